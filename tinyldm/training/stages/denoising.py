"""The batches and the losses of ddpm.py: pictures, perhaps with a class, and no text.

    pictures ─→ x_start, pixels or latents ──┐
    the seed, the batch's number ─→ noise, t ┼→ x_t ─model→ model_output → loss
    classes ─→ labels, some of them dropped ─┘

The model is a UNet2DModel on pixels, or a DiTTransformer2DModel on the latents of a VAE. The whole
batch is drawn before it is divided among threads, so their number changes nothing.
Source: Ho et al. 2020, arXiv:2006.11239, algorithm 1; for the classes Ho & Salimans 2022,
arXiv:2207.12598, algorithm 1.
"""
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ...backend import asarray, wide, widen
from ...diffusion import variational
from ...diffusion.process import Process
from ...layers import Tape
from ..objectives import drop_captions, generators
from ..shards import split_batch

VALIDATED = 16              # pictures, whose loss is looked at again and again
AT_ONCE = 16                # pictures whose bits per dimension are measured at once
MOST_KEPT = 2 ** 29         # bytes of pictures that stay in memory


class Batch(NamedTuple):
    """What the loss of B pictures needs."""

    x_start: Any                                        # (B,h,w,C)
    x_t: Any                                            # (B,h,w,C)
    timesteps: Any                                      # (B,)
    noise: Any                                          # (B,h,w,C)
    labels: Any                                         # (B,), None without classes


class Pixels:
    """Pictures as x_start, in [-1, 1]. Decoded once, as long as MOST_KEPT holds them."""

    def __init__(self, pictures):
        self.pictures, self.kept = pictures, {}
        self.most = MOST_KEPT // (4 * 3 * pictures.resolution ** 2)

    def __call__(self, sample, rng=None):               # Sample -> (H,W,3)
        image = self.kept.get(sample.index)
        if image is None:
            image = self.pictures.image(sample._replace(flipped=False))
            if len(self.kept) < self.most:
                self.kept[sample.index] = image
        return image[:, ::-1] if sample.flipped else image


class Latents:
    """Latents of pictures as x_start, of variance about 1. cache: a LatentCache; vae: its VAE."""

    def __init__(self, cache, vae):
        self.cache, self.vae = cache, vae

    def __call__(self, sample, rng=None):               # Sample -> (h,w,C)
        mean, std = self.cache.moments(sample)
        z = mean if rng is None else mean + std * rng.standard_normal(mean.shape, np.float32)
        return self.vae.to_latents(z)


class Denoising:
    """The batches of a training and their losses.

    model: a UNet2DModel or a DiTTransformer2DModel. pictures: a PictureFolder. x_start: Pixels or
    Latents. loss: a DiffusionLoss, or a HybridLoss for a model that predicts the variance. labels:
    for a model with classes, the label of each of the folder's items; a share `dropout` of them is
    replaced by `no_class`. held_out: indices of items, by which the training is validated; without
    any the first ones. timestep_scale: the model sees timesteps times this number.
    """

    def __init__(self, model, pictures, x_start, loss, seed, *, labels=None, dropout=0.0,
                 no_class=None, held_out=(), timestep_scale=1.0, checkpoints=False):
        self.model, self.pictures, self.x_start, self.loss = model, pictures, x_start, loss
        self.seed, self.checkpoints, self.timestep_scale = seed, checkpoints, timestep_scale
        self.labels = None if labels is None else np.asarray(labels)
        self.dropout, self.no_class, self.held_out = dropout, no_class, list(held_out)

    def batch(self, number, size):
        """The Batch of this number."""
        samples, rngs = self.pictures.samples(self.seed, number, size), generators(
            self.seed, number, size)
        x_start = self.array([self.x_start(sample, rng) for sample, rng in zip(samples, rngs)])
        noisy, labels = self.loss.noisy(x_start, rngs), None
        if self.labels is not None:
            labels = np.array(drop_captions([self.labels[sample.index] for sample in samples],
                                            self.dropout, rngs, self.no_class))
        return Batch(x_start, *noisy, labels)

    def describe(self, number, size):
        """The names of a batch's pictures, for messages."""
        samples = self.pictures.samples(self.seed, number, size)
        return "pictures " + ", ".join(self.pictures.items[sample.index].name for sample in samples)

    def batch_loss(self, number, size, scale=1.0):
        """Add a batch's gradients to the parameters -> {"loss", "expected"}.

        expected: the loss of a model that knows nothing. scale: of the gradients, Trainer.scale.
        """
        batch = self.batch(number, size)
        return split_batch(partial(self.part_loss, batch, scale), [range(size)],
                           xp=self.model.xp)

    def part_loss(self, batch, scale, rows, share):
        """The loss of some rows of a Batch, and its gradients -> as batch_loss, times share.

        The model may compute in float16; the noisy pictures before it, and the loss behind it, are
        float32 then.
        """
        tape = Tape(self.checkpoints, only_trained=True)
        rows = slice(rows[0], rows[-1] + 1)             # neighbours: also of a device's arrays
        x_start, x_t, timesteps, noise = (array[rows] for array in batch[:4])
        labels = None if batch.labels is None else batch.labels[rows]
        output = self.predict(x_t, timesteps, labels, tape)
        loss, doutput, expected = self.loss(output, x_start, noise, timesteps, share)
        self.model.backward((doutput * scale).astype(self.model.dtype, copy=False), tape)
        return {"loss": loss, "expected": expected}

    def predict(self, x_t, timesteps, labels, *tape):
        """The model's output for timesteps (B,) and labels (B,), or None -> (B,h,w,O)."""
        own = {} if labels is None else {"class_labels": asarray(labels, like=x_t)}
        own |= {"tape": tape[0]} if tape else {}
        t = asarray(timesteps * self.timestep_scale, like=x_t)
        return widen(self.model(x_t.astype(self.model.dtype, copy=False), t, **own))

    def step(self, side, checkpoints):
        """Forward and backward of one picture, for memory.py."""
        x_t, tape = self.array(np.zeros((1, side, side, self.model.settings.in_channels))), Tape(
            checkpoints, only_trained=True)
        labels = None if self.labels is None else self.labels[:1]
        output = self.predict(x_t, np.zeros(1), labels, tape)
        self.model.backward(output.astype(self.model.dtype, copy=False), tape)
        self.model.zero_grad()

    def array(self, values):
        """Numbers as the model's arrays, float32 at least."""
        return self.model.xp.asarray(np.asarray(values), wide(self.model.dtype))

    # ---- looking at it --------------------------------------------------------------------------

    def shown(self, indices):
        """Pictures as they are, cut in the middle -> x_start (B,h,w,C) and labels (B,), or None."""
        x_start = self.array([self.x_start(self.pictures.centred(i)) for i in indices])
        return x_start, None if self.labels is None else self.labels[indices]

    def validate(self):
        """The loss of fixed pictures at fixed timesteps, with fixed noise -> {"t 62": ...}."""
        indices = self.held_out[:VALIDATED] or range(len(self.pictures.items))[:VALIDATED]
        x_start, labels = self.shown(list(indices))
        return self.loss.profile(lambda x_t, t: self.predict(x_t, t, labels), x_start)

    def bits(self, variance_type, steps, progress=iter):
        """Bits per dimension of the held-out pictures, pixels -> variational.Bits.

        variance_type: of the reverse steps, which are `steps` of the schedule's. The noise is the
        same in every call.
        """
        process = Process.of(self.loss.schedule).respaced(steps)
        rng, labels = np.random.default_rng([0, 0, 0, 0, 3]), [None]

        def batches():
            for i in range(0, len(self.held_out), AT_ONCE):
                x_start, labels[0] = self.shown(self.held_out[i:i + AT_ONCE])
                yield x_start

        return variational.bits_per_dimension(
            lambda x_t, t: self.predict(x_t, t, labels[0]), process, batches(),
            lambda shape: self.array(rng.standard_normal(shape, np.float32)), variance_type,
            progress)
