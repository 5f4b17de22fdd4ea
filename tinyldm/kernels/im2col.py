"""Convolution as large matrix products: the fast twin of ops.conv2d where Winograd does not pay.

What each output pixel sees, K*K*C numbers, is copied into a row of a matrix ("im2col"), so that
BLAS works on one product with K*K*C in place of K*K products with C. The matrix is made a strip of
output rows at a time, strips over worker threads, and is never kept.
"""
import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..backend import parallel
from .half import widened
from .product import product

STRIP_BYTES = 2 << 20       # at least: where the weight is larger than this, the strip is as large


def sliding_windows(x, K, stride, padding):
    """View (B,Ho,Wo,K,K,C) of the padded map."""
    before, after = padding
    if before or after:
        x = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    B, H, W, C = x.shape
    sB, sH, sW, sC = x.strides
    shape = (B, (H - K) // stride + 1, (W - K) // stride + 1, K, K, C)
    return as_strided(x, shape, (sB, sH * stride, sW * stride, sH, sW, sC), writeable=False)


def strips(windows, weight_bytes):
    """The slices (images, rows) that cut windows into strips.

    Each strip reads the weight once, so it should be no smaller than that: 8x8 maps of 1280
    channels, with their 59 MB, take half of the time in one strip.
    """
    B, Ho, Wo, K, _, C = windows.shape
    row_bytes = Wo * K * K * C * windows.itemsize
    strip_bytes = max(STRIP_BYTES, weight_bytes)
    rows = min(Ho, max(1, strip_bytes // row_bytes))
    images = min(B, max(1, strip_bytes // (row_bytes * Ho)))
    return [(slice(b, b + images), slice(h, h + rows))
            for b in range(0, B, images) for h in range(0, Ho, rows)]


def conv2d(x, weight, bias, stride, padding):
    """As ops.conv2d. x (B,H,W,C), weight (K,K,C,O) -> y (B,Ho,Wo,O)."""
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
    """The weight's gradient: dy (B,Ho,Wo,O), x (B,H,W,C) -> dweight (K,K,C,O)."""
    C, O = x.shape[-1], dy.shape[-1]
    windows = sliding_windows(x, K, stride, padding)
    total = np.zeros((K * K * C, O), x.dtype)
    for strip in strips(windows, total.nbytes):
        rows = windows[strip].reshape(-1, K * K * C)
        total += product(rows.T, dy[strip].reshape(-1, O))
    return total.reshape(K, K, C, O)
