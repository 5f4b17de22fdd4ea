"""DDIM: a jump to x_start and back to less noise, Song et al. 2020."""
from itertools import pairwise

from ...errors import TinyldmError
from .shared import (
    NO_PICTURE,
    State,
    alpha_bar_after,
    clip,
    level,
    whole,
    x_start_and_noise,
)


def ddim(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE, eta=0.0):
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
    timesteps = whole(schedule.timesteps(num_inference_steps, "leading"))[origin.first:]
    x_t = origin.begin(latents, *level(schedule, timesteps[0]))
    jump = schedule.num_train_timesteps // num_inference_steps
    for step, (t, after) in enumerate(pairwise([*timesteps, None])):
        alpha_bar_t = schedule.alphas_cumprod[t]
        alpha_bar_p = alpha_bar_after(schedule, t - jump, beyond_is_one=True)
        x_0, noise = x_start_and_noise(schedule, predict(x_t, t), x_t, alpha_bar_t)
        x_0 = clip(x_0, schedule, unless_told=True)
        var = (1 - alpha_bar_p) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_p)
        sigma = eta * var ** 0.5
        direction = max(1 - alpha_bar_p - sigma ** 2, 0) ** 0.5      # 0 may round to -1e-8
        x_t = float(alpha_bar_p ** 0.5) * x_0 + float(direction) * noise
        if eta > 0:
            x_t = x_t + float(sigma) * draw_noise()
        x_t = origin.keep(x_t, latents, *level(schedule, after))
        yield State(step, t, x_t, x_0)


# ---- shared ---------------------------------------------------------------------------------
