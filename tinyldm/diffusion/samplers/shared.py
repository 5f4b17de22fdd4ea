"""What every sampler's walk has: a state after each call, a place to begin from, noise levels.

Under variance_preserving.py, exponential.py and variance_exploding.py, which hold the samplers;
samplers.py lists them and says how they are called.
"""
from typing import Any, NamedTuple

import numpy as np


class State(NamedTuple):
    """What is known after one model call."""

    step: int           # counts model calls from 0
    timestep: float     # where the model was called, 0 .. num_train_timesteps - 1
    latents: Any        # after this step, in the sampler's own scale (samplers.py)
    pred_x0: Any        # the clean latents as predicted by this call, for previews


class Origin(NamedTuple):
    """Where a walk begins: from noise alone, or from a picture that noise is added to.

    first: how many steps are left out; the picture is noised to the level of the first one made,
    so that the less is left out, the less is left of the picture. mask: 1 where the walk paints, 0
    where the picture is put back after each step, noised to the level reached. noise_only: begin
    from noise alone even so. reach: for lcm, the share of the timesteps it knows that it may use.
    Source: Meng et al. 2021, "SDEdit: Guided Image Synthesis and Editing with Stochastic
    Differential Equations", arXiv:2108.01073, algorithms 1 and 2.
    """

    picture: Any = None         # x_0, clean latents; None: there is no picture
    first: int = 0
    mask: Any = None            # one value a latent: broadcasts against x_0
    noise_only: bool = False
    reach: float = 1.0

    def rest(self, timesteps):
        """The steps to be made: (number, timestep), numbered as if none were left out."""
        return list(enumerate(timesteps))[self.first:]

    def begin(self, noise, a, s, scale=1.0):
        """The first x: a x_0 + s noise, or without a picture noise alone times a scale."""
        if self.picture is None or self.noise_only:
            return noise * scale
        return float(a) * self.picture + float(s) * noise

    def keep(self, x, noise, a, s):
        """x where the mask says so, elsewhere the picture at the level that x has reached."""
        if self.mask is None:
            return x
        return self.mask * x + (1 - self.mask) * (float(a) * self.picture + float(s) * noise)


NO_PICTURE = Origin()


# ---- noise levels ---------------------------------------------------------------------------

def level(schedule, t):
    """a and s of x_t = a x_0 + s noise at a whole timestep; None is the end, without noise."""
    if t is None:
        return 1.0, 0.0
    alpha_bar = schedule.alphas_cumprod[t]
    return alpha_bar ** 0.5, (1 - alpha_bar) ** 0.5


def whole(timesteps):
    return [int(t) for t in timesteps.round()]


def clip(x_0, schedule, unless_told):
    """x_0 held in the schedule's range where clip_sample says so, or where None the sampler."""
    if not (unless_told if schedule.clip_sample is None else schedule.clip_sample):
        return x_0
    return x_0.clip(-schedule.clip_sample_range, schedule.clip_sample_range)


def sigmas_at(schedule, timesteps):
    """sigma at whole or fractional timesteps, (n,) -> (n,) float32."""
    table = schedule.sigmas
    return np.interp(timesteps, np.arange(len(table)), table).astype(np.float32)


def final_sigma_of(schedule):
    return 0.0 if schedule.final_sigmas_type == "zero" else float(schedule.sigmas[0])


def x_start_and_noise(schedule, model_output, x_t, alpha_bar):
    return schedule.to_x_start_and_noise(model_output, x_t, alpha_bar ** 0.5,
                                         (1 - alpha_bar) ** 0.5)


def alpha_bar_after(schedule, p, beyond_is_one):
    """alpha_bar_p; beyond the table's clean end (p < 0) 1 or alpha_bar_0, as the schedule says."""
    if p >= 0:
        return schedule.alphas_cumprod[p]
    is_one = beyond_is_one if schedule.set_alpha_to_one is None else schedule.set_alpha_to_one
    return 1.0 if is_one else schedule.alphas_cumprod[0]
