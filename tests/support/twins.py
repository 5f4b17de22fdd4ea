"""A fast twin beside the plain op: the tolerance, shapes, and gradients of both."""
import numpy as np

from tests.support.arrays import read_only
from tests.support.tolerance import within
from tinyldm import backend

TOLERANCE = 2e-4            # of the output's standard deviation


def plain(op, *args, **options):
    with backend.plain():
        return op(*args, **options)[0]


CONV_SHAPES = [             # B, H, W, C, O
    (2, 16, 16, 32, 48), (1, 7, 9, 5, 3), (1, 1, 1, 4, 8), (3, 16, 18, 8, 8), (3, 5, 4, 33, 70),
    (1, 64, 64, 4, 32), (2, 64, 9, 32, 4), (1, 3, 200, 8, 6), (40, 8, 8, 16, 16),
    (1, 70, 33, 6, 130)]


def where_the_kernel_fits(paddings):
    return [(shape, padding) for shape in CONV_SHAPES for padding in paddings
            if min(shape[1:3]) + sum(padding) >= 3]


def both(op, backward, inputs, dy_shape, rng, names, absolute=0, **params):
    """Run op and backward in float32 (the twins) and in float64 (plain), compare the gradients."""
    results = []
    dy = rng.standard_normal(dy_shape).astype(np.float32)
    inputs = [x.astype(np.float32) for x in inputs]
    for dtype in (np.float32, np.float64):
        arrays = [read_only(x.astype(dtype)) for x in (dy, *inputs)]
        assert backend.fast(arrays[0]) == (dtype == np.float32)
        _, cache = op(*arrays[1:], **params)
        gradients = backward(arrays[0], cache)
        results.append(gradients if isinstance(gradients, tuple) else (gradients,))
    for name, fast, plain in zip(names, *results, strict=True):
        assert fast.shape == plain.shape, f"{name}: {fast.shape}, not {plain.shape}"
        assert fast.dtype == np.float32, f"{name}: {fast.dtype}"
        error, allowed = abs(fast - plain).max(), max(TOLERANCE * spread(plain), absolute)
        within(error, allowed, name)


def spread(gradient):
    """The standard deviation; of a single number its size."""
    return gradient.std() if gradient.size > 1 else abs(gradient).max()
