"""Samplers on x = x_0 + sigma noise, which the model sees as x_t = x / sqrt(sigma^2 + 1).

Euler, Euler ancestral, Heun and LMS: methods for differential equations, step by step along sigma.
How they are called and what they yield: samplers.py. The variance of x grows with sigma, hence the
name, which is Song et al.'s (arXiv:2011.13456, section 3.4).
"""
import numpy as np

from .walk import NO_PICTURE, State, clip, final_sigma_of, sigmas_at


def euler(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE):
    """Euler's method on dx/dsigma = (x - x_0) / sigma.

    Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
    arXiv:2206.00364, algorithm 2 with S_churn = 0 and without its second-order correction.
    """
    final_sigma = final_sigma_of(schedule)
    timesteps, sigmas, x = _begin_euler(schedule, num_inference_steps, latents, final_sigma, origin)
    for step, t in origin.rest(timesteps):
        sigma = sigmas[step]
        x_0 = _denoise(predict, x, t, sigma, schedule)
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
    timesteps, sigmas, x = _begin_euler(schedule, num_inference_steps, latents, 0.0, origin)
    for step, t in origin.rest(timesteps):
        sigma, sigma_to = sigmas[step], sigmas[step + 1]
        x_0 = _denoise(predict, x, t, sigma, schedule)
        sigma_up = (sigma_to ** 2 * (sigma ** 2 - sigma_to ** 2) / sigma ** 2) ** 0.5
        sigma_down = (sigma_to ** 2 - sigma_up ** 2) ** 0.5
        d = (x - x_0) / float(sigma)
        x = x + d * float(sigma_down - sigma) + float(sigma_up) * draw_noise()
        x = origin.keep(x, latents, 1.0, sigma_to)
        yield State(step - origin.first, t, x, x_0)


def heun(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE):
    """Euler's step, made again with the mean of the slopes at both of its ends.

        d = (x - x_0) / sigma,  x' = x + d (sigma_to - sigma)
        d' = (x' - x_0') / sigma_to, where x_0' is what the model says of x'
        x = x + (d + d') / 2 (sigma_to - sigma)

    The last step ends at sigma = 0, where there is no slope, and remains Euler's. So the model is
    called 2 steps - 1 times; of every State but the last, the even ones hold x' for latents.
    Source: Karras et al. 2022, arXiv:2206.00364, algorithm 1.
    """
    timesteps, sigmas, x = _begin_euler(schedule, num_inference_steps, latents, 0.0, origin)
    for step, t in origin.rest(timesteps):
        sigma, sigma_to = sigmas[step], sigmas[step + 1]
        x_0 = clip(_denoise(predict, x, t, sigma, schedule), schedule, unless_told=False)
        d = (x - x_0) / float(sigma)
        x_to = origin.keep(x + d * float(sigma_to - sigma), latents, 1.0, sigma_to)
        calls = 2 * (step - origin.first)
        yield State(calls, t, x_to, x_0)
        if sigma_to > 0:
            t = timesteps[step + 1]
            x_0 = clip(_denoise(predict, x_to, t, sigma_to, schedule), schedule, unless_told=False)
            d = (d + (x_to - x_0) / float(sigma_to)) / 2
            x = origin.keep(x + d * float(sigma_to - sigma), latents, 1.0, sigma_to)
            yield State(calls + 1, t, x, x_0)


def lms(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE):
    """Linear multistep: the slope is the polynomial through its last four values, integrated.

        d_i = (x - x_0) / sigma_i at the i-th call
        x = x + sum over j of c_j d_j,  j = i, i - 1, i - 2, i - 3
        c_j = integral from sigma_i to sigma_{i+1} of L_j,
        L_j(sigma) = product over the other k of (sigma - sigma_k) / (sigma_j - sigma_k)

    Where fewer values are known the polynomial is of lower degree; the first step is Euler's. But
    where an origin leaves out steps, their sigmas count and their slopes are missing in the sum, as
    in the public scheduler.
    Source: Crowson, k-diffusion, sample_lms; the method is Adams and Bashforth's, for uneven steps.
    """
    timesteps, sigmas, x = _begin_euler(schedule, num_inference_steps, latents, 0.0, origin)
    slopes = []                                             # newest first
    for step, t in origin.rest(timesteps):
        x_0 = _denoise(predict, x, t, sigmas[step], schedule)
        slopes = [(x - x_0) / float(sigmas[step]), *slopes[:3]]
        weights = _lagrange_integrals(sigmas[step::-1][:4], sigmas[step + 1])
        change = weights[0] * slopes[0]
        for weight, slope in zip(weights[1:], slopes[1:]):
            change = change + weight * slope
        x = origin.keep(x + change, latents, 1.0, sigmas[step + 1])
        yield State(step - origin.first, t, x, x_0)


def _lagrange_integrals(sigmas, end):
    """For each sigma, the integral of its Lagrange polynomial from the first sigma to the end.

    By Gauss' two points, which are exact up to degree 3.
    """
    sigmas = sigmas.astype(np.float64)
    half = (end - sigmas[0]) / 2
    points = sigmas[0] + half * np.array([[1 - 3 ** -0.5], [1 + 3 ** -0.5]])        # (2,1)
    others = [np.delete(sigmas, i) for i in range(len(sigmas))]
    return [float(half * ((points - other) / (sigma - other)).prod(axis=1).sum())
            for sigma, other in zip(sigmas, others)]


def _begin_euler(schedule, num_inference_steps, latents, final_sigma, origin):
    """Timesteps, their sigmas and the final one, and the first x: noise of the largest sigma.

    "leading" starts below the noisiest timestep, where x is expected to hold some picture too: + 1.
    """
    timesteps = schedule.timesteps(num_inference_steps, "linspace").astype(np.float32)
    sigmas = np.append(sigmas_at(schedule, timesteps), np.float32(final_sigma))
    leading = schedule.timestep_spacing == "leading"
    scale = float((sigmas[0] ** 2 + leading) ** 0.5)
    return timesteps.tolist(), sigmas, origin.begin(latents, 1.0, sigmas[origin.first], scale)


def _denoise(predict, x, t, sigma, schedule):
    """The predicted x_0 of x = x_0 + sigma noise, whose x_t = x / sqrt(sigma^2 + 1) the model sees.

    Solved for in x, not in x_t: Heun divides x - x_0 by a small sigma, which magnifies roundings.
    """
    scale = (sigma ** 2 + 1) ** 0.5
    output = predict(x / float(scale), t)
    if schedule.prediction_type == "v_prediction":      # defined by x_t, which has unit variance
        return output * float(-sigma / scale) + x / float(sigma ** 2 + 1)
    x_0, _ = schedule.to_x_start_and_noise(output, x, 1.0, sigma)
    return x_0
