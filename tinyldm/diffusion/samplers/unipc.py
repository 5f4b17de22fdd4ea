"""UniPC: DPM-Solver++ with a corrector, Zhao et al. 2023."""
import math
from itertools import pairwise

from .dpm_solver import begin_dpm, dpm_level, dpm_step, dpm_x_0, log_ratio
from .shared import NO_PICTURE, State


def unipc(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE):
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
    n, first = num_inference_steps, origin.first
    timesteps, sigmas, x_t = begin_dpm(schedule, n, latents, origin)
    h = [log_ratio(sigma_s, sigma_t) for sigma_s, sigma_t in pairwise(sigmas)]
    x_s, past = None, []                            # past: the x_0 before, newest first
    for step, t in origin.rest(timesteps):
        x_0 = dpm_x_0(predict, x_t, t, sigmas[step], schedule)
        if step > first:
            D = _unipc_corrected(x_0, past, *h[max(step - 2, first):step])
            x_t = dpm_step(x_s, D, sigmas[step - 1], sigmas[step], h[step - 1])
        x_s, D = x_t, x_0
        if first < step < n - 1:
            D = x_0 + h[step] / h[step - 1] / 2 * (x_0 - past[0])
        x_t = dpm_step(x_s, D, sigmas[step], sigmas[step + 1], h[step])
        past = [x_0, *past[:1]]
        x_t = origin.keep(x_t, latents, *dpm_level(sigmas[step + 1] if step < n - 1 else 0.0))
        yield State(step - first, t, x_t, x_0)


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
