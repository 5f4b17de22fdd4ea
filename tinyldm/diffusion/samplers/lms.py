"""LMS, a linear multistep method. Crowson's k-diffusion."""
import numpy as np

from .shared import NO_PICTURE, State, begin_at_sigma, denoise, spacing_of


def lms(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE,
        use_karras_sigmas=False, use_exponential_sigmas=False):
    """Linear multistep: integrate the polynomial through the last four slopes.

        d_i = (x - x_start) / sigma_i at the i-th call
        x = x + sum over j of c_j d_j,  j = i, i - 1, i - 2, i - 3
        c_j = integral from sigma_i to sigma_{i+1} of L_j,
        L_j(sigma) = product over the other k of (sigma - sigma_k) / (sigma_j - sigma_k)

    With fewer slopes the polynomial is of lower degree; the first step is Euler's. Where an origin
    leaves out steps, their sigmas still count in L_j, but their slopes are missing in the sum, as
    in the public scheduler.
    Source: Crowson, k-diffusion, sample_lms; the method is Adams and Bashforth's, for uneven steps.
    """
    timesteps, sigmas, x = begin_at_sigma(
        schedule, num_inference_steps, latents, 0.0, origin,
        spacing_of(use_karras_sigmas, use_exponential_sigmas))
    slopes = []                                             # newest first
    for step, t in origin.remaining(timesteps):
        x_start = denoise(predict, x, t, sigmas[step], schedule)
        slopes = [(x - x_start) / float(sigmas[step]), *slopes[:3]]
        weights = _lagrange_integrals(sigmas[step::-1][:4], sigmas[step + 1])
        change = weights[0] * slopes[0]
        for weight, slope in zip(weights[1:], slopes[1:]):
            change = change + weight * slope
        x = origin.keep(x + change, latents, 1.0, sigmas[step + 1])
        yield State(step - origin.first, t, x, x_start)


def _lagrange_integrals(sigmas, end):
    """For each sigma the integral of its Lagrange polynomial, from the first sigma to the end.

    By Gauss' rule with two points, which is exact up to degree 3.
    """
    sigmas = sigmas.astype(np.float64)
    half = (end - sigmas[0]) / 2
    points = sigmas[0] + half * np.array([[1 - 3 ** -0.5], [1 + 3 ** -0.5]])        # (2,1)
    others = [np.delete(sigmas, i) for i in range(len(sigmas))]
    return [float(half * ((points - other) / (sigma - other)).prod(axis=1).sum())
            for sigma, other in zip(sigmas, others)]
