"""The losses: of an autoencoder, of a denoiser with its text encoder, and of one of pixels.

Each function runs forward and backward on one shard of a batch and leaves the gradients on the
parameters. DiffusionLoss is what the product's stages share: the draws, the target, the weights.
"""
import numpy as np

from .. import ops
from ..backend import asarray
from ..diffusion import variational
from ..diffusion.objective import (
    min_snr_weights,
    sample_timesteps,
    target,
    uniform_timesteps,
    uninformed_loss,
)
from ..diffusion.process import Process
from ..layers import Tape
from .stages.round_trip import RoundTrip, latent_shape

L1_WEIGHT, MSE_WEIGHT, KL_WEIGHT = 0.3, 12, 1e-7


def vae_loss(vae, images, rng, share, decoder_only=False):
    """How far an autoencoder is from reconstructing images, and the gradients.

        loss = L1_WEIGHT mean |d| + MSE_WEIGHT mean d^2 + KL_WEIGHT KL(N(mean, var), N(0, 1))
        d = decode(z) - images,       z = mean + sqrt(var) noise

    The means are over all numbers, KL is a sum over a picture's latents. With sums over a picture,
    as in the paper (round_trip.py), the KL weight would be H*W*3 times 1e-7: at 64x64 pixels 1,229
    times the paper's 1e-6. It keeps the latents near N(0, 1).

    |d| weighs all pixels alike, and nearly all are plain background. d^2 weighs most where d is
    largest: at corners and tips, which tell shapes apart.
    Source: Rombach et al. 2022, arXiv:2112.10752, appendix G, with d^2 in place of its perceptual
    and adversarial terms.
    images (B,H,W,3) in [-1, 1] -> {"loss", "mse", "kl"}, each times share, the shard's part of the
    batch. decoder_only: only the decoder gets gradients.
    """
    noise = rng.standard_normal((len(images), *latent_shape(vae, images)), np.float32)
    trip = RoundTrip(vae, images, asarray(noise, like=images), decoder_only)
    l1, l1_cache = ops.l1(trip.output, images)
    mse, mse_cache = ops.mse(trip.output, images)

    doutput, _ = ops.l1_backward(np.float32(share * L1_WEIGHT), l1_cache)
    doutput = doutput + ops.mse_backward(np.float32(share * MSE_WEIGHT), mse_cache)[0]
    trip.backward(doutput, np.float32(share * KL_WEIGHT))
    loss = L1_WEIGHT * l1 + MSE_WEIGHT * mse + KL_WEIGHT * trip.kl
    return {"loss": share * loss, "mse": share * mse, "kl": share * trip.kl}


def diffusion_loss(text_encoder, unet, schedule, latents, ids, rng, share):
    """mean (unet(x_t, t, text_encoder(ids)) - target)^2 at random timesteps, and its gradients.

    latents (B,h,w,C) of variance 1, ids (B,77) -> {"loss", "expected"}, times share, the shard's
    part of the batch. expected: the loss of a model that knows nothing.
    """
    timesteps = sample_timesteps(rng, len(latents), schedule.num_train_timesteps)
    noise = asarray(rng.standard_normal(latents.shape, np.float32), like=latents)
    x_t = schedule.add_noise(latents, noise, timesteps)
    tape = Tape()
    context = text_encoder(ids, tape)
    model_output = unet(x_t, asarray(timesteps, like=x_t), context, tape)
    loss, cache = ops.mse(model_output, target(schedule, latents, noise, timesteps))
    doutput, _ = ops.mse_backward(np.float32(share), cache)
    _, dcontext = unet.backward(doutput, tape)
    text_encoder.backward(dcontext, tape)
    return {"loss": share * loss, "expected": share * uninformed_loss(schedule, timesteps).mean()}


TIMESTEPS = {"uniform": uniform_timesteps, "logit-normal": sample_timesteps}


def generators(seed, batch, size):
    """A random generator for each sample of a batch: what a sample gets depends neither on the
    other samples nor on what ran before. The last numbers set them apart from those of the data.
    """
    return [np.random.default_rng([seed, batch, sample, 0, 1]) for sample in range(size)]


class DiffusionLoss:
    """The mean squared error of what a denoiser predicts, at random timesteps.

        x_t = sqrt(alpha_bar_t) x_start + sqrt(1 - alpha_bar_t) noise
        loss = mean w_t (model_output - target)^2

    schedule: its prediction_type tells the target. min_snr: gamma of the weights w_t, usually 5; 0
    stands for w_t = 1. timesteps: a name of TIMESTEPS. noise_offset: the size of a part of the
    noise that is the same for all pixels of a channel, so that a model also learns to change a
    picture's mean; 0 for none. Source: Guttenberg 2023, "Diffusion with Offset Noise",
    crosslabs.org/blog/diffusion-with-offset-noise; the public scripts' option of this name.
    """

    def __init__(self, schedule, min_snr=0, timesteps="uniform", noise_offset=0):
        self.schedule, self.min_snr, self.noise_offset = schedule, min_snr, noise_offset
        self.draw_timesteps = TIMESTEPS[timesteps]

    def noisy(self, x_start, generators):
        """Draw a timestep and noise for each sample -> x_t (B,...), timesteps (B,), noise (B,...).

        x_start (B,...,C), a generator for each sample. Noise is drawn as float32.
        """
        shape, drawn = x_start.shape[1:], []
        timesteps = self.timesteps(generators)
        for rng in generators:
            noise = rng.standard_normal(shape, np.float32)
            offset = rng.standard_normal(shape[-1], np.float32)         # (C,)
            drawn.append(noise + np.float32(self.noise_offset) * offset)
        noise = asarray(np.stack(drawn).astype(x_start.dtype), like=x_start)
        return self.schedule.add_noise(x_start, noise, timesteps), timesteps, noise

    def timesteps(self, generators):
        """The timesteps (B,) that `noisy` draws first from these generators."""
        T = self.schedule.num_train_timesteps
        return np.array([self.draw_timesteps(rng, 1, T)[0] for rng in generators])

    def __call__(self, model_output, x_start, noise, timesteps, share=1.0):
        """-> the loss, its gradient (B,...) and the loss of a model that knows nothing.

        All times share, the shard's part of the batch.
        """
        wanted = target(self.schedule, x_start, noise, timesteps)
        expected = uninformed_loss(self.schedule, timesteps)
        if self.min_snr:
            weights = min_snr_weights(self.schedule, timesteps, self.min_snr)
            expected = expected * weights
            root = np.sqrt(weights).reshape(-1, *[1] * (x_start.ndim - 1))
            root = asarray(root.astype(model_output.dtype), like=model_output)
            loss, cache = ops.mse(root * model_output, root * wanted)
            dmodel_output = root * ops.mse_backward(float(share), cache)[0]
        else:
            loss, cache = ops.mse(model_output, wanted)
            dmodel_output, _ = ops.mse_backward(float(share), cache)
        return share * float(loss), dmodel_output, share * float(expected.mean())

    def profile(self, predict, x_start, count=8):
        """The loss without weights at `count` timesteps, the middles of equal parts of all.

        predict(x_t, timesteps) -> model_output. The noise is the same in every call, so the numbers
        of two calls differ by the model alone; over all timesteps they lie decades apart.
        x_start (B,...) -> {"t 62": loss, ...}.
        """
        T, losses = self.schedule.num_train_timesteps, {}
        for i in range(count):
            timesteps = np.full(len(x_start), int(T * (i + 0.5) / count))
            rng = np.random.default_rng([i, 0, 0, 0, 2])
            noise = rng.standard_normal(x_start.shape, np.float32)
            noise = asarray(noise.astype(x_start.dtype), like=x_start)
            output = predict(self.schedule.add_noise(x_start, noise, timesteps), timesteps)
            loss, _ = ops.mse(output, target(self.schedule, x_start, noise, timesteps))
            losses[f"t {timesteps[0]}"] = float(loss)
        return losses


class HybridLoss:
    """Improved DDPM's loss of a denoiser that predicts the variance of each reverse step, too.

        loss = mean (model_output[..., :C] - target)^2 + 0.001 L_vlb

    L_vlb is estimated by T L_t at the drawn t, in bits per dimension. It teaches the second half of
    the output alone: the mean is held fixed in it. simple: a DiffusionLoss without weights, whose
    draws these are.
    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 16; its code's rescaled_mse.
    """

    def __init__(self, simple):
        self.simple, self.schedule = simple, simple.schedule
        self.noisy, self.process = simple.noisy, Process.of(simple.schedule)

    def __call__(self, model_output, x_start, noise, timesteps, share=1.0):
        """-> as DiffusionLoss; the loss of a model that knows nothing has no bound."""
        x_t = self.schedule.add_noise(x_start, noise, timesteps)
        losses, cache = variational.loss(self.process, model_output, x_start, noise, x_t, timesteps)
        each = asarray(np.full(len(losses), share / len(losses), losses.dtype), like=losses)
        expected = uninformed_loss(self.schedule, timesteps).mean()
        return (share * float(losses.mean()), variational.loss_backward(each, cache),
                share * float(expected))

    def profile(self, predict, x_start, count=8):
        """The squared error alone at `count` timesteps: see DiffusionLoss."""
        C = x_start.shape[-1]
        return self.simple.profile(lambda x_t, t: predict(x_t, t)[..., :C], x_start, count)


def drop_captions(captions, share, generators, empty=""):
    """Replace this share of the captions, or of labels, by the empty one, for the unconditional
    prediction that guidance needs. Source: Ho & Salimans 2022, arXiv:2207.12598, algorithm 1.
    """
    return [empty if rng.random() < share else caption
            for caption, rng in zip(captions, generators)]


def variational_loss(unet, process, images, timesteps, weights, rng, share, kind="rescaled_mse",
                     variance_type="learned_range", **labels):
    """Improved DDPM's loss of a UNet2DModel, and its gradients.

    images (B,H,W,C) in [-1, 1]; timesteps and weights (B,), as timestep_sampling.py draws them.
    process, kind, variance_type: see diffusion/variational.py, `loss`. labels: the UNet's
    class_labels, if it has classes.
    -> {"loss"}: the weighted mean times share, the shard's part of the batch; and the losses (B,)
    without weights, which LossSecondMoment remembers.
    """
    noise = asarray(rng.standard_normal(images.shape, np.float32), like=images)
    x_t, tape = process.add_noise(images, noise, timesteps), Tape()
    output = unet(x_t, process.model_timesteps(timesteps, x_t), tape, **labels)
    losses, cache = variational.loss(process, output, images, noise, x_t, timesteps, kind,
                                     variance_type)
    weights = asarray(np.asarray(weights, losses.dtype) / len(images), like=losses)
    unet.backward(variational.loss_backward(share * weights, cache), tape)
    return {"loss": share * (weights * losses).sum()}, losses
