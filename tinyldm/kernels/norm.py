"""Group and layer norm in cache-sized blocks over threads: the fast twins of those ops.

Group norm reads the map twice: once for its sums, once for scale * x + shift and the SiLU.

Measured beside PyTorch (`python -m tests.benchmarks.kernels`): group norm with SiLU half of the
time on the VAE's maps, two to four times on the UNet's; layer norm a third to four times.
"""
import numpy as np

from .blocks import over_blocks


def group_norm(x, weight, bias, num_groups, eps, silu):
    """As ops.group_norm or, with silu, ops.group_norm_silu; returns what both keep for backward.

    x (B,...,C), weight (C,), bias (C,) -> y (B,...,C), mean (B,1,G,1), rstd (B,1,G,1), all float32.
    """
    B, C = x.shape[0], x.shape[-1]
    pixels = x.reshape(B, -1, C)                                         # (B,N,C)
    mean, rstd = _statistics(pixels, num_groups, eps)                    # (B,1,G)
    scale = weight * _to_channels(rstd, C)                               # (B,1,C)
    shift = bias - _to_channels(mean, C) * scale
    if silu:                            # silu(h) = (h/2) * (1 + tanh(h/2)): halved here, at no cost
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
    return y.reshape(x.shape), mean[..., None], rstd[..., None]


def _to_channels(statistic, C):                                          # (B,1,G) -> (B,1,C)
    return statistic.repeat(C // statistic.shape[-1], axis=-1)


def _statistics(pixels, G, eps):
    """(B,N,C) -> mean, rstd (B,1,G), from sums of x - pivot and of its square.

    The pivot, the mean of each group's first pixel, keeps the difference of mean square and squared
    mean from cancelling; a block's sums are short, and the blocks' are added in float64.
    """
    B, N, C = pixels.shape
    pivot = pixels[:, :1].reshape(B, 1, G, C // G).mean(axis=-1)         # (B,1,G)
    pivots = _to_channels(pivot, C)

    def sums(block):
        shifted = pixels[block] - pivots[block[0]]
        total = shifted.sum(axis=1)
        shifted *= shifted
        return block[0], total, shifted.sum(axis=1)

    totals, squares = np.zeros((2, B, C))
    for images, total, square in over_blocks(sums, B, N, C):
        totals[images] += total
        squares[images] += square
    count = N * (C // G)
    offset, square = (s.reshape(B, 1, G, -1).sum(axis=-1) / count for s in (totals, squares))
    rstd = (square - offset * offset + eps) ** -0.5
    return (pivot + offset).astype(np.float32), rstd.astype(np.float32)


def layer_norm(x, weight, bias, eps):
    """As ops.layer_norm: x (...,C), weight (C,), bias (C,) -> y (...,C), mean, rstd (...,1)."""
    C = x.shape[-1]
    tokens = x.reshape(-1, C)
    y = np.empty_like(tokens)
    mean, rstd = np.empty((2, len(tokens), 1), np.float32)

    def normalise(block):
        rows = block[1]
        part = y[rows]
        tokens[rows].mean(axis=-1, keepdims=True, out=mean[rows])
        np.subtract(tokens[rows], mean[rows], out=part)
        variance = np.einsum("nc,nc->n", part, part)[:, None] / C
        rstd[rows] = (variance + eps) ** -0.5
        part *= rstd[rows]
        part *= weight
        part += bias
    over_blocks(normalise, 1, *tokens.shape)
    shape = (*x.shape[:-1], 1)
    return y.reshape(x.shape), mean.reshape(shape), rstd.reshape(shape)
