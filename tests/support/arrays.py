"""Arrays for tests: read-only, random, and those that a cache holds."""
import numpy as np


def read_only(array):
    if array is not None:
        array = np.array(array)
        array.flags.writeable = False
    return array


def arrays_in(cache):
    """All arrays of a cache, which may be nested tuples."""
    if isinstance(cache, np.ndarray):
        yield cache
    elif isinstance(cache, tuple):
        for item in cache:
            yield from arrays_in(item)


def read_only_cache(cache):
    for array in arrays_in(cache):
        array.flags.writeable = False


def normal(*shape, seed=0, scale=1.0, mean=0.0, dtype=np.float32):
    return read_only(np.random.default_rng(seed).normal(mean, scale, shape).astype(dtype))
