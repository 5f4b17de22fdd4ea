"""Convolution and upsampling, forward and backward, against the plain ops."""
import numpy as np
import pytest

from tests.support.arrays import normal
from tests.support.tolerance import assert_close
from tests.support.twins import TOLERANCE, both, plain, where_the_kernel_fits
from tinyldm import backend, ops
from tinyldm.kernels import conv


@pytest.mark.parametrize("shape, padding", where_the_kernel_fits([(1, 1), (0, 0), (0, 1), (2, 2)]),
                         ids=str)
def test_convolution_of_few_outputs(shape, padding):
    B, H, W, C, _ = shape
    x, bias, weight = normal(B, H, W, C), normal(3, seed=2), normal(3, 3, C, 3, seed=1, scale=0.1)
    for b in (bias, None):
        assert_close(conv.few_outputs(x, weight, b, padding),
                     plain(ops.conv2d, x, weight, b, 1, padding), TOLERANCE)


def test_upsampling():
    x = normal(2, 5, 3, 4)
    for size in (None, (9, 5), (10, 5)):
        np.testing.assert_array_equal(ops.upsample_nearest(x, size)[0],
                                      plain(ops.upsample_nearest, x, size))


@pytest.mark.parametrize("shape", [(2, 16, 9, 33), (1, 70, 64, 5)], ids=str)
def test_convolution_1x1_and_its_backward(shape):
    x, weight, bias = normal(*shape), normal(1, 1, shape[-1], 40, seed=1), normal(40, seed=2)
    y, cache = ops.conv2d(x, weight, bias)
    dy = normal(*y.shape, seed=3)
    ours = y, *ops.conv2d_backward(dy, cache)
    with backend.plain():
        y, cache = ops.conv2d(x, weight, bias)
        for a, b in zip(ours, (y, *ops.conv2d_backward(dy, cache)), strict=True):
            assert_close(a, b, TOLERANCE)


@pytest.mark.parametrize("shape", [(2, 16, 16, 32, 48), (1, 70, 33, 40, 33), (1, 7, 9, 5, 3),
                                   (2, 64, 64, 40, 340)], ids=str)
@pytest.mark.parametrize("K, stride", [(3, 1), (3, 2), (1, 1)])
def test_convolution_with_a_float16_weight(shape, K, stride):
    """Forward and backward are the same as with the weight widened in advance."""
    B, H, W, C, O = shape
    x, bias = normal(B, H, W, C), normal(O, seed=2)
    weight = normal(K, K, C, O, seed=1, scale=(K * K * C) ** -0.5).astype(np.float16)
    wide = weight.astype(np.float32)
    y, cache = ops.conv2d(x, weight, bias, stride, (K // 2, K // 2))
    expected, expected_cache = ops.conv2d(x, wide, bias, stride, (K // 2, K // 2))
    np.testing.assert_array_equal(y, expected)
    dy = normal(*y.shape, seed=3)
    for ours, theirs in zip(ops.conv2d_backward(dy, cache),
                            ops.conv2d_backward(dy, expected_cache), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# ---- backward -------------------------------------------------------------------------------

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
def test_conv2d_backward(shape, out, K, padding, stride, rng):
    B, H, W, C = shape
    inputs = [rng.normal(size=shape), rng.normal(size=(K, K, C, out)), rng.normal(size=out)]
    Ho, Wo = ((size + sum(padding) - K) // stride + 1 for size in (H, W))
    both(ops.conv2d, ops.conv2d_backward, inputs, (B, Ho, Wo, out), rng, ("dx", "dweight", "dbias"),
         stride=stride, padding=padding)


@pytest.mark.parametrize("shape, out, K, padding", [
    (shape, out, K, padding) for shape, out in CONVOLUTIONS for K, padding in KERNELS
    if min(shape[1:3]) + sum(padding) >= K], ids=str)
def test_the_gradient_of_x_where_the_weight_is_not_copied(shape, out, K, padding, rng, monkeypatch):
    monkeypatch.setattr(conv, "LARGE", 0)
    test_conv2d_backward(shape, out, K, padding, 1, rng)


def test_the_gradient_of_x_of_a_large_weight_in_float16():
    for size in (4, 24):                                # im2col, Winograd
        weight = normal(3, 3, 240, 250, scale=0.02).astype(np.float16)
        dy, shape = normal(1, size, size, 250, seed=1), (1, size, size, 240)
        assert weight.size >= conv.LARGE
        np.testing.assert_array_equal(
            ops.conv2d_input_backward(dy, weight, shape, 1, (1, 1)),
            ops.conv2d_input_backward(dy, weight.astype(np.float32), shape, 1, (1, 1)))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("out", [3, 40])
@pytest.mark.parametrize("kernel, padding", [
    ((1, 7), ((0, 0), (3, 3))), ((7, 1), ((3, 3), (0, 0))), ((1, 3), (0, 0)), ((3, 2), (1, 0)),
    ((3, 3), ((1, 1), (0, 2))), ((1, 1), ((0, 0), (0, 1)))], ids=str)
def test_conv2d_that_is_not_square(kernel, padding, out, stride, rng):
    inputs = [rng.normal(size=(3, 17, 18, 33)), rng.normal(size=(*kernel, 33, out)),
              rng.normal(size=out)]
    y_shape = ops.conv2d(*inputs, stride, padding)[0].shape
    both(ops.conv2d, ops.conv2d_backward, inputs, y_shape, rng, ("dx", "dweight", "dbias"),
         stride=stride, padding=padding)
    x, weight, bias = (array.astype("float32") for array in inputs)
    assert_close(ops.conv2d(x, weight, bias, stride, padding)[0],
                 plain(ops.conv2d, x, weight, bias, stride, padding), TOLERANCE)


def test_conv2d_of_two_blocks_of_strips(rng, monkeypatch):
    """Strips of a few rows or a few images; dweight is the sum over the strips."""
    for size in (1, 3000, 20000):
        monkeypatch.setattr(conv.im2col, "STRIP_BYTES", size)
        inputs = [rng.normal(size=(5, 7, 5, 6)), rng.normal(size=(3, 3, 6, 4)), rng.normal(size=4)]
        both(ops.conv2d, ops.conv2d_backward, inputs, (5, 7, 5, 4), rng, ("dx", "dweight", "dbias"),
             padding=(1, 1))
