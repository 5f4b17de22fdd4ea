"""Samplers on x_t = a x_0 + s noise, a^2 + s^2 = 1, as the model sees it: DDPM, DDIM, PNDM, LCM.

How they are called and what they yield: samplers.py. The variance of x_t stays 1 throughout the
walk, hence the name, which is Song et al.'s (arXiv:2011.13456, section 3.4).
"""
from itertools import pairwise

import numpy as np

from ..errors import TinyldmError
from .walk import NO_PICTURE, State, clip, level, whole

LCM_TIMESTEPS = 50          # that Latent Consistency Models are distilled at

def ddpm(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE):
    """Ancestral sampling: each step draws from the posterior q(x_p | x_t, x_0), p the next lower t.

        x_p = sqrt(alpha_bar_p) beta / (1 - alpha_bar_t) x_0
              + sqrt(alpha) (1 - alpha_bar_p) / (1 - alpha_bar_t) x_t + sqrt(var) z
        alpha = alpha_bar_t / alpha_bar_p,  beta = 1 - alpha,
        var = (1 - alpha_bar_p) / (1 - alpha_bar_t) beta

    Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239, eq. 6-7,
    algorithm 2.
    """
    timesteps = whole(schedule.timesteps(num_inference_steps, "leading"))[origin.first:]
    x_t = origin.begin(latents, *level(schedule, timesteps[0]))
    for step, (t, p) in enumerate(pairwise([*timesteps, None])):
        alpha_bar_t = schedule.alphas_cumprod[t]
        alpha_bar_p = schedule.alphas_cumprod[p] if p is not None else 1.0
        x_0, _ = _split(schedule, predict(x_t, t), x_t, alpha_bar_t)
        x_0 = clip(x_0, schedule, unless_told=True)
        alpha = alpha_bar_t / alpha_bar_p
        beta, var = 1 - alpha, (1 - alpha_bar_p) / (1 - alpha_bar_t) * (1 - alpha)
        x_t = (float(alpha_bar_p ** 0.5 * beta / (1 - alpha_bar_t)) * x_0
               + float(alpha ** 0.5 * (1 - alpha_bar_p) / (1 - alpha_bar_t)) * x_t)
        if t > 0:
            x_t = x_t + float(var ** 0.5) * draw_noise()
        x_t = origin.keep(x_t, latents, *level(schedule, p))
        yield State(step, t, x_t, x_0)


def ddim(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE, eta=0.0):
    """Jump to the predicted x_0 and back to a lower noise level p = t - T // steps.

        x_p = sqrt(alpha_bar_p) x_0 + sqrt(1 - alpha_bar_p - sigma^2) noise + sigma z
        sigma = eta sqrt((1 - alpha_bar_p) / (1 - alpha_bar_t) (1 - alpha_bar_t / alpha_bar_p))

    eta = 0 draws no noise, eta = 1 is DDPM. The last step goes to alpha_bar[0], not to 1, where the
    schedule says set_alpha_to_one = false (Stable Diffusion does).
    Source: Song et al. 2020, "Denoising Diffusion Implicit Models", arXiv:2010.02502, eq. 12, 16.
    Raises TinyldmError for eta outside 0 .. 1.
    """
    if not 0 <= eta <= 1:
        raise TinyldmError(f"eta must lie between 0 (no noise) and 1 (DDPM's noise), not {eta}")
    timesteps = whole(schedule.timesteps(num_inference_steps, "leading"))[origin.first:]
    x_t = origin.begin(latents, *level(schedule, timesteps[0]))
    jump = schedule.num_train_timesteps // num_inference_steps
    for step, (t, after) in enumerate(pairwise([*timesteps, None])):
        alpha_bar_t = schedule.alphas_cumprod[t]
        alpha_bar_p = _alpha_bar_after(schedule, t - jump, beyond_is_one=True)
        x_0, noise = _split(schedule, predict(x_t, t), x_t, alpha_bar_t)
        x_0 = clip(x_0, schedule, unless_told=True)
        var = (1 - alpha_bar_p) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_p)
        sigma = eta * var ** 0.5
        direction = max(1 - alpha_bar_p - sigma ** 2, 0) ** 0.5      # 0 may round to -1e-8
        x_t = float(alpha_bar_p ** 0.5) * x_0 + float(direction) * noise
        if eta > 0:
            x_t = x_t + float(sigma) * draw_noise()
        x_t = origin.keep(x_t, latents, *level(schedule, after))
        yield State(step, t, x_t, x_0)


def pndm(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE):
    """Pseudo linear multistep (PLMS): DDIM's jump with the noise averaged over up to four calls.

        x_p = sqrt(alpha_bar_p / alpha_bar_t) x_t - (alpha_bar_p - alpha_bar_t) e / d
        d = alpha_bar_t sqrt(1 - alpha_bar_p) + sqrt(alpha_bar_t (1 - alpha_bar_t) alpha_bar_p)

    e is Adams-Bashforth's blend of the last model outputs. The first step has no past: it is made
    twice, the second time with the mean of the noise at both of its ends (Heun). So from 2 steps on
    the model is called steps + 1 times, and the second timestep appears twice. Where an origin
    leaves out steps, as many of these calls are left out, as the public scheduler does.
    Source: Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds",
    arXiv:2202.09778, eq. 9, 12 and 13; the start is CompVis' PLMS sampler, without Runge-Kutta.
    """
    if schedule.alphas_cumprod[-1] == 0:
        raise TinyldmError("pndm divides by alpha_bar, which rescale_betas_zero_snr makes 0: "
                           "use another sampler")
    timesteps = whole(schedule.timesteps(num_inference_steps, "leading"))
    timesteps = (timesteps[:2] + timesteps[1:])[origin.first:]
    start = x_t = origin.begin(latents, *level(schedule, timesteps[0]))
    jump = schedule.num_train_timesteps // num_inference_steps
    outputs = []                                            # newest first
    for step, (t, after) in enumerate(pairwise([*timesteps, None])):
        output = predict(x_t, t)
        x_0, _ = _split(schedule, output, x_t, schedule.alphas_cumprod[t])
        if step == 1:                                       # once more from the start to here
            x_t, source, blend = start, t + jump, (output + outputs[0]) / 2
        else:
            outputs = [output, *outputs[:3]]
            source, blend = t, _adams_bashforth(outputs)
        x_t = _plms_step(schedule, x_t, blend, source, source - jump)
        x_t = origin.keep(x_t, latents, *level(schedule, after))
        yield State(step, t, x_t, x_0)


def _adams_bashforth(e):
    """The blend of one to four outputs, newest first: exact for a polynomial of as many terms."""
    if len(e) == 1:
        return e[0]
    if len(e) == 2:
        return (3 * e[0] - e[1]) / 2
    if len(e) == 3:
        return (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
    return (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24


def _plms_step(schedule, x_t, output, t, p):
    """Eq. 9 of arXiv:2202.09778: from t to p along the noise that a blended output stands for."""
    alpha_bar_t = schedule.alphas_cumprod[t]
    alpha_bar_p = _alpha_bar_after(schedule, p, beyond_is_one=False)
    _, e = _split(schedule, output, x_t, alpha_bar_t)
    d = (alpha_bar_t * (1 - alpha_bar_p) ** 0.5
         + (alpha_bar_t * (1 - alpha_bar_t) * alpha_bar_p) ** 0.5)
    scale = (alpha_bar_p / alpha_bar_t) ** 0.5
    return float(scale) * x_t - float((alpha_bar_p - alpha_bar_t) / d) * e


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
        x_0, _ = _split(schedule, predict(x_t, t), x_t, schedule.alphas_cumprod[t])
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


# ---- shared ---------------------------------------------------------------------------------

def _split(schedule, model_output, x_t, alpha_bar):
    return schedule.to_x_start_and_noise(model_output, x_t, alpha_bar ** 0.5,
                                         (1 - alpha_bar) ** 0.5)


def _alpha_bar_after(schedule, p, beyond_is_one):
    """alpha_bar_p; beyond the table's clean end (p < 0) 1 or alpha_bar_0, as the schedule says."""
    if p >= 0:
        return schedule.alphas_cumprod[p]
    is_one = beyond_is_one if schedule.set_alpha_to_one is None else schedule.set_alpha_to_one
    return 1.0 if is_one else schedule.alphas_cumprod[0]
