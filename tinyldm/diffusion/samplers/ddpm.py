"""DDPM, the first sampler: each step adds fresh noise. Ho et al. 2020."""
from itertools import pairwise

import numpy as np

from ...backend import get_xp
from ...errors import TinyldmError
from ..objective import to_x_start_and_noise
from .shared import NO_PICTURE, State, clip, to_ints

LEARNED = "learned", "learned_range"        # the model predicts these, in further channels


def ddpm(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE,
         variance_type="fixed_small"):
    """Ancestral sampling: draw x_p from the posterior q(x_p | x_t, x_start), p the next timestep.

        x_p = sqrt(alpha_bar_p) beta_t / (1 - alpha_bar_t) x_start
              + sqrt(alpha_t) (1 - alpha_bar_p) / (1 - alpha_bar_t) x_t + sqrt(var) z
        alpha_t = alpha_bar_t / alpha_bar_p,  beta_t = 1 - alpha_t,
        beta~ = (1 - alpha_bar_p) / (1 - alpha_bar_t) beta_t

    alpha_t and beta_t are the paper's where p = t - 1; z is fresh noise. var is beta~, beta_t or
    between them, as variance_type says: see `std`. With a learned one, predict returns twice as
    many channels: behind the usual output, those that the variance is made of.
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
        model_output, values = predict(x_t, t), None
        if variance_type in LEARNED:
            model_output, values = _halves(model_output, x_t.shape[-1], variance_type)
        x_start, _ = to_x_start_and_noise(schedule, model_output, x_t, *schedule.scales(t))
        x_start = clip(x_start, schedule, by_default=True)
        x_t = (float(alpha_bar_p ** 0.5 * beta_t / (1 - alpha_bar_t)) * x_start
               + float(alpha_t ** 0.5 * (1 - alpha_bar_p) / (1 - alpha_bar_t)) * x_t)
        if t > 0:
            beta_tilde = (1 - alpha_bar_p) / (1 - alpha_bar_t) * beta_t
            x_t = x_t + std(variance_type, beta_t, beta_tilde, values) * draw_noise()
        x_t = origin.keep(x_t, latents, *schedule.scales(p))
        yield State(step, t, x_t, x_start)


def _halves(model_output, C, variance_type):
    """(...,2C) -> (...,C), (...,C). Raises TinyldmError for another number of channels."""
    if model_output.shape[-1] != 2 * C:
        raise TinyldmError(f"the scheduler's variance_type {variance_type} needs a model that also "
                           "predicts the variance, in as many channels again: choose another "
                           "sampler, such as ddim")
    return model_output[..., :C], model_output[..., C:]


def std(variance_type, beta_t, beta_tilde, values=None):
    """The standard deviation of the noise that a step adds: a number, or an array like values.

    fixed_small, fixed_small_log    the root of beta~, the variance of q(x_p | x_t, x_start)
    fixed_large                     the root of beta_t
    learned                         the root of values, which the model predicted
    learned_range                   between both, on a logarithmic scale: values -1 stand for beta~
                                    and 1 for beta_t
    Source: arXiv:2006.11239, section 3.2; for learned_range Nichol & Dhariwal 2021,
    arXiv:2102.09672, eq. 15. As in diffusers, beta~ is at least 1e-20.
    """
    beta_tilde = np.maximum(beta_tilde, np.float32(1e-20))      # it is 0 in the step to the picture
    if variance_type == "learned":
        return values ** 0.5
    if variance_type == "learned_range":
        share = (values + 1) / 2
        log_variance = share * float(np.log(beta_t)) + (1 - share) * float(np.log(beta_tilde))
        return get_xp(values).exp(log_variance / 2)
    return float((beta_t if variance_type == "fixed_large" else beta_tilde) ** 0.5)
