"""Activations, forward and backward, against the plain ops."""
import numpy as np
import pytest

from tests.support.arrays import normal
from tests.support.tolerance import assert_allclose, assert_close, within
from tests.support.twins import TOLERANCE, both, plain
from tinyldm import ops
from tinyldm.kernels import activation


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("name", ["silu", "quick_gelu", "gelu_tanh", "gelu", "geglu"])
@pytest.mark.parametrize("shape", [
    (2, 8), (1, 1, 4), (3, 7, 9, 6), (2, 1500, 66), (3, 70000), (0, 4)], ids=str)
def test_activations(name, shape):
    x = normal(*shape, scale=3)
    y, expected = getattr(activation, name)(x)[0], plain(getattr(ops, name), x)
    assert y.dtype == np.float32 and y.shape == expected.shape
    if x.size:
        assert_close(y, expected, TOLERANCE)


@pytest.mark.parametrize("name", ["silu", "quick_gelu", "gelu_tanh", "gelu"])
def test_activations_everywhere(name):
    """Error below 1e-6, relative for large results, also for large x. NaN stays NaN."""
    x = np.concatenate([np.linspace(-12, 12, 200001), [-1e30, -1e4, 1e4, 1e30, np.nan]])
    x = x.astype(np.float32)[:, None]
    expected = plain(getattr(ops, name), x.astype(np.float64))
    y = getattr(activation, name)(x)[0]
    assert np.isnan(y[-1]) and not np.isnan(y[:-1]).any()
    within(abs(y - expected)[:-1], 1e-6 * np.maximum(1, abs(expected[:-1])))


# ---- backward -------------------------------------------------------------------------------

@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("scale", [0.1, 1, 5])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 7), (3, 5, 9), (2, 3, 1, 33), (3, 500, 65),
                                   (4001, 17)], ids=str)
def test_geglu_backward(shape, scale, rng):
    x = scale * rng.normal(size=(*shape[:-1], 2 * shape[-1]))
    both(ops.geglu, ops.geglu_backward, [x], shape, rng, ("dx",))


def test_geglu_of_large_gates(rng):
    """No overflow and no NaN: gelu'(gate) is 1 or 0."""
    x = np.array([[2, 3, 4, 5, 1e4, -1e4, 20, -20]], np.float32)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        dx = ops.geglu_backward(np.ones((1, 4), np.float32), x)
    assert_allclose(dx, [[1e4, 0, 20, 0, 2, 0, 4, 0]], rtol=1e-6, atol=1e-6)
