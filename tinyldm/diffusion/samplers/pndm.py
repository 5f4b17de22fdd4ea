"""PNDM: pseudo linear multistep, after a start by Runge-Kutta or by Heun. Liu et al. 2022."""
from itertools import pairwise

from ...errors import TinyldmError
from ..objective import to_x_start_and_noise
from .shared import NO_PICTURE, State, alpha_bar_after, refuse_thresholding, to_ints


def pndm(predict, latents, schedule, num_inference_steps, draw_noise, origin=NO_PICTURE,
         skip_prk_steps=True):
    """Pseudo linear multistep (PLMS): DDIM's jump with the noise averaged over up to four calls.

        x_p = sqrt(alpha_bar_p / alpha_bar_t) x_t - (alpha_bar_p - alpha_bar_t) e / d
        d = alpha_bar_t sqrt(1 - alpha_bar_p) + sqrt(alpha_bar_t (1 - alpha_bar_t) alpha_bar_p)

    e is the Adams-Bashforth average of the last model outputs. The first step has none before it,
    so it is made twice: the second time with the mean of the noise at both of its ends (Heun). So
    from 2 steps on the model is called steps + 1 times, and the second timestep appears twice. An
    origin leaves out calls, not steps, as the public scheduler does.

    skip_prk_steps=False is the paper's own start: the first three steps by Runge-Kutta (PRK), with
    four calls each, steps + 9 in all. It needs at least 4 steps. An origin that leaves out steps is
    drawn without it, as by the public inpainting pipeline: the public scheduler would count its
    calls from the first timestep, and jump from there although x_t has less noise.
    Source: Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds",
    arXiv:2202.09778, eq. 9, 12 and 13, algorithm 2; the start by Heun is CompVis' PLMS sampler.
    Raises TinyldmError for fewer steps, and for a schedule that reaches alpha_bar = 0.
    """
    refuse_thresholding(schedule)
    if schedule.alphas_cumprod[-1] == 0:
        raise TinyldmError("pndm divides by alpha_bar, which rescale_betas_zero_snr makes 0: "
                           "use another sampler")
    timesteps = to_ints(schedule.timesteps(num_inference_steps, "leading"))
    jump = schedule.num_train_timesteps // num_inference_steps
    by_runge_kutta = 0 if skip_prk_steps or origin.first else 12        # calls
    if by_runge_kutta:
        calls = _runge_kutta_timesteps(timesteps, jump // 2) + timesteps[3:]
    else:
        calls = (timesteps[:2] + timesteps[1:])[origin.first:]
    begun_at = x_t = origin.begin(latents, *schedule.scales(calls[0]))
    outputs = []                                            # newest first
    for step, (t, following) in enumerate(pairwise([*calls, None])):
        model_output = predict(x_t, t)
        x_start, _ = to_x_start_and_noise(schedule, model_output, x_t, *schedule.scales(t))
        repeats = step == 0 and num_inference_steps > 1
        if step < by_runge_kutta:
            stage = step % 4
            if stage == 0:
                begun_at, source, stages = x_t, t, []
                outputs = [model_output, *outputs]
            stages.append(model_output)
            average = _runge_kutta(stages) if stage == 3 else model_output
            x_t, p = begun_at, t - (0 if stage % 2 else jump // 2)
            repeats = stage < 3
        elif step == 1:                                     # the first step again
            x_t, average = begun_at, (model_output + outputs[0]) / 2
            source, p = t + jump, t
        else:
            outputs = [model_output, *outputs[:3]]
            average, source, p = _adams_bashforth(outputs), t, t - jump
        x_t = _transfer(schedule, x_t, average, source, p)
        x_t = origin.keep(x_t, latents, *schedule.scales(following))
        yield State(step, t, x_t, x_start, repeats)


def _runge_kutta_timesteps(timesteps, half):
    """Where the first three steps call the model: each at its start, twice half-way, at its end."""
    if len(timesteps) < 4:
        raise TinyldmError("the weights' scheduler has skip_prk_steps = false, a start that takes "
                           f"at least 4 steps, not {len(timesteps)}: take more, or another sampler")
    return [t for start, end in pairwise(timesteps[:4])
            for t in (start, end + half, end + half, end)]


def _runge_kutta(e):
    """Average the outputs of a step's four calls, as Simpson's rule does. Eq. 13."""
    return (e[0] + 2 * e[1] + 2 * e[2] + e[3]) / 6


def _adams_bashforth(e):
    """Average one to four outputs, newest first: exact for a polynomial of as many terms."""
    if len(e) == 1:
        return e[0]
    if len(e) == 2:
        return (3 * e[0] - e[1]) / 2
    if len(e) == 3:
        return (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
    return (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24


def _transfer(schedule, x_t, model_output, t, p):
    """Eq. 9 of arXiv:2202.09778: from t to p with the noise that the averaged output means."""
    alpha_bar_t = schedule.alphas_cumprod[t]
    alpha_bar_p = alpha_bar_after(schedule, p, end_is_one=False)
    _, e = to_x_start_and_noise(schedule, model_output, x_t, *schedule.scales(t))
    d = (alpha_bar_t * (1 - alpha_bar_p) ** 0.5
         + (alpha_bar_t * (1 - alpha_bar_t) * alpha_bar_p) ** 0.5)
    scale = (alpha_bar_p / alpha_bar_t) ** 0.5
    return float(scale) * x_t - float((alpha_bar_p - alpha_bar_t) / d) * e
