"""The twins of ops/conv.py: the choice of the convolution, its backward, and upsampling."""
import numpy as np

from ..backend import parallel
from . import im2col, winograd
from .half import widened
from .product import column_sums, product

FEW = 8                     # output channels: with no more than this, few_outputs is fastest
LARGE = 1 << 19             # numbers of a weight: to copy so many in another order takes a tenth
                            # of a convolution or more; of small maps, most of the time


def conv2d(x, weight, bias=None, stride=1, padding=(0, 0)):
    """Twin of ops.conv2d. x (B,H,W,C), weight (K,L,C,O), bias (O,) or None -> y (B,Ho,Wo,O)."""
    if x.shape[-1] != weight.shape[2]:
        return NotImplemented                           # the op says why
    return _conv2d(x, weight, bias, stride, im2col.sides(padding)), (x, weight, stride, padding)


def _conv2d(x, weight, bias, stride, padding):
    """padding: ((top, bottom), (left, right))."""
    if weight.shape[0] == weight.shape[1] == stride == 1 and not np.any(padding):
        return product(x.reshape(-1, x.shape[-1]), weight[0, 0], bias).reshape(
            *x.shape[:-1], weight.shape[3])
    if stride == 1 and weight.shape[3] <= FEW:
        return few_outputs(x, weight, bias, padding)
    if _suits_winograd(x, weight, stride, padding):
        return winograd.conv3x3(x, weight, bias, padding[0])
    return im2col.conv2d(x, weight, bias, stride, padding)


def _suits_winograd(x, weight, stride, padding):
    return (weight.shape[:2] == (3, 3) and stride == 1 and padding[0] == padding[1]
            and winograd.pays(x.shape))


def few_outputs(x, weight, bias, padding):
    """conv2d with stride 1: one product for all K*L taps, whose results are shifted and added up.

    Made for the three channels of a picture. im2col would copy each input number K*L times.
    """
    B, H, W, C = x.shape
    K, L, _, O = weight.shape
    rows, columns = im2col.sides(padding)
    taps = product(x.reshape(-1, C), weight.transpose(2, 0, 1, 3).reshape(C, -1))
    taps = taps.reshape(B, H, W, K, L, O)
    y = np.empty((B, H + sum(rows) - K + 1, W + sum(columns) - L + 1, O), np.float32)
    y[:] = 0 if bias is None else bias
    for i in range(K):
        for j in range(L):
            # y[h, w] += taps[h + i - top, w + j - left], where both exist
            (to_h, from_h), (to_w, from_w) = (
                (slice(max(0, -shift), max(0, size - shift)),
                 slice(max(0, shift), max(0, shift + y_size)))
                for shift, size, y_size in ((i - rows[0], H, y.shape[1]),
                                            (j - columns[0], W, y.shape[2])))
            y[:, to_h, to_w] += taps[:, from_h, from_w, i, j]
    return y


def upsample_nearest(x, size=None):
    """Twin of ops.upsample_nearest: x (B,H,W,C) -> y (B,2H,2W,C). Threads share the rows."""
    B, h, w, C = x.shape
    H, W = size or (2 * h, 2 * w)
    if (H + 1) // 2 != h or (W + 1) // 2 != w:
        return NotImplemented                           # the op says why
    y = np.empty((B, h, 2, w, 2, C), x.dtype)

    def row(i):
        y[:, i] = x[:, i, None, :, None]
    parallel(row, range(h))
    return y.reshape(B, 2 * h, 2 * w, C)[:, :H, :W], (H, W)


def conv2d_backward(dy, cache):
    """Twin of ops.conv2d_backward. dy (B,Ho,Wo,O) -> dx (B,H,W,C), dweight (K,L,C,O), dbias."""
    x, weight, stride, padding = cache
    K, L, C, O = weight.shape
    rows, zeros = dy.reshape(-1, O), im2col.sides(padding)
    if K == L == stride == 1 and not np.any(zeros):
        dweight = product(x.reshape(-1, C).T, rows).reshape(weight.shape)
    elif _suits_winograd(x, weight, stride, zeros) and winograd.dweight_pays(x.shape, O):
        dweight = winograd.dweight3x3(dy, x, zeros[0])
    else:
        dweight = im2col.dweight(dy, x, (K, L), stride, zeros)
    return (conv2d_input_backward(dy, weight, x.shape, stride, padding), dweight,
            column_sums(rows))


def conv2d_input_backward(dy, weight, shape, stride=1, padding=(0, 0)):
    """Twin of ops.conv2d_input_backward. dy (B,Ho,Wo,O), weight (K,L,C,O) -> dx of the shape."""
    K, L, C, O = weight.shape
    rows, padding = dy.reshape(-1, O), im2col.sides(padding)
    if K == L == stride == 1 and not np.any(padding):
        return product(rows, weight[0, 0].T).reshape(shape)
    (top, bottom), (left, right) = padding
    rest = (K - 1 - top, K - 1 - bottom), (L - 1 - left, L - 1 - right)
    if stride == 1 and np.min(rest) >= 0:       # dx is a convolution of dy
        turned = winograd.turn(weight)
        if weight.size < LARGE or C <= FEW:
            return _conv2d(dy, np.ascontiguousarray(turned), None, 1, rest)
        if _suits_winograd(dy, turned, 1, rest):
            return winograd.conv3x3(dy, weight, None, rest[0], turned=True)
    (_, Ho, Wo, _), (B, H, W, _) = dy.shape, shape
    weight = widened(weight.reshape(-1, O)).reshape(weight.shape)
    dx = np.zeros((B, H + top + bottom, W + left + right, C), np.float32)
    for i in range(K):
        for j in range(L):
            dx_tap = dx[:, i:i + stride * Ho:stride, j:j + stride * Wo:stride]
            dx_tap += product(rows, weight[i, j].T).reshape(dx_tap.shape)
    return dx[:, top:top + H, left:left + W]
