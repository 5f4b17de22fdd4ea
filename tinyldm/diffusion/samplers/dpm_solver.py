"""DPM-Solver++: the linear part of the differential equation is solved exactly. Lu et al. 2022.

x_t = a x_start + s noise as the model gets it; sigma = s / a, and so a = 1 / sqrt(sigma^2 + 1). The
paper writes alpha and sigma for a and s. UniPC builds on the same functions.
"""
import math

import numpy as np

from ..objective import to_x_start_and_noise
from .shared import NO_PICTURE, State, final_sigma, sigmas_at, to_ints


def dpmpp_2m(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE,
             use_karras_sigmas=False, sde=False):
    """DPM-Solver++(2M): x_start is extrapolated from two calls, the rest is solved exactly.

        h = log(sigma / sigma_to),  r = (the h before) / h
        D = x_start + (x_start - the x_start before) / (2 r)
        x_to = s_to / s x_t - a_to (e^-h - 1) D

    The first step has no earlier call and takes D = x_start. So does the last step where it ends at
    sigma = 0, as h is infinite there, or where the steps are few (< 15), as it is large then. With
    `sde` the old noise decays twice as fast and fresh noise z replaces it; the last step draws
    noise too and multiplies it by 0:

        x_to = s_to / s e^-h x_t - a_to (e^-2h - 1) D + s_to sqrt(1 - e^-2h) z

    Source: Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
    Probabilistic Models", arXiv:2211.01095, algorithm 2; its SDE-DPM-Solver++(2M). The Karras
    sigmas: see _karras_sigmas.
    """
    n, first = num_inference_steps, origin.first
    timesteps, sigmas, x_t = begin_dpm(schedule, n, latents, origin, use_karras_sigmas)
    first_order_last = sigmas[-1] == 0 or n < 15
    x_start_before = h_before = None
    for step, t in origin.remaining(timesteps):
        sigma, sigma_to = sigmas[step], sigmas[step + 1]
        x_start = dpm_x_start(predict, x_t, t, sigma, schedule)
        h, D = log_ratio(sigma, sigma_to), x_start
        if step > first and not (step == n - 1 and first_order_last):
            D = x_start + h / h_before / 2 * (x_start - x_start_before)
        if sde:
            _, noise_scale_to = scales_of(sigma_to)
            fresh = max(-math.expm1(-2 * h), 0.0) ** 0.5    # 0 may round to -1e-7
            x_t = (dpm_step(x_t * math.exp(-h), D, sigma, sigma_to, 2 * h)
                   + noise_scale_to * fresh * draw_noise())
        else:
            x_t = dpm_step(x_t, D, sigma, sigma_to, h)
        x_start_before, h_before = x_start, h
        x_t = origin.keep(x_t, latents, *scales_of(sigma_to if step < n - 1 else 0.0))
        yield State(step - first, t, x_t, x_start)


def begin_dpm(schedule, n, latents, origin, use_karras_sigmas=False):
    """n whole timesteps; their sigmas and the final one, n + 1 python floats; the first x_t."""
    timesteps = schedule.timesteps(n, "linspace", spare=1)
    if use_karras_sigmas:
        sigmas, timesteps = _karras_sigmas(schedule, n)
    else:
        sigmas = sigmas_at(schedule, timesteps.round())
    x_t = origin.begin(latents, *scales_of(float(sigmas[origin.first])))
    return to_ints(timesteps), [*sigmas.tolist(), final_sigma(schedule)], x_t


def scales_of(sigma):
    """The signal scale a and the noise scale s of x_t, for a sigma."""
    a = (sigma ** 2 + 1) ** -0.5
    return a, a * sigma


def dpm_x_start(predict, x_t, t, sigma, schedule):
    x_start, _ = to_x_start_and_noise(schedule, predict(x_t, t), x_t, *scales_of(sigma))
    return x_start


def dpm_step(x_t, D, sigma, sigma_to, h):
    """The exact solution at sigma_to, if x_start is D all the way."""
    (_, s), (a_to, s_to) = scales_of(sigma), scales_of(sigma_to)
    return s_to / s * x_t - a_to * math.expm1(-h) * D


def log_ratio(sigma, sigma_to):
    return math.log(sigma / sigma_to) if sigma_to > 0 else math.inf


def _karras_sigmas(schedule, n, rho=7.0):
    """n sigmas evenly spaced in sigma^(1/rho) over the whole schedule, and their timesteps.

    A timestep is found by interpolating log sigma.
    Source: Karras et al. 2022, arXiv:2206.00364, eq. 5.
    """
    log_sigmas = np.log(schedule.sigmas)
    low, high = (float(sigma) ** (1 / rho) for sigma in schedule.sigmas[[0, -1]])
    sigmas = (high + np.linspace(0, 1, n) * (low - high)) ** rho
    timesteps = np.interp(np.log(sigmas), log_sigmas, np.arange(len(log_sigmas)))
    return sigmas.astype(np.float32), timesteps
