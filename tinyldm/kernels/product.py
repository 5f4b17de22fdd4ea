"""The matrix product shared among worker threads: twins of ops.linear, and the 1x1 convolution.

BLAS can use all cores by itself. But afterwards its threads wait for more work in a busy loop for
some milliseconds, while the worker threads of the other kernels need the cores. So BLAS gets one
thread, and the worker threads share the rows or columns. A part is still in the cache when its bias
is added. `python -m tests.benchmarks.leads` compares this with BLAS's own threads.
"""
import numpy as np

from ..backend import free_threads, parallel
from .half import widened

PART = 128                  # at least so many rows or columns per item of work
FEW = range(16, PART)       # with so few rows, a thread would have less than a millisecond of work,
LARGE = 1 << 19             # but a matrix with so many numbers is worth more than one thread
PAIR = 2, 3                 # so few rows are faster one by one: BLAS need not rearrange the matrix


def linear(x, weight, bias=None):
    """Twin of ops.linear. x (..., in), weight (out, in), bias (out,) or None -> y (..., out)."""
    y = product(x.reshape(-1, x.shape[-1]), weight.T, bias)
    return y.reshape(*x.shape[:-1], len(weight)), (x, weight)


def linear_backward(dy, cache):
    """Twin of ops.linear_backward. dy (..., out) -> dx (..., in), dweight (out, in), dbias."""
    x, weight = cache
    rows, inputs = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    return linear_input_backward(dy, weight), product(rows.T, inputs), column_sums(rows)


def linear_input_backward(dy, weight):
    """Twin of ops.linear_input_backward. dy (..., out), weight (out, in) -> dx (..., in)."""
    dx = product(dy.reshape(-1, dy.shape[-1]), weight)
    return dx.reshape(*dy.shape[:-1], weight.shape[1])


def product(x, matrix, bias=None):
    """y = x @ matrix + bias: x (R,I), matrix (I,O), bias (O,) or None -> y (R,O), float32.

    The matrix may be float16. Its parts are widened where they are used.
    """
    R, O = len(x), matrix.shape[1]
    if R in FEW and matrix.size >= LARGE and matrix.dtype == np.float32 and free_threads() > 1:
        return _few_rows(x, matrix, bias)
    if R > O:                                           # otherwise each part would widen all of it
        matrix = widened(matrix)
    y = np.empty((R, O), np.float32)
    # Each part reads one operand whole. Cut the longer side, so that this is the smaller operand.
    longer, threads = max(R, O), free_threads()
    whole = threads == 1 and matrix.dtype != np.float16
    step = max(1, longer) if whole else max(PART, -(-longer // (4 * threads)))
    if R in PAIR:
        step = PART                                     # the second row finds it in the cache

    def part(start):
        at = slice(start, start + step)
        rows, columns = (at, slice(None)) if R > O else (slice(None), at)
        part_matrix = widened(matrix[:, columns], "part")
        out = y[rows, columns]
        if R in PAIR:
            for i in range(R):
                np.matmul(x[i], part_matrix, out=out[i])
        else:
            np.matmul(x[rows], part_matrix, out=out)
        if bias is not None:
            out += bias[columns]
    parallel(part, range(0, longer, step))
    return y


def _few_rows(x, matrix, bias):
    """product by BLAS's own threads, because here it costs more to wake a worker thread.

    BLAS is also faster with whole tiles of 16 rows and with the larger matrix first. For the 77
    tokens of a prompt, this saves a tenth of the time (`python -m tests.benchmarks.leads`), and
    more if the worker threads are asleep.
    """
    R, I = x.shape
    padded = np.zeros((-(-R // 16) * 16, I), np.float32)
    padded[:R] = x
    y = (matrix.T @ padded.T)[:, :R].T
    return np.add(y, bias, order="C") if bias is not None else np.ascontiguousarray(y)


def column_sums(x):
    """x (R,C) -> (C,), as a product with ones, which is faster than NumPy's sum over rows."""
    return np.ones(len(x), np.float32) @ x
