"""Modulation: a condition (class and timestep) scales, shifts and gates the tokens of a sample."""
from ..backend import add_up, get_xp
from .norm import layer_norm, layer_norm_backward


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
