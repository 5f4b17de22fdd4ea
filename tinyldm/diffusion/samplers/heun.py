"""Heun's method: Karras et al. 2022, algorithm 1."""
from .euler import begin_euler, denoise
from .shared import NO_PICTURE, State, clip


def heun(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE):
    """Euler's step, made again with the mean of the slopes at both of its ends.

        d = (x - x_0) / sigma,  x' = x + d (sigma_to - sigma)
        d' = (x' - x_0') / sigma_to, where x_0' is what the model says of x'
        x = x + (d + d') / 2 (sigma_to - sigma)

    The last step ends at sigma = 0, where there is no slope, and remains Euler's. So the model is
    called 2 steps - 1 times; of every State but the last, the even ones hold x' for latents.
    Source: Karras et al. 2022, arXiv:2206.00364, algorithm 1.
    """
    timesteps, sigmas, x = begin_euler(schedule, num_inference_steps, latents, 0.0, origin)
    for step, t in origin.rest(timesteps):
        sigma, sigma_to = sigmas[step], sigmas[step + 1]
        x_0 = clip(denoise(predict, x, t, sigma, schedule), schedule, unless_told=False)
        d = (x - x_0) / float(sigma)
        x_to = origin.keep(x + d * float(sigma_to - sigma), latents, 1.0, sigma_to)
        calls = 2 * (step - origin.first)
        yield State(calls, t, x_to, x_0)
        if sigma_to > 0:
            t = timesteps[step + 1]
            x_0 = clip(denoise(predict, x_to, t, sigma_to, schedule), schedule, unless_told=False)
            d = (d + (x_to - x_0) / float(sigma_to)) / 2
            x = origin.keep(x + d * float(sigma_to - sigma), latents, 1.0, sigma_to)
            yield State(calls + 1, t, x, x_0)
