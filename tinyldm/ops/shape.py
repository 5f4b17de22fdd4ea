"""Joining and splitting channels. Each is the backward of the other."""
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
