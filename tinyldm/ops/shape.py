"""Joining and parting channels: each is the other's derivative."""
from ..backend import get_xp


def concat(a, b):
    """Put b's channels behind a's. a (...,C1), b (...,C2) -> y (...,C1+C2)."""
    return get_xp(a).concatenate([a, b], axis=-1), a.shape[-1]


def concat_backward(dy, cache):
    """dy (...,C1+C2) -> da (...,C1), db (...,C2)."""
    return dy[..., :cache], dy[..., cache:]


def split(x):
    """Part the channels in two halves. x (...,2C) -> a (...,C), b (...,C)."""
    C = x.shape[-1] // 2
    assert x.shape[-1] == 2 * C, f"{x.shape[-1]} channels have no halves"
    return x[..., :C], x[..., C:]


def split_backward(da, db):
    """da (...,C), db (...,C) -> dx (...,2C)."""
    return get_xp(da).concatenate([da, db], axis=-1)
