"""One check for every op: its derivative against finite differences, both directions against torch.

Torch gets the same arrays in our layout (channels last); a test hands over a small function that
turns its tensors round. All that an op is given is read-only, so an op that writes into it fails.
"""
import numpy as np
import torch

from tinyldm import backend

STEP = 1e-5                         # of the central difference
DIFFERENCE = 1e-5                   # allowed, of the gradient's length
AGAINST_TORCH = 1e-9                # allowed, of the array's largest value
NOTHING = 1e-8                      # rounding of a difference quotient whose true value is 0


def check_op(op, backward, inputs, torch_op=None, **params):
    """y, cache = op(*inputs, **params); backward(dy, cache) -> gradients of all but integers.

    inputs: float64 arrays, integer arrays, or None for a bias left out (its gradient is not read).
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
    if torch_op is not None:
        _check_torch(torch_op, inputs, y, dy, gradients)
    _check_dtype(op, backward, inputs, dy, params)


def gradients_of(backward, dy, cache, inputs):
    """Position -> gradient. Integers have none, and backward leaves them out."""
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
    assert error <= allowed, (f"input {i}: {error:.2e} from the difference quotient, "
                              f"allowed {allowed:.2e}")


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
    """A float32 op has float32 results: no constant in it widens them."""
    narrow = [x.astype(np.float32) if x is not None and x.dtype.kind == "f" else x for x in inputs]
    with backend.plain():
        y, cache = op(*narrow, **params)
        gradients = gradients_of(backward, dy.astype(np.float32), cache, narrow)
    for result in (y, *gradients.values()):
        assert result.dtype == np.float32, f"{result.dtype} out of float32"


def assert_same(ours, theirs, what):
    assert np.shape(ours) == theirs.shape, f"{what}: {np.shape(ours)}, torch {theirs.shape}"
    error, size = abs(ours - theirs).max(), abs(theirs).max()
    assert error <= AGAINST_TORCH * size + 1e-13, f"{what}: {error:.2e} from torch, size {size:.2e}"


def read_only(array):
    if array is not None:
        array = np.array(array)
        array.flags.writeable = False
    return array


def arrays_in(cache):
    """Every array of a cache, which may be nested tuples."""
    if isinstance(cache, np.ndarray):
        yield cache
    elif isinstance(cache, tuple):
        for item in cache:
            yield from arrays_in(item)


def read_only_cache(cache):
    for array in arrays_in(cache):
        array.flags.writeable = False
