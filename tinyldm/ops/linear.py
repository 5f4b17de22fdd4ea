"""The linear layer: a matrix product with a weight, plus a bias. And scale and shift by channel."""
from ..backend import add_up, fast_twin
from ..kernels import product


@fast_twin(cpu=product.linear)
def linear(x, weight, bias=None):
    """Mix the last axis.

        y = x @ weight.T + bias

    x (..., in), weight (out, in), bias (out,) or None -> y (..., out).
    """
    y = x.reshape(-1, x.shape[-1]) @ weight.T                            # one product over all rows
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], len(weight)), (x, weight)


@fast_twin(cpu=product.linear_backward)
def linear_backward(dy, cache):
    """dy (..., out) -> dx (..., in), dweight (out, in), dbias (out,).

    All rows of x share the weight and the bias, so their gradients are sums over the rows.
    """
    x, weight = cache
    rows, inputs = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dx = rows @ weight                                                   # (R, out) @ (out, in)
    dweight = rows.T @ inputs                                            # (out, R) @ (R, in)
    return dx.reshape(x.shape), dweight, add_up(rows, axis=0)


def scale_shift(x, scale, shift):
    """Scale and shift each channel: y = x * scale + shift.

    x (B,C), scale (1,C), shift (1,C) -> y (B,C).
    """
    return x * scale + shift, (x, scale)


def scale_shift_backward(dy, cache):
    """dy (B,C) -> dx (B,C), dscale (1,C), dshift (1,C). All rows share the scale and the shift."""
    x, scale = cache
    return dy * scale, add_up(dy * x, axis=0)[None], add_up(dy, axis=0)[None]
