"""Group, layer and batch norm in cache-sized blocks, shared among threads: twins of ops/norm.py.

Group norm reads the map twice: for the sums, and for scale * x + shift with the SiLU.

Measured against PyTorch (`python -m tests.benchmarks.kernels`): group norm with SiLU takes half the
time on the VAE's maps, but two to four times as long on the UNet's; layer norm from a third to four
times as long.
"""
import numpy as np

from .blocks import over_blocks

F32 = np.float32


def group_norm(x, weight, bias, num_groups, eps):
    """Twin of ops.group_norm. x (B,...,C), weight (C,), bias (C,) -> y (B,...,C)."""
    return _group_norm(x, weight, bias, num_groups, eps, silu=False)


def group_norm_silu(x, weight, bias, num_groups, eps):
    """Twin of ops.group_norm_silu. x (B,...,C), weight (C,), bias (C,) -> y (B,...,C)."""
    return _group_norm(x, weight, bias, num_groups, eps, silu=True)


def _group_norm(x, weight, bias, num_groups, eps, silu):
    B, C = x.shape[0], x.shape[-1]
    if C % num_groups:
        return NotImplemented                           # the op says why
    pixels = x.reshape(B, -1, C)                                         # (B,N,C)
    mean, rstd = _statistics(pixels, num_groups, eps)                    # (B,1,G)
    scale = weight * _to_channels(rstd, C)                               # (B,1,C)
    shift = bias - _to_channels(mean, C) * scale
    if silu:                            # silu(h) = (h/2) * (1 + tanh(h/2)): h/2 costs nothing here
        scale, shift = scale / 2, shift / 2
    y = np.empty_like(pixels)

    def normalise(block):
        images, part = block[0], y[block]
        np.multiply(pixels[block], scale[images], out=part)
        part += shift[images]
        if silu:
            gate = np.tanh(part)
            gate += 1
            part *= gate
    over_blocks(normalise, *pixels.shape)
    cache = x, weight, mean[..., None], rstd[..., None]
    return y.reshape(x.shape), (bias, cache) if silu else cache


def batch_norm_relu(x, weight, bias, mean, var, eps, out=None):
    """Twin of ops.batch_norm_relu. x (...,C), the others (C,) -> y (...,C), in out if given."""
    pixels = x.reshape(1, -1, x.shape[-1])                               # (1,N,C)
    scale = weight * (var + F32(eps)) ** F32(-0.5)
    shift = bias - mean * scale
    y = np.empty_like(pixels) if out is None else out.reshape(pixels.shape)

    def normalise(block):
        part = y[block]
        np.multiply(pixels[block], scale, out=part)
        part += shift
        np.maximum(part, 0, out=part)
    over_blocks(normalise, *pixels.shape)
    return y.reshape(x.shape), (x, weight, bias, mean, var, eps)


def _to_channels(statistic, C):                                          # (B,1,G) -> (B,1,C)
    return statistic.repeat(C // statistic.shape[-1], axis=-1)


def _statistics(pixels, G, eps):
    """(B,N,C) -> mean, rstd (B,1,G), from the sums of x - pivot and of its square.

    The pivot is the mean of the group's first pixel. Without it, mean square minus squared mean
    could cancel. Each block is summed in float32, and these sums are added in float64.
    """
    B, N, C = pixels.shape
    pivot = pixels[:, :1].reshape(B, 1, G, C // G).mean(axis=-1)         # (B,1,G)
    pivots = _to_channels(pivot, C)

    def sums(block):
        shifted = pixels[block] - pivots[block[0]]
        total = np.ones(shifted.shape[1], F32) @ shifted                 # faster than NumPy's sum
        return block[0], total, np.einsum("bnc,bnc->bc", shifted, shifted)

    totals, squares = np.zeros((2, B, C))
    for images, total, square in over_blocks(sums, B, N, C):
        totals[images] += total
        squares[images] += square
    count = N * (C // G)
    offset, square = (s.reshape(B, 1, G, -1).sum(axis=-1) / count for s in (totals, squares))
    rstd = (square - offset * offset + eps) ** -0.5
    return (pivot + offset).astype(F32), rstd.astype(F32)


def group_norm_backward(dy, cache, frozen=False):
    """Twin of ops.group_norm_backward. dy (B,...,C) -> dx (B,...,C), dweight (C,), dbias (C,)."""
    return _group_norm_backward(dy, *cache)             # the sums are needed for dx, too


def group_norm_silu_backward(dy, cache, frozen=False):
    """Twin of ops.group_norm_silu_backward: dy (B,...,C) -> dx (B,...,C), dweight, dbias (C,)."""
    bias, norm_cache = cache
    return _group_norm_backward(dy, *norm_cache, bias)


def _group_norm_backward(dy, x, weight, mean, rstd, bias=None):
    """bias: given if a SiLU follows the norm, otherwise None.

    With g = dy, or dy * silu'(h), each channel has dx = scale * g + slope * x + offset. The three
    numbers come from sums over the pixels. So there is no copy of the normalised x and no loop over
    the few channels of a group.
    """
    B, C, G = x.shape[0], x.shape[-1], mean.shape[2]
    pixels, grads = x.reshape(B, -1, C), dy.reshape(B, -1, C)
    mean, rstd = (s.reshape(B, 1, G).repeat(C // G, axis=-1) for s in (mean, rstd))     # (B,1,C)
    scale = rstd * weight
    shift = bias - mean * scale if bias is not None else None
    g = np.empty_like(grads) if bias is not None else grads
    sum_g, sum_gx = np.zeros((2, B, 1, C))              # float64, for the sums of all blocks

    def sums(block):
        images, part = block[0], g[block]
        if bias is not None:
            _silu_slope(pixels[block] * scale[images] + shift[images], out=part)
            part *= grads[block]
        product = np.einsum("bnc,bnc->bc", part, pixels[block])[:, None]
        return images, part.sum(axis=1, keepdims=True), product

    for images, total, product in over_blocks(sums, *pixels.shape):
        sum_g[images] += total
        sum_gx[images] += product
    sum_gn = (sum_gx - mean * sum_g) * rstd             # n is the normalised x

    def group_mean(channel_sums):       # (B,1,C) -> (B,1,C), equal within a group
        by_group = (channel_sums * weight).reshape(B, 1, G, C // G)
        return by_group.sum(axis=-1).repeat(C // G, axis=-1) / (pixels.shape[1] * (C // G))

    slope = (-rstd * rstd * group_mean(sum_gn)).astype(F32)
    offset = (-rstd * group_mean(sum_g) - slope * mean).astype(F32)
    dx = np.empty_like(pixels)

    def write(block):
        images, part = block[0], dx[block]
        np.multiply(g[block], scale[images], out=part)
        part += pixels[block] * slope[images]
        part += offset[images]

    over_blocks(write, *pixels.shape)
    dweight, dbias = (s.sum(axis=(0, 1)).astype(F32) for s in (sum_gn, sum_g))
    return dx.reshape(x.shape), dweight, dbias


def _silu_slope(h, out):
    """out = silu'(h) = s * (1 + h * (1 - s)), s = sigmoid(h). Overwrites h."""
    np.multiply(h, 0.5, out=out)
    np.tanh(out, out=out)
    out *= 0.5
    out += 0.5                                          # s
    h -= h * out
    h += 1
    out *= h


def layer_norm(x, weight, bias, eps):
    """As ops.layer_norm: x (...,C), weight (C,), bias (C,) -> y (...,C), mean, rstd (...,1)."""
    C = x.shape[-1]
    tokens = x.reshape(-1, C)
    y = np.empty_like(tokens)
    mean, rstd = np.empty((2, len(tokens), 1), F32)
    average = np.full((C, 1), 1 / C, F32)               # a product with it is faster than x.mean

    def normalise(block):
        rows = block[1]
        part = y[rows]
        np.matmul(tokens[rows], average, out=mean[rows])
        np.subtract(tokens[rows], mean[rows], out=part)
        variance = np.einsum("nc,nc->n", part, part)[:, None] / C
        rstd[rows] = (variance + eps) ** -0.5
        part *= rstd[rows]
        part *= weight
        part += bias
    over_blocks(normalise, 1, *tokens.shape)
    shape = (*x.shape[:-1], 1)
    return y.reshape(x.shape), (x, weight, mean.reshape(shape), rstd.reshape(shape))


def layer_norm_backward(dy, cache, frozen=False):
    """Twin of ops.layer_norm_backward. dy (...,C) -> dx (...,C), dweight (C,), dbias (C,)."""
    x, weight, mean, rstd = cache
    C = x.shape[-1]
    tokens, grads = x.reshape(-1, C), dy.reshape(-1, C)
    mean, rstd = mean.reshape(-1, 1), rstd.reshape(-1, 1)
    dx = np.empty_like(tokens)

    def block(at):
        rows = at[1]
        n = tokens[rows] - mean[rows]
        n *= rstd[rows]
        d = grads[rows]
        gradients = None if frozen else (np.einsum("nc,nc->c", d, n), d.sum(axis=0))
        part = np.multiply(d, weight, out=dx[rows])     # g
        m1 = part.mean(axis=1, keepdims=True)
        m2 = np.einsum("nc,nc->n", part, n)[:, None] * (1 / C)
        n *= m2
        part -= n
        part -= m1
        part *= rstd[rows]
        return gradients

    gradients = over_blocks(block, 1, *tokens.shape)
    sums = (None, None) if frozen else (np.sum(parts, axis=0) for parts in zip(*gradients))
    return dx.reshape(x.shape), *sums
