"""Euler, and Euler ancestral with fresh noise. Karras et al. 2022; Crowson's k-diffusion."""
from .shared import NO_PICTURE, State, begin_at_sigma, denoise, final_sigma, spacing_of


def euler(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE,
          use_karras_sigmas=False, use_exponential_sigmas=False):
    """Euler's method for the differential equation dx/dsigma = (x - x_start) / sigma.

    Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
    arXiv:2206.00364, algorithm 2 with S_churn = 0 and without its second-order correction.
    """
    timesteps, sigmas, x = begin_at_sigma(schedule, num_inference_steps, latents,
                                          final_sigma(schedule), origin,
                                          spacing_of(use_karras_sigmas, use_exponential_sigmas))
    for step, t in origin.remaining(timesteps):
        sigma, sigma_to = sigmas[step], sigmas[step + 1]
        x_start = denoise(predict, x, t, sigma, schedule)
        d = (x - x_start) / float(sigma)
        x = x + d * float(sigma_to - sigma)
        x = origin.keep(x, latents, 1.0, sigma_to if step < len(timesteps) - 1 else 0.0)
        yield State(step - origin.first, t, x, x_start)


def euler_ancestral(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE):
    """Euler's method to a sigma below the next one, then up to it with fresh noise z.

        sigma_up^2 = sigma_to^2 (sigma^2 - sigma_to^2) / sigma^2
        sigma_down^2 = sigma_to^2 - sigma_up^2
        x = x + d (sigma_down - sigma) + sigma_up z

    sigma_up is the posterior's standard deviation: this is DDPM, for x = x_start + sigma noise. The
    last step draws noise too, as the public scheduler does, and multiplies it by 0.
    Source: Crowson, k-diffusion, sample_euler_ancestral, after Song et al. 2020, "Score-Based
    Generative Modeling through Stochastic Differential Equations", arXiv:2011.13456, appendix F.
    """
    timesteps, sigmas, x = begin_at_sigma(schedule, num_inference_steps, latents, 0.0, origin)
    for step, t in origin.remaining(timesteps):
        sigma, sigma_to = sigmas[step], sigmas[step + 1]
        x_start = denoise(predict, x, t, sigma, schedule)
        sigma_up = (sigma_to ** 2 * (sigma ** 2 - sigma_to ** 2) / sigma ** 2) ** 0.5
        sigma_down = (sigma_to ** 2 - sigma_up ** 2) ** 0.5
        d = (x - x_start) / float(sigma)
        x = x + d * float(sigma_down - sigma) + float(sigma_up) * draw_noise()
        x = origin.keep(x, latents, 1.0, sigma_to)
        yield State(step - origin.first, t, x, x_start)
