"""Normalisation: group norm (images), group norm followed by SiLU, layer norm (tokens); batch norm,
as it is while a network trains, and as it is afterwards, with the statistics of the training data
and followed by ReLU; and vectors of length 1 (embeddings)."""
from ..backend import add_up, fast_twin, get_xp, widen
from ..kernels import cuda, norm
from .activation import silu, silu_backward

NO_SUMS = None, None        # in place of the gradients of a frozen weight and bias


@fast_twin(cpu=norm.group_norm, gpu=cuda.group_norm)
def group_norm(x, weight, bias, num_groups, eps):
    """Normalise each group of channels to mean 0 and variance 1, then scale and shift each channel.

        y = weight * (x - mean) * rstd + bias,    rstd = 1 / sqrt(var + eps)

    x (B,...,C), weight (C,), bias (C,) -> y (B,...,C). Mean and variance are over one sample's C/G
    channels and all pixels, so they do not depend on the batch.
    Source: Wu & He 2018, "Group Normalization", arXiv:1803.08494, eq. 1-2.
    Explained: docs/group-norm.md
    """
    B, C = x.shape[0], x.shape[-1]
    assert C % num_groups == 0, f"{C} channels do not divide into {num_groups} groups"
    groups = widen(x).reshape(B, -1, num_groups, C // num_groups)        # (B,N,G,C/G)
    mean = groups.mean(axis=(1, 3), keepdims=True)                       # (B,1,G,1)
    rstd = (groups.var(axis=(1, 3), keepdims=True) + eps) ** -0.5
    y = (_normalise(x, mean, rstd) * weight + bias).astype(x.dtype, copy=False)
    return y, (x, weight, mean, rstd)                                   # backward normalises again


def _normalise(x, mean, rstd):
    B, C, G = x.shape[0], x.shape[-1], mean.shape[2]
    return ((x.reshape(B, -1, G, C // G) - mean) * rstd).reshape(x.shape)


@fast_twin(cpu=norm.group_norm_backward, gpu=cuda.group_norm_backward)
def group_norm_backward(dy, cache, frozen=False):
    """dy (B,...,C) -> dx (B,...,C), dweight (C,), dbias (C,). frozen: only dx is needed.

    With n the normalised x and g = weight * dy, per group:

        dx = rstd * (g - mean(g) - n * mean(g * n))

    The two subtracted terms come from the mean and the variance, which also depend on x.
    """
    x, weight, mean, rstd = cache
    B, C, G = x.shape[0], x.shape[-1], mean.shape[2]
    dy = widen(dy)
    n = _normalise(x, mean, rstd).reshape(B, -1, G, C // G)              # (B,N,G,C/G)
    g = (dy * weight).reshape(n.shape)
    dx = rstd * (g - g.mean(axis=(1, 3), keepdims=True)
                 - n * (g * n).mean(axis=(1, 3), keepdims=True))
    dx = dx.reshape(x.shape).astype(x.dtype, copy=False)
    return dx, *(NO_SUMS if frozen else _sums(dy, n.reshape(x.shape), weight))


def _sums(dy, n, weight):
    """dweight = sum(dy * n), dbias = sum(dy), over all axes except the last; in weight's dtype."""
    axes = tuple(range(dy.ndim - 1))
    return ((dy * n).sum(axis=axes).astype(weight.dtype, copy=False),
            dy.sum(axis=axes).astype(weight.dtype, copy=False))


@fast_twin(cpu=norm.group_norm_silu, gpu=cuda.group_norm_silu)
def group_norm_silu(x, weight, bias, num_groups, eps):
    """Group norm followed by SiLU, the pair in front of every convolution: y = silu(group_norm(x)).

    x (B,...,C), weight (C,), bias (C,) -> y (B,...,C). One op, so the norm's output is not kept.
    """
    y, cache = group_norm(x, weight, bias, num_groups, eps)
    return silu(y)[0], (bias, cache)


@fast_twin(cpu=norm.group_norm_silu_backward, gpu=cuda.group_norm_silu_backward)
def group_norm_silu_backward(dy, cache, frozen=False):
    """dy (B,...,C) -> dx (B,...,C), dweight (C,), dbias (C,). frozen: only dx is needed.

    Computes the norm's output again, then goes back through SiLU and norm.
    """
    bias, norm_cache = cache
    x, weight, mean, rstd = norm_cache
    h = _normalise(x, mean, rstd) * weight + bias
    return group_norm_backward(silu_backward(dy, h), norm_cache, frozen)


@fast_twin(cpu=norm.layer_norm, gpu=cuda.layer_norm)
def layer_norm(x, weight, bias, eps):
    """Normalise each token over its channels: y = weight * (x - mean) * rstd + bias.

    x (...,C), weight (C,), bias (C,) -> y (...,C).
    Source: Ba, Kiros & Hinton 2016, "Layer Normalization", arXiv:1607.06450, eq. 3-4.
    """
    mean = widen(x).mean(axis=-1, keepdims=True)                         # (...,1)
    centred = x - mean
    rstd = ((centred * centred).mean(axis=-1, keepdims=True) + eps) ** -0.5
    y = (centred * rstd * weight + bias).astype(x.dtype, copy=False)
    return y, (x, weight, mean, rstd)


@fast_twin(cpu=norm.layer_norm_backward, gpu=cuda.layer_norm_backward)
def layer_norm_backward(dy, cache, frozen=False):
    """dy (...,C) -> dx (...,C), dweight (C,), dbias (C,). frozen: only dx is needed.

    Per token, with g = weight * dy, as in group_norm_backward:

        dx = rstd * (g - mean(g) - n * mean(g * n))
    """
    x, weight, mean, rstd = cache
    dy = widen(dy)
    n = (x - mean) * rstd
    g = dy * weight
    dx = rstd * (g - g.mean(axis=-1, keepdims=True) - n * (g * n).mean(axis=-1, keepdims=True))
    return dx.astype(x.dtype, copy=False), *(NO_SUMS if frozen else _sums(dy, n, weight))


def batch_norm(x, weight, bias, eps):
    """Normalise each channel over the batch to mean 0 and variance 1, then scale and shift it.

        y = weight * (x - mean) * rstd + bias,    rstd = 1 / sqrt(var + eps)

    x (B,...,C), weight (C,), bias (C,) -> y (B,...,C). Mean and variance are over all samples and
    all pixels, as while a network trains, so one sample's y depends on the others.
    Source: Ioffe & Szegedy 2015, "Batch Normalization", arXiv:1502.03167, algorithm 1.
    """
    wide, axes = widen(x), tuple(range(x.ndim - 1))
    mean = wide.mean(axis=axes)                                          # (C,)
    rstd = (wide.var(axis=axes) + eps) ** -0.5
    y = ((wide - mean) * rstd * weight + bias).astype(x.dtype, copy=False)
    return y, (x, weight, mean, rstd)


def batch_norm_backward(dy, cache, frozen=False):
    """dy (B,...,C) -> dx (B,...,C), dweight (C,), dbias (C,). frozen: only dx is needed.

    Per channel, with g = weight * dy, as in group_norm_backward:

        dx = rstd * (g - mean(g) - n * mean(g * n))
    """
    x, weight, mean, rstd = cache
    dy, axes = widen(dy), tuple(range(x.ndim - 1))
    n, g = (x - mean) * rstd, dy * weight
    dx = rstd * (g - g.mean(axis=axes) - n * (g * n).mean(axis=axes))
    return dx.astype(x.dtype, copy=False), *(NO_SUMS if frozen else _sums(dy, n, weight))


@fast_twin(cpu=norm.batch_norm_relu)
def batch_norm_relu(x, weight, bias, mean, var, eps, out=None):
    """Normalise each channel with running statistics, scale and shift it; then cut at zero.

        y = max(weight * (x - mean) * rstd + bias, 0),    rstd = 1 / sqrt(var + eps)

    x (...,C), weight, bias, mean, var (C,) -> y (...,C). mean and var are constants here, as they
    are when a trained network is used: averages over its training data, stored with the weights. So
    each channel of each pixel is a number times x plus a number. out: an array for y; it may be x
    itself if no backward follows.
    Source: Ioffe & Szegedy 2015, "Batch Normalization", arXiv:1502.03167, algorithm 2, line 11.
    """
    scale, shift = _scale_and_shift(weight, bias, mean, var, eps)
    y = get_xp(x).maximum(widen(x) * scale + shift, 0, out=out).astype(x.dtype, copy=False)
    return y, (x, weight, bias, mean, var, eps)


def _scale_and_shift(weight, bias, mean, var, eps):
    scale = widen(weight) * (widen(var) + eps) ** -0.5
    return scale, bias - mean * scale


def batch_norm_relu_backward(dy, cache):
    """dy (...,C) -> dx (...,C), dweight, dbias, dmean, dvar (C,).

    With n the normalised x and g = dy where y > 0, else 0:

        dx = g * weight * rstd,  dweight = sum(g * n),  dbias = sum(g),
        dmean = -dbias * weight * rstd,  dvar = -1/2 * dweight * weight * rstd^2

    The last line: n = (x - mean) * rstd, and the derivative of rstd is -rstd^3 / 2.
    """
    x, weight, bias, mean, var, eps = cache
    scale, shift = _scale_and_shift(weight, bias, mean, var, eps)
    rstd = (widen(var) + eps) ** -0.5
    g = widen(dy) * (widen(x) * scale + shift > 0)
    rows = g.reshape(-1, g.shape[-1])
    dbias = add_up(rows, axis=0)
    dweight = add_up(rows * ((widen(x) - mean) * rstd).reshape(rows.shape), axis=0)
    dmean, dvar = -dbias * scale, -0.5 * dweight * scale * rstd
    return tuple(gradient.astype(x.dtype, copy=False)
                 for gradient in (g * scale, dweight, dbias, dmean, dvar))


def unit(x):
    """Divide each vector by its length:  y = x / |x|.  x (...,C) -> y (...,C)."""
    wide = widen(x)
    length = (wide * wide).sum(axis=-1, keepdims=True) ** 0.5            # (...,1)
    y = (wide / length).astype(x.dtype, copy=False)
    return y, (y, length)


def unit_backward(dy, cache):
    """dx = (dy - y * sum(dy * y)) / |x|.  The part of dy along x only changes the length: it is 0.
    """
    y, length = cache
    dy = widen(dy)
    dx = (dy - y * (dy * y).sum(axis=-1, keepdims=True)) / length
    return dx.astype(y.dtype, copy=False)
