"""The matrix product with a weight, and its derivative. Used by every layer that mixes channels."""
from ..backend import add_up, fast
from ..kernels.product import column_sums, product


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
    return y.reshape(*x.shape[:-1], len(weight)), (x, weight)


def linear_backward(dy, cache):
    """dy (..., out) -> dx (..., in), dweight (out, in), dbias (out,).

    Every row of x is an example of the same product, so the rows' gradients are summed.
    """
    x, weight = cache
    rows, inputs = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    if fast(x):
        dx, dweight, dbias = product(rows, weight), product(rows.T, inputs), column_sums(rows)
    else:
        dx = rows @ weight                                               # (R, out) @ (out, in)
        dweight = rows.T @ inputs                                        # (out, R) @ (R, in)
        dbias = add_up(rows, axis=0)
    return dx.reshape(x.shape), dweight, dbias
