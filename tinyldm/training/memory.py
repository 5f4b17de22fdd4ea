"""How much memory a training takes, said before its first step.

    a step of one picture ─observed→ places ─division of the batch→ activations ─→ sentence

Each stage has a step(side, checkpoints), which runs forward and backward for one picture of that
side, or latents, and adds gradients to the model. They are forgotten.
"""
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import ranks
from ..backend import free_threads
from ..layers import Tape
from ..tape import nbytes_of, observed
from .shards import number_of_shards


class Division(NamedTuple):
    """How a batch is computed."""

    shards: int                                         # computed apart, each with a gradient
    pictures: int                                       # of this rank
    at_once: int                                        # pictures, in all worker threads


def division(batch, xp=np):
    """A batch of so many pictures, computed by an array library -> Division."""
    shards = number_of_shards(batch)
    own, each = len(ranks.share(shards)) or 1, -(-batch // shards)
    if xp is not np:                                    # in one piece
        return Division(1, own * each, own * each)
    return Division(own, own * each, min(own, free_threads()) * each)


def places(step, side, checkpoints=False, least=None):
    """About how many bytes one picture's tape holds wherever it is about to get shorter: at the end
    of forward, and with checkpoints in each block -> a list.

    The tape is measured for two small maps, because at each place it grows as the area, beside what
    the context takes. The largest place is another one for large maps than for small ones. least:
    the smallest side, whose multiples the model takes; None: a model takes only one side.
    """
    if least is None:
        return _measured(step, side, checkpoints)
    small = max(least, side // 8 // least * least)
    sizes = small, 2 * small
    first, second = (_measured(step, size, checkpoints) for size in sizes)
    grown = (side ** 2 - sizes[0] ** 2) / (sizes[1] ** 2 - sizes[0] ** 2)
    return [a + grown * (b - a) for a, b in zip(first, second, strict=True)]


def _measured(step, side, checkpoints):
    found = []
    with observed(lambda entries: found.append(sum(size for _, size in nbytes_of(entries)))), \
            np.errstate(all="ignore"):
        step(side, checkpoints)
    return found


def waiting(places, division):
    """The bytes of a batch's tapes, where all of them wait for a loss of the whole batch."""
    kept, *_ = places
    return division.pictures * kept + division.at_once * (max(places) - kept)


def activations(unet, context, side, batch, checkpoints=False, texts=None, **conditions):
    """About how many bytes a UNet's tape holds at its peak, for latents of side x side.

    context (1,M,D), conditions: those of one picture. texts: the Texts whose encoders are trained,
    too. batch: how many pictures at once.
    """
    def step(side, checkpoints):
        tape = Tape(checkpoints, only_trained=True)
        xp, dtype = unet.xp, unet.dtype
        latents = xp.zeros((1, side, side, unet.settings.in_channels), dtype)
        own = {"context": context} | conditions | (texts(texts.ids([""]), tape) if texts else {})
        output = unet(latents, xp.zeros(1, dtype), own.pop("context"), tape, **own)
        gradients = unet.backward(output, tape)
        if texts:
            texts.backward(gradients, tape)
        for model in filter(None, (unet, texts)):
            model.zero_grad()

    least = 2 ** (len(unet.settings.block_out_channels) - 1)
    return int(batch * max(places(step, side, checkpoints, least)))


def weights(*models):
    """The bytes of all parameters."""
    return sum(parameter.data.nbytes for model in models for parameter in model.parameters())


def sentence(options, models, named, found):
    """A line on the memory that the training will take, and on how it could take less.

    models: whatever is there; named: pairs of a name and a Parameter that is trained. found: the
    bytes of the activations, {whether with checkpoints: number}.
    """
    models = list(models)
    trained = sum(parameter.data.nbytes for _, parameter in named)
    # Adam's two averages, that of the weights, and a gradient of each shard. The update needs the
    # sum of the gradients, when the activations are gone. Beside float16 all but the shards'
    # gradients are float32, and so are the weights once more.
    half, shards = options.dtype == "float16", division(options.batch, models[0].xp).shards
    adam = ((2 + half + bool(options.ema)) * (1 + half) + shards) * trained
    own = weights(*models)
    total = own + adam + max(found[options.checkpoints], (1 + half) * trained)
    free = available()
    line = (f"memory: about {in_words(total)}: weights {in_words(own)}, what is trained with its "
            f"gradients and averages {in_words(adam)}, activations "
            f"{in_words(found[options.checkpoints])}"
            + f" ({in_words(found[True])} with --checkpoints)" * (not options.checkpoints))
    # The weights are there already.
    if models[0].xp is np and free is not None and total - own > free:
        line += f"; only {in_words(free)} are free: take --checkpoints, a smaller --batch or " \
                "--resolution"
    return line


def in_words(count):
    """Bytes for people."""
    return f"{count / 2 ** 30:.1f} GiB" if count >= 2 ** 30 else f"{count / 2 ** 20:.0f} MiB"


def available():
    """The bytes of memory that programs can still get; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration, ValueError):
        return None
