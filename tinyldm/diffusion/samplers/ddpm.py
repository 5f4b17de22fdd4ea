"""DDPM: ancestral sampling, Ho et al. 2020."""
from itertools import pairwise

from .shared import NO_PICTURE, State, clip, level, whole, x_start_and_noise


def ddpm(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE):
    """Ancestral sampling: each step draws from the posterior q(x_p | x_t, x_0), p the next lower t.

        x_p = sqrt(alpha_bar_p) beta / (1 - alpha_bar_t) x_0
              + sqrt(alpha) (1 - alpha_bar_p) / (1 - alpha_bar_t) x_t + sqrt(var) z
        alpha = alpha_bar_t / alpha_bar_p,  beta = 1 - alpha,
        var = (1 - alpha_bar_p) / (1 - alpha_bar_t) beta

    Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239, eq. 6-7,
    algorithm 2.
    """
    timesteps = whole(schedule.timesteps(num_inference_steps, "leading"))[origin.first:]
    x_t = origin.begin(latents, *level(schedule, timesteps[0]))
    for step, (t, p) in enumerate(pairwise([*timesteps, None])):
        alpha_bar_t = schedule.alphas_cumprod[t]
        alpha_bar_p = schedule.alphas_cumprod[p] if p is not None else 1.0
        x_0, _ = x_start_and_noise(schedule, predict(x_t, t), x_t, alpha_bar_t)
        x_0 = clip(x_0, schedule, unless_told=True)
        alpha = alpha_bar_t / alpha_bar_p
        beta, var = 1 - alpha, (1 - alpha_bar_p) / (1 - alpha_bar_t) * (1 - alpha)
        x_t = (float(alpha_bar_p ** 0.5 * beta / (1 - alpha_bar_t)) * x_0
               + float(alpha ** 0.5 * (1 - alpha_bar_p) / (1 - alpha_bar_t)) * x_t)
        if t > 0:
            x_t = x_t + float(var ** 0.5) * draw_noise()
        x_t = origin.keep(x_t, latents, *level(schedule, p))
        yield State(step, t, x_t, x_0)
