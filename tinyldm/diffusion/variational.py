"""The evidence lower bound of a diffusion model: its terms, the losses made of them, bits per
dimension.

    -log p(x_start) <= L_T + L_{T-1} + ... + L_1 + L_0
    L_T = KL(q(x_T | x_start) || N(0, 1))                                the prior
    L_t = KL(q(x_{t-1} | x_t, x_start) || p(x_{t-1} | x_t))              t = 1 ... T - 1
    L_0 = -log p(x_start | x_0), a pixel being one of 256 values         the decoder

Indices are those of the code, t = 0 ... T - 1, so that x_0 is the picture with the least noise.
p = N(mean, variance), of what a model predicts from x_t: in the first channels the noise, in as
many again v, a place between the two fixed variances. Every number here is in bits per dimension:
the mean over a picture's numbers, divided by ln 2.
Source: Ho et al. 2020, arXiv:2006.11239, eq. 5, 7, 8 and 13; Nichol & Dhariwal 2021, "Improved
Denoising Diffusion Probabilistic Models", arXiv:2102.09672, eq. 4-7, 15 and 16. Explained:
docs/improved-ddpm.md
"""
import math
from typing import Any, NamedTuple

import numpy as np

from .. import ops
from ..backend import get_xp, widen
from ..errors import TinyldmError
from .objective import target

VARIANCE_TYPES = ("learned_range", "learned", "fixed_large", "fixed_small")
LAMBDA = 0.001
# Of a picture's loss, the weight of its squared error and that of its term, by the number of steps.
# The bound is a sum of T terms, so one term stands for T: rescaled_mse is L_simple + 0.001 L_vlb.
LOSSES = {"mse": (1, lambda T: 1), "rescaled_mse": (1, lambda T: LAMBDA * T),
          "kl": (0, lambda T: 1), "rescaled_kl": (0, lambda T: T)}


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t) of a model, a normal distribution for every number; and its x_start."""

    mean: Any                                           # (B,H,W,C)
    logvar: Any                                         # (B,H,W,C)
    x_start: Any                                        # (B,H,W,C)


def reverse(process, model_output, x_t, t, variance_type="learned_range", clip=True):
    """What a model's output says about the step back from x_t -> Reverse.

        logvar = f ln beta_t + (1 - f) ln beta~_t,    f = (v + 1) / 2        learned_range

    model_output (B,H,W,2C), or (B,H,W,C) with a fixed variance; x_t (B,H,W,C), t (B,). v may leave
    [-1, 1]. learned: the second half is the logarithm itself. fixed_large: beta_t, fixed_small:
    beta~_t. clip: x_start to [-1, 1], as in drawing and in measuring; training does not clip.
    Source: arXiv:2102.09672, eq. 15.
    """
    output, values = _halves(model_output, x_t, variance_type)
    of_x_t, of_output = _x_start_coefficients(process, x_t, t)
    x_start = of_x_t * x_t + of_output * output
    if clip:
        x_start = x_start.clip(-1, 1)
    mean, _ = process.posterior(x_start, x_t, t)
    low, high = _range(process, x_t, t, variance_type)
    if variance_type == "learned":
        logvar = values
    elif variance_type == "learned_range":
        logvar = low + (values + 1) * 0.5 * (high - low)
    else:
        logvar = (high if variance_type == "fixed_large" else low) + 0 * x_t
    return Reverse(mean, logvar, x_start)


def _halves(model_output, x_t, variance_type):
    """(B,H,W,2C) -> twice (B,H,W,C); with a fixed variance (B,H,W,C), and None."""
    if variance_type not in VARIANCE_TYPES:
        raise TinyldmError(f"variance_type must be one of {', '.join(VARIANCE_TYPES)}, not "
                           f"{variance_type!r:.80}")
    C, learned = x_t.shape[-1], variance_type.startswith("learned")
    if model_output.shape != (*x_t.shape[:-1], C * (1 + learned)):
        raise TinyldmError(f"with variance_type {variance_type} a model must predict "
                           f"{C * (1 + learned)} channels for {C}, not {model_output.shape[-1]}")
    return model_output[..., :C], model_output[..., C:] if learned else None


def _x_start_coefficients(process, x_t, t):
    """x_start = first * x_t + second * output, see objective.py -> (B,1,1,1) each, or numbers."""
    if process.prediction_type == "sample":
        return 0, 1
    a, s = process.scales_like(x_t, t)
    return (a, -s) if process.prediction_type == "v_prediction" else (1 / a, -s / a)


def _range(process, x_t, t, variance_type):
    """ln beta~_t and ln beta_t -> (B,1,1,1) each.

    A fixed beta_0 is replaced by beta~_1: it would be far too wide for the decoder's term.
    """
    low, high = process.posterior_logvar, np.log(process.betas)
    if variance_type == "fixed_large":
        high = np.append(low[:1], high[1:])
    return process.at(low, t, x_t), process.at(high, t, x_t)


# ---- the terms -------------------------------------------------------------------------------

def prior_term(process, x_start):
    """L_T, which no training changes: (B,H,W,C) -> (B,)."""
    t = np.full(len(x_start), process.num_train_timesteps - 1)
    a, s = process.scales_like(x_start, t)
    zero = 0 * x_start
    logvar = zero + 2 * get_xp(s).log(s)
    return _bits(ops.gaussian_kl(a * x_start, logvar, zero, zero)[0])


def term(process, mean, logvar, x_start, x_t, t):
    """L_t of p = N(mean, exp logvar): the decoder's term where t is 0, else the KL divergence.

    mean, logvar, x_start, x_t (B,H,W,C), t (B,) -> (B,), cache. At 0, x_start must hold values of
    the 256: k / 127.5 - 1.
    """
    true_mean, true_logvar = process.posterior(x_start, x_t, t)
    kl, kl_cache = ops.gaussian_kl(true_mean, true_logvar + 0 * true_mean, mean, logvar)
    likelihood, likelihood_cache = ops.discretized_log_likelihood(x_start, mean, logvar)
    xp = get_xp(x_t)
    at_zero = xp.asarray(t).reshape(-1, *[1] * (x_t.ndim - 1)) == 0
    return _bits(xp.where(at_zero, -likelihood, kl)), (at_zero, kl_cache, likelihood_cache)


def term_backward(dterms, cache):
    """dterms (B,) -> dmean, dlogvar (B,H,W,C). What is data has no gradient."""
    at_zero, kl_cache, likelihood_cache = cache
    shape = kl_cache[0].shape
    dnats = dterms.reshape(at_zero.shape) / (math.prod(shape[1:]) * math.log(2))
    dnats = (dnats + 0 * kl_cache[0]).astype(kl_cache[0].dtype, copy=False)     # (B,H,W,C)
    _, _, dmean, dlogvar = ops.gaussian_kl_backward(dnats * ~at_zero, kl_cache)
    _, dmean_0, dlogvar_0 = ops.discretized_log_likelihood_backward(-dnats * at_zero,
                                                                    likelihood_cache)
    return dmean + dmean_0, dlogvar + dlogvar_0


def _bits(nats):
    """(B,H,W,C) -> (B,): the mean over each picture, in bits."""
    return widen(nats).reshape(len(nats), -1).mean(axis=1) / math.log(2)


# ---- the losses ------------------------------------------------------------------------------

def loss(process, model_output, x_start, noise, x_t, t, kind="rescaled_mse",
         variance_type="learned_range"):
    """The loss of each picture at its step, for training -> (B,), cache.

        mse             mean squared error + L_t        (with a fixed variance the error alone)
        rescaled_mse    mean squared error + L_t T / 1000, which is L_simple + 0.001 L_vlb
        kl              L_t
        rescaled_kl     T L_t, which is L_vlb at a uniformly drawn t

    model_output (B,H,W,2C), or C; x_start, noise, x_t = process.add_noise(x_start, noise, t)
    (B,H,W,C), t (B,). In the first two the bound does not see the first half of the output: it
    learns the noise from the squared error, and only v from the bound.
    Source: arXiv:2102.09672, eq. 16, and its code for the names.
    """
    if kind not in LOSSES:
        raise TinyldmError(f"the loss must be one of {', '.join(LOSSES)}, not {kind!r:.80}")
    simple_weight, weight_of = LOSSES[kind]
    bound_weight = weight_of(process.num_train_timesteps)
    if simple_weight and not variance_type.startswith("learned"):
        bound_weight = 0                                # nothing would learn from it
    output, _ = _halves(model_output, x_t, variance_type)
    p = reverse(process, model_output, x_t, t, variance_type, clip=False)
    terms, term_cache = term(process, p.mean, p.logvar, x_start, x_t, t)
    difference = output - target(process, x_start, noise, t)
    squared = widen(difference) ** 2
    losses = simple_weight * squared.reshape(len(x_t), -1).mean(axis=1) + bound_weight * terms
    return losses, (process, difference, x_t, t, variance_type, simple_weight, bound_weight,
                    term_cache)


def loss_backward(dlosses, cache):
    """dlosses (B,) -> dmodel_output (B,H,W,2C), or C.

    The output changes the mean through x_start: dmean/doutput = c dx_start/doutput, see process.py.
    Where the loss has a squared error, that path is cut. v: dlogvar/dv = (ln beta - ln beta~) / 2.
    """
    process, difference, x_t, t, variance_type, simple_weight, bound_weight, term_cache = cache
    each = dlosses.reshape(-1, *[1] * (x_t.ndim - 1))                           # (B,1,1,1)
    doutput = simple_weight * 2 * difference * each / math.prod(x_t.shape[1:])
    dmean, dlogvar = term_backward(dlosses * bound_weight, term_cache)
    if not simple_weight:                               # else the mean is stopped
        _, of_output = _x_start_coefficients(process, x_t, t)
        doutput = doutput + dmean * process.at(process.posterior_x_start, t, x_t) * of_output
    if variance_type == "learned_range":
        low, high = _range(process, x_t, t, variance_type)
        dlogvar = dlogvar * (high - low) * 0.5
    if variance_type.startswith("learned"):
        doutput = get_xp(x_t).concatenate([doutput, dlogvar], axis=-1)
    return doutput.astype(x_t.dtype, copy=False)


# ---- measuring -------------------------------------------------------------------------------

class Step(NamedTuple):
    """One term of the bound of some pictures, each (B,): of the reverse step at t."""

    t: int
    bits: Any                                           # L_t
    x_start_mse: Any                                    # mean (x_start predicted - x_start)^2
    mse: Any                                            # the same of the noise


def bound(predict, process, x_start, draw_noise, variance_type="learned_range"):
    """The terms of the bound for some pictures, from t = T - 1 down to 0 -> iterator of Step.

    predict(x_t, timesteps (B,)) -> model_output; x_start (B,H,W,C), values of k / 127.5 - 1;
    draw_noise() -> normal numbers of its shape, called once for each step. The last Step is the
    decoder's; the prior is prior_term(process, x_start); their sum is the bound.
    """
    for t in reversed(range(process.num_train_timesteps)):
        steps, noise = np.full(len(x_start), t), draw_noise()
        x_t = process.add_noise(x_start, noise, steps)
        output = predict(x_t, process.model_timesteps(steps, x_t))
        p = reverse(process, output, x_t, steps, variance_type)
        bits, _ = term(process, p.mean, p.logvar, x_start, x_t, steps)
        a, s = process.scales_like(x_t, steps)
        errors = p.x_start - x_start, (x_t - a * p.x_start) / s - noise
        yield Step(t, bits, *((widen(error) ** 2).reshape(len(x_t), -1).mean(axis=1)
                              for error in errors))


class Bits(NamedTuple):
    """Bits per dimension of a data set, and what they are made of: means over the pictures."""

    total: float
    prior: float                                        # L_T
    terms: np.ndarray                                   # (T,): L_0 is the decoder's
    x_start_mse: np.ndarray                             # (T,)
    mse: np.ndarray                                     # (T,)


def bits_per_dimension(predict, process, batches, draw_noise, variance_type="learned_range",
                       progress=iter):
    """Measure a model on a data set: an upper bound of -log2 p(x_start) for each number -> Bits.

    batches: arrays (B,H,W,C) of pictures, in [-1, 1], values of k / 127.5 - 1. predict: as for
    `bound`. draw_noise(shape) -> normal numbers. progress: wraps the steps of each batch and passes
    them on, such as functools.partial(tqdm, total=T).
    Source: the code of arXiv:2102.09672, scripts/image_nll.py.
    Raises TinyldmError for no pictures, and for values that no picture has.
    """
    count, prior, sums = 0, 0.0, np.zeros((3, process.num_train_timesteps))
    for x_start in batches:
        _check_pictures(x_start)
        steps = bound(predict, process, x_start, lambda x=x_start: draw_noise(x.shape),
                      variance_type)
        for step in progress(steps):
            sums[:, step.t] += [float(values.sum()) for values in step[1:]]
        prior += float(prior_term(process, x_start).sum())
        count += len(x_start)
    if not count:
        raise TinyldmError("bits per dimension need at least one picture, but there is none")
    terms, x_start_mse, mse = sums / count
    return Bits(terms.sum() + prior / count, prior / count, terms, x_start_mse, mse)


def _check_pictures(x_start):
    levels = (x_start + 1) * 127.5
    if x_start.ndim != 4 or not len(x_start) or not (
            abs(levels - levels.round()) < 0.01).all() or abs(x_start).max() > 1.0001:
        raise TinyldmError("pictures must be arrays of shape (pictures, height, width, channels) "
                           "with values k / 127.5 - 1 for k = 0 ... 255, but these are not: "
                           "divide bytes by 127.5 and subtract 1")
