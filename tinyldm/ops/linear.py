"""The matrix product with a weight, and its derivative. Used by every layer that mixes channels."""
import operator

from ..backend import add_up, fast
from ..kernels.product import product


def linear(x, weight, bias=None):
    """Mix the last axis.

        y = x @ weight.T + bias

    x (..., in), weight (out, in), bias (out,) or None -> y (..., out).
    """
    rows = x.reshape(-1, x.shape[-1])                                    # one product over all rows
    if fast(x):
        y = product(rows, weight.T, bias)
    else:
        y = rows @ weight.T
        if bias is not None:
            y += bias
    return y.reshape(*x.shape[:-1], -1), (x, weight)


def linear_backward(dy, cache):
    """dy (..., out) -> dx (..., in), dweight (out, in), dbias (out,).

    Every row of x is an example of the same product, so the rows' gradients are summed.
    """
    x, weight = cache
    multiply = product if fast(x) else operator.matmul
    rows = dy.reshape(-1, dy.shape[-1])                                  # (R, out)
    dweight = multiply(rows.T, x.reshape(-1, x.shape[-1]))               # (out, R) @ (R, in)
    return multiply(rows, weight).reshape(x.shape), dweight, add_up(rows, axis=0)
