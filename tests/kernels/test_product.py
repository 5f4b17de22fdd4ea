"""Matrix products, with float16 weights as well, against NumPy's."""
import numpy as np
import pytest

from tests.support.arrays import normal
from tests.support.tolerance import assert_allclose, assert_close
from tests.support.twins import TOLERANCE
from tinyldm import ops
from tinyldm.kernels.product import product


@pytest.mark.parametrize("shape", [(700, 40), (3, 5, 130), (0, 6), (2, 0, 3, 8)], ids=str)
@pytest.mark.parametrize("O", [1, 260])
def test_linear_and_its_backward(shape, O):
    x, weight, bias = normal(*shape), normal(O, shape[-1], seed=1), normal(O, seed=2)
    y, cache = ops.linear(x, weight, bias)
    dy = normal(*shape[:-1], O, seed=3)
    ours = y, *ops.linear_backward(dy, cache)
    exact = [a.astype(np.float64) for a in (x, weight, bias, dy)]
    y, cache = ops.linear(*exact[:3])
    for a, b in zip(ours, (y, *ops.linear_backward(exact[3], cache)), strict=True):
        assert a.shape == b.shape and a.dtype == np.float32
        if b.size:
            assert_allclose(a, b, atol=1e-4 * max(abs(b).max(), 1))


@pytest.mark.parametrize("R, I, O", [
    (5, 7, 3), (3, 7, 5), (1, 1, 1), (700, 40, 600), (600, 30, 700), (77, 768, 700),
    (17, 700, 770), (2, 30, 700), (3, 30, 2)])
def test_product(R, I, O):
    x, weight, bias = normal(R, I), normal(O, I, seed=1), normal(O, seed=2)
    assert_close(product(x, weight.T, bias), x @ weight.T + bias, TOLERANCE)
    assert_close(product(x, np.ascontiguousarray(weight.T)), x @ weight.T, TOLERANCE)
    narrow = weight.astype(np.float16)
    assert_close(product(x, narrow.T, bias), x @ narrow.astype(np.float32).T + bias, TOLERANCE)
    assert_close(product(x, np.ascontiguousarray(narrow.T)), x @ narrow.astype(np.float32).T,
                 TOLERANCE)
