"""Embeddings: rows of a table for token ids, sines and cosines for timesteps."""
import math

from ..backend import get_xp, wide, widen


def embedding(ids, weight):
    """Look up rows: y = weight[ids]. ids (...) integers in [0, V), weight (V,C) -> y (...,C)."""
    return weight[ids], (ids, weight)


def embedding_backward(dy, cache):
    """dy (...,C) -> dweight (V,C). A row that was used several times gets the sum."""
    ids, weight = cache
    xp = get_xp(weight)
    dweight = xp.zeros_like(weight, wide(weight.dtype))
    xp.add.at(dweight, ids.reshape(-1), widen(dy).reshape(-1, dy.shape[-1]))
    return dweight.astype(weight.dtype, copy=False)


def timestep_embedding(timesteps, dim, flip_sin_to_cos=True, freq_shift=0):
    """Sinusoidal embedding of a timestep: cosines and sines whose frequencies fall geometrically.

        y = [cos(t * f), sin(t * f)]
        f_i = 10000 ** (-i / (dim/2 - freq_shift)),    i = 0 ... dim/2 - 1

    timesteps (B,) float -> y (B,dim). The paper has [sin, cos]; Stable Diffusion has [cos, sin]. If
    dim is odd, the last column is 0.
    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5; Ho et al. 2020, arXiv:2006.11239,
    appendix B.
    """
    xp, half = get_xp(timesteps), dim // 2
    steps = xp.arange(half, dtype=wide(timesteps.dtype))
    frequencies = xp.exp(steps * (-math.log(10000) / (half - freq_shift)))
    angles = timesteps[:, None] * frequencies                            # (B,dim/2)
    columns = [xp.cos(angles), xp.sin(angles)]
    if not flip_sin_to_cos:
        columns.reverse()
    if dim % 2:
        columns.append(xp.zeros_like(angles[:, :1]))
    y = xp.concatenate(columns, axis=1).astype(timesteps.dtype, copy=False)
    return y, (angles, frequencies, flip_sin_to_cos)


def timestep_embedding_backward(dy, cache):
    """dy (B,dim) -> dtimesteps (B,), from cos' = -sin and sin' = cos, times the frequency."""
    angles, frequencies, flip_sin_to_cos = cache
    xp, half = get_xp(angles), angles.shape[1]
    first, second = dy[:, :half], dy[:, half:2 * half]
    dcos, dsin = (first, second) if flip_sin_to_cos else (second, first)
    dangles = dsin * xp.cos(angles) - dcos * xp.sin(angles)              # (B,dim/2)
    return (dangles * frequencies).sum(axis=1).astype(dy.dtype, copy=False)
