"""Winograd's convolution against the plain one."""
import numpy as np
import pytest

from tests.support.arrays import normal
from tests.support.tolerance import assert_close, within
from tests.support.twins import TOLERANCE, plain, where_the_kernel_fits
from tinyldm import backend, ops
from tinyldm.kernels import winograd


@pytest.mark.parametrize("shape, padding", where_the_kernel_fits(
    [(1, 1), (0, 1), (0, 0), (2, 2), (1, 0), (3, 3), (5, 4)]), ids=str)
@pytest.mark.parametrize("strip_tiles, columns", [(16, 64), (128, 1 << 11)],
                         ids=["strips", "whole maps"])
def test_winograd(shape, padding, strip_tiles, columns, monkeypatch):
    B, H, W, C, O = shape
    monkeypatch.setattr(winograd, "STRIP_TILES", strip_tiles)
    monkeypatch.setattr(winograd, "WEIGHTS", columns)
    x, bias = normal(B, H, W, C), normal(O, seed=2)
    weight = normal(3, 3, C, O, seed=1, scale=(9 * C) ** -0.5)
    y = winograd.conv3x3(x, weight, bias, padding)
    assert y.dtype == np.float32
    assert_close(y, plain(ops.conv2d, x, weight, bias, 1, padding), TOLERANCE)
    without = winograd.conv3x3(x, weight, None, padding)
    assert_close(without, plain(ops.conv2d, x, weight, None, 1, padding), TOLERANCE)
    dy = normal(*y.shape, seed=3)
    with backend.plain():
        _, dweight, _ = ops.conv2d_backward(dy, (x, weight, 1, padding))
    assert_close(winograd.dweight3x3(dy, x, padding), dweight, TOLERANCE)
    turned = winograd.conv3x3(x, winograd.turn(weight), bias, padding, turned=True)
    assert_close(turned, y, TOLERANCE)


def test_winograd_is_as_accurate_as_its_points_promise(monkeypatch):
    """At 64 channels the root mean square error is half of what the points 0, +-1, +-2 give."""
    x, weight = normal(2, 32, 32, 64), normal(3, 3, 64, 64, seed=1, scale=1 / 24)
    exact = plain(ops.conv2d, x.astype(np.float64), weight.astype(np.float64), None, 1, (1, 1))

    def error():
        return np.sqrt(((winograd.conv3x3(x, weight, None) - exact) ** 2).mean())
    ours = error()
    monkeypatch.setattr(winograd, "LARGE", winograd.Points(1, 2))
    within(ours, error())
