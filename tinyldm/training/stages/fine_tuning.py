"""The batches and the losses of lora.py and textual_inversion.py; stage.py has what is around.

    pictures ─LatentCache→ latents ──────────┐
    the seed, the batch's number ─→ noise, t ┼→ x_t ─UNet→ model_output → loss
    captions ─Texts→ conditions ─────────────┘

The UNet, the VAE and the text encoders are frozen, except for what the stage has put into them. The
whole batch is drawn before it is divided among threads, so their number changes nothing.
Source: Rombach et al. 2022, arXiv:2112.10752, eq. 3; Ruiz et al. 2022, "DreamBooth",
arXiv:2208.12242, eq. 2.
"""
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ...backend import asarray, wide, widen
from ...layers import Tape
from ..objectives import drop_captions, generators
from ..shards import split_batch
from .conditions import Texts

VALIDATED = 4               # pictures, whose loss is looked at again and again


class Source(NamedTuple):
    """A folder of pictures, how it is read, and how much it counts."""

    pictures: Any                                       # PictureFolder
    latents: Any                                        # LatentCache
    batch: int
    weight: float = 1.0
    prefix: str = ""                                    # of each caption


class Batch(NamedTuple):
    """What the loss of B pictures needs."""

    latents: Any                                        # (B,h,w,C), of variance 1
    x_t: Any                                            # (B,h,w,C)
    timesteps: Any                                      # (B,)
    noise: Any                                          # (B,h,w,C)
    captions: list
    time_ids: Any                                       # (B,6), only for Stable Diffusion XL
    weight: float                                       # of its mean in the loss


class FineTuning:
    """The batches of a training and their losses.

    pipe: its UNet and text encoders are trained where they have trainable parameters. sources:
    [Source]: the pictures, and for prior preservation those of the class. loss: a DiffusionLoss.
    dropout: the share of captions that are left out.
    """

    def __init__(self, pipe, sources, loss, seed, checkpoints=False, dropout=0.0):
        self.pipe, self.unet, self.texts = pipe, pipe.unet, Texts(pipe)
        self.sources, self.loss, self.seed = sources, loss, seed
        self.checkpoints, self.dropout = checkpoints, dropout
        self.reads = any(parameter.trainable for parameter in self.texts.parameters())

    def batches(self, number):
        """The batch of this number -> one Batch per Source."""
        own = iter(generators(self.seed, number, sum(source.batch for source in self.sources)))
        for source in self.sources:
            samples = source.pictures.samples(self.seed, number, source.batch)
            mean, std = (self.array(x) for x in zip(*map(source.latents.moments, samples)))
            rngs = [rng for _, rng in zip(samples, own)]
            z = mean + std * self.array([rng.standard_normal(mean.shape[1:]) for rng in rngs])
            latents = self.pipe.vae.to_latents(z)
            noisy = self.loss.noisy(latents, rngs)
            captions = drop_captions([source.prefix + sample.caption for sample in samples],
                                     self.dropout, rngs)
            yield Batch(latents, *noisy, captions, self.time_ids(source.pictures, samples),
                        source.weight)

    def describe(self, number):
        """The names of a batch's pictures, for messages."""
        return "pictures " + ", ".join(
            source.pictures.items[sample.index].name for source in self.sources
            for sample in source.pictures.samples(self.seed, number, source.batch))

    def validate(self):
        """The loss of the first pictures at fixed timesteps, with fixed noise -> {"t 62": ...}."""
        source = self.sources[0]
        target = source.pictures.items[0].target
        chosen = [i for i, item in enumerate(source.pictures.items) if item.target == target]
        samples = [source.pictures.centred(i, False) for i in chosen[:VALIDATED]]
        mean = self.array([source.latents.moments(sample)[0] for sample in samples])
        conditions = self.texts(self.texts.ids([source.prefix + sample.caption
                                                for sample in samples]))
        if (time_ids := self.time_ids(source.pictures, samples)) is not None:
            conditions["time_ids"] = asarray(time_ids, like=mean)
        context = conditions.pop("context")
        return self.loss.profile(
            lambda x_t, t: widen(self.unet(x_t.astype(self.unet.dtype), asarray(t, like=x_t),
                                           context, **conditions)),
            self.pipe.vae.to_latents(mean))

    def array(self, values):
        """Numbers as the UNet's arrays, at least float32."""
        return self.unet.xp.asarray(np.asarray(values), wide(self.unet.dtype))

    def time_ids(self, pictures, samples):
        """Of Stable Diffusion XL: the picture's size, the crop's corner and size, (B,6)."""
        if not self.unet.add_embedding:
            return None
        items = [pictures.items[sample.index] for sample in samples]
        return np.array([(*item.size[::-1], sample.top, sample.left, *item.target[::-1])
                         for item, sample in zip(items, samples)], np.float32)

    def batch_loss(self, number, scale=1.0):
        """Add a batch's gradients to the parameters -> {"loss", "expected"}, of all Sources.

        expected: the loss of a model that knows nothing. scale: of the gradients, Trainer.scale.
        """
        reports = [split_batch(partial(self.part_loss, batch, scale), [range(len(batch.captions))],
                               xp=self.unet.xp)
                   for batch in self.batches(number)]
        return {name: sum(report[name] for report in reports) for name in reports[0]}

    def part_loss(self, batch, scale, rows, share):
        """The loss of some rows of a Batch, and its gradients -> as batch_loss, times share.

        The UNet may compute in float16; the noisy latents before it, and the loss behind it, are
        float32 then.
        """
        tape = Tape(self.checkpoints, only_trained=True)
        rows = slice(rows[0], rows[-1] + 1)             # neighbours: also of a device's arrays
        captions = batch.captions[rows]
        conditions = (self.texts(self.texts.ids(captions), tape) if self.reads else
                      self.texts.frozen(captions))
        latents, x_t, timesteps, noise = (array[rows] for array in batch[:4])
        if batch.time_ids is not None:
            conditions["time_ids"] = asarray(batch.time_ids[rows], like=latents)
        context = conditions.pop("context")
        dtype = self.unet.dtype
        output = self.unet(x_t.astype(dtype, copy=False), asarray(timesteps, like=x_t), context,
                           tape, **conditions)
        loss, doutput, expected = self.loss(widen(output), latents, noise, timesteps,
                                            batch.weight * share)
        gradients = self.unet.backward((doutput * scale).astype(dtype, copy=False), tape)
        if self.reads:
            self.texts.backward(gradients, tape)
        return {"loss": loss, "expected": expected}
