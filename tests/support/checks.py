"""One check for all ops: the derivative against finite differences; forward and backward against
torch if it is installed, and on arrays that behave like a GPU's, in float32 and float16.

Torch gets the same arrays in our layout (channels last); a test hands over a small function that
turns its tensors round. All that an op is given is read-only, so an op that writes into it fails.
"""
import numpy as np
import pytest

from tests.support import strict
from tests.support.arrays import read_only, read_only_cache
from tests.support.extra import MISSING, torch
from tests.support.tolerance import within
from tinyldm import backend

STEP = 1e-5                         # of the central difference
DIFFERENCE = 1e-5                   # allowed, of the gradient's length
AGAINST_TORCH = 1e-9                # allowed, of the array's largest value
NOTHING = 1e-8                      # rounding error of a difference quotient that should be 0
KERNEL = 1e-5                       # allowed in float32, of the array's largest value
FLOAT16 = 2e-3                      # allowed, of the array's largest value: four roundings


def check_op(op, backward, inputs, torch_op=None, **params):
    """y, cache = op(*inputs, **params); backward(dy, cache) -> gradients of all float inputs.

    inputs: float64 arrays, integer arrays, or None for no bias (then its gradient is ignored).
    torch_op(*tensors) -> tensor of y's shape.
    """
    rng = np.random.default_rng(len(inputs))
    inputs = [read_only(x) for x in inputs]
    y, cache = op(*inputs, **params)
    read_only_cache(cache)
    dy = read_only(rng.standard_normal(np.shape(y)))
    gradients = gradients_of(backward, dy, cache, inputs)
    for i, gradient in gradients.items():
        shape, expected = gradient.shape, inputs[i].shape
        assert shape == expected, f"gradient of input {i} is {shape}, not {expected}"
        assert gradient.dtype == np.float64, f"gradient of input {i} is {gradient.dtype}"
        _check_difference(lambda *moved: (op(*moved, **params)[0] * dy).sum(),
                          inputs, i, gradient, rng)
    if torch_op is not None and "torch" not in MISSING:
        _check_torch(torch_op, inputs, y, dy, gradients)
    _check_dtype(op, backward, inputs, dy, params)
    _check_device(op, backward, inputs, dy, params)


def gradients_of(backward, dy, cache, inputs):
    """{position: gradient}. backward returns none for integer inputs."""
    gradients = backward(dy, cache)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    places = [i for i, x in enumerate(inputs) if x is None or x.dtype.kind == "f"]
    assert len(gradients) == len(places), f"{len(gradients)} gradients for {len(places)} inputs"
    return {i: gradient for i, gradient in zip(places, gradients) if inputs[i] is not None}


def _check_difference(loss, inputs, i, gradient, rng):
    """(loss(x + s v) - loss(x - s v)) / 2s = gradient . v, in a random direction v."""
    direction = rng.standard_normal(inputs[i].shape)

    def moved(step):
        return loss(*inputs[:i], inputs[i] + step * direction, *inputs[i + 1:])
    expected = (moved(STEP) - moved(-STEP)) / (2 * STEP)
    error = abs((gradient * direction).sum() - expected)
    allowed = DIFFERENCE * np.linalg.norm(gradient) + NOTHING
    within(error, allowed, f"input {i} against the difference quotient")


def _check_torch(torch_op, inputs, y, dy, gradients):
    tensors = [None if x is None else torch.from_numpy(x.copy()) for x in inputs]
    for i in gradients:
        tensors[i].requires_grad_()
    expected = torch_op(*tensors)
    assert_same(y, expected.detach().numpy(), "output")
    expected.backward(torch.from_numpy(dy.copy()))
    for i, gradient in gradients.items():
        assert_same(gradient, tensors[i].grad.numpy(), f"gradient of input {i}")


def _check_dtype(op, backward, inputs, dy, params):
    """From float32, an op gives float32: no constant widens the result."""
    for result in results(op, backward, inputs, dy, params, np.float32):
        assert result.dtype == np.float32, f"{result.dtype} out of float32"


def results(op, backward, inputs, dy, params, *dtypes, move=lambda x: x, plain=True):
    """The output and all gradients, with all inputs rounded to one dtype after another."""
    inputs = [x if x is None else move(rounded(x, *dtypes)) for x in inputs]
    dy = rounded(dy, *dtypes) if dy.ndim else rounded(dy, np.float32)       # float32 for a loss
    with backend.plain(plain):
        y, cache = op(*inputs, **params)
        return [y, *gradients_of(backward, move(dy), cache, inputs).values()]


def rounded(x, *dtypes):
    for dtype in dtypes:
        x = x.astype(dtype) if x.dtype.kind == "f" else x
    return read_only(x)


def _check_device(op, backward, inputs, dy, params):
    """On the stand-in for CuPy, float32 gives NumPy's numbers, and float16 nearly the same.

    A loss is float32, because a sum may overflow float16. The GPU kernels must be close, too.
    """
    def compare(dtypes, allowed, plain=True):
        # NumPy in float32 from the same rounded inputs: only roundings inside the op differ.
        expected = results(op, backward, inputs, dy, params, *dtypes, np.float32)
        with strict.installed() as xp:
            ours = results(op, backward, inputs, dy, params, *dtypes, move=strict.Array,
                           plain=plain)
        for i, (our, their) in enumerate(zip(ours, expected)):
            assert isinstance(our, xp.ndarray) and our.shape == np.shape(their)
            assert our.dtype == (np.float32 if i == 0 and not our.ndim else dtypes[-1])
            error, size = abs(our.get() - their).max(), abs(their).max()
            if not plain:       # gradients are sums of parts as large as dy, which may cancel
                size = max(size, abs(dy).max() if i else 0.1)
            within(error, allowed * size, f"result {i} in {dtypes[-1].__name__}, plain={plain}")
    compare([np.float32], 0)
    compare([np.float16], FLOAT16)
    compare([np.float32], KERNEL, plain=False)
    compare([np.float16], FLOAT16, plain=False)


def assert_same(ours, theirs, what):
    assert np.shape(ours) == theirs.shape, f"{what}: {np.shape(ours)}, torch {theirs.shape}"
    error, size = abs(ours - theirs).max(), abs(theirs).max()
    within(error, AGAINST_TORCH * size + 1e-13, f"{what} against torch")


shapes = pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 7, 3), (3, 5, 1, 9)], ids=str)
