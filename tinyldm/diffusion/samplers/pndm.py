"""PNDM, in the form of Stable Diffusion's PLMS sampler. Liu et al. 2022."""
from itertools import pairwise

from ...errors import TinyldmError
from ..objective import to_x_start_and_noise
from .shared import NO_PICTURE, State, alpha_bar_after, refuse_thresholding, to_ints


def pndm(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE):
    """Pseudo linear multistep (PLMS): DDIM's jump with the noise averaged over up to four calls.

        x_p = sqrt(alpha_bar_p / alpha_bar_t) x_t - (alpha_bar_p - alpha_bar_t) e / d
        d = alpha_bar_t sqrt(1 - alpha_bar_p) + sqrt(alpha_bar_t (1 - alpha_bar_t) alpha_bar_p)

    e is the Adams-Bashforth average of the last model outputs. The first step has none before it,
    so it is made twice: the second time with the mean of the noise at both of its ends (Heun). So
    from 2 steps on the model is called steps + 1 times, and the second timestep appears twice. An
    origin leaves out calls, not steps, as the public scheduler does.
    Source: Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds",
    arXiv:2202.09778, eq. 9, 12 and 13; the start is CompVis' PLMS sampler, without Runge-Kutta.
    """
    refuse_thresholding(schedule)
    if schedule.alphas_cumprod[-1] == 0:
        raise TinyldmError("pndm divides by alpha_bar, which rescale_betas_zero_snr makes 0: "
                           "use another sampler")
    timesteps = to_ints(schedule.timesteps(num_inference_steps, "leading"))
    timesteps = (timesteps[:2] + timesteps[1:])[origin.first:]
    begun_at = x_t = origin.begin(latents, *schedule.scales(timesteps[0]))
    jump = schedule.num_train_timesteps // num_inference_steps
    outputs = []                                            # newest first
    for step, (t, following) in enumerate(pairwise([*timesteps, None])):
        model_output = predict(x_t, t)
        x_start, _ = to_x_start_and_noise(schedule, model_output, x_t, *schedule.scales(t))
        if step == 1:                                       # the first step again
            x_t, source, average = begun_at, t + jump, (model_output + outputs[0]) / 2
        else:
            outputs = [model_output, *outputs[:3]]
            source, average = t, _adams_bashforth(outputs)
        x_t = _plms_step(schedule, x_t, average, source, source - jump)
        x_t = origin.keep(x_t, latents, *schedule.scales(following))
        yield State(step, t, x_t, x_start)


def _adams_bashforth(e):
    """Average one to four outputs, newest first: exact for a polynomial of as many terms."""
    if len(e) == 1:
        return e[0]
    if len(e) == 2:
        return (3 * e[0] - e[1]) / 2
    if len(e) == 3:
        return (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
    return (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24


def _plms_step(schedule, x_t, model_output, t, p):
    """Eq. 9 of arXiv:2202.09778: from t to p with the noise that the averaged output means."""
    alpha_bar_t = schedule.alphas_cumprod[t]
    alpha_bar_p = alpha_bar_after(schedule, p, end_is_one=False)
    _, e = to_x_start_and_noise(schedule, model_output, x_t, *schedule.scales(t))
    d = (alpha_bar_t * (1 - alpha_bar_p) ** 0.5
         + (alpha_bar_t * (1 - alpha_bar_t) * alpha_bar_p) ** 0.5)
    scale = (alpha_bar_p / alpha_bar_t) ** 0.5
    return float(scale) * x_t - float((alpha_bar_p - alpha_bar_t) / d) * e
