"""Latent Consistency Models: a picture in a few steps, Luo et al. 2023."""
from itertools import pairwise

import numpy as np

from ...errors import TinyldmError
from .shared import NO_PICTURE, State, clip, level, x_start_and_noise

LCM_TIMESTEPS = 50          # that Latent Consistency Models are distilled at


def lcm(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE):
    """Latent consistency: jump to x_0, and as long as steps remain go back up with fresh noise.

        f = c_out x_0 + c_skip x_t,  c_skip = 1/4 / (u^2 + 1/4),  c_out = u / sqrt(u^2 + 1/4)
        x_p = sqrt(alpha_bar_p) f + sqrt(1 - alpha_bar_p) z

    u = 10 t, so that f = x_t at t = 0: the boundary condition of a consistency model, which is
    trained to answer the end of the walk from any of its points. It knows 50 timesteps, T / 50
    apart; the steps are spread over them from the top, whatever the schedule's spacing.
    Source: Luo et al. 2023, "Latent Consistency Models", arXiv:2310.04378, algorithm 3; c_skip and
    c_out are Song et al.'s 2023, "Consistency Models", arXiv:2303.01469, for discrete t.
    """
    known = int(LCM_TIMESTEPS * origin.reach)
    timesteps = _lcm_timesteps(schedule, num_inference_steps, known)[origin.first:]
    x_t = origin.begin(latents, *level(schedule, timesteps[0]))
    for step, (t, p) in enumerate(pairwise([*timesteps, None])):
        x_0, _ = x_start_and_noise(schedule, predict(x_t, t), x_t, schedule.alphas_cumprod[t])
        x_0 = clip(x_0, schedule, unless_told=False)
        u = 10.0 * t
        x_t = f = u / (u ** 2 + 0.25) ** 0.5 * x_0 + 0.25 / (u ** 2 + 0.25) * x_t
        if p is not None:
            a, s = level(schedule, p)
            x_t = float(a) * f + float(s) * draw_noise()
        x_t = origin.keep(x_t, latents, *level(schedule, p))
        yield State(step, t, x_t, f)


def _lcm_timesteps(schedule, n, known):
    """n of the lowest `known` timesteps that the model was distilled at, from the highest down."""
    schedule.timesteps(n, "leading")                # for its check of n
    T = schedule.num_train_timesteps
    if not n <= known <= LCM_TIMESTEPS <= T:
        raise TinyldmError(f"lcm takes from 1 to {known} steps here, of at least {LCM_TIMESTEPS} "
                           f"training timesteps, not {n} of {T}: use another sampler")
    places = np.linspace(0, known, n, endpoint=False)
    return [T // LCM_TIMESTEPS * (known - int(place)) - 1 for place in places]
