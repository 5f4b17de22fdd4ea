"""Heun's method: Euler's step, corrected by a second call. Karras et al. 2022."""
from .shared import NO_PICTURE, State, begin_at_sigma, clip, denoise, spacing_of


def heun(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE,
         use_karras_sigmas=False, use_exponential_sigmas=False):
    """Make Euler's step, then make it again with the mean of the slopes at both of its ends.

        d = (x - x_start) / sigma,  x' = x + d (sigma_to - sigma)
        d' = (x' - x_start') / sigma_to, where x_start' is the prediction from x'
        x = x + (d + d') / 2 (sigma_to - sigma)

    The last step ends at sigma = 0, where there is no slope, and stays Euler's. So the model is
    called 2 steps - 1 times. State 2k holds x' of step k as latents (except in the last step, whose
    only state holds x), state 2k + 1 holds x.
    Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
    arXiv:2206.00364, algorithm 1.
    """
    timesteps, sigmas, x = begin_at_sigma(
        schedule, num_inference_steps, latents, 0.0, origin,
        spacing_of(use_karras_sigmas, use_exponential_sigmas))
    for step, t in origin.remaining(timesteps):
        sigma, sigma_to = sigmas[step], sigmas[step + 1]
        x_start = clip(denoise(predict, x, t, sigma, schedule), schedule, by_default=False)
        d = (x - x_start) / float(sigma)
        x_to = origin.keep(x + d * float(sigma_to - sigma), latents, 1.0, sigma_to)
        calls = 2 * (step - origin.first)
        yield State(calls, t, x_to, x_start)
        if sigma_to > 0:
            t = timesteps[step + 1]
            x_start = clip(denoise(predict, x_to, t, sigma_to, schedule), schedule,
                           by_default=False)
            d = (d + (x_to - x_start) / float(sigma_to)) / 2
            x = origin.keep(x + d * float(sigma_to - sigma), latents, 1.0, sigma_to)
            yield State(calls + 1, t, x, x_start, repeats=True)
