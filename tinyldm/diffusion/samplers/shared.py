"""What the samplers share: the state after each call, the start from a picture, small helpers."""
from typing import Any, NamedTuple

import numpy as np

from ...backend import get_xp, widen
from ...errors import TinyldmError
from ..objective import to_x_start_and_noise


class State(NamedTuple):
    """The sampling after one model call."""

    step: int           # counts model calls from 0
    timestep: float     # where the model was called, 0 .. num_train_timesteps - 1
    latents: Any        # after this step, in the sampler's own scale: see __init__.py
    pred_x0: Any        # x_start, the clean latents, as this call predicts them; for previews
    repeats: bool = False   # of a step's calls all but one, which progress counts

    def __repr__(self):                                 # without the numbers of the arrays
        arrays = (f"{name}=<{x.dtype} {x.shape}>" if hasattr(x, "shape") else f"{name}={x!r}"
                  for name, x in zip(self._fields[2:4], self[2:4]))
        return f"State(step={self.step}, timestep={self.timestep:g}, {', '.join(arrays)})"


class Origin(NamedTuple):
    """Where sampling begins: at noise alone, or at a picture with noise added to it.

    Source: Meng et al. 2021, "SDEdit: Guided Image Synthesis and Editing with Stochastic
    Differential Equations", arXiv:2108.01073, algorithms 1 and 2.
    """

    picture: Any = None         # its x_start, clean latents; None: there is no picture
    first: int = 0              # the number of steps to leave out: more keep more of the picture
    mask: Any = None            # 1: draw here; 0: put the noised picture back after each step.
                                # One value per latent, broadcasts against the picture
    noise_only: bool = False    # with a mask: begin from noise alone all the same
    reach: float = 1.0          # for lcm: the share of its 50 timesteps to use, from the lowest up

    def remaining(self, timesteps):
        """The steps to make: (number, timestep), with the numbers of the whole list."""
        return list(enumerate(timesteps))[self.first:]

    def begin(self, noise, signal_scale, noise_scale, only_noise_scale=1.0):
        """The first x: the noised picture, or without a picture noise times only_noise_scale."""
        if self.picture is None or self.noise_only:
            return noise * only_noise_scale
        return float(signal_scale) * self.picture + float(noise_scale) * noise

    def keep(self, x, noise, signal_scale, noise_scale):
        """x inside the mask; outside the picture, with as much noise as x now has."""
        if self.mask is None:
            return x
        noised = float(signal_scale) * self.picture + float(noise_scale) * noise
        return self.mask * x + (1 - self.mask) * noised


NO_PICTURE = Origin()


def to_ints(timesteps):
    return [int(t) for t in timesteps.round()]


def clip(x_start, schedule, by_default):
    """x_start thresholded if the schedule asks for it; or else clipped to the schedule's range, if
    clip_sample asks for it, or is None and by_default.
    """
    if schedule.thresholding:
        return dynamic_threshold(x_start, schedule)
    if not (by_default if schedule.clip_sample is None else schedule.clip_sample):
        return x_start
    return x_start.clip(-schedule.clip_sample_range, schedule.clip_sample_range)


def dynamic_threshold(x_start, schedule):
    """Pull the pixels of each image back into [-1, 1] by its own quantile of their sizes.

        s = the quantile of |x_start| over all pixels and channels, at least 1
        x_start = clip(x_start, -s, s) / s

    Strong guidance drives many pixels beyond 1. Static thresholding (clip_sample) makes all of them
    black or white; this one keeps their differences. s is at most sample_max_value, which the paper
    does not bound: with 1, the public default, it is static thresholding.
    Source: Saharia et al. 2022, "Photorealistic Text-to-Image Diffusion Models with Deep Language
    Understanding" (Imagen), arXiv:2205.11487, section 2.3.
    """
    x, xp = widen(x_start), get_xp(x_start)
    s = xp.quantile(abs(x).reshape(len(x), -1), schedule.dynamic_thresholding_ratio, axis=1)
    s = xp.minimum(xp.maximum(s, 1.0), schedule.sample_max_value)
    s = s.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))              # (B,1,...,1)
    return (x.clip(-s, s) / s).astype(x_start.dtype)


def refuse_thresholding(schedule):
    """Raise TinyldmError if the schedule asks for thresholding: for samplers that have none."""
    if schedule.thresholding:
        raise TinyldmError("the weights' scheduler has thresholding = true, which this sampler has "
                           "not: choose ddpm, ddim, dpmpp_2m, unipc, deis or lcm")


def alpha_bar_after(schedule, p, end_is_one):
    """alpha_bar_p; beyond the last step (p < 0) 1 or alpha_bar_0, as set_alpha_to_one says."""
    if p >= 0:
        return schedule.alphas_cumprod[p]
    is_one = end_is_one if schedule.set_alpha_to_one is None else schedule.set_alpha_to_one
    return 1.0 if is_one else schedule.alphas_cumprod[0]


# ---- sigmas, the noise per unit of picture --------------------------------------------------

def sigmas_at(schedule, timesteps):
    """sigma at whole or fractional timesteps, (n,) -> (n,) float32."""
    table = schedule.sigmas
    return np.interp(timesteps, np.arange(len(table)), table).astype(np.float32)


def final_sigma(schedule):
    return 0.0 if schedule.final_sigmas_type == "zero" else float(schedule.sigmas[0])


def respaced(schedule, high, low, n, spacing, rho=7.0):
    """n sigmas from high to low, and their timesteps, (n,) float64 each.

    spacing: "karras" is even in sigma^(1/rho), "exponential" in log sigma. A timestep is
    found by interpolating log sigma.
    Source: Karras et al. 2022, arXiv:2206.00364, eq. 5; Crowson, k-diffusion,
    get_sigmas_exponential.
    """
    if spacing == "karras":
        first, last = high ** (1 / rho), low ** (1 / rho)
        sigmas = (first + np.linspace(0, 1, n) * (last - first)) ** rho
    else:
        sigmas = np.exp(np.linspace(np.log(high), np.log(low), n))
    log_sigmas = np.log(schedule.sigmas)
    return sigmas, np.interp(np.log(sigmas), log_sigmas, np.arange(len(log_sigmas)))


def spacing_of(use_karras_sigmas, use_exponential_sigmas):
    """The word of a public scheduler's switches for `respaced`; None if both are off."""
    return "karras" if use_karras_sigmas else "exponential" if use_exponential_sigmas else None


def begin_at_sigma(schedule, num_inference_steps, latents, last_sigma, origin, spacing=None):
    """For x = x_start + sigma noise: the timesteps, their sigmas with the last one, the first x.

    spacing: of the sigmas between the first and the last timestep's, see respaced; None takes those
    of the timesteps.

    Without a picture the first x is noise times the largest sigma; with "leading" spacing, which
    begins below the noisiest timestep, times sqrt(sigma^2 + 1), as x then holds some picture too.
    """
    refuse_thresholding(schedule)
    timesteps = schedule.timesteps(num_inference_steps, "linspace").astype(np.float32)
    sigmas = sigmas_at(schedule, timesteps)
    if spacing:
        ends = np.interp(timesteps[[0, -1]], np.arange(len(schedule.sigmas)), schedule.sigmas)
        sigmas, timesteps = respaced(schedule, *ends, num_inference_steps, spacing)
        timesteps = timesteps.astype(np.float32)
    sigmas = np.append(sigmas.astype(np.float32), np.float32(last_sigma))
    leading = schedule.timestep_spacing == "leading"
    only_noise_scale = float((sigmas[0] ** 2 + leading) ** 0.5)
    x = origin.begin(latents, 1.0, sigmas[origin.first], only_noise_scale)
    return timesteps.tolist(), sigmas, x


def denoise(predict, x, t, sigma, schedule):
    """Call the model and return the predicted x_start of x = x_start + sigma noise.

    The model gets x_t = x / sqrt(sigma^2 + 1). The equation is solved with x, not with x_t: Heun
    divides x - x_start by a small sigma, which magnifies rounding.
    """
    scale = (sigma ** 2 + 1) ** 0.5
    model_output = predict(x / float(scale), t)
    if schedule.prediction_type == "v_prediction":      # v is defined by x_t, not by x
        return model_output * float(-sigma / scale) + x / float(sigma ** 2 + 1)
    x_start, _ = to_x_start_and_noise(schedule, model_output, x, 1.0, sigma)
    return x_start
