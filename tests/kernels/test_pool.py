"""Average pooling by products with band matrices against the plain op."""
import numpy as np
import pytest

from tests.support.arrays import normal, read_only
from tests.support.tolerance import assert_close
from tests.support.twins import TOLERANCE, plain
from tinyldm import ops
from tinyldm.kernels import pool


@pytest.mark.parametrize("K, stride, padding", [(3, 1, (1, 1)), (3, 2, (0, 0)), (2, 2, (0, 1)),
                                                (5, 3, (2, 2)), (4, 4, (0, 0)), (1, 1, (0, 0))])
@pytest.mark.parametrize("shape", [(1, 7, 8, 3), (3, 6, 5, 2), (2, 4, 35, 1)], ids=str)
def test_average_pool(shape, K, stride, padding):
    x = read_only(normal(*shape, mean=2))
    if min(shape[1:3]) + sum(padding) < K:
        pytest.skip("the map is smaller than the window")
    y, cache = pool.average_pool(x, K, stride, padding)
    expected = plain(ops.average_pool, x.astype(np.float64), K, stride, padding)
    assert y.dtype == np.float32 and cache == (x, K, stride, padding)
    assert_close(y, expected, TOLERANCE)
