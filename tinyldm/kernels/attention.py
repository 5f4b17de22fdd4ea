"""Attention, one block of queries and keys at a time: the fast twins of ops.attention.

Worker threads share the heads and parts of the queries; each has one BLAS thread. A block of
scores, 1024 queries by 256 keys, is computed, exponentiated and multiplied with the values while it
is in the core's cache. The whole matrix of scores never exists, so memory is proportional to the
number of tokens. Each block of keys adds to two sums: the numerator (weighted values) and the
denominator (weights). As in softmax, the largest score is subtracted so that no exponential
overflows. If a later block has a larger score, the sums so far are scaled down. If no score can be
large, all of this is left out. Backward takes a block of queries with all keys, so that it computes
each score once: half of the plain op's time with 4096 tokens (`python -m tests.benchmarks.leads`).
Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", arXiv:1805.02867,
algorithm 3; Dao et al. 2022, "FlashAttention", arXiv:2205.14135, section 3.1.
"""
import math

import numpy as np

from ..backend import free_threads, parallel, scratch

QUERIES, KEYS = 1024, 256   # in a block: 1 MiB of scores
QUERIES_BACK = 256          # at a time in backward, with all keys
ITEM = 256                  # at least so many queries per item of work
FEW = 1 << 13               # with fewer scores per head, the plain op is faster
# Scores from -80 to 80 (exponents of 2) can stay as they are: 2^80 and 2^-80 are far from float32's
# limits 2^127 and 2^-126, even multiplied with values up to 1e10 and summed over thousands of keys.
SAFE = 80
LOWEST = np.finfo(np.float32).min       # not -inf, because -inf - -inf is NaN


@np.errstate(under="ignore")            # weights close to 0
def attention(q, k, v, num_heads, causal=False, mask=None):
    """Twin of ops.attention without a mask. q (B,N,C), k (B,M,C), v (B,M,C) -> y (B,N,C)."""
    B, N, C = q.shape
    if N * k.shape[1] < FEW or C % num_heads or mask is not None:
        return NotImplemented
    d = C // num_heads
    y = np.empty_like(q)
    parts = max(1, 4 * free_threads() // (B * num_heads))                # per head
    size = max(ITEM, -(-N // parts))

    def work(item):
        b, h, start = item
        head, rows = slice(h * d, (h + 1) * d), slice(start, min(start + size, N))
        _one_head(q[b, rows, head], k[b, :, head], v[b, :, head], y[b, rows, head],
                  start if causal else None)
    parallel(work, [(b, h, start) for b in range(B) for h in range(num_heads)
                    for start in range(0, N, size)])
    return y, (q, k, v, num_heads, causal, mask)


def _one_head(q, k, v, y, first):
    """q (n,d), k (M,d), v (M,d) -> y (n,d), written. first: if causal, the position of query 0."""
    (n, d), M = q.shape, len(k)
    q = q * np.float32(math.log2(math.e) / math.sqrt(d))    # 2^(q.k) is now e^(q.k / sqrt(d))
    # |q.k| <= |q| |k|. With NaN this is False.
    safe = _largest_norm(q) * _largest_norm(k) <= SAFE
    buffer, ones = np.empty(QUERIES * KEYS, np.float32), np.ones(KEYS, np.float32)
    for start in range(0, n, QUERIES):
        part = q[start:start + QUERIES]                                  # (R,d)
        largest = np.full((len(part), 1), LOWEST, np.float32)
        numerator, denominator = 0, 0                                    # (R,d), (R,)
        for at in range(0, M, KEYS):
            keys, values = k[at:at + KEYS], v[at:at + KEYS]              # (m,d)
            shape = len(part), len(keys)
            scores = np.matmul(part, keys.T, out=buffer[:math.prod(shape)].reshape(shape))
            if first is not None:
                queries = first + start + np.arange(len(part))
                scores[np.arange(at, at + len(keys)) > queries[:, None]] = -np.inf
            if not safe:
                before, largest = largest, np.maximum(largest, scores.max(axis=1, keepdims=True))
                scores -= largest
                shrink = np.exp2(before - largest)                       # 0 in the first block
                numerator, denominator = numerator * shrink, denominator * shrink[:, 0]
            np.exp2(scores, out=scores)
            numerator = numerator + scores @ values
            denominator = denominator + scores @ ones[:len(keys)]
        np.divide(numerator, denominator[:, None], out=y[start:start + QUERIES])


@np.errstate(under="ignore")            # weights close to 0
def attention_backward(dy, cache):
    """Twin of ops.attention_backward without a mask.

    dy (B,N,C) -> dq (B,N,C), dk (B,M,C), dv (B,M,C). Worker threads share the heads.
    """
    q, k, v, num_heads, causal, mask = cache
    B, N, C = q.shape
    if N * k.shape[1] < FEW or mask is not None:
        return NotImplemented
    d = C // num_heads
    gradients = tuple(np.empty_like(x) for x in (q, k, v))

    def work(item):
        b, h = item
        _one_head_backward(*(x[b, :, h * d:(h + 1) * d] for x in (dy, q, k, v, *gradients)), causal)
    parallel(work, [(b, h) for b in range(B) for h in range(num_heads)])
    return gradients


def _one_head_backward(dy, q, k, v, dq, dk, dv, causal):
    """dy (N,d), q (N,d), k (M,d), v (M,d) -> dq (N,d), dk (M,d), dv (M,d), written.

    With e the weights before they are divided by their sum, and g = dy / sum:

        dv = e.T @ g,      dp = g @ v.T,      ds = e * (dp - (sum_m e * dp) / sum)
    """
    N, M, scale = len(q), len(k), 1 / math.sqrt(q.shape[1])
    exponents = q * np.float32(math.log2(math.e) * scale)
    safe, ones = _largest_norm(exponents) * _largest_norm(k) <= SAFE, np.ones(M, np.float32)
    dk[:], dv[:] = 0, 0
    for start in range(0, N, QUERIES_BACK):
        rows = slice(start, min(start + QUERIES_BACK, N))
        e = np.matmul(exponents[rows], k.T, out=scratch("e", rows.stop - start, M))
        if causal:
            e[np.arange(M) > np.arange(start, rows.stop)[:, None]] = -np.inf
        if not safe:
            e -= e.max(axis=1, keepdims=True)
        np.exp2(e, out=e)
        total = (e @ ones)[:, None]                                      # (n,1)
        g = dy[rows] / total
        dv += e.T @ g
        ds = np.matmul(g, v.T, out=scratch("ds", *e.shape))
        ds -= np.einsum("nm,nm->n", e, ds)[:, None] / total
        ds *= e
        np.matmul(ds, k, out=dq[rows])
        dk += ds.T @ q[rows]
    dq *= np.float32(scale)
    dk *= np.float32(scale)


def _largest_norm(x):
    return math.sqrt(np.einsum("nd,nd->n", x, x).max())
