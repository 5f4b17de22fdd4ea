"""Euler and Euler ancestral: Karras et al. 2022; Crowson's k-diffusion."""
import numpy as np

from .shared import NO_PICTURE, State, final_sigma_of, sigmas_at


def euler(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE):
    """Euler's method on dx/dsigma = (x - x_0) / sigma.

    Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
    arXiv:2206.00364, algorithm 2 with S_churn = 0 and without its second-order correction.
    """
    final_sigma = final_sigma_of(schedule)
    timesteps, sigmas, x = begin_euler(schedule, num_inference_steps, latents, final_sigma, origin)
    for step, t in origin.rest(timesteps):
        sigma = sigmas[step]
        x_0 = denoise(predict, x, t, sigma, schedule)
        d = (x - x_0) / float(sigma)
        x = x + d * float(sigmas[step + 1] - sigma)
        x = origin.keep(x, latents, 1.0, sigmas[step + 1] if step < len(timesteps) - 1 else 0.0)
        yield State(step - origin.first, t, x, x_0)


def euler_ancestral(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE):
    """Euler's method that goes below the next sigma and comes back with fresh noise.

        sigma_up^2 = sigma_to^2 (sigma^2 - sigma_to^2) / sigma^2
        sigma_down^2 = sigma_to^2 - sigma_up^2
        x = x + d (sigma_down - sigma) + sigma_up z

    sigma_up is the posterior's deviation: DDPM in this x. Noise is drawn on the last step too,
    times 0.
    Source: Crowson, k-diffusion, sample_euler_ancestral, after Song et al. 2020, "Score-Based
    Generative Modeling through Stochastic Differential Equations", arXiv:2011.13456, appendix F.
    """
    timesteps, sigmas, x = begin_euler(schedule, num_inference_steps, latents, 0.0, origin)
    for step, t in origin.rest(timesteps):
        sigma, sigma_to = sigmas[step], sigmas[step + 1]
        x_0 = denoise(predict, x, t, sigma, schedule)
        sigma_up = (sigma_to ** 2 * (sigma ** 2 - sigma_to ** 2) / sigma ** 2) ** 0.5
        sigma_down = (sigma_to ** 2 - sigma_up ** 2) ** 0.5
        d = (x - x_0) / float(sigma)
        x = x + d * float(sigma_down - sigma) + float(sigma_up) * draw_noise()
        x = origin.keep(x, latents, 1.0, sigma_to)
        yield State(step - origin.first, t, x, x_0)


def begin_euler(schedule, num_inference_steps, latents, final_sigma, origin):
    """Timesteps, their sigmas and the final one, and the first x: noise of the largest sigma.

    "leading" starts below the noisiest timestep, where x is expected to hold some picture too: + 1.
    """
    timesteps = schedule.timesteps(num_inference_steps, "linspace").astype(np.float32)
    sigmas = np.append(sigmas_at(schedule, timesteps), np.float32(final_sigma))
    leading = schedule.timestep_spacing == "leading"
    scale = float((sigmas[0] ** 2 + leading) ** 0.5)
    return timesteps.tolist(), sigmas, origin.begin(latents, 1.0, sigmas[origin.first], scale)


def denoise(predict, x, t, sigma, schedule):
    """The predicted x_0 of x = x_0 + sigma noise, whose x_t = x / sqrt(sigma^2 + 1) the model sees.

    Solved for in x, not in x_t: Heun divides x - x_0 by a small sigma, which magnifies roundings.
    """
    scale = (sigma ** 2 + 1) ** 0.5
    output = predict(x / float(scale), t)
    if schedule.prediction_type == "v_prediction":      # defined by x_t, which has unit variance
        return output * float(-sigma / scale) + x / float(sigma ** 2 + 1)
    x_0, _ = schedule.to_x_start_and_noise(output, x, 1.0, sigma)
    return x_0
