"""Convolution as large matrix products: the twin of ops.conv2d where Winograd is not faster.

The K*K*C numbers under each output pixel's kernel are copied into one row of a matrix ("im2col").
Then BLAS computes one product over K*K*C instead of K*K products over C. The matrix is made for one
strip of output rows at a time and never kept. Worker threads share the strips.
"""
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..backend import parallel
from .half import widened
from .product import product

STRIP_BYTES = 2 << 20       # at least; strips are as large as the weight if that is larger


def sliding_windows(x, K, stride, padding):
    """A view (B,Ho,Wo,K,K,C) of the padded map: the window of each output pixel."""
    before, after = padding
    if before or after:
        x = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    windows = sliding_window_view(x, (K, K), axis=(1, 2))[:, ::stride, ::stride]
    return windows.transpose(0, 1, 2, 4, 5, 3)                          # from (B,Ho,Wo,C,K,K)


def strips(windows, weight_bytes):
    """Slices (images, rows) that cut the windows into strips.

    Each strip reads the whole weight, so it should not be smaller than the weight. For 8x8 maps
    with 1280 channels, whose weight has 59 MB, one strip takes half the time of many.
    """
    B, Ho, Wo, K, _, C = windows.shape
    row_bytes = Wo * K * K * C * windows.itemsize
    strip_bytes = max(STRIP_BYTES, weight_bytes)
    rows = min(Ho, max(1, strip_bytes // row_bytes))
    images = min(B, max(1, strip_bytes // (row_bytes * Ho)))
    return [(slice(b, b + images), slice(h, h + rows))
            for b in range(0, B, images) for h in range(0, Ho, rows)]


def conv2d(x, weight, bias, stride, padding):
    """ops.conv2d without the cache. x (B,H,W,C), weight (K,K,C,O) -> y (B,Ho,Wo,O)."""
    K, _, C, O = weight.shape
    windows = sliding_windows(x, K, stride, padding)
    items = strips(windows, 4 * weight.size)
    weight = weight.reshape(K * K * C, O)
    if len(items) > 1:
        weight = widened(weight)
    y = np.empty((*windows.shape[:3], O), x.dtype)

    def multiply(strip):
        rows = windows[strip].reshape(-1, K * K * C)                     # the reshape copies
        y[strip] = product(rows, weight, bias).reshape(y[strip].shape)
    parallel(multiply, items)
    return y


def dweight(dy, x, K, stride, padding):
    """The gradient of the weight: dy (B,Ho,Wo,O), x (B,H,W,C) -> dweight (K,K,C,O)."""
    C, O = x.shape[-1], dy.shape[-1]
    windows = sliding_windows(x, K, stride, padding)
    total = np.zeros((K * K * C, O), x.dtype)
    for strip in strips(windows, total.nbytes):
        rows = windows[strip].reshape(-1, K * K * C)
        total += product(rows.T, dy[strip].reshape(-1, O))
    return total.reshape(K, K, C, O)
