"""Latent Consistency Models: a picture in one to a few steps. Luo et al. 2023."""
from itertools import pairwise

import numpy as np

from ...errors import TinyldmError
from ..objective import to_x_start_and_noise
from .shared import NO_PICTURE, State, clip

LCM_TIMESTEPS = 50          # the number of timesteps that these models are distilled at


def lcm(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE):
    """Latent consistency: jump to x_start and, while steps remain, go back up with fresh noise z.

        f = c_out x_start + c_skip x_t,  c_skip = 1/4 / (u^2 + 1/4),  c_out = u / sqrt(u^2 + 1/4)
        x_p = sqrt(alpha_bar_p) f + sqrt(1 - alpha_bar_p) z

    u = 10 t. At t = 0 f equals x_t: the boundary condition of a consistency model, which is trained
    to predict the end of a trajectory from any of its points. The model is distilled at 50
    timesteps, T / 50 apart. The steps are spread over them from the top, whatever the schedule's
    spacing.
    Source: Luo et al. 2023, "Latent Consistency Models", arXiv:2310.04378, algorithm 3; c_skip and
    c_out are those of Song et al. 2023, "Consistency Models", arXiv:2303.01469, for discrete t.
    """
    timesteps = _lcm_timesteps(schedule, num_inference_steps, origin.reach)[origin.first:]
    x_t = origin.begin(latents, *schedule.scales(timesteps[0]))
    for step, (t, p) in enumerate(pairwise([*timesteps, None])):
        x_start, _ = to_x_start_and_noise(schedule, predict(x_t, t), x_t, *schedule.scales(t))
        x_start = clip(x_start, schedule, by_default=False)
        u = 10.0 * t
        x_t = f = u / (u ** 2 + 0.25) ** 0.5 * x_start + 0.25 / (u ** 2 + 0.25) * x_t
        if p is not None:
            signal_scale, noise_scale = schedule.scales(p)
            x_t = float(signal_scale) * f + float(noise_scale) * draw_noise()
        x_t = origin.keep(x_t, latents, *schedule.scales(p))
        yield State(step, t, x_t, f)


def _lcm_timesteps(schedule, num_inference_steps, reach):
    """Spread the steps over the lowest of the 50 timesteps, reach being their share to use."""
    schedule.check_steps(num_inference_steps)
    n, T, usable = num_inference_steps, schedule.num_train_timesteps, int(LCM_TIMESTEPS * reach)
    if not n <= usable <= LCM_TIMESTEPS <= T:
        raise TinyldmError(f"lcm takes from 1 to {usable} steps here, of at least {LCM_TIMESTEPS} "
                           f"training timesteps, not {n} of {T}: use another sampler")
    places = np.linspace(0, usable, n, endpoint=False)
    return [T // LCM_TIMESTEPS * (usable - int(place)) - 1 for place in places]
