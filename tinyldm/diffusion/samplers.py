"""Samplers: from noise to latents, a model call at a time, each named after its paper.

Every sampler is a generator function

    sampler(predict, latents, schedule, num_inference_steps, draw_noise, ...)

    predict(x_t, t) -> model output   guidance already inside; x_t has unit scale, t is a python
                                      number (fractional for Euler with "linspace" spacing)
    latents                           standard normal, any shape, numpy or cupy; never written to
    schedule                          schedule.Schedule
    draw_noise() -> array             a fresh standard normal of latents' shape, if noise is added

which yields a State after every model call, so a caller can show progress, look inside or stop.
All raise TinyldmError at the first step for a number of steps outside 1 .. num_train_timesteps;
lcm, which has learnt 50 timesteps, for more than those.

Coefficients are computed in float32, as the schedule's tables are and in the order PyTorch's
schedulers have: differences of nearly equal numbers then round alike. They meet an array as python
floats, so that it keeps its dtype.

Two kinds of x appear. DDPM, DDIM, PNDM, LCM, DPM-Solver++ and UniPC hold x_t = a x_0 + s noise
with a^2 + s^2 = 1, as the model sees it. Euler, Heun and LMS hold x = x_t / a = x_0 + sigma noise
with sigma = s / a, and scale it back for the model. Either way the walk is the same: Euler in x is
DDIM with eta = 0 in x_t.
"""
import math
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..errors import TinyldmError


class State(NamedTuple):
    """What is known after one model call."""

    step: int           # counts model calls from 0
    timestep: float     # where the model was called, 0 .. num_train_timesteps - 1
    latents: Any        # after this step, in the sampler's own scale (module docstring)
    pred_x0: Any        # the clean latents as predicted by this call, for previews


# ---- samplers on x_t ------------------------------------------------------------------------

def ddpm(predict, latents, schedule, num_inference_steps, draw_noise):
    """Ancestral sampling: each step draws from the posterior q(x_p | x_t, x_0), p the next lower t.

        x_p = sqrt(alpha_bar_p) beta / (1 - alpha_bar_t) x_0
              + sqrt(alpha) (1 - alpha_bar_p) / (1 - alpha_bar_t) x_t + sqrt(var) z
        alpha = alpha_bar_t / alpha_bar_p,  beta = 1 - alpha,
        var = (1 - alpha_bar_p) / (1 - alpha_bar_t) beta

    Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239, eq. 6-7,
    algorithm 2.
    """
    x_t = latents
    timesteps = _whole(schedule.timesteps(num_inference_steps, "leading"))
    for step, (t, p) in enumerate(zip(timesteps, [*timesteps[1:], -1])):
        alpha_bar_t = schedule.alphas_cumprod[t]
        alpha_bar_p = schedule.alphas_cumprod[p] if p >= 0 else 1.0
        x_0, _ = _split(schedule, predict(x_t, t), x_t, alpha_bar_t)
        x_0 = _clip(x_0, schedule, unless_told=True)
        alpha = alpha_bar_t / alpha_bar_p
        beta, var = 1 - alpha, (1 - alpha_bar_p) / (1 - alpha_bar_t) * (1 - alpha)
        x_t = (float(alpha_bar_p ** 0.5 * beta / (1 - alpha_bar_t)) * x_0
               + float(alpha ** 0.5 * (1 - alpha_bar_p) / (1 - alpha_bar_t)) * x_t)
        if t > 0:
            x_t = x_t + float(var ** 0.5) * draw_noise()
        yield State(step, t, x_t, x_0)


def ddim(predict, latents, schedule, num_inference_steps, draw_noise, eta=0.0):
    """Jump to the predicted x_0 and back to a lower noise level p = t - T // steps.

        x_p = sqrt(alpha_bar_p) x_0 + sqrt(1 - alpha_bar_p - sigma^2) noise + sigma z
        sigma = eta sqrt((1 - alpha_bar_p) / (1 - alpha_bar_t) (1 - alpha_bar_t / alpha_bar_p))

    eta = 0 draws no noise, eta = 1 is DDPM. The last step goes to alpha_bar[0], not to 1, where the
    schedule says set_alpha_to_one = false (Stable Diffusion does).
    Source: Song et al. 2020, "Denoising Diffusion Implicit Models", arXiv:2010.02502, eq. 12, 16.
    Raises TinyldmError for eta outside 0 .. 1.
    """
    if not 0 <= eta <= 1:
        raise TinyldmError(f"eta must lie between 0 (no noise) and 1 (DDPM's noise), not {eta}")
    x_t = latents
    timesteps = _whole(schedule.timesteps(num_inference_steps, "leading"))
    jump = schedule.num_train_timesteps // num_inference_steps
    for step, t in enumerate(timesteps):
        alpha_bar_t = schedule.alphas_cumprod[t]
        alpha_bar_p = _alpha_bar_after(schedule, t - jump, beyond_is_one=True)
        x_0, noise = _split(schedule, predict(x_t, t), x_t, alpha_bar_t)
        x_0 = _clip(x_0, schedule, unless_told=True)
        var = (1 - alpha_bar_p) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_p)
        sigma = eta * var ** 0.5
        direction = max(1 - alpha_bar_p - sigma ** 2, 0) ** 0.5      # 0 may round to -1e-8
        x_t = float(alpha_bar_p ** 0.5) * x_0 + float(direction) * noise
        if eta > 0:
            x_t = x_t + float(sigma) * draw_noise()
        yield State(step, t, x_t, x_0)


def pndm(predict, latents, schedule, num_inference_steps, draw_noise):
    """Pseudo linear multistep (PLMS): DDIM's jump with the noise averaged over up to four calls.

        x_p = sqrt(alpha_bar_p / alpha_bar_t) x_t - (alpha_bar_p - alpha_bar_t) e / d
        d = alpha_bar_t sqrt(1 - alpha_bar_p) + sqrt(alpha_bar_t (1 - alpha_bar_t) alpha_bar_p)

    e is Adams-Bashforth's blend of the last model outputs. The first step has no past: it is made
    twice, the second time with the mean of the noise at both of its ends (Heun). So from 2 steps on
    the model is called steps + 1 times, and the second timestep appears twice.
    Source: Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds",
    arXiv:2202.09778, eq. 9, 12 and 13; the start is CompVis' PLMS sampler, without Runge-Kutta.
    """
    if schedule.alphas_cumprod[-1] == 0:
        raise TinyldmError("pndm divides by alpha_bar, which rescale_betas_zero_snr makes 0: "
                           "use another sampler")
    x_t = latents
    timesteps = _whole(schedule.timesteps(num_inference_steps, "leading"))
    jump = schedule.num_train_timesteps // num_inference_steps
    outputs = []                                            # newest first
    for step, t in enumerate(timesteps[:2] + timesteps[1:2] + timesteps[2:]):
        output = predict(x_t, t)
        x_0, _ = _split(schedule, output, x_t, schedule.alphas_cumprod[t])
        if step == 1:                                       # once more from the start to here
            x_t, source, blend = latents, t + jump, (output + outputs[0]) / 2
        else:
            outputs = [output, *outputs[:3]]
            source, blend = t, _adams_bashforth(outputs)
        x_t = _plms_step(schedule, x_t, blend, source, source - jump)
        yield State(step, t, x_t, x_0)


def _adams_bashforth(e):
    """The blend of one to four outputs, newest first: exact for a polynomial of as many terms."""
    if len(e) == 1:
        return e[0]
    if len(e) == 2:
        return (3 * e[0] - e[1]) / 2
    if len(e) == 3:
        return (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
    return (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24


def _plms_step(schedule, x_t, output, t, p):
    """Eq. 9 of arXiv:2202.09778: from t to p along the noise that a blended output stands for."""
    alpha_bar_t = schedule.alphas_cumprod[t]
    alpha_bar_p = _alpha_bar_after(schedule, p, beyond_is_one=False)
    _, e = _split(schedule, output, x_t, alpha_bar_t)
    d = (alpha_bar_t * (1 - alpha_bar_p) ** 0.5
         + (alpha_bar_t * (1 - alpha_bar_t) * alpha_bar_p) ** 0.5)
    scale = (alpha_bar_p / alpha_bar_t) ** 0.5
    return float(scale) * x_t - float((alpha_bar_p - alpha_bar_t) / d) * e


def lcm(predict, latents, schedule, num_inference_steps, draw_noise):
    """Latent consistency: jump to x_0, and as long as steps remain go back up with fresh noise.

        f = c_out x_0 + c_skip x_t,  c_skip = 1/4 / (u^2 + 1/4),  c_out = u / sqrt(u^2 + 1/4)
        x_p = sqrt(alpha_bar_p) f + sqrt(1 - alpha_bar_p) z

    u = 10 t, so that f = x_t at t = 0: the boundary condition of a consistency model, which is
    trained to answer the end of the walk from any of its points. It knows 50 timesteps, T / 50
    apart; the steps are spread over them from the top, whatever the schedule's spacing.
    Source: Luo et al. 2023, "Latent Consistency Models", arXiv:2310.04378, algorithm 3; c_skip and
    c_out are Song et al.'s 2023, "Consistency Models", arXiv:2303.01469, for discrete t.
    """
    x_t = latents
    timesteps = _lcm_timesteps(schedule, num_inference_steps)
    for step, (t, p) in enumerate(zip(timesteps, [*timesteps[1:], None])):
        x_0, _ = _split(schedule, predict(x_t, t), x_t, schedule.alphas_cumprod[t])
        x_0 = _clip(x_0, schedule, unless_told=False)
        u = 10.0 * t
        x_t = f = u / (u ** 2 + 0.25) ** 0.5 * x_0 + 0.25 / (u ** 2 + 0.25) * x_t
        if p is not None:
            alpha_bar_p = schedule.alphas_cumprod[p]
            x_t = float(alpha_bar_p ** 0.5) * f + float((1 - alpha_bar_p) ** 0.5) * draw_noise()
        yield State(step, t, x_t, f)


def _lcm_timesteps(schedule, n, known=50):
    """n of the `known` timesteps that the model was distilled at, from the highest down."""
    schedule.timesteps(n, "leading")                # for its check of n
    T = schedule.num_train_timesteps
    if not n <= known <= T:
        raise TinyldmError(f"lcm takes from 1 to {known} steps, of at least {known} training "
                           f"timesteps, not {n} of {T}: use another sampler")
    places = np.linspace(0, known, n, endpoint=False)
    return [T // known * (known - int(place)) - 1 for place in places]


# ---- samplers on x_t that solve its linear part exactly -------------------------------------

def dpmpp_2m(predict, latents, schedule, num_inference_steps, draw_noise, use_karras_sigmas=False,
             sde=False):
    """DPM-Solver++(2M): the ODE's linear part solved exactly, x_0 extrapolated from two calls.

        h = log(sigma_s / sigma_t),  r = (the h before) / h,  alpha = 1 / sqrt(sigma^2 + 1)
        D = x_0 + (x_0 - the x_0 before) / (2 r)
        x_t = alpha_t sigma_t / (alpha_s sigma_s) x_s - alpha_t (e^-h - 1) D

    goes from s to t; the paper's sigma is alpha sigma here. The first step has no past and takes
    D = x_0. So does the last where it ends at sigma = 0, h being infinite, or where the steps are
    few (< 15) and so large. With `sde` the old noise decays twice as fast and fresh noise fills up,
    drawn on the last step too, times 0:

        x_t = alpha_t sigma_t / (alpha_s sigma_s) e^-h x_s - alpha_t (e^-2h - 1) D
              + alpha_t sigma_t sqrt(1 - e^-2h) z

    Source: Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
    Probabilistic Models", arXiv:2211.01095, algorithm 2; its SDE-DPM-Solver++(2M).
    """
    x_t, n = latents, num_inference_steps
    timesteps, sigmas = _begin_dpm(schedule, n, use_karras_sigmas)
    first_order_last = sigmas[-1] == 0 or n < 15
    x_0_before = h_before = None
    for step, t in enumerate(timesteps):
        sigma_s, sigma_t = sigmas[step], sigmas[step + 1]
        x_0 = _dpm_x_0(predict, x_t, t, sigma_s, schedule)
        h, D = _log_ratio(sigma_s, sigma_t), x_0
        if step > 0 and not (step == n - 1 and first_order_last):
            D = x_0 + h / h_before / 2 * (x_0 - x_0_before)
        if sde:
            fresh = max(-math.expm1(-2 * h), 0.0) ** 0.5    # 0 may round to -1e-7
            x_t = (_dpm_step(x_t * math.exp(-h), D, sigma_s, sigma_t, 2 * h)
                   + _alpha(sigma_t) * sigma_t * fresh * draw_noise())
        else:
            x_t = _dpm_step(x_t, D, sigma_s, sigma_t, h)
        x_0_before, h_before = x_0, h
        yield State(step, t, x_t, x_0)


def unipc(predict, latents, schedule, num_inference_steps, draw_noise):
    """UniPC-2: a step of DPM-Solver++(2M), made again once the model has been called at its end.

    The predictor is dpmpp_2m's step. The corrector starts from the same x_s and knows one x_0 more,
    so that its D is, weighted as the exact solution weights it, the mean of the parabola through
    three: the x_0 before at -r, x_0 at 0 and the x_0 after, at the predicted x_t, at 1.

        D = x_0 + c_1 (x_0 - the x_0 before) / r + c_2 (the x_0 after - x_0)
        c_1 + c_2 = b_1,  c_2 - r c_1 = b_2,  b_k = the mean of u^k over 0..1, weighted with e^hu

    The first step has no past: its predictor takes D = x_0, its corrector the mean of the x_0 at
    both ends. The last predictor takes D = x_0, and no corrector follows.
    Source: Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of
    Diffusion Models", arXiv:2302.04867, algorithms 1 and 2 in their multistep form for x_0, with
    B(h) = e^h - 1.
    """
    x_t, n = latents, num_inference_steps
    timesteps, sigmas = _begin_dpm(schedule, n)
    h = [_log_ratio(sigma_s, sigma_t) for sigma_s, sigma_t in pairwise(sigmas)]
    x_s, past = None, []                            # past: the x_0 before, newest first
    for step, t in enumerate(timesteps):
        x_0 = _dpm_x_0(predict, x_t, t, sigmas[step], schedule)
        if step > 0:
            D = _unipc_corrected(x_0, past, *h[max(step - 2, 0):step])
            x_t = _dpm_step(x_s, D, sigmas[step - 1], sigmas[step], h[step - 1])
        x_s, D = x_t, x_0
        if 0 < step < n - 1:
            D = x_0 + h[step] / h[step - 1] / 2 * (x_0 - past[0])
        x_t = _dpm_step(x_s, D, sigmas[step], sigmas[step + 1], h[step])
        past = [x_0, *past[:1]]
        yield State(step, t, x_t, x_0)


def _unipc_corrected(x_0_after, past, *h):
    """D of unipc's corrector. h: of the step before, if there is one, and of the step itself."""
    if len(past) == 1:
        return (past[0] + x_0_after) / 2
    h_before, h = h
    r = h_before / h
    b_1 = -1 / h - 1 / math.expm1(-h)
    b_2 = -2 * b_1 / h - 1 / math.expm1(-h)
    c_1 = (b_1 - b_2) / (1 + r)
    return past[0] + c_1 / r * (past[0] - past[1]) + (b_1 - c_1) * (x_0_after - past[0])


def _begin_dpm(schedule, n, use_karras_sigmas=False):
    """n whole timesteps, and their sigmas with the final one: n + 1 python floats."""
    timesteps = schedule.timesteps(n, "linspace", spare=1)
    if use_karras_sigmas:
        sigmas, timesteps = _karras_sigmas(schedule, n)
    else:
        sigmas = _sigmas_at(schedule, timesteps.round())
    return _whole(timesteps), [*sigmas.tolist(), _final_sigma(schedule)]


def _dpm_x_0(predict, x_t, t, sigma, schedule):
    x_0, _ = schedule.split(predict(x_t, t), x_t, _alpha(sigma), sigma * _alpha(sigma))
    return x_0


def _dpm_step(x_s, D, sigma_s, sigma_t, h):
    """The exact solution from s to t where x_0 is D all the way."""
    alpha_s, alpha_t = _alpha(sigma_s), _alpha(sigma_t)
    return alpha_t * sigma_t / (alpha_s * sigma_s) * x_s - alpha_t * math.expm1(-h) * D


def _alpha(sigma):
    return (sigma ** 2 + 1) ** -0.5


def _log_ratio(sigma_s, sigma_t):
    return math.log(sigma_s / sigma_t) if sigma_t > 0 else math.inf


# ---- samplers on x = x_0 + sigma noise ------------------------------------------------------

def euler(predict, latents, schedule, num_inference_steps, draw_noise):
    """Euler's method on dx/dsigma = (x - x_0) / sigma.

    Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
    arXiv:2206.00364, algorithm 2 with S_churn = 0 and without its second-order correction.
    """
    final_sigma = _final_sigma(schedule)
    timesteps, sigmas, x = _begin_euler(schedule, num_inference_steps, latents, final_sigma)
    for step, t in enumerate(timesteps):
        sigma = sigmas[step]
        x_0 = _denoise(predict, x, t, sigma, schedule)
        d = (x - x_0) / float(sigma)
        x = x + d * float(sigmas[step + 1] - sigma)
        yield State(step, t, x, x_0)


def euler_ancestral(predict, latents, schedule, num_inference_steps, draw_noise):
    """Euler's method that goes below the next sigma and comes back with fresh noise.

        sigma_up^2 = sigma_to^2 (sigma^2 - sigma_to^2) / sigma^2
        sigma_down^2 = sigma_to^2 - sigma_up^2
        x = x + d (sigma_down - sigma) + sigma_up z

    sigma_up is the posterior's deviation: DDPM in this x. Noise is drawn on the last step too,
    times 0.
    Source: Crowson, k-diffusion, sample_euler_ancestral, after Song et al. 2020, "Score-Based
    Generative Modeling through Stochastic Differential Equations", arXiv:2011.13456, appendix F.
    """
    timesteps, sigmas, x = _begin_euler(schedule, num_inference_steps, latents, 0.0)
    for step, t in enumerate(timesteps):
        sigma, sigma_to = sigmas[step], sigmas[step + 1]
        x_0 = _denoise(predict, x, t, sigma, schedule)
        sigma_up = (sigma_to ** 2 * (sigma ** 2 - sigma_to ** 2) / sigma ** 2) ** 0.5
        sigma_down = (sigma_to ** 2 - sigma_up ** 2) ** 0.5
        d = (x - x_0) / float(sigma)
        x = x + d * float(sigma_down - sigma) + float(sigma_up) * draw_noise()
        yield State(step, t, x, x_0)


def heun(predict, latents, schedule, num_inference_steps, draw_noise):
    """Euler's step, made again with the mean of the slopes at both of its ends.

        d = (x - x_0) / sigma,  x' = x + d (sigma_to - sigma)
        d' = (x' - x_0') / sigma_to, where x_0' is what the model says of x'
        x = x + (d + d') / 2 (sigma_to - sigma)

    The last step ends at sigma = 0, where there is no slope, and remains Euler's. So the model is
    called 2 steps - 1 times; of every State but the last, the even ones hold x' for latents.
    Source: Karras et al. 2022, arXiv:2206.00364, algorithm 1.
    """
    timesteps, sigmas, x = _begin_euler(schedule, num_inference_steps, latents, 0.0)
    for step, t in enumerate(timesteps):
        sigma, sigma_to = sigmas[step], sigmas[step + 1]
        x_0 = _clip(_denoise(predict, x, t, sigma, schedule), schedule, unless_told=False)
        d = (x - x_0) / float(sigma)
        x_to = x + d * float(sigma_to - sigma)
        yield State(2 * step, t, x_to, x_0)
        if sigma_to > 0:
            t = timesteps[step + 1]
            x_0 = _clip(_denoise(predict, x_to, t, sigma_to, schedule), schedule, unless_told=False)
            d = (d + (x_to - x_0) / float(sigma_to)) / 2
            x = x + d * float(sigma_to - sigma)
            yield State(2 * step + 1, t, x, x_0)


def lms(predict, latents, schedule, num_inference_steps, draw_noise):
    """Linear multistep: the slope is the polynomial through its last four values, integrated.

        d_i = (x - x_0) / sigma_i at the i-th call
        x = x + sum over j of c_j d_j,  j = i, i - 1, i - 2, i - 3
        c_j = integral from sigma_i to sigma_{i+1} of L_j,
        L_j(sigma) = product over the other k of (sigma - sigma_k) / (sigma_j - sigma_k)

    Where fewer values are known the polynomial is of lower degree; the first step is Euler's.
    Source: Crowson, k-diffusion, sample_lms; the method is Adams and Bashforth's, for uneven steps.
    """
    timesteps, sigmas, x = _begin_euler(schedule, num_inference_steps, latents, 0.0)
    slopes = []                                             # newest first
    for step, t in enumerate(timesteps):
        x_0 = _denoise(predict, x, t, sigmas[step], schedule)
        slopes = [(x - x_0) / float(sigmas[step]), *slopes[:3]]
        weights = _lagrange_integrals(sigmas[step::-1][:4], sigmas[step + 1])
        change = weights[0] * slopes[0]
        for weight, slope in zip(weights[1:], slopes[1:]):
            change = change + weight * slope
        x = x + change
        yield State(step, t, x, x_0)


def _lagrange_integrals(sigmas, end):
    """For each sigma, the integral of its Lagrange polynomial from the first sigma to the end.

    By Gauss' two points, which are exact up to degree 3.
    """
    sigmas = sigmas.astype(np.float64)
    half = (end - sigmas[0]) / 2
    points = sigmas[0] + half * np.array([[1 - 3 ** -0.5], [1 + 3 ** -0.5]])        # (2,1)
    others = [np.delete(sigmas, i) for i in range(len(sigmas))]
    return [float(half * ((points - other) / (sigma - other)).prod(axis=1).sum())
            for sigma, other in zip(sigmas, others)]


def _begin_euler(schedule, num_inference_steps, latents, final_sigma):
    """Timesteps, their sigmas and the final one, and the first x: noise at the largest sigma.

    "leading" starts below the noisiest timestep, where x is expected to hold some picture too: + 1.
    """
    timesteps = schedule.timesteps(num_inference_steps, "linspace").astype(np.float32)
    sigmas = np.append(_sigmas_at(schedule, timesteps), np.float32(final_sigma))
    leading = schedule.timestep_spacing == "leading"
    return timesteps.tolist(), sigmas, latents * float((sigmas[0] ** 2 + leading) ** 0.5)


def _denoise(predict, x, t, sigma, schedule):
    """The predicted x_0 of x = x_0 + sigma noise, whose x_t = x / sqrt(sigma^2 + 1) the model sees.

    Solved for in x, not in x_t: Heun divides x - x_0 by a small sigma, which magnifies roundings.
    """
    scale = (sigma ** 2 + 1) ** 0.5
    output = predict(x / float(scale), t)
    if schedule.prediction_type == "v_prediction":      # defined by x_t, which has unit variance
        return output * float(-sigma / scale) + x / float(sigma ** 2 + 1)
    x_0, _ = schedule.split(output, x, 1.0, sigma)
    return x_0


# ---- shared ---------------------------------------------------------------------------------

def _split(schedule, model_output, x_t, alpha_bar):
    return schedule.split(model_output, x_t, alpha_bar ** 0.5, (1 - alpha_bar) ** 0.5)


def _whole(timesteps):
    return [int(t) for t in timesteps.round()]


def _alpha_bar_after(schedule, p, beyond_is_one):
    """alpha_bar_p; beyond the table's clean end (p < 0) 1 or alpha_bar_0, as the schedule says."""
    if p >= 0:
        return schedule.alphas_cumprod[p]
    is_one = beyond_is_one if schedule.set_alpha_to_one is None else schedule.set_alpha_to_one
    return 1.0 if is_one else schedule.alphas_cumprod[0]


def _clip(x_0, schedule, unless_told):
    """x_0 held in the schedule's range where clip_sample says so, or where None the sampler."""
    if not (unless_told if schedule.clip_sample is None else schedule.clip_sample):
        return x_0
    return x_0.clip(-schedule.clip_sample_range, schedule.clip_sample_range)


def _sigmas_at(schedule, timesteps):
    """sigma at whole or fractional timesteps, (n,) -> (n,) float32."""
    table = schedule.sigmas
    return np.interp(timesteps, np.arange(len(table)), table).astype(np.float32)


def _final_sigma(schedule):
    return 0.0 if schedule.final_sigmas_type == "zero" else float(schedule.sigmas[0])


def _karras_sigmas(schedule, n, rho=7.0):
    """n sigmas evenly spaced in sigma^(1/rho) over the whole schedule, and their timesteps.

    Source: Karras et al. 2022, arXiv:2206.00364, eq. 5. A timestep is found by log sigma.
    """
    log_sigmas = np.log(schedule.sigmas)
    low, high = (float(sigma) ** (1 / rho) for sigma in schedule.sigmas[[0, -1]])
    sigmas = (high + np.linspace(0, 1, n) * (low - high)) ** rho
    timesteps = np.interp(np.log(sigmas), log_sigmas, np.arange(len(log_sigmas)))
    return sigmas.astype(np.float32), timesteps


# ---- by name --------------------------------------------------------------------------------

SAMPLERS = {
    "ddpm": ddpm,
    "ddim": ddim,
    "pndm": pndm,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "lms": lms,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_karras": partial(dpmpp_2m, use_karras_sigmas=True),
    "dpmpp_2m_sde": partial(dpmpp_2m, sde=True),
    "dpmpp_2m_sde_karras": partial(dpmpp_2m, sde=True, use_karras_sigmas=True),
    "unipc": unipc,
    "lcm": lcm,
}

EVENLY = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}

# the public files' class -> the name here, and the one value of each switch that is implemented
CLASSES = {
    "DDPMScheduler": ("ddpm", {"variance_type": "fixed_small"}),
    "DDIMScheduler": ("ddim", {}),
    "PNDMScheduler": ("pndm", {"skip_prk_steps": True}),
    "EulerDiscreteScheduler": ("euler", {
        **EVENLY, "interpolation_type": "linear", "timestep_type": "discrete"}),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", {}),
    "HeunDiscreteScheduler": ("heun", EVENLY),
    "LMSDiscreteScheduler": ("lms", EVENLY),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", {
        "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint",
        "lower_order_final": True, "euler_at_final": False, "lambda_min_clipped": -math.inf,
        "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False,
        "use_flow_sigmas": False}),
    "UniPCMultistepScheduler": ("unipc", {
        **EVENLY, "solver_order": 2, "solver_type": "bh2", "predict_x0": True,
        "lower_order_final": True, "disable_corrector": [], "solver_p": None,
        "use_flow_sigmas": False}),
    "LCMScheduler": ("lcm", {"original_inference_steps": 50, "timestep_scaling": 10.0}),
}


def get_sampler(name):
    """The sampler of a public name. Raises TinyldmError, listing the names, for any other."""
    if name not in SAMPLERS:
        raise TinyldmError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def default_sampler(config):
    """The name of the sampler that a scheduler_config.json (a dict) asks for.

    Raises TinyldmError for a class, or a variant of one, that is not among SAMPLERS.
    """
    name = config.get("_class_name")
    if name not in CLASSES:
        raise TinyldmError(f"the scheduler class {name!r} is not supported; supported: "
                           f"{', '.join(CLASSES)}; or choose a sampler: {', '.join(SAMPLERS)}")
    sampler, switches = CLASSES[name]
    config = {"skip_prk_steps": False, **config}        # what its absence means in the public class
    if sde := sampler == "dpmpp_2m" and config.get("algorithm_type") == "sde-dpmsolver++":
        switches = switches | {"algorithm_type": "sde-dpmsolver++"}
    for key, supported in switches.items():
        value = config.get(key)
        if value is not None and value != supported:
            raise TinyldmError(f"{name} with {key} = {value!r} is not supported, only "
                               f"{supported!r}; or choose a sampler: {', '.join(SAMPLERS)}")
    karras = sampler == "dpmpp_2m" and config.get("use_karras_sigmas")
    return sampler + "_sde" * sde + "_karras" * bool(karras)
