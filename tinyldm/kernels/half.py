"""float16 weights, widened a part at a time where they are used: half of the memory of a model.

NumPy converts float16 number by number. Here whole blocks are widened by integer operations, three
to four times as fast (`python -m tests.benchmarks.leads`). A float16 is a sign, 5 bits of exponent
and 10 of mantissa; moved to where a float32 keeps its own 8 and 23 bits they mean the
same number but for the exponent's origin, 15 in place of 127. So a product with 2^112 sets that
right, also for the numbers below 2^-14 that have no leading one. Infinity and NaN become finite:
weights are read strictly, and hold neither.
"""
import numpy as np

from ..backend import parallel, scratch

BLOCK = 1 << 16             # numbers at a time: four passes while they are near the core
SIGN_AND_VALUE = -0x70002000    # the bits of int32 that remain: 0x8fffe000


def widen(x, out):
    """float16 x (R,...,C) -> out (R,...,C), the same numbers as float32, written; returned."""
    rows = max(1, BLOCK * len(x) // x.size)
    for start in range(0, len(x), rows):
        values, narrow = out[start:start + rows], x[start:start + rows]
        bits = values.view(np.int32)
        np.copyto(bits, narrow.view(np.int16))              # spreads the sign to the left
        bits <<= 13
        bits &= SIGN_AND_VALUE
        values *= np.float32(2.0 ** 112)
    return out


def widened(x, name=None):
    """A float16 matrix (R,C) as float32, in new memory or this thread's scratch of that name.

    A float32 one as it is.
    """
    if x.dtype != np.float16:
        return x
    if x.flags.f_contiguous and not x.flags.c_contiguous:
        return widened(x.T, name).T
    if name:
        return widen(x, scratch(name, *x.shape))
    out = np.empty(x.shape, np.float32)
    rows = max(1, BLOCK // x.shape[1])
    parallel(lambda r: widen(x[r:r + rows], out[r:r + rows]), range(0, len(x), rows))
    return out
