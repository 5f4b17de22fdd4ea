"""Attention: each query gets a mean of the values, weighted by how well their keys match it."""
import numpy as np

from ..backend import fast_twin, get_xp, widen
from ..kernels import attention as blocked
from ..kernels import cuda
from .activation import softmax, softmax_backward

# So many queries at a time: the scores are (B,h,ROWS,M), never (B,h,N,M).
ROWS = 512


def split_heads(x, num_heads):                                      # (B,N,h*d) -> (B,h,N,d), a view
    B, N, C = x.shape
    assert C % num_heads == 0, f"{C} channels do not divide into {num_heads} heads"
    return x.reshape(B, N, num_heads, C // num_heads).swapaxes(1, 2)


def _merge_heads(x):                                                # (B,h,N,d) -> (B,N,h*d)
    B, h, N, d = x.shape
    return x.swapaxes(1, 2).reshape(B, N, h * d)


def weights(q, k, start, causal, mask):
    """softmax(q @ k.T / sqrt(d)), queries from `start` on: (B,h,n,d), (B,h,M,d) -> (B,h,n,M)."""
    xp = get_xp(q)
    scores = (q * q.shape[-1] ** -0.5) @ k.swapaxes(-1, -2)              # (B,h,n,M)
    if mask is not None:
        scores += mask[:, None, start:start + q.shape[2]]
    if causal:
        future = xp.arange(k.shape[2]) > xp.arange(start, start + q.shape[2])[:, None]
        scores = xp.where(future, -xp.inf, scores)
    return softmax(scores)[0]


@fast_twin(cpu=blocked.attention, gpu=cuda.attention)
@np.errstate(under="ignore")            # weights close to 0
def attention(q, k, v, num_heads, causal=False, mask=None):
    """Scaled dot-product attention, each head on its own d = C/h channels.

        y = softmax(q @ k.T / sqrt(d) + mask) @ v

    q (B,N,C), k (B,M,C), v (B,M,C) -> y (B,N,C). causal: token n sees only tokens 0..n (N = M).
    mask (B,N,M): 0 where a query may look, and far below 0 elsewhere; it has no gradient.
    For backward only q, k and v are kept: the N x M weights are computed again.
    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1 and section 3.2.2.
    """
    # float16 scores could overflow, and CuPy multiplies stacks of matrices in float32 anyway.
    heads = [widen(split_heads(x, num_heads)) for x in (q, k, v)]
    y = get_xp(q).empty_like(heads[0])
    for start in range(0, q.shape[1], ROWS):
        rows = slice(start, start + ROWS)
        y[:, :, rows] = weights(heads[0][:, :, rows], heads[1], start, causal, mask) @ heads[2]
    return _merge_heads(y).astype(q.dtype, copy=False), (q, k, v, num_heads, causal, mask)


@fast_twin(cpu=blocked.attention_backward, gpu=cuda.attention_backward)
@np.errstate(under="ignore")
def attention_backward(dy, cache):
    """dy (B,N,C) -> dq (B,N,C), dk (B,M,C), dv (B,M,C).

    With p the weights and s the scores, per head:

        dv = p.T @ dy,              dp = dy @ v.T,              ds = softmax'(dp)
        dq = ds @ k / sqrt(d),      dk = ds.T @ q / sqrt(d)

    All queries share the keys and values, so dk and dv are sums over the blocks of rows.
    """
    *qkv, num_heads, causal, mask = cache
    q, k, v, dy = (widen(split_heads(x, num_heads)) for x in (*qkv, dy))
    xp, scale = get_xp(q), q.shape[-1] ** -0.5
    dq, dk, dv = xp.empty_like(q), xp.zeros_like(k), xp.zeros_like(v)
    for start in range(0, q.shape[2], ROWS):
        rows = slice(start, start + ROWS)
        p = weights(q[:, :, rows], k, start, causal, mask)         # (B,h,n,M)
        dv += p.swapaxes(-1, -2) @ dy[:, :, rows]
        dp = dy[:, :, rows] @ v.swapaxes(-1, -2)
        ds = softmax_backward(dp, p) * scale                        # causal: p = 0, so ds = 0
        dq[:, :, rows] = ds @ k
        dk += ds.swapaxes(-1, -2) @ q[:, :, rows]
    return tuple(_merge_heads(d).astype(x.dtype, copy=False) for d, x in zip((dq, dk, dv), qkv))
