"""PNDM, in the form of Stable Diffusion's PLMS sampler: Liu et al. 2022."""
from itertools import pairwise

from ...errors import TinyldmError
from .shared import NO_PICTURE, State, alpha_bar_after, level, whole, x_start_and_noise


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
        x_0, _ = x_start_and_noise(schedule, output, x_t, schedule.alphas_cumprod[t])
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
    alpha_bar_p = alpha_bar_after(schedule, p, beyond_is_one=False)
    _, e = x_start_and_noise(schedule, output, x_t, alpha_bar_t)
    d = (alpha_bar_t * (1 - alpha_bar_p) ** 0.5
         + (alpha_bar_t * (1 - alpha_bar_t) * alpha_bar_p) ** 0.5)
    scale = (alpha_bar_p / alpha_bar_t) ** 0.5
    return float(scale) * x_t - float((alpha_bar_p - alpha_bar_t) / d) * e
