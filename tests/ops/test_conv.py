"""Convolution, nearest upsampling and averaging, and their gradients."""
import numpy as np
import pytest

from tests.support import strict
from tests.support.checks import check_op
from tests.support.extra import F
from tests.support.reference import chw, hwc
from tests.support.tolerance import assert_allclose
from tinyldm import ops


def torch_conv(stride, padding):
    def conv(x, weight, bias):
        rows, columns = padding if isinstance(padding[0], tuple) else (padding, padding)
        padded = F.pad(chw(x), (*columns, *rows))
        return hwc(F.conv2d(padded, weight.permute(3, 2, 0, 1).contiguous(), bias, stride))
    return conv


@pytest.mark.parametrize("shape, out", [((1, 5, 7, 3), 4), ((3, 9, 4, 5), 1), ((2, 3, 11, 1), 7)],
                         ids=str)
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (0, 1), (2, 1)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_conv2d(K, stride, padding, shape, out, rng):
    weight = rng.normal(size=(K, K, shape[-1], out))
    inputs = [rng.normal(size=shape), weight, rng.normal(size=out) if stride == 1 else None]
    check_op(ops.conv2d, ops.conv2d_backward, inputs, torch_conv(stride, padding),
             stride=stride, padding=padding)


@pytest.mark.parametrize("kernel, padding", [
    ((1, 7), ((0, 0), (3, 3))), ((7, 1), ((3, 3), (0, 0))), ((1, 3), (0, 0)), ((3, 2), (1, 0)),
    ((1, 1), ((1, 0), (2, 3))), ((3, 3), ((1, 1), (0, 2)))], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_conv2d_that_is_not_square(kernel, padding, stride, rng):
    weight = rng.normal(size=(*kernel, 3, 4))
    inputs = [rng.normal(size=(2, 7, 8, 3)), weight, rng.normal(size=4)]
    check_op(ops.conv2d, ops.conv2d_backward, inputs, torch_conv(stride, padding),
             stride=stride, padding=padding)


def test_conv2d_of_one_pixel(rng):
    inputs = [rng.normal(size=(2, 1, 1, 3)), rng.normal(size=(3, 3, 3, 5)), rng.normal(size=5)]
    check_op(ops.conv2d, ops.conv2d_backward, inputs, torch_conv(1, (1, 1)), padding=(1, 1))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 7, 2), (2, 4, 3, 5)], ids=str)
@pytest.mark.parametrize("cut", [(0, 0), (1, 0), (0, 1), (1, 1)], ids=str)
def test_upsample_nearest(shape, cut, rng):
    size = (2 * shape[1] - cut[0], 2 * shape[2] - cut[1])
    check_op(ops.upsample_nearest, ops.upsample_nearest_backward, [rng.normal(size=shape)],
             lambda x: hwc(F.interpolate(chw(x), size=size, mode="nearest")), size=size)
    if cut == (0, 0):
        check_op(ops.upsample_nearest, ops.upsample_nearest_backward, [rng.normal(size=shape)],
                 lambda x: hwc(F.interpolate(chw(x), scale_factor=2.0, mode="nearest")))


@pytest.mark.parametrize("size", [(6, 5), (5, 9), (7, 8)], ids=str)
def test_upsample_nearest_to_another_size(size, rng):
    with pytest.raises(AssertionError):
        ops.upsample_nearest(rng.normal(size=(1, 3, 4, 2)), size)


@pytest.mark.parametrize("shape, size", [
    ((1, 1, 1, 1), (1, 1)), ((2, 1, 3, 2), (5, 3)), ((2, 4, 3, 5), (16, 12)), ((1, 5, 4, 3), (7, 9))
], ids=str)
def test_upsample_bilinear(shape, size, rng):
    check_op(ops.upsample_bilinear, ops.upsample_bilinear_backward, [rng.normal(size=shape)],
             lambda x: hwc(F.interpolate(chw(x), size=size, mode="bilinear", align_corners=True)),
             size=size)


@pytest.mark.parametrize("shape, size", [
    ((1, 1, 1, 1), (1, 1)), ((2, 1, 3, 2), (5, 3)), ((2, 9, 3, 5), (4, 7)),
    ((1, 8, 12, 3), (4, 3)), ((1, 7, 5, 2), (7, 5)), ((1, 13, 11, 1), (5, 2))], ids=str)
def test_resize_bilinear(shape, size, rng):
    check_op(ops.resize_bilinear, ops.resize_bilinear_backward, [rng.normal(size=shape)],
             lambda x: hwc(F.interpolate(chw(x), size=size, mode="bilinear", antialias=True)),
             size=size)


def test_upsample_bilinear_does_not_shrink(rng):
    with pytest.raises(AssertionError, match="is larger than"):
        ops.upsample_bilinear(rng.normal(size=(1, 3, 4, 2)), (6, 3))


@pytest.mark.parametrize("shape", [(1, 2, 2, 1), (3, 6, 4, 5)], ids=str)
def test_downsample_average(shape, rng):
    check_op(ops.downsample_average, ops.downsample_average_backward, [rng.normal(size=shape)],
             lambda x: hwc(F.avg_pool2d(chw(x), 2)))


@pytest.mark.parametrize("shape", [(1, 3, 4, 2), (1, 4, 3, 2)], ids=str)
def test_downsample_average_of_an_odd_size(shape, rng):
    with pytest.raises(AssertionError, match="must be even"):
        ops.downsample_average(rng.normal(size=shape))


@pytest.mark.parametrize("K, stride, padding", [(3, 1, (1, 1)), (3, 2, (0, 1)), (1, 1, (0, 0))])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_gradient_of_the_input_alone(K, stride, padding, dtype, rng):
    x, weight = (rng.normal(size=shape).astype(dtype) for shape in [(2, 6, 5, 4), (K, K, 4, 7)])
    y, cache = ops.conv2d(x, weight, None, stride, padding)
    dy = rng.normal(size=y.shape).astype(dtype)
    expected, *_ = ops.conv2d_backward(dy, cache)
    found = ops.conv2d_input_backward(dy, weight, x.shape, stride, padding)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)
    with strict.installed() as cupy:
        found = ops.conv2d_input_backward(*map(cupy.asarray, (dy, weight)), x.shape, stride,
                                          padding)
        allowed = 1e-2 if dtype == np.float16 else 1e-5
        assert_allclose(found.get(), expected, allowed, allowed)
