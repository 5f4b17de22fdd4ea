"""UniPC: DPM-Solver++ with a corrector. Zhao et al. 2023."""
import math
from itertools import pairwise

from .dpm_solver import begin_dpm, dpm_step, dpm_x_start, log_ratio, scales_of
from .shared import NO_PICTURE, State, spacing_of


def unipc(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE,
          use_karras_sigmas=False, use_exponential_sigmas=False):
    """UniPC-2: DPM-Solver++(2M), with each step made again once the model was called at its end.

    The predictor is dpmpp_2m's step. The corrector starts from the same x and has one x_start more.
    Its D is the mean of the parabola through three of them, weighted as the exact solution weights
    it: the x_start before at u = -r, x_start at 0, and x_start_to, predicted at the step's end, at
    1.

        D = x_start + c_1 (x_start - the x_start before) / r + c_2 (x_start_to - x_start)
        c_1 + c_2 = b_1,  c_2 - r c_1 = b_2,  b_k = the mean of u^k over 0..1, weighted with e^hu

    In the first step, with no x_start before, the predictor takes D = x_start and the corrector the
    mean of the x_start at both ends. The last step's predictor takes D = x_start, and no corrector
    follows.
    Source: Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of
    Diffusion Models", arXiv:2302.04867, algorithms 1 and 2 in their multistep form for x_start,
    with B(h) = e^h - 1.
    """
    n, first = num_inference_steps, origin.first
    spacing = spacing_of(use_karras_sigmas, use_exponential_sigmas)
    timesteps, sigmas, x_t = begin_dpm(schedule, n, latents, origin, spacing)
    if spacing and sigmas[-1] > 0:
        sigmas[-1] = sigmas[-2]                         # as in the public scheduler
    h = [log_ratio(sigma, sigma_to) for sigma, sigma_to in pairwise(sigmas)]
    x_before, past = None, []                       # past: earlier x_start, newest first
    for step, t in origin.remaining(timesteps):
        x_start = dpm_x_start(predict, x_t, t, sigmas[step], schedule)
        if step > first:
            D = _corrected(x_start, past, *h[max(step - 2, first):step])
            x_t = dpm_step(x_before, D, sigmas[step - 1], sigmas[step], h[step - 1])
        x_before, D = x_t, x_start
        if first < step < n - 1:
            D = x_start + h[step] / h[step - 1] / 2 * (x_start - past[0])
        x_t = dpm_step(x_before, D, sigmas[step], sigmas[step + 1], h[step])
        past = [x_start, *past[:1]]
        x_t = origin.keep(x_t, latents, *scales_of(sigmas[step + 1] if step < n - 1 else 0.0))
        yield State(step - first, t, x_t, x_start)


def _corrected(x_start_to, past, *h):
    """The corrector's D. h: of the step before, if there is one, and of the step itself."""
    if len(past) == 1:
        return (past[0] + x_start_to) / 2
    h_before, h = h
    r = h_before / h
    b_1 = -1 / h - 1 / math.expm1(-h)
    b_2 = -2 * b_1 / h - 1 / math.expm1(-h)
    c_1 = (b_1 - b_2) / (1 + r)
    return past[0] + c_1 / r * (past[0] - past[1]) + (b_1 - c_1) * (x_start_to - past[0])
