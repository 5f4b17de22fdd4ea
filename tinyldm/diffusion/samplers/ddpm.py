"""DDPM, the first sampler: each step adds fresh noise. Ho et al. 2020."""
from itertools import pairwise

from ..objective import to_x_start_and_noise
from .shared import NO_PICTURE, State, clip, to_ints


def ddpm(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE):
    """Ancestral sampling: draw x_p from the posterior q(x_p | x_t, x_start), p the next timestep.

        x_p = sqrt(alpha_bar_p) beta_t / (1 - alpha_bar_t) x_start
              + sqrt(alpha_t) (1 - alpha_bar_p) / (1 - alpha_bar_t) x_t + sqrt(var) z
        alpha_t = alpha_bar_t / alpha_bar_p,  beta_t = 1 - alpha_t,
        var = (1 - alpha_bar_p) / (1 - alpha_bar_t) beta_t

    alpha_t and beta_t are the paper's where p = t - 1; z is fresh noise.
    Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239, eq. 6-7,
    algorithm 2.
    """
    timesteps = to_ints(schedule.timesteps(num_inference_steps, "leading"))[origin.first:]
    x_t = origin.begin(latents, *schedule.scales(timesteps[0]))
    for step, (t, p) in enumerate(pairwise([*timesteps, None])):
        alpha_bar_t = schedule.alphas_cumprod[t]
        alpha_bar_p = schedule.alphas_cumprod[p] if p is not None else 1.0
        alpha_t = alpha_bar_t / alpha_bar_p
        beta_t = 1 - alpha_t
        var = (1 - alpha_bar_p) / (1 - alpha_bar_t) * beta_t
        x_start, _ = to_x_start_and_noise(schedule, predict(x_t, t), x_t, *schedule.scales(t))
        x_start = clip(x_start, schedule, by_default=True)
        x_t = (float(alpha_bar_p ** 0.5 * beta_t / (1 - alpha_bar_t)) * x_start
               + float(alpha_t ** 0.5 * (1 - alpha_bar_p) / (1 - alpha_bar_t)) * x_t)
        if t > 0:
            x_t = x_t + float(var ** 0.5) * draw_noise()
        x_t = origin.keep(x_t, latents, *schedule.scales(p))
        yield State(step, t, x_t, x_start)
