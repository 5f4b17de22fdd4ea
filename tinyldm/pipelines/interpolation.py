"""Between two prompts, seeds or images: a point to give in place of one of them.

    pipe(Between("a cat", "a dog", 0.3))        contexts, mixed linearly
    pipe("a cat", seed=Between(1, 2, 0.3))      noise, along the arc between both
    pipe("a cat", image=Between(a, b, 0.3))     latents of two pictures, before noise is added

The last one, with the same noise for both pictures, is the interpolation of Ho et al. 2020,
"Denoising Diffusion Probabilistic Models", arXiv:2006.11239, section 4.3 and figure 8: noise is
added to two pictures, the results are mixed, and sampling goes on from there.
"""
from typing import Any, NamedTuple

from ..errors import TinyldmError


class Between(NamedTuple):
    """A point between first and second; weight 0 is the first, 1 the second."""

    first: Any
    second: Any
    weight: float


def ends(value):
    """[first, second] of a Between; [value] of anything else."""
    return [value.first, value.second] if isinstance(value, Between) else [value]


def as_list(value):
    """A list or a tuple as a list; [value] of anything else, also of a Between."""
    several = isinstance(value, (list, tuple)) and not isinstance(value, Between)
    return list(value) if several else [value]


def mixed(value, function, mix):
    """function(value); of a Between mix(function(first), function(second), weight).

    Raises TinyldmError for a weight that is not a number from 0 to 1.
    """
    if not isinstance(value, Between):
        return function(value)
    try:
        inside = 0 <= value.weight <= 1
    except TypeError:
        inside = False
    if not inside:
        raise TinyldmError(f"the weight of a Between must be from 0 to 1, not {value.weight!r}")
    return mix(function(value.first), function(value.second), value.weight)


def lerp(a, b, weight):
    """Interpolate two arrays of one shape linearly."""
    return (1 - weight) * a + weight * b


def slerp(a, b, weight):
    """Interpolate two arrays of one shape along the arc between them.

        (sin((1 - w) angle) a + sin(w angle) b) / sin(angle)

    So standard normal numbers keep a standard deviation of 1, which the model expects of noise; on
    a straight line it would fall to 0.7 half-way.
    Source: Shoemake 1985, "Animating rotation with quaternion curves", section 3.3.
    """
    import numpy as np  # here, so that the command line's --help need not wait for it

    a, b = (np.asarray(array, np.float64) for array in (a, b))
    cosine = (a * b).sum() / np.sqrt((a ** 2).sum() * (b ** 2).sum())
    angle = np.arccos(cosine.clip(-1, 1))
    if np.sin(angle) < 1e-6:                            # (nearly) parallel: there is no arc
        return lerp(a, b, weight)
    return (np.sin((1 - weight) * angle) * a + np.sin(weight * angle) * b) / np.sin(angle)


class BetweenGenerator:
    """Normal numbers between those of two generators of noise.py."""

    def __init__(self, first, second, weight):
        self.first, self.second, self.weight = first, second, weight

    def randn(self, shape):
        numbers = slerp(self.first.randn(shape), self.second.randn(shape), self.weight)
        return numbers.astype("float32")
