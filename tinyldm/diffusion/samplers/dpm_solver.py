"""DPM-Solver++: the linear part of the differential equation is solved exactly. Lu et al. 2022.

x_t = a x_start + s noise as the model gets it; sigma = s / a, and so a = 1 / sqrt(sigma^2 + 1). The
paper writes alpha and sigma for a and s. UniPC builds on the same functions.
"""
import math

import numpy as np

from ..objective import to_x_start_and_noise
from .shared import (
    NO_PICTURE,
    State,
    dynamic_threshold,
    final_sigma,
    respaced,
    sigmas_at,
    spacing_of,
    to_ints,
)


def dpmpp_2m(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE,
             use_karras_sigmas=False, sde=False, use_exponential_sigmas=False, solver_order=2,
             solver_type="midpoint", lower_order_final=True, euler_at_final=False):
    """DPM-Solver++(2M): x_start is extrapolated from two calls, the rest is solved exactly.

        h = log(sigma / sigma_to),  r = (the h before) / h
        D = x_start + (x_start - the x_start before) / (2 r)
        x_to = s_to / s x_t - a_to (e^-h - 1) D

    The first step has no earlier call and takes D = x_start. So does the last step where it ends at
    sigma = 0, as h is infinite there, or where the steps are few (< 15), as it is large then. With
    `sde` the old noise decays twice as fast and fresh noise z replaces it; the last step draws
    noise too and multiplies it by 0:

        x_to = s_to / s e^-h x_t - a_to (e^-2h - 1) D + s_to sqrt(1 - e^-2h) z

    The other options are those of the public scheduler: solver_order 1 never looks back;
    solver_type "heun" weights the slope of x_start as the exact solution weights it, by
    1 / (1 - e^-h) - 1 / h in place of 1/2; lower_order_final = False keeps the last of few steps,
    and euler_at_final drops that of many.

    Source: Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
    Probabilistic Models", arXiv:2211.01095, algorithm 2; its SDE-DPM-Solver++(2M). The Karras
    sigmas: see shared.respaced.
    """
    n, first = num_inference_steps, origin.first
    spacing = spacing_of(use_karras_sigmas, use_exponential_sigmas)
    timesteps, sigmas, x_t = begin_dpm(schedule, n, latents, origin, spacing)
    first_order_last = sigmas[-1] == 0 or euler_at_final or lower_order_final and n < 15
    x_start_before = h_before = None
    for step, t in origin.remaining(timesteps):
        sigma, sigma_to = sigmas[step], sigmas[step + 1]
        x_start = dpm_x_start(predict, x_t, t, sigma, schedule)
        h, D = log_ratio(sigma, sigma_to), x_start
        if solver_order > 1 and step > first and not (step == n - 1 and first_order_last):
            k = 2 * h if sde else h
            weight = -1 / math.expm1(-k) - 1 / k if solver_type == "heun" else 1 / 2
            D = x_start + weight * h / h_before * (x_start - x_start_before)
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


def begin_dpm(schedule, n, latents, origin, spacing=None):
    """n whole timesteps; their sigmas and the final one, n + 1 python floats; the first x_t.

    spacing: of the sigmas, over the whole schedule, see shared.respaced. The timesteps of
    "exponential" ones are cut to whole numbers, those of "karras" rounded, as in public schedulers.
    """
    timesteps = schedule.timesteps(n, "linspace", spare=1)
    if spacing:
        high, low = (float(sigma) for sigma in schedule.sigmas[[-1, 0]])
        sigmas, timesteps = respaced(schedule, high, low, n, spacing)
        sigmas = sigmas.astype(np.float32)
        timesteps = np.floor(timesteps) if spacing == "exponential" else timesteps
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
    return dynamic_threshold(x_start, schedule) if schedule.thresholding else x_start


def dpm_step(x_t, D, sigma, sigma_to, h):
    """The exact solution at sigma_to, if x_start is D all the way."""
    (_, s), (a_to, s_to) = scales_of(sigma), scales_of(sigma_to)
    return s_to / s * x_t - a_to * math.expm1(-h) * D


def log_ratio(sigma, sigma_to):
    return math.log(sigma / sigma_to) if sigma_to > 0 else math.inf
