"""Max and average pooling, and their gradients."""
import numpy as np
import pytest

from tests.support.checks import check_op
from tests.support.extra import F
from tests.support.reference import chw, hwc
from tests.support.tolerance import assert_allclose
from tinyldm import ops

MAP = np.arange(9.0).reshape(1, 3, 3, 1)
CASES = pytest.mark.parametrize("K, stride, zeros", [(3, 1, 1), (3, 2, 0), (3, 2, 1), (2, 2, 0),
                                                     (5, 3, 2), (1, 1, 0)])
MAPS = pytest.mark.parametrize("shape", [(1, 7, 8, 3), (3, 6, 5, 2), (2, 5, 9, 1)], ids=str)


@CASES
@MAPS
def test_max_pool(shape, K, stride, zeros, rng):
    check_op(ops.max_pool, ops.max_pool_backward, [rng.normal(size=shape)],
             lambda x: hwc(F.max_pool2d(chw(x), K, stride, zeros)),
             K=K, stride=stride, padding=(zeros, zeros))


@CASES
@MAPS
def test_average_pool(shape, K, stride, zeros, rng):
    check_op(ops.average_pool, ops.average_pool_backward, [rng.normal(size=shape)],
             lambda x: hwc(F.avg_pool2d(chw(x), K, stride, zeros, count_include_pad=False)),
             K=K, stride=stride, padding=(zeros, zeros))


def test_the_gradient_of_equal_numbers_goes_to_the_first():
    """After a ReLU many numbers are 0. Finite differences cannot tell, PyTorch can."""
    y, cache = ops.max_pool(np.zeros((1, 4, 4, 1)), 3, 1, (1, 1))
    dx = ops.max_pool_backward(np.ones_like(y), cache)
    np.testing.assert_array_equal(dx[0, ..., 0], [[4, 2, 2, 0], [2, 1, 1, 0], [2, 1, 1, 0],
                                                  [0, 0, 0, 0]])


def test_pools_of_a_small_map():
    """The table of fid.md in the reference: valid pixels only, and the maximum."""
    average, _ = ops.average_pool(MAP, 3, 1, (1, 1))
    largest, _ = ops.max_pool(MAP, 3, 1, (1, 1))
    assert_allclose(average.ravel(), [2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6])
    np.testing.assert_array_equal(largest.ravel(), [4, 5, 5, 7, 8, 8, 7, 8, 8])
