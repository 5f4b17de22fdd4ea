"""How much memory a training takes, said before its first step."""
from pathlib import Path

from ..layers import Tape
from ..tape import nbytes_of, observed

GIB = 2 ** 30


def activations(unet, context, side, batch, checkpoints=False, texts=None, **conditions):
    """About how many bytes a UNet's tape holds at its peak, for latents of side x side.

    context (1,M,D), conditions: those of one picture. texts: the Texts whose encoders are trained,
    too. batch: how many pictures at once.
    The tape is measured for two small maps, at the end of forward and, with checkpoints, in each
    block: at each place it grows as the area, beside what the context takes. The largest place is
    another one for large maps than for small ones. The gradients that are made are forgotten.
    """
    least = 2 ** (len(unet.settings.block_out_channels) - 1)
    small = max(least, side // 8 // least * least)
    sizes = small, 2 * small
    first, second = (_places(unet, context, size, checkpoints, texts, conditions) for size in sizes)
    grown = (side ** 2 - sizes[0] ** 2) / (sizes[1] ** 2 - sizes[0] ** 2)
    return int(batch * max(a + grown * (b - a) for a, b in zip(first, second, strict=True)))


def _places(unet, context, size, checkpoints, texts, conditions):
    """The bytes of one picture's tape, wherever it is about to get shorter, in order."""
    found = []
    tape = Tape(checkpoints, only_trained=True)
    xp, dtype = unet.xp, unet.dtype
    latents = xp.zeros((1, size, size, unet.settings.in_channels), dtype)
    with observed(lambda entries: found.append(sum(size for _, size in nbytes_of(entries)))):
        if texts:
            conditions = conditions | texts(texts.ids([""]), tape)
            context = conditions.pop("context")
        output = unet(latents, xp.zeros(1, dtype), context, tape, **conditions)
        gradients = unet.backward(output, tape)
        if texts:
            texts.backward(gradients, tape)
    for model in filter(None, (unet, texts)):
        model.zero_grad()
    return found


def weights(*models):
    """The bytes of all parameters."""
    return sum(parameter.data.nbytes for model in models for parameter in model.parameters())


def available():
    """The bytes of memory that programs can still get; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration, ValueError):
        return None
