"""DDIM: jump to x_start and back to a lower noise level, without fresh noise. Song et al. 2020."""
from itertools import pairwise

from ..objective import to_x_start_and_noise
from .shared import NO_PICTURE, State, alpha_bar_after, clip, to_ints


def ddim(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE):
    """Jump to the predicted x_start and back to a lower noise level p = t - T // steps.

        x_p = sqrt(alpha_bar_p) x_start + sqrt(1 - alpha_bar_p) noise

    The last step goes to alpha_bar_0, not to 1, where the schedule says set_alpha_to_one = false,
    as Stable Diffusion's does.
    Source: Song et al. 2020, "Denoising Diffusion Implicit Models", arXiv:2010.02502, eq. 12 with
    sigma = 0.
    """
    timesteps = to_ints(schedule.timesteps(num_inference_steps, "leading"))[origin.first:]
    x_t = origin.begin(latents, *schedule.scales(timesteps[0]))
    jump = schedule.num_train_timesteps // num_inference_steps
    for step, (t, following) in enumerate(pairwise([*timesteps, None])):
        alpha_bar_p = alpha_bar_after(schedule, t - jump, end_is_one=True)
        x_start, noise = to_x_start_and_noise(schedule, predict(x_t, t), x_t, *schedule.scales(t))
        x_start = clip(x_start, schedule, by_default=True)
        x_t = float(alpha_bar_p ** 0.5) * x_start + float((1 - alpha_bar_p) ** 0.5) * noise
        x_t = origin.keep(x_t, latents, *schedule.scales(following))
        yield State(step, t, x_t, x_start)
