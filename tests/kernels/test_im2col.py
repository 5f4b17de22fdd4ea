"""Convolution by im2col in strips against the plain one."""
import pytest

from tests.support.arrays import normal
from tests.support.tolerance import assert_close
from tests.support.twins import TOLERANCE, plain, where_the_kernel_fits
from tinyldm import ops
from tinyldm.kernels import im2col


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape, padding", where_the_kernel_fits([(1, 1), (0, 0), (0, 1)]), ids=str)
def test_im2col(shape, stride, padding, monkeypatch):
    B, H, W, C, O = shape
    monkeypatch.setattr(im2col, "STRIP_BYTES", 1 << 16)     # strips for small maps, too
    x, bias = normal(B, H, W, C), normal(O, seed=2)
    weight = normal(3, 3, C, O, seed=1, scale=(9 * C) ** -0.5)
    y = im2col.conv2d(x, weight, bias, stride, padding)
    assert_close(y, plain(ops.conv2d, x, weight, bias, stride, padding), TOLERANCE)
