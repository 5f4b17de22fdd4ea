"""Joining and splitting channels, and patches put together: no arithmetic."""
import math

from ..backend import get_xp


def concat(a, b):
    """Append b's channels to a's. a (...,C1), b (...,C2) -> y (...,C1+C2)."""
    return get_xp(a).concatenate([a, b], axis=-1), a.shape[-1]


def concat_backward(dy, cache):
    """dy (...,C1+C2) -> da (...,C1), db (...,C2)."""
    return dy[..., :cache], dy[..., cache:]


def split(x):
    """Split the channels in two halves. x (...,2C) -> y = a (...,C), b (...,C)."""
    C = x.shape[-1] // 2
    assert x.shape[-1] == 2 * C, f"{x.shape[-1]} channels cannot be split in two halves"
    return (x[..., :C], x[..., C:]), None


def split_backward(dy, cache):
    """dy = da (...,C), db (...,C) -> dx (...,2C)."""
    return get_xp(dy[0]).concatenate(dy, axis=-1)


def unpatchify(x, patch_size):
    """Put a square of patches together: each token holds the pixels of one patch.

    x (B,T,p*p*C) -> y (B,G*p,G*p,C), G = sqrt(T). Tokens come row by row; so do the pixels in a
    token, each with its channels side by side.
    Source: Peebles & Xie 2022, arXiv:2212.09748, section 3.2; its code's DiT.unpatchify.
    """
    (B, T, C), p = x.shape, patch_size
    G = math.isqrt(T)
    assert G * G == T and C % (p * p) == 0, f"{T} tokens of {C} numbers are no square of {p}x{p}"
    y = x.reshape(B, G, G, p, p, -1).swapaxes(2, 3)                      # (B,G,p,G,p,C)
    return y.reshape(B, G * p, G * p, -1), p


def unpatchify_backward(dy, cache):
    """dy (B,G*p,G*p,C) -> dx (B,T,p*p*C): each pixel back to its place in a token."""
    (B, H, _, C), p = dy.shape, cache
    dx = dy.reshape(B, H // p, p, H // p, p, C).swapaxes(2, 3)           # (B,G,G,p,p,C)
    return dx.reshape(B, -1, p * p * C)
