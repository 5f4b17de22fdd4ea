"""Which fast convolution, and the backward of both: twins of ops.conv2d and ops.conv2d_backward."""
import numpy as np

from . import im2col, winograd
from .half import widened
from .product import product


def conv2d(x, weight, bias, stride, padding):
    """As ops.conv2d. x (B,H,W,C), weight (K,K,C,O), bias (O,) or None -> y (B,Ho,Wo,O)."""
    if len(weight) == stride == 1 and padding == (0, 0):
        return product(x.reshape(-1, x.shape[-1]), weight[0, 0], bias).reshape(*x.shape[:-1], -1)
    if len(weight) == 3 and stride == 1 and winograd.pays(x.shape, weight.shape):
        return winograd.conv3x3(x, weight, bias, padding)
    return im2col.conv2d(x, weight, bias, stride, padding)


def conv2d_backward(dy, x, weight, stride, padding):
    """As ops.conv2d_backward, without dbias: dx (B,H,W,C), dweight (K,K,C,O)."""
    K, _, C, O = weight.shape
    if K == stride == 1 and padding == (0, 0):
        rows, pixels = dy.reshape(-1, O), x.reshape(-1, C)
        return (product(rows, weight[0, 0].T).reshape(x.shape),
                product(pixels.T, rows).reshape(weight.shape))
    if K == 3 and stride == 1 and winograd.pays(x.shape, weight.shape):
        dweight = winograd.dweight3x3(dy, x, padding)
    else:
        dweight = im2col.dweight(dy, x, K, stride, padding)
    if stride == 1:                 # dx is a convolution too: taps flipped, channels exchanged
        flipped = np.ascontiguousarray(weight[::-1, ::-1].transpose(0, 1, 3, 2))
        return conv2d(dy, flipped, None, 1, (K - 1 - padding[0], K - 1 - padding[1])), dweight
    B, Ho, Wo, _ = dy.shape
    before, after = padding
    weight, rows = widened(weight.reshape(-1, O)).reshape(weight.shape), dy.reshape(-1, O)
    dx = np.zeros((B, x.shape[1] + before + after, x.shape[2] + before + after, C), x.dtype)
    for i in range(K):
        for j in range(K):
            dx_tap = dx[:, i:i + stride * Ho:stride, j:j + stride * Wo:stride]
            dx_tap += product(rows, weight[i, j].T).reshape(dx_tap.shape)
    return dx[:, before:before + x.shape[1], before:before + x.shape[2]], dweight
