"""A matrix product over worker threads: the fast twin inside ops.linear and the 1x1 convolution.

BLAS can use all cores by itself, but its threads then keep spinning for some milliseconds in wait
for more, while the worker threads of the other kernels want the cores. So BLAS gets one thread, and
the rows or the columns are shared out here; a part is still in the cache when its bias is added.
`python -m tests.benchmarks.leads` times it beside BLAS's own threads.
"""
import numpy as np

from ..backend import free_threads, parallel
from .half import widened

PART = 128                  # rows or columns of an item of work, at least
FEW = range(16, PART)       # rows of which each thread would have less than a millisecond's work
LARGE = 1 << 19             # numbers of a matrix that is worth more than one thread all the same


def linear(x, weight, bias=None):
    """Twin of ops.linear. x (..., in), weight (out, in), bias (out,) or None -> y (..., out)."""
    y = product(x.reshape(-1, x.shape[-1]), weight.T, bias)
    return y.reshape(*x.shape[:-1], len(weight)), (x, weight)


def linear_backward(dy, cache):
    """Twin of ops.linear_backward: dy (..., out) -> dx (..., in), dweight (out, in), dbias (out,).
    """
    x, weight = cache
    rows, inputs = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    return product(rows, weight).reshape(x.shape), product(rows.T, inputs), column_sums(rows)


def product(x, matrix, bias=None):
    """y = x @ matrix + bias: x (R,I), matrix (I,O), bias (O,) or None -> y (R,O), float32.

    The matrix may be float16; a part of it is widened where it is used.
    """
    R, O = len(x), matrix.shape[1]
    if R in FEW and matrix.size >= LARGE and matrix.dtype == np.float32 and free_threads() > 1:
        return _few_rows(x, matrix, bias)
    if R > O:                                           # every part would widen all of it
        matrix = widened(matrix)
    y = np.empty((R, O), np.float32)
    # Every part reads one operand whole: share out the longer side, so that that is the smaller.
    longer, threads = max(R, O), free_threads()
    whole = threads == 1 and matrix.dtype != np.float16
    step = max(1, longer) if whole else max(PART, -(-longer // (4 * threads)))

    def part(start):
        at = slice(start, start + step)
        rows, columns = (at, slice(None)) if R > O else (slice(None), at)
        part_matrix = widened(matrix[:, columns], "part")
        out = np.matmul(x[rows], part_matrix, out=y[rows, columns])
        if bias is not None:
            out += bias[columns]
    parallel(part, range(0, longer, step))
    return y


def _few_rows(x, matrix, bias):
    """product by BLAS's own threads: to wake a thread costs more here than their spinning.

    BLAS is faster, too, with whole tiles of 16 rows and with the larger matrix first. For the 77
    tokens of a prompt a tenth of the time is saved (`python -m tests.benchmarks.leads`), and more
    where the worker threads have gone to sleep.
    """
    R, I = x.shape
    padded = np.zeros((-(-R // 16) * 16, I), np.float32)
    padded[:R] = x
    y = (matrix.T @ padded.T)[:, :R].T
    return np.add(y, bias, order="C") if bias is not None else np.ascontiguousarray(y)


def column_sums(x):
    """x (R,C) -> (C,): a product with ones is faster than NumPy's sum over rows."""
    return np.ones(len(x), np.float32) @ x
