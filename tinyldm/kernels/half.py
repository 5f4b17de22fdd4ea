"""float16 weights, which halve a model's memory, widened to float32 in parts where they are used.

NumPy converts float16 one number at a time. Here integer operations convert whole blocks, three to
four times as fast (`python -m tests.benchmarks.leads`). A float16 has a sign, 5 bits of exponent
and 10 bits of mantissa. Shifted to the places of a float32's 8 and 23 bits, they mean the same
number, except that the exponent is counted from 15, not from 127. A product with 2^112 corrects
that, also for subnormal numbers, those below 2^-14. Infinity and NaN would become finite numbers,
but weights have neither: loading refuses them.
"""
import numpy as np

from ..backend import parallel, scratch

BLOCK = 1 << 16             # numbers at a time: they stay in the cache during the four passes
SIGN_AND_VALUE = -0x70002000    # the bits of int32 that remain: 0x8fffe000


def widen(x, out):
    """Write float16 x (R,...,C) to out (R,...,C) as float32, and return out."""
    rows = max(1, BLOCK * len(x) // x.size)

    def block(start):
        values, narrow = out[start:start + rows], x[start:start + rows]
        bits = values.view(np.int32)
        np.copyto(bits, narrow.view(np.int16))              # repeats the sign on the left
        bits <<= 13
        bits &= SIGN_AND_VALUE
        values *= np.float32(2.0 ** 112)
    parallel(block, range(0, len(x), rows))
    return out


def widened(x, name=None):
    """A matrix (R,C) as float32: float16 is widened, float32 returned as it is.

    name: use the scratch memory with this name, otherwise new memory.
    """
    if x.dtype != np.float16:
        return x
    if x.flags.f_contiguous and not x.flags.c_contiguous:
        return widened(x.T, name).T
    return widen(x, scratch(name, *x.shape) if name else np.empty(x.shape, np.float32))
