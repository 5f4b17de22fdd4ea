"""Normal distributions, entry by entry: what the terms of a diffusion model's bound are made of.

All arrays of an op have one shape, here (B,H,W,C). Logarithms are natural, so the unit is the nat.
"""
import math

import numpy as np

from ..backend import get_xp, widen

SMALLEST = 1e-12                    # of a probability whose logarithm is taken
SATURATED = 8.0                     # in float64 too, tanh is +-1 beyond this u
HALF_BIN = 1 / 255                  # 256 values lie between -1 and 1


@np.errstate(under="ignore")
def gaussian_kl(mean_q, logvar_q, mean_p, logvar_p):
    """KL divergence of N(mean_q, exp logvar_q) from N(mean_p, exp logvar_p), for each entry.

        KL = 1/2 (logvar_p - logvar_q - 1 + exp(logvar_q - logvar_p)
                  + (mean_q - mean_p)^2 exp(-logvar_p))

    Four arrays (B,H,W,C) -> (B,H,W,C) >= 0.
    Source: Kingma & Welling 2013, arXiv:1312.6114, appendix B, for two Gaussians.
    """
    xp, caches = get_xp(mean_q), (mean_q, logvar_q, mean_p, logvar_p)
    mean_q, logvar_q, mean_p, logvar_p = map(widen, caches)
    difference, log_ratio = mean_q - mean_p, logvar_q - logvar_p
    kl = 0.5 * (xp.exp(log_ratio) - log_ratio - 1 + difference * difference * xp.exp(-logvar_p))
    return kl.astype(caches[0].dtype, copy=False), caches


@np.errstate(under="ignore")
def gaussian_kl_backward(dy, cache):
    """dy (B,H,W,C) -> dmean_q, dlogvar_q, dmean_p, dlogvar_p, each (B,H,W,C).

        dmean_q = dy (mean_q - mean_p) exp(-logvar_p) = -dmean_p
        dlogvar_q = dy (exp(logvar_q - logvar_p) - 1) / 2
        dlogvar_p = -dlogvar_q - dy (mean_q - mean_p)^2 exp(-logvar_p) / 2
    """
    xp, dtype = get_xp(dy), dy.dtype
    mean_q, logvar_q, mean_p, logvar_p = map(widen, cache)
    dy, difference = widen(dy), mean_q - mean_p
    dmean_q = dy * difference * xp.exp(-logvar_p)
    dlogvar_q = dy * (xp.exp(logvar_q - logvar_p) - 1) * 0.5
    dlogvar_p = -dlogvar_q - dmean_q * difference * 0.5
    return tuple(gradient.astype(dtype, copy=False)
                 for gradient in (dmean_q, dlogvar_q, -dmean_q, dlogvar_p))


@np.errstate(under="ignore")
def discretized_log_likelihood(x, mean, logvar):
    """Log probability of a pixel's value among 256, under N(mean, exp logvar), for each entry.

        log P = log(Phi((x + 1/255 - mean) / s) - Phi((x - 1/255 - mean) / s)),  s = exp(logvar / 2)

    x (B,H,W,C) on the grid k / 127.5 - 1, k = 0 ... 255; mean and logvar like x -> (B,H,W,C) <= 0.
    The bin of 0 reaches down to minus infinity, that of 255 up to infinity. P is at least 1e-12.
    Phi(u) = 1/2 (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))), which is close to the normal
    distribution's: published numbers are of this one.
    Source: Ho et al. 2020, arXiv:2006.11239, eq. 13; for Phi the code of Nichol & Dhariwal 2021.
    """
    xp, probability = get_xp(x), _bins(x, mean, logvar)[0]
    return xp.log(probability.clip(SMALLEST, None)).astype(x.dtype, copy=False), (x, mean, logvar)


@np.errstate(under="ignore")
def discretized_log_likelihood_backward(dy, cache):
    """dy (B,H,W,C) -> dx, dmean, dlogvar, each (B,H,W,C).

    With phi = Phi' and u, v the upper and the lower edge of the bin in units of s, an infinite edge
    having phi = 0:

        dmean = -dy (phi(u) - phi(v)) / (P s) = -dx,    dlogvar = -dy (phi(u) u - phi(v) v) / (2 P)

    Where P is held at 1e-12, all are 0.
    """
    x, mean, logvar = cache
    xp, dtype = get_xp(dy), dy.dtype
    probability, upper, lower, is_first, is_last = _bins(x, mean, logvar)
    slope = widen(dy) * (probability >= SMALLEST) / probability.clip(SMALLEST, None)
    dupper, dlower = slope * _density(upper) * ~is_last, slope * _density(lower) * ~is_first
    dx = (dupper - dlower) * xp.exp(widen(logvar) * -0.5)
    dlogvar = (dupper * upper - dlower * lower) * -0.5
    return (dx.astype(dtype, copy=False), -dx.astype(dtype, copy=False),
            dlogvar.astype(dtype, copy=False))


def _bins(x, mean, logvar):
    """-> P, both edges in units of s, and which are the first and the last of the 256 bins."""
    x = widen(x)
    is_first, is_last = x < -0.999, x > 0.999
    centred, one_over_s = x - mean, get_xp(x).exp(widen(logvar) * -0.5)
    upper, lower = (centred + HALF_BIN) * one_over_s, (centred - HALF_BIN) * one_over_s
    to_upper, to_lower, where = _distribution(upper), _distribution(lower), get_xp(x).where
    probability = where(is_first, to_upper,
                        where(is_last, 1 - to_lower, to_upper - to_lower))
    return probability, upper, lower, is_first, is_last


def _inner(u):
    """The argument of tanh, where it is not saturated: u^3 must not overflow."""
    u = u.clip(-SATURATED, SATURATED)
    return math.sqrt(2 / math.pi) * (u + 0.044715 * u * u * u), u


def _distribution(u):
    return 0.5 * (1 + get_xp(u).tanh(_inner(u)[0]))


def _density(u):
    inner, u = _inner(u)
    tanh = get_xp(u).tanh(inner)
    return (0.5 * math.sqrt(2 / math.pi)) * (1 - tanh * tanh) * (1 + 3 * 0.044715 * u * u)
