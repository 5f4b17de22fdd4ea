"""Modulation: a condition (class, timestep) scales, shifts and gates the channels of a sample."""
from ..backend import add_up, get_xp, widen
from .norm import (
    group_norm_silu,
    group_norm_silu_backward,
    layer_norm,
    layer_norm_backward,
)


def ada_layer_norm(x, shift, scale, eps):
    """Normalise each token, then scale and shift each channel as the sample's condition says.

        y[b] = (1 + scale[b]) * (x[b] - mean) * rstd + shift[b]

    x (B,N,C), shift (B,C), scale (B,C) -> y (B,N,C). That is a layer norm for each sample, whose
    weight is 1 + scale[b] and whose bias is shift[b].
    Source: Peebles & Xie 2022, "Scalable Diffusion Models with Transformers", arXiv:2212.09748,
    section 3.2 (adaLN); Perez et al. 2017, "FiLM", arXiv:1709.07871, eq. 2.
    """
    weight = 1 + scale
    rows, caches = zip(*(layer_norm(x[b], weight[b], shift[b], eps) for b in range(len(x))))
    return get_xp(x).stack(rows), caches


def ada_layer_norm_backward(dy, cache):
    """dy (B,N,C) -> dx (B,N,C), dshift (B,C), dscale (B,C).

    Those of each sample's layer norm. The derivative of its weight, 1 + scale, by scale is 1.
    """
    xp = get_xp(dy)
    dx, dscale, dshift = map(xp.stack, zip(*map(layer_norm_backward, dy, cache)))
    return dx, dshift, dscale


def ada_group_norm_silu(x, weight, bias, shift, scale, num_groups, eps):
    """Group norm; then scale and shift each channel as the sample's condition says; then SiLU.

        y[b] = silu((1 + scale[b]) * group_norm(x[b]) + shift[b])

    x (B,H,W,C), weight (C,), bias (C,), shift (B,C), scale (B,C) -> y (B,H,W,C). That is the op
    group_norm_silu for each sample, whose weight is weight * (1 + scale[b]) and whose bias is
    bias * (1 + scale[b]) + shift[b].
    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, section 6 (the condition h of a residual
    block scales and shifts); Dhariwal & Nichol 2021, arXiv:2105.05233, section 3.1 (AdaGN).
    """
    factor = 1 + widen(scale)                                            # (B,C)
    weights, biases = (own.astype(x.dtype, copy=False)                   # rounded once
                       for own in (weight * factor, bias * factor + shift))
    rows, caches = zip(*(group_norm_silu(x[b:b + 1], weights[b], biases[b], num_groups, eps)
                         for b in range(len(x))))
    return get_xp(x).concatenate(rows), (weight, bias, factor, caches)


def ada_group_norm_silu_backward(dy, cache):
    """dy (B,H,W,C) -> dx (B,H,W,C), dweight (C,), dbias (C,), dshift (B,C), dscale (B,C).

    With dw[b] and db[b], the gradients of sample b's own weight and bias:

        dweight = sum of (1 + scale[b]) * dw[b],     dscale[b] = weight * dw[b] + bias * db[b]
        dbias   = sum of (1 + scale[b]) * db[b],     dshift[b] = db[b]
    """
    weight, bias, factor, caches = cache
    xp = get_xp(dy)
    dx, dw, db = zip(*(group_norm_silu_backward(dy[b:b + 1], own) for b, own in enumerate(caches)))
    dw, db = xp.stack(dw), xp.stack(db)                                  # (B,C) each
    gradients = (add_up(factor * dw, axis=0), add_up(factor * db, axis=0), db,
                 weight * widen(dw) + bias * widen(db))
    return xp.concatenate(dx), *(gradient.astype(dw.dtype, copy=False) for gradient in gradients)


def add_gated(x, h, gate):
    """Add a branch's output h to x; the sample's condition says how much of each channel.

        y[b] = x[b] + gate[b] * h[b]

    x (B,N,C), h (B,N,C), gate (B,C) -> y (B,N,C). With gate 0 the branch does nothing: adaLN-Zero
    begins its training so.
    Source: Peebles & Xie 2022, arXiv:2212.09748, section 3.2 (adaLN-Zero).
    """
    y = h * gate[:, None]
    y += x
    return y, (h, gate)


def add_gated_backward(dy, cache):
    """dy (B,N,C) -> dx = dy, dh (B,N,C), dgate (B,C).

        dh = gate * dy,        dgate = sum over the tokens of dy * h
    """
    h, gate = cache
    return dy, dy * gate[:, None], add_up(dy * h, axis=1)
