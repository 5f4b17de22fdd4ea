"""The linear layer: a matrix product with a weight, plus a bias. Also scale and shift by channel,
and CLIP's similarity, the product of two sets of vectors."""
from ..backend import add_up, fast_twin, get_xp, widen
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
    dweight = rows.T @ inputs                                            # (out, R) @ (R, in)
    return linear_input_backward(dy, weight), dweight, add_up(rows, axis=0)


@fast_twin(cpu=product.linear_input_backward)
def linear_input_backward(dy, weight):
    """dy (..., out), weight (out, in) -> dx (..., in) alone, which does not depend on x."""
    dx = dy.reshape(-1, dy.shape[-1]) @ weight                           # (R, out) @ (out, in)
    return dx.reshape(*dy.shape[:-1], weight.shape[1])


def scale_shift(x, scale, shift):
    """Scale and shift each channel: y = x * scale + shift.

    x (B,C), scale (1,C), shift (1,C) -> y (B,C).
    """
    return x * scale + shift, (x, scale)


def scale_shift_backward(dy, cache):
    """dy (B,C) -> dx (B,C), dscale (1,C), dshift (1,C). All rows share the scale and the shift."""
    x, scale = cache
    return dy * scale, add_up(dy * x, axis=0)[None], add_up(dy, axis=0)[None]


def similarity(a, b, log_scale):
    """How well each vector of one set matches each of another, on a scale that is learned.

        y = exp(log_scale) * a @ b.T

    a (N,P), b (M,P), log_scale () -> y (N,M). For vectors of length 1 that is the cosine of the
    angle between them, times the scale.
    Source: Radford et al. 2021, arXiv:2103.00020, figure 3.
    """
    y = get_xp(a).exp(widen(log_scale)) * (widen(a) @ widen(b).T)
    return y.astype(a.dtype, copy=False), (a, b, log_scale, y)


def similarity_backward(dy, cache):
    """dy (N,M) -> da (N,P), db (M,P), dlog_scale () = sum(dy * y), as y is its own derivative."""
    a, b, log_scale, y = cache
    dy = widen(dy)
    dlog_scale = (dy * y).sum()
    dy = get_xp(a).exp(widen(log_scale)) * dy
    return ((dy @ widen(b)).astype(a.dtype, copy=False),
            (dy.T @ widen(a)).astype(b.dtype, copy=False),
            dlog_scale.astype(log_scale.dtype, copy=False))
