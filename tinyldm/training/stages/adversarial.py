"""The adversarial term of an autoencoder's loss: a discriminator that learns beside it.

    output ─frozen discriminator→ logits → -mean ─backward→ doutput, added to that of the rest
    images, output ─discriminator→ logits → hinge ─backward→ its own gradients

Between the forward and the backward of round_trip.py. The discriminator's parameters go to the same
optimiser as the autoencoder's: Adam works on each number alone, so with the same rate and betas it
is two optimisers, and the loop saves, resumes and checks both as one.
Source: Rombach et al. 2022, arXiv:2112.10752, section 3.1, eq. 25; Esser, Rombach & Ommer 2020,
"Taming Transformers for High-Resolution Image Synthesis", arXiv:2012.09841, eq. 6-7;
CompVis/latent-diffusion, ldm/modules/losses/contperceptual.py. There the discriminator sees a
second round trip, made after the autoencoder's update; here it is the same one, half the work.
"""
import math
from contextlib import contextmanager

from ... import ops, ranks
from ...backend import asarray, get_xp, to_host, widen
from ...layers import Tape

LEAST, MOST = 1e-4, 1e4     # added to the denominator; the largest adaptive weight


class Adversary:
    """discriminator: a PatchDiscriminator. start: the step at which it begins. weight: of its part.

        loss of the autoencoder += a g,    g = -mean(discriminator(output))
        a = weight * min(|d rest / dW| / (|d g / dW| + 1e-4), 1e4),    W: the last layer's weight

    So both parts pull at the decoder with gradients of comparable lengths, whatever their units.
    """

    def __init__(self, discriminator, start=0, weight=0.5):
        self.discriminator, self.start, self.weight = discriminator, start, weight

    def __call__(self, parts, images, last_layer, scale=1.0):
        """Add its gradients to each part's doutput, and the discriminator's to its parameters.

        parts: this rank's of the batch `images`, whose forward has run. last_layer: that of the
        decoder. scale: of all gradients, Trainer.scale.
        -> {"generator": g, "adaptive_weight": a, "discriminator": its hinge loss, "real", "made":
        its mean logits}, times this rank's share. Batch norm sees the whole batch, real and
        made pictures apart: so each rank runs the discriminator on all rows.
        """
        output = get_xp(images).concatenate([part.trip.output for part in parts])
        if ranks.size() > 1:
            output = asarray(ranks.stack(to_host(output)), like=images)
        dtype = self.discriminator.dtype
        with frozen(self.discriminator):
            tape = Tape()
            logits = self.discriminator(output.astype(dtype, copy=False), tape)
            dlogits = get_xp(logits).full_like(logits, -scale / logits.size)
            doutput = widen(self.discriminator.backward(dlogits, tape))
        own = [doutput[part.first:part.first + len(part.doutput)] for part in parts]
        rest = [part.doutput for part in parts]
        rest, mine = (length(last_layer, parts, gradients) for gradients in (rest, own))
        # A length that overflows float16 spoils the gradient, and the scale becomes smaller.
        a = self.weight * (min(rest / (mine + LEAST * scale), MOST)
                           if math.isfinite(rest + mine) else math.nan)
        for part, dmore in zip(parts, own):
            part.doutput = part.doutput + a * dmore
        found = {"generator": -widen(logits).mean(), "adaptive_weight": a} | self._learn(
            images.astype(dtype, copy=False), output.astype(dtype, copy=False), scale)
        share = sum(part.share for part in parts)
        return {name: share * float(value) for name, value in found.items()}

    def _learn(self, images, output, scale):
        """Add the discriminator's gradients -> its loss and its mean answers.

        The gradients are divided by the number of ranks, because each adds the same.
        """
        tapes = [Tape(), Tape()]
        real, made = (self.discriminator(x, tape) for x, tape in zip((images, output), tapes))
        loss, cache = ops.hinge(real, made)
        for dlogits, tape in zip(ops.hinge_backward(scale / ranks.size(), cache), tapes):
            self.discriminator.backward(dlogits, tape)
        return {"discriminator": loss, "real": widen(real).mean(), "made": widen(made).mean()}

    def step(self, image):
        """Learn from an image (1,H,W,3) twice, for memory.py: both tapes of `_learn` as one."""
        tape = Tape()
        for _ in range(2):
            logits = self.discriminator(image.astype(self.discriminator.dtype), tape)
        for _ in range(2):
            self.discriminator.backward(logits, tape)
        self.discriminator.zero_grad()

    def wait(self):
        """Before it begins, its gradients are 0: so Adam counts the step and moves nothing."""
        for parameter in self.discriminator.parameters():
            parameter.add_grad(get_xp(parameter.data).zeros_like(parameter.data))


def length(layer, parts, gradients):
    """The length of the gradient of a layer's weight, from the gradients of its output.

    layer: the last one of the forward of each part. What it saved is read and stays on the tape.
    """
    total = 0
    for part, dy in zip(parts, gradients):
        owner, cache = part.trip.tape.entries[-1]
        assert owner is layer, f"{type(owner).__name__} ran last, not the decoder's last layer"
        total = total + widen(layer.op_backward(dy.astype(layer.dtype, copy=False), cache)[1])
    ranks.add_up(total)
    return float(to_host((total * total).sum())) ** 0.5


@contextmanager
def frozen(module):
    """Inside, the module's parameters get no gradients."""
    parameters = [parameter for parameter in module.parameters() if parameter.trainable]
    for parameter in parameters:
        parameter.trainable = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.trainable = True
