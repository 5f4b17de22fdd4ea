"""The fast backward twins in float32 against the plain ops in float64, on the same numbers."""
import numpy as np
import pytest

from tests.support.tolerance import assert_allclose, within
from tinyldm import backend, ops
from tinyldm.kernels import conv as conv_twins

TOLERANCE = 2e-4                    # of the gradient's standard deviation


@pytest.fixture
def rng():
    return np.random.default_rng(0)


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
    """The standard deviation, or the absolute value of a single number."""
    return gradient.std() if gradient.size > 1 else abs(gradient).max()


def read_only(array):
    array.flags.writeable = False
    return array


def norm_inputs(rng, shape, mean):
    return [rng.normal(mean, 1, shape), rng.normal(1, 0.3, shape[-1]),
            rng.normal(0, 0.3, shape[-1])]


# The last two have several images in a block.
MAPS = [((1, 5, 7, 6), 3), ((3, 9, 11, 32), 8), ((2, 3, 1, 4), 4), ((3, 1, 1, 12), 3),
        ((1, 1, 1, 8), 1), ((3, 7, 33), 11), ((2, 12), 2), ((1, 64, 65, 36), 4),
        ((3, 37, 41, 32), 32), ((301, 3, 5, 32), 8), ((170, 9, 7, 15), 5)]


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("op", ["group_norm", "group_norm_silu"])
@pytest.mark.parametrize("mean", [0, 4])
@pytest.mark.parametrize("shape, groups", MAPS, ids=str)
def test_group_norm(shape, groups, mean, op, rng):
    inputs = norm_inputs(rng, shape, mean)
    both(getattr(ops, op), getattr(ops, op + "_backward"), inputs, shape, rng,
         ("dx", "dweight", "dbias"), num_groups=groups, eps=1e-5)


@pytest.mark.parametrize("op", ["group_norm", "group_norm_silu"])
def test_group_norm_of_one_number_a_group(op, rng):
    """Each number equals the mean of its group: y is the bias, and only dbias is not 0."""
    shape = (3, 1, 1, 8)
    inputs = norm_inputs(rng, shape, 0)
    both(getattr(ops, op), getattr(ops, op + "_backward"), inputs, shape, rng,
         ("dx", "dweight", "dbias"), absolute=TOLERANCE, num_groups=8, eps=1e-5)


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("mean", [0, 4])
@pytest.mark.parametrize("shape", [(1, 6), (3, 5), (1, 1, 33), (3, 7, 9), (2, 77, 48),
                                   (3, 1, 5, 11), (3, 700, 65), (4001, 33)], ids=str)
def test_layer_norm(shape, mean, rng):
    both(ops.layer_norm, ops.layer_norm_backward, norm_inputs(rng, shape, mean), shape, rng,
         ("dx", "dweight", "dbias"), eps=1e-5)


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("scale", [0.1, 1, 5])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 7), (3, 5, 9), (2, 3, 1, 33), (3, 500, 65),
                                   (4001, 17)], ids=str)
def test_geglu(shape, scale, rng):
    x = scale * rng.normal(size=(*shape[:-1], 2 * shape[-1]))
    both(ops.geglu, ops.geglu_backward, [x], shape, rng, ("dx",))


def test_geglu_of_large_gates(rng):
    """No overflow and no NaN: gelu'(gate) is 1 or 0."""
    x = np.array([[2, 3, 4, 5, 1e4, -1e4, 20, -20]], np.float32)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        dx = ops.geglu_backward(np.ones((1, 4), np.float32), x)
    assert_allclose(dx, [[1e4, 0, 20, 0, 2, 0, 4, 0]], rtol=1e-6, atol=1e-6)


# Small maps use im2col, large ones with 32 channels Winograd, long ones several strips.
CONVOLUTIONS = [((1, 5, 7, 3), 4), ((3, 9, 4, 5), 1), ((2, 3, 11, 1), 7), ((3, 3, 3, 8), 8),
                ((3, 1, 1, 6), 5), ((2, 17, 19, 33), 35), ((1, 29, 30, 32), 32),
                ((3, 23, 9, 48), 9),
                ((1, 51, 49, 36), 3), ((33, 4, 4, 40), 33)]


KERNELS = [(3, (1, 1)), (3, (0, 1)), (3, (2, 0)), (2, (0, 1)), (5, (2, 2))]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape, out, K, padding", [
    (shape, out, K, padding) for shape, out in CONVOLUTIONS for K, padding in KERNELS
    if min(shape[1:3]) + sum(padding) >= K], ids=str)
def test_conv2d(shape, out, K, padding, stride, rng):
    B, H, W, C = shape
    inputs = [rng.normal(size=shape), rng.normal(size=(K, K, C, out)), rng.normal(size=out)]
    Ho, Wo = ((size + sum(padding) - K) // stride + 1 for size in (H, W))
    both(ops.conv2d, ops.conv2d_backward, inputs, (B, Ho, Wo, out), rng, ("dx", "dweight", "dbias"),
         stride=stride, padding=padding)


def test_conv2d_of_two_blocks_of_strips(rng, monkeypatch):
    """Strips of a few rows or a few images; dweight is the sum over the strips."""
    for size in (1, 3000, 20000):
        monkeypatch.setattr(conv_twins.im2col, "STRIP_BYTES", size)
        inputs = [rng.normal(size=(5, 7, 5, 6)), rng.normal(size=(3, 3, 6, 4)), rng.normal(size=4)]
        both(ops.conv2d, ops.conv2d_backward, inputs, (5, 7, 5, 4), rng, ("dx", "dweight", "dbias"),
             padding=(1, 1))
