"""Pooling: the largest number in a window, or the average of a window, for each channel.

Both work along the rows first, then along the columns: 2K numbers per window instead of K*K.
"""
from ..backend import fast_twin, get_xp, wide, widen
from ..kernels import pool


def _windows(x, K, stride, axis, size):
    """The K views of a padded map that together are the windows along an axis, `size` of them."""
    before = (slice(None),) * axis
    return [x[(*before, slice(i, i + stride * size, stride))] for i in range(K)]


def _pad(x, padding, value):
    if padding == (0, 0):
        return x
    return get_xp(x).pad(x, ((0, 0), padding, padding, (0, 0)), constant_values=value)


def _out(size, K, stride, padding):
    return (size + sum(padding) - K) // stride + 1


def max_pool(x, K, stride=1, padding=(0, 0)):
    """y[b,h,w] = the largest of the K x K numbers x[b, stride*h + i - before, ...], per channel.

    x (B,H,W,C) -> y (B,Ho,Wo,C). padding = (before, after): outside the map nothing is larger.
    """
    y = _pad(x, padding, -get_xp(x).inf)
    for axis in (1, 2):
        first, *others = _windows(y, K, stride, axis, _out(x.shape[axis], K, stride, padding))
        y = first.copy()
        for other in others:
            get_xp(x).maximum(y, other, out=y)
    return y, (x, y, K, stride, padding)


def max_pool_backward(dy, cache):
    """dy (B,Ho,Wo,C) -> dx (B,H,W,C): each gradient goes to the number that was the largest.

    Of several equal ones it goes to the first, row by row, as in PyTorch.
    """
    x, y, K, stride, padding = cache
    padded = _pad(x, padding, -get_xp(x).inf)
    dx = get_xp(x).zeros_like(padded, wide(x.dtype))
    open_ = get_xp(x).ones(y.shape, bool)               # whose gradient has not found its place yet
    for x_row, dx_row in zip(*(_windows(a, K, stride, 1, y.shape[1]) for a in (padded, dx))):
        for x_tap, dx_tap in zip(*(_windows(a, K, stride, 2, y.shape[2]) for a in (x_row, dx_row))):
            hit = open_ & (x_tap == y)
            dx_tap += dy * hit
            open_ &= ~hit
    before = padding[0]
    dx = dx[:, before:before + x.shape[1], before:before + x.shape[2]]
    return dx.astype(x.dtype, copy=False)


@fast_twin(cpu=pool.average_pool)
def average_pool(x, K, stride=1, padding=(0, 0)):
    """y[b,h,w] = the average of those of the K x K numbers of a channel that lie inside the map.

    x (B,H,W,C) -> y (B,Ho,Wo,C). Zeros outside the map are not counted, as in TensorFlow; PyTorch
    counts them unless told otherwise.
    """
    y = _pad(widen(x), padding, 0)
    for axis in (1, 2):
        y = sum(_windows(y, K, stride, axis, _out(x.shape[axis], K, stride, padding)))
    y = y / _count(x, y.shape, K, stride, padding)
    return y.astype(x.dtype, copy=False), (x, K, stride, padding)


def _count(x, y_shape, K, stride, padding):
    """How many pixels of the map each window has: (1,Ho,Wo,1)."""
    inside = _pad(get_xp(x).ones((1, *x.shape[1:3], 1), wide(x.dtype)), padding, 0)
    for axis in (1, 2):
        inside = sum(_windows(inside, K, stride, axis, y_shape[axis]))
    return inside


def average_pool_backward(dy, cache):
    """dy (B,Ho,Wo,C) -> dx (B,H,W,C): each pixel in a window gets an equal share of dy."""
    x, K, stride, padding = cache
    share = widen(dy) / _count(x, dy.shape, K, stride, padding)
    B, H, W, C = x.shape
    dx = get_xp(x).zeros((B, H + sum(padding), W + sum(padding), C), share.dtype)
    for row in _windows(dx, K, stride, 1, dy.shape[1]):                 # views into dx
        for tap in _windows(row, K, stride, 2, dy.shape[2]):
            tap += share
    before = padding[0]
    return dx[:, before:before + H, before:before + W].astype(x.dtype, copy=False)
