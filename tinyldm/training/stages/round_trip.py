"""The loss of an autoencoder with a KL term, as in the latent diffusion paper.

    images ─encode→ mean, logvar ─+ noise→ z ─decode→ output ─┬─ |output - images| ────────┐
              └── KL from N(0, 1) ────────────┐               ├─ perceptual.py, on request ┤
                                              └───── loss ────┴─ adversarial.py, on request┘

autoencoder.py is the stage that brings the pictures; the toy world's recipe uses RoundTrip alone.
Source: Rombach et al. 2022, arXiv:2112.10752, section 3.1 and appendix G; CompVis/latent-diffusion,
ldm/modules/losses/contperceptual.py. Its log-variance of the reconstruction, "logvar", is left out:
it begins at 0, and the optimiser there never gets it, so it stays 0.
"""
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import ops
from ...backend import get_xp, to_host, wide, widen
from ...layers import NO_TAPE, Tape
from .. import memory
from ..shards import over_shards

PEAK = 2.0                  # what pixels in [-1, 1] can differ by


class RoundTrip:
    """Images (B,H,W,3) through a VAE: mean, logvar and z (B,h,w,C), output like images, kl.

        z = mean + exp(logvar / 2) noise,    output = decode(z),    kl = KL(N(mean, var), N(0, 1))

    kl is the sum over a picture's latents, the mean over the batch. noise: normal numbers
    (B,h,w,C). decoder_only: backward ends at z. Where the encoder or the decoder computes in
    float16, all that is between them, before and behind is float32.
    """

    def __init__(self, vae, images, noise, decoder_only=False, checkpoints=False):
        self.vae, self.tape, self.decoder_only = vae, Tape(checkpoints), decoder_only
        self.mean, self.logvar = encode(vae, images, NO_TAPE if decoder_only else self.tape)
        self.spread = get_xp(images).exp(0.5 * self.logvar) * noise
        self.z = self.mean + self.spread
        self.output = decode(vae, self.z, self.tape)
        self.kl, self.cache = ops.kl_normal(self.mean, self.logvar)

    def backward(self, doutput, dkl):
        """Add the gradients of the parameters. doutput like images, dkl a number."""
        encoder, decoder = self.vae.encoder.dtype, self.vae.decoder.dtype
        dz = self.vae.decode_backward(doutput.astype(decoder, copy=False), self.tape)
        if not self.decoder_only:
            dmean, dlogvar = ops.kl_normal_backward(dkl, self.cache)
            dmean = dmean + dz                          # z = mean + spread
            dlogvar = dlogvar + dz * (0.5 * self.spread)                # std' = std / 2
            self.vae.encode_backward(dmean.astype(encoder, copy=False),
                                     dlogvar.astype(encoder, copy=False), self.tape)


def encode(vae, images, tape=NO_TAPE):
    """vae.encode, in the encoder's dtype -> mean, logvar (B,h,w,C), float32 at least."""
    return map(widen, vae.encode(images.astype(vae.encoder.dtype, copy=False), tape))


def decode(vae, z, tape=NO_TAPE):
    """vae.decode, in the decoder's dtype -> (B,H,W,3), float32 at least."""
    return widen(vae.decode(z.astype(vae.decoder.dtype, copy=False), tape))


class AutoencoderLoss:
    """The loss of a batch, and its gradients on the parameters.

        loss = n (mean |d| + perceptual_weight p) + kl_weight kl,    d = output - images

    n = H*W*3 numbers of a picture: so the first term is the sum over a picture, as kl is the sum
    over its latents, and both are means over the batch. With a mean in the first place the same
    balance would need kl_weight / n. squared: mean d^2 in place of mean |d|.
    perceptual: a Perceptual, which gives p; None for none. adversary: an Adversary; None for none.
    decoder_only: the encoder stays as it is, and kl does not count.
    """

    def __init__(self, vae, *, squared=False, kl_weight=1e-6, perceptual=None,
                 perceptual_weight=1.0, adversary=None, decoder_only=False, checkpoints=False):
        self.vae, self.kl_weight = vae, 0.0 if decoder_only else kl_weight
        self.pixels = (ops.mse, ops.mse_backward) if squared else (ops.l1, ops.l1_backward)
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self.adversary, self.options = adversary, (decoder_only, checkpoints)

    def __call__(self, images, noise, step=0, scale=1.0):
        """Add the gradients of one batch -> a report.

        images (B,H,W,3) in [-1, 1], noise (B,h,w,C). step: of the training, at which an adversary
        may begin. scale: of the gradients, Trainer.scale.
        -> {"loss", "l1": mean |d|, "psnr": in dB, mean over the pictures, "kl_bits": kl in bits,
        "latent_std": of z, perhaps "perceptual": p, and those of Adversary}. The adversary's part
        is not in "loss": its size follows that of the rest.
        """
        adversary = self.adversary if self.adversary and step >= self.adversary.start else None

        def forward(rows, share):
            part = self._part(images, noise, rows[0], rows[-1] + 1, share, scale)
            if adversary is None:                       # its tape need not wait for other shards
                part.backward()
            return part

        parts = over_shards(forward, [range(len(images))], xp=self.vae.xp)
        report = {name: sum(part.report[name] for part in parts) for name in parts[0].report}
        share = sum(part.share for part in parts)       # 1, or that of this rank
        mean, square = report.pop("z") / share, report.pop("z^2") / share
        report["latent_std"] = share * math.sqrt(max(0.0, square - mean * mean))
        if adversary:
            report |= adversary(parts, images, self.vae.decoder.conv_out, scale)
            waiting = {part.first: part for part in parts}
            over_shards(lambda rows, _: waiting[rows[0]].backward(), [range(len(images))],
                        xp=self.vae.xp)
        elif self.adversary:
            self.adversary.wait()
        return report

    def _part(self, images, noise, first, end, share, scale):
        """Some rows of a batch, up to the gradient of their output -> Part."""
        images = images[first:end]
        trip = RoundTrip(self.vae, images, noise[first:end], *self.options)
        distance, backward = self.pixels
        n = images[0].size
        loss, cache = distance(trip.output, images)
        doutput, _ = backward(share * n * scale, cache)
        loss = n * loss + self.kl_weight * trip.kl
        difference, z = widen(trip.output - images), widen(trip.z)
        squares = (difference * difference).mean(axis=(1, 2, 3))
        report = {"l1": abs(difference).mean(), "psnr": psnr(squares),
                  "kl_bits": trip.kl / math.log(2), "z": z.mean(), "z^2": (z * z).mean()}
        if self.perceptual:
            weight = n * self.perceptual_weight
            report["perceptual"], dmore = self.perceptual(trip.output, images,
                                                          share * weight * scale)
            loss, doutput = loss + weight * report["perceptual"], doutput + dmore
        report = {name: share * float(value) for name, value in ({"loss": loss} | report).items()}
        return Part(trip, first, share, doutput, share * self.kl_weight * scale, report)

    def memory(self, side, batch, checkpoints):
        """About how many bytes are kept for backward, of a batch of pictures of side x side."""
        vae, decoder_only = self.vae, self.options[0]

        def images(side):
            return vae.xp.zeros((1, side, side, 3), wide(vae.dtype))

        def step(side, checkpoints):
            trip = RoundTrip(vae, images(side), 0.0, decoder_only, checkpoints)
            trip.backward(trip.output, 0.0)
            vae.zero_grad()

        division = memory.division(batch, vae.xp)
        places = memory.places(step, side, checkpoints, vae.vae_scale_factor)
        found = division.at_once * max(places)
        if self.adversary:
            found = memory.waiting(places, division) + batch * max(memory.places(
                lambda *_: self.adversary.step(images(side)), side))
        if self.perceptual:
            found += division.at_once * max(memory.places(
                lambda *_: self.perceptual(images(side), images(side), 1.0), side))
        return found


@dataclass
class Part:
    """Some rows of a batch between forward and backward."""

    trip: RoundTrip
    first: int                                          # row
    share: float                                        # of the batch
    doutput: Any                                        # the adversary adds to it
    dkl: float
    report: dict                                        # times share

    def backward(self):
        self.trip.backward(self.doutput, self.dkl)


def decoder_parameters(vae):
    """The (name, Parameter) pairs of the layers that decode latents."""
    return [pair for pair in vae.named_parameters()
            if pair[0].startswith(("decoder.", "post_quant_conv."))]


def latent_shape(vae, images):
    """(h,w,C) of the latents of images (B,H,W,3)."""
    H, W = (side // vae.vae_scale_factor for side in images.shape[1:3])
    return H, W, vae.settings.latent_channels


def psnr(squares):
    """Peak signal-to-noise ratio in dB, 10 log10(2^2 / mean squared error), mean over the pictures.

    squares (B,): the mean squared error of each picture of pixels in [-1, 1].
    """
    return float(np.mean(10 * np.log10(PEAK ** 2 / np.maximum(to_host(squares), 1e-12))))
