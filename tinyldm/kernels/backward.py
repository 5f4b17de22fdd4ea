"""Backward of group norm, layer norm and GEGLU in cache-sized blocks: fast twins for training.

Per channel group norm's derivative is a line in dy and x, dx = a*dy + b*x + c, whose three numbers
come from sums over the pixels; so no normalised copy is made, and no loop runs over the few
channels of a group.
"""
import math

import numpy as np

from .blocks import over_blocks

F32 = np.float32


def group_norm_backward(dy, x, weight, bias, mean, rstd, silu):
    """As ops.group_norm_backward (silu: as ops.group_norm_silu_backward): dx, dweight, dbias."""
    B, C, G = x.shape[0], x.shape[-1], mean.shape[2]
    pixels, grads = x.reshape(B, -1, C), dy.reshape(B, -1, C)
    mean, rstd = (s.reshape(B, 1, G).repeat(C // G, axis=-1) for s in (mean, rstd))     # (B,1,C)
    scale = rstd * weight
    shift = bias - mean * scale if silu else None
    g = np.empty_like(grads) if silu else grads
    sum_g, sum_gx = np.zeros((2, B, 1, C))              # float64: the blocks' sums are added here

    def sums(block):
        images, part = block[0], g[block]
        if silu:
            _silu_slope(pixels[block] * scale[images] + shift[images], out=part)
            part *= grads[block]
        product = np.einsum("bnc,bnc->bc", part, pixels[block])[:, None]
        return images, part.sum(axis=1, keepdims=True), product

    for images, total, product in over_blocks(sums, *pixels.shape):
        sum_g[images] += total
        sum_gx[images] += product
    sum_gn = (sum_gx - mean * sum_g) * rstd             # n is the normalised x

    def group_mean(channel_sums):       # (B,1,C) -> (B,1,C): each channel its group's mean
        by_group = (channel_sums * weight).reshape(B, 1, G, C // G)
        return by_group.sum(axis=-1).repeat(C // G, axis=-1) / (pixels.shape[1] * (C // G))

    slope = (-rstd * rstd * group_mean(sum_gn)).astype(F32)
    offset = (-rstd * group_mean(sum_g) - slope * mean).astype(F32)
    dx = np.empty_like(pixels)

    def line(block):
        images, part = block[0], dx[block]
        np.multiply(g[block], scale[images], out=part)
        part += pixels[block] * slope[images]
        part += offset[images]

    over_blocks(line, *pixels.shape)
    dweight, dbias = (s.sum(axis=(0, 1)).astype(F32) for s in (sum_gn, sum_g))
    return dx.reshape(x.shape), dweight, dbias


def _silu_slope(h, out):
    """silu'(h) = s * (1 + h * (1 - s)), s = sigmoid(h); h is used up."""
    np.multiply(h, F32(0.5), out=out)
    np.tanh(out, out=out)
    out *= F32(0.5)
    out += F32(0.5)                                     # s
    h -= h * out
    h += F32(1)
    out *= h


def layer_norm_backward(dy, x, weight, mean, rstd):
    """As ops.layer_norm_backward: dx, dweight, dbias."""
    C = x.shape[-1]
    tokens, grads = x.reshape(-1, C), dy.reshape(-1, C)
    mean, rstd = mean.reshape(-1, 1), rstd.reshape(-1, 1)
    dx = np.empty_like(tokens)

    def block(at):
        rows = at[1]
        n = tokens[rows] - mean[rows]
        n *= rstd[rows]
        d = grads[rows]
        dweight, dbias = np.einsum("nc,nc->c", d, n), d.sum(axis=0)
        part = np.multiply(d, weight, out=dx[rows])     # g
        m1 = part.mean(axis=1, keepdims=True)
        m2 = np.einsum("nc,nc->n", part, n)[:, None] * F32(1 / C)
        n *= m2
        part -= n
        part -= m1
        part *= rstd[rows]
        return dweight, dbias

    dweight, dbias = (np.sum(s, axis=0) for s in zip(*over_blocks(block, 1, *tokens.shape)))
    return dx.reshape(x.shape), dweight, dbias


# Abramowitz & Stegun 1964, 7.1.26:
# erfc(z) = (a1 t + … + a5 t^5) exp(-z^2), t = 1/(1 + p z), error 1.5e-7.
# Here z = |x|/sqrt 2, and the 1/2 of the normal distribution is in the coefficients. The
# exponential is the density that gelu's derivative needs anyway.
_P = F32(0.3275911 / math.sqrt(2))
_A = [F32(0.5 * a) for a in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)]


def _normal(x):
    """Phi(x) and exp(-x^2/2)."""
    bell = x * x
    bell *= F32(-0.5)
    np.exp(bell, out=bell)
    t = np.abs(x)
    t *= _P
    t += F32(1)
    np.reciprocal(t, out=t)
    tail = t * _A[4]
    for a in _A[3::-1]:
        tail += a
        tail *= t
    tail *= bell                                        # Phi(-|x|)
    np.subtract(F32(0.5), tail, out=tail)               # Phi(x) = 1/2 + sign(x) * (1/2 - tail)
    np.copysign(tail, x, out=tail)
    tail += F32(0.5)
    return tail, bell


def geglu_backward(dy, x):
    """As ops.geglu_backward: dy (..., F), x (..., 2F) -> dx (..., 2F)."""
    F = x.shape[-1] // 2
    rows, drows = x.reshape(-1, 2 * F), dy.reshape(-1, F)
    dx = np.empty_like(rows)

    def block(at):
        part = at[1]
        value, gate, d = rows[part, :F], rows[part, F:], drows[part]
        cdf, bell = _normal(gate)
        bell *= gate
        bell *= F32(1 / math.sqrt(2 * math.pi))
        bell += cdf                                     # gelu'(gate)
        bell *= value
        np.multiply(bell, d, out=dx[part, F:])
        cdf *= gate                                     # gelu(gate)
        np.multiply(cdf, d, out=dx[part, :F])

    over_blocks(block, 1, *rows.shape)
    return dx.reshape(x.shape)
