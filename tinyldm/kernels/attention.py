"""Attention, one block of scores at a time: the fast twins of ops.attention.

A block of scores is computed, exponentiated and multiplied with the values while it is in the
core's cache. Heads of few scores are computed together, with those of other samples: of 16 samples
with 64 tokens, that takes a third of the plain op's time (`python -m tests.benchmarks.leads`). Of
many scores, a block is 1024 queries by 256 keys. The whole matrix of scores never exists, so memory
is proportional to the number of tokens. Each block of keys adds to two sums: the numerator
(weighted values) and the denominator (weights). As in softmax, the largest score is subtracted so
that no exponential overflows. If a later block has a larger score, the sums so far are scaled down.
If no score can be large, all of this is left out. Backward takes a block of queries with all keys,
so that it computes each score once: half of the plain op's time with 4096 tokens. Worker threads
share the heads and parts of the queries; each has one BLAS thread.
Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", arXiv:1805.02867,
algorithm 3; Dao et al. 2022, "FlashAttention", arXiv:2205.14135, section 3.1.
"""
import math

import numpy as np

from ..backend import free_threads, parallel, scratch

QUERIES, KEYS = 1024, 256   # in a block: 1 MiB of scores
QUERIES_BACK = 256          # at a time in backward, with all keys
ITEM = 256                  # at least so many queries per item of work
FEW = 1 << 16               # heads with so many scores or fewer are computed together,
TOGETHER = 1 << 18          # up to so many scores: 1 MiB. Then NumPy's calls are long enough that
                            # threads seldom wait for the interpreter's lock
SERIAL = 1 << 17            # for fewer scores in all, waking a thread costs more than it saves
# Scores from -80 to 80 (exponents of 2) can stay as they are: 2^80 and 2^-80 are far from float32's
# limits 2^127 and 2^-126, even multiplied with values up to 1e10 and summed over thousands of keys.
SAFE = 80
LOWEST = np.finfo(np.float32).min       # not -inf, because -inf - -inf is NaN


@np.errstate(under="ignore")            # weights close to 0
def attention(q, k, v, num_heads, causal=False, mask=None):
    """Twin of ops.attention without a mask. q (B,N,C), k (B,M,C), v (B,M,C) -> y (B,N,C)."""
    (B, N, C), M = q.shape, k.shape[1]
    if C % num_heads or mask is not None:
        return NotImplemented
    y = np.empty_like(q)
    heads = [split_heads(x, num_heads) for x in (q, k, v, y)]
    if N * M <= FEW:
        _over_heads(lambda *parts: _few_scores(*parts, causal), heads)
        return y, (q, k, v, num_heads, causal, mask)
    parts = max(1, 4 * free_threads() // (B * num_heads))                # per head
    size = max(ITEM, -(-N // parts))

    def work(item):
        b, h, start = item
        rows, (q, k, v, y) = slice(start, start + size), (x[b, h] for x in heads)
        _one_head(q[rows], k, v, y[rows], start if causal else None)
    parallel(work, [(b, h, start) for b in range(B) for h in range(num_heads)
                    for start in range(0, N, size)])
    return y, (q, k, v, num_heads, causal, mask)


def split_heads(x, num_heads):                         # (B,N,h*d) -> (B,h,N,d), a view
    B, N, C = x.shape
    return x.reshape(B, N, num_heads, C // num_heads).swapaxes(1, 2)


def _over_heads(function, arrays):
    """function(*parts of the arrays), over worker threads. arrays: (B,h,N or M,d); the first two
    are queries and keys. A part is of as many heads as have TOGETHER scores, but of one at least.
    """
    (B, h, N, _), M = arrays[0].shape, arrays[1].shape[2]
    most = max(1, min(TOGETHER // max(1, N * M), B * h // (2 * free_threads())))    # heads per part
    heads, images = -(-h // -(-h // most)), max(1, most // h)
    places = [(slice(b, b + images), slice(i, i + heads))
              for b in range(0, B, images) for i in range(0, h, heads)]
    run = parallel if B * h * N * M >= SERIAL else map
    list(run(lambda place: function(*(x[place] for x in arrays)), places))


def _few_scores(q, k, v, y, causal):
    """q (...,N,d), k (...,M,d), v (...,M,d) -> y (...,N,d), written."""
    e, total = _weights(_exponents(q), k, 0 if causal else None)
    np.divide(e @ v, total, out=y)


def _exponents(q):
    """2^(these @ k) is e^(q @ k / sqrt(d))."""
    return q * np.float32(math.log2(math.e) / math.sqrt(q.shape[-1]))


def _weights(q, k, first):
    """The weights of all keys before they are divided by their sum, and that: q (...,n,d) from
    _exponents, k (...,M,d) -> e (...,n,M), in scratch memory, total (...,n,1).

    first: if causal, the position of query 0, else None.
    """
    e = np.matmul(q, k.swapaxes(-1, -2), out=scratch("e", *q.shape[:-1], k.shape[-2]))
    n, M = e.shape[-2:]
    if first is not None:
        np.copyto(e, -np.inf, where=np.arange(M) > np.arange(first, first + n)[:, None])
    if not _are_safe(q, k):
        e -= e.max(axis=-1, keepdims=True)
    np.exp2(e, out=e)
    return e, (e @ np.ones(M, np.float32))[..., None]


def _are_safe(q, k):
    """Whether no score q.k is large, as |q.k| <= |q| |k|. With NaN it may be."""
    return _largest_norm(q) * _largest_norm(k) <= SAFE


def _largest_norm(x):
    return math.sqrt(np.einsum("...d,...d->...", x, x).max())


def _one_head(q, k, v, y, first):
    """q (n,d), k (M,d), v (M,d) -> y (n,d), written. first: if causal, the position of query 0."""
    n, M = len(q), len(k)
    q = _exponents(q)
    safe = _are_safe(q, k)
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

    dy (B,N,C) -> dq (B,N,C), dk (B,M,C), dv (B,M,C).
    """
    q, k, v, num_heads, causal, mask = cache
    if mask is not None:
        return NotImplemented
    gradients = tuple(np.empty_like(x) for x in (q, k, v))
    _over_heads(lambda *parts: _heads_backward(*parts, causal),
                [split_heads(x, num_heads) for x in (q, k, v, dy, *gradients)])
    return gradients


def _heads_backward(q, k, v, dy, dq, dk, dv, causal):
    """q (...,N,d), k (...,M,d), v (...,M,d), dy (...,N,d) -> dq, dk, dv, written.

    With e the weights before they are divided by their sum, and g = dy / sum:

        dv = e.T @ g,      dp = g @ v.T,      ds = e * (dp - (sum_m e * dp) / sum)
    """
    N, scale = q.shape[-2], np.float32(1 / math.sqrt(q.shape[-1]))
    exponents = _exponents(q)

    def add(a, b, out):                                 # the first block writes
        if start:
            out += a @ b
        else:
            np.matmul(a, b, out=out)

    for start in range(0, N, QUERIES_BACK):
        rows = ..., slice(start, start + QUERIES_BACK), slice(None)
        e, total = _weights(exponents[rows], k, start if causal else None)   # (...,n,M)
        g = dy[rows] / total
        add(e.swapaxes(-1, -2), g, out=dv)
        ds = np.matmul(g, v.swapaxes(-1, -2), out=scratch("ds", *e.shape))
        ds -= np.einsum("...nm,...nm->...n", e, ds)[..., None] / total
        ds *= e
        np.matmul(ds, k, out=dq[rows])
        add(ds.swapaxes(-1, -2), q[rows], out=dk)
    dq *= scale
    dk *= scale
