"""Convolution as large matrix products: the twin of ops.conv2d where Winograd is not faster.

The K*L*C numbers under each output pixel's kernel are copied into one row of a matrix ("im2col").
Then BLAS computes one product over K*L*C instead of K*L products over C. The matrix is made for one
strip of output rows at a time and never kept. Worker threads share the strips.
"""
import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..backend import parallel, scratch
from .half import widened
from .product import product

STRIP_BYTES = 2 << 20       # at least; strips are as large as the weight if that is larger


def sides(padding):
    """(before, after), the same for both axes, or a pair for each -> (top, bottom), (left, right).
    """
    return tuple(map(tuple, np.broadcast_to(padding, (2, 2)).tolist()))


def sliding_windows(x, kernel, stride, padding):
    """A view (B,Ho,Wo,K,L,C) of the padded map: the window of each output pixel."""
    (B, H, W, C), (K, L), ((top, bottom), (left, right)) = x.shape, kernel, sides(padding)
    if np.any(padding):
        padded = np.zeros((B, H + top + bottom, W + left + right, C), x.dtype)
        padded[:, top:top + H, left:left + W] = x
        x = padded
    Ho, Wo = (x.shape[1] - K) // stride + 1, (x.shape[2] - L) // stride + 1
    sB, sH, sW, sC = x.strides
    return as_strided(x, (B, Ho, Wo, K, L, C), (sB, stride * sH, stride * sW, sH, sW, sC),
                      writeable=False)


def strips(windows, weight_bytes):
    """Slices (images, rows) that cut the windows into strips.

    Each strip reads the whole weight, so it should not be smaller than the weight. For 8x8 maps
    with 1280 channels, whose weight has 59 MB, one strip takes half the time of many.
    """
    B, Ho, Wo, K, L, C = windows.shape
    row_bytes = Wo * K * L * C * windows.itemsize
    strip_bytes = max(STRIP_BYTES, weight_bytes)
    rows = min(Ho, max(1, strip_bytes // row_bytes))
    images = min(B, max(1, strip_bytes // (row_bytes * Ho)))
    return [(slice(b, b + images), slice(h, h + rows))
            for b in range(0, B, images) for h in range(0, Ho, rows)]


def conv2d(x, weight, bias, stride, padding):
    """ops.conv2d without the cache. x (B,H,W,C), weight (K,L,C,O) -> y (B,Ho,Wo,O)."""
    K, L, C, O = weight.shape
    windows = sliding_windows(x, (K, L), stride, padding)
    items = strips(windows, 4 * weight.size)
    weight = weight.reshape(K * L * C, O)
    if len(items) == 1:
        rows = windows.reshape(-1, K * L * C)                            # the reshape copies
        return product(rows, weight, bias).reshape(*windows.shape[:3], O)
    weight = widened(weight)
    y = np.empty((*windows.shape[:3], O), x.dtype)

    def multiply(strip):
        rows = scratch("windows", *windows[strip].shape)
        rows[:] = windows[strip]
        out = y[strip].reshape(-1, O)
        np.matmul(rows.reshape(-1, K * L * C), weight, out=out)
        if bias is not None:
            out += bias
    parallel(multiply, items)
    return y


def dweight(dy, x, kernel, stride, padding):
    """The gradient of the weight: dy (B,Ho,Wo,O), x (B,H,W,C) -> dweight (K,L,C,O)."""
    (K, L), C, O = kernel, x.shape[-1], dy.shape[-1]
    windows = sliding_windows(x, kernel, stride, padding)
    total = np.zeros((K * L * C, O), x.dtype)
    for strip in strips(windows, total.nbytes):
        rows = windows[strip].reshape(-1, K * L * C)
        total += product(rows.T, dy[strip].reshape(-1, O))
    return total.reshape(K, L, C, O)
