"""DPM-Solver++: the linear part of the differential equation solved exactly, Lu et al. 2022."""
import math

import numpy as np

from .shared import NO_PICTURE, State, final_sigma_of, sigmas_at, whole


def dpmpp_2m(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE,
             use_karras_sigmas=False, sde=False):
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
    n, first = num_inference_steps, origin.first
    timesteps, sigmas, x_t = begin_dpm(schedule, n, latents, origin, use_karras_sigmas)
    first_order_last = sigmas[-1] == 0 or n < 15
    x_0_before = h_before = None
    for step, t in origin.rest(timesteps):
        sigma_s, sigma_t = sigmas[step], sigmas[step + 1]
        x_0 = dpm_x_0(predict, x_t, t, sigma_s, schedule)
        h, D = log_ratio(sigma_s, sigma_t), x_0
        if step > first and not (step == n - 1 and first_order_last):
            D = x_0 + h / h_before / 2 * (x_0 - x_0_before)
        if sde:
            fresh = max(-math.expm1(-2 * h), 0.0) ** 0.5    # 0 may round to -1e-7
            x_t = (dpm_step(x_t * math.exp(-h), D, sigma_s, sigma_t, 2 * h)
                   + _alpha(sigma_t) * sigma_t * fresh * draw_noise())
        else:
            x_t = dpm_step(x_t, D, sigma_s, sigma_t, h)
        x_0_before, h_before = x_0, h
        x_t = origin.keep(x_t, latents, *dpm_level(sigma_t if step < n - 1 else 0.0))
        yield State(step - first, t, x_t, x_0)


def begin_dpm(schedule, n, latents, origin, use_karras_sigmas=False):
    """n whole timesteps; their sigmas and the final one, n + 1 python floats; the first x_t."""
    timesteps = schedule.timesteps(n, "linspace", spare=1)
    if use_karras_sigmas:
        sigmas, timesteps = _karras_sigmas(schedule, n)
    else:
        sigmas = sigmas_at(schedule, timesteps.round())
    x_t = origin.begin(latents, *dpm_level(float(sigmas[origin.first])))
    return whole(timesteps), [*sigmas.tolist(), final_sigma_of(schedule)], x_t


def dpm_level(sigma):
    return _alpha(sigma), sigma * _alpha(sigma)


def dpm_x_0(predict, x_t, t, sigma, schedule):
    x_0, _ = schedule.to_x_start_and_noise(predict(x_t, t), x_t, *dpm_level(sigma))
    return x_0


def dpm_step(x_s, D, sigma_s, sigma_t, h):
    """The exact solution from s to t where x_0 is D all the way."""
    alpha_s, alpha_t = _alpha(sigma_s), _alpha(sigma_t)
    return alpha_t * sigma_t / (alpha_s * sigma_s) * x_s - alpha_t * math.expm1(-h) * D


def _alpha(sigma):
    return (sigma ** 2 + 1) ** -0.5


def log_ratio(sigma_s, sigma_t):
    return math.log(sigma_s / sigma_t) if sigma_t > 0 else math.inf


def _karras_sigmas(schedule, n, rho=7.0):
    """n sigmas evenly spaced in sigma^(1/rho) over the whole schedule, and their timesteps.

    Source: Karras et al. 2022, arXiv:2206.00364, eq. 5. A timestep is found by log sigma.
    """
    log_sigmas = np.log(schedule.sigmas)
    low, high = (float(sigma) ** (1 / rho) for sigma in schedule.sigmas[[0, -1]])
    sigmas = (high + np.linspace(0, 1, n) * (low - high)) ** rho
    timesteps = np.interp(np.log(sigmas), log_sigmas, np.arange(len(log_sigmas)))
    return sigmas.astype(np.float32), timesteps
