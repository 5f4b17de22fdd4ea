"""DEIS: the noise, not x_start, is extrapolated, over log sigma. Zhang and Chen 2022."""
import math

from ..objective import to_x_start_and_noise
from .dpm_solver import begin_dpm, scales_of
from .shared import NO_PICTURE, State, dynamic_threshold, spacing_of


def deis(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE,
         use_karras_sigmas=False, use_exponential_sigmas=False, solver_order=2,
         lower_order_final=True):
    """DEIS of order 2: integrate the line, in log sigma, through the noise of the last two calls.

        x_to / a_to = x_t / a + (sigma_to - sigma) noise + c (noise - the noise before)
        c = (sigma_to (log(sigma_to / sigma) - 1) + sigma) / log(sigma / the sigma before)

    The first step has no earlier call and takes c = 0, which is DDIM. So does the last one where
    the steps are few (< 15), unless lower_order_final = False, and each with solver_order 1.
    Sampling ends at the smallest sigma, not at 0, whatever final_sigmas_type says; respaced sigmas
    repeat their last one. Both are as in the public scheduler.
    Source: Zhang and Chen 2022, "Fast Sampling of Diffusion Models with Exponential Integrator",
    arXiv:2204.13902, eq. 15 in its log-rho form.
    """
    n, first = num_inference_steps, origin.first
    spacing = spacing_of(use_karras_sigmas, use_exponential_sigmas)
    timesteps, sigmas, x_t = begin_dpm(schedule, n, latents, origin, spacing)
    sigmas[-1] = sigmas[-2] if spacing else float(schedule.sigmas[0])
    noise_before = None
    first_order_last = lower_order_final and n < 15
    for step, t in origin.remaining(timesteps):
        sigma, sigma_to = sigmas[step:step + 2]
        (a, s), (a_to, _) = scales_of(sigma), scales_of(sigma_to)
        x_start, noise = to_x_start_and_noise(schedule, predict(x_t, t), x_t, a, s)
        if schedule.thresholding:
            x_start = dynamic_threshold(x_start, schedule)
            noise = (x_t - a * x_start) / s             # that x_t then holds
        x_t = a_to / a * x_t + a_to * (sigma_to - sigma) * noise
        if solver_order > 1 and step > first and not (step == n - 1 and first_order_last):
            c = sigma_to * (math.log(sigma_to / sigma) - 1) + sigma
            c = c / math.log(sigma / sigmas[step - 1])
            x_t = x_t + a_to * c * (noise - noise_before)
        noise_before = noise
        x_t = origin.keep(x_t, latents, *scales_of(sigma_to if step < n - 1 else 0.0))
        yield State(step - first, t, x_t, x_start)
