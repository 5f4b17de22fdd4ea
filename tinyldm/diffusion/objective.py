"""What the network learns to predict, and what its prediction says about x_t.

    x_t = a x_start + s noise,    a = sqrt(alpha_bar_t), s = sqrt(1 - alpha_bar_t)

| prediction_type | target |
|---|---|
| epsilon | noise |
| v_prediction | v = a noise - s x_start |
| sample | x_start |

Used by the samplers (to_x_start_and_noise) and by training (all others).
Source: Ho et al. 2020, arXiv:2006.11239, eq. 4 and 14; for v Salimans & Ho 2022, "Progressive
Distillation for Fast Sampling of Diffusion Models", arXiv:2202.00512, section 4 and appendix D.
"""
import numpy as np

from ..errors import TinyldmError


def to_x_start_and_noise(schedule, model_output, x_t, signal_scale, noise_scale):
    """Solve x_t = a x_start + s noise with the model's output -> (x_start, noise), as x_t is.

    signal_scale, noise_scale: the numbers a and s.
    Raises TinyldmError for epsilon prediction where a is 0: the noise says nothing about x_start.
    """
    a, s = float(signal_scale), float(noise_scale)      # python floats keep the arrays' dtype
    if schedule.prediction_type == "v_prediction":
        return a * x_t - s * model_output, a * model_output + s * x_t
    if schedule.prediction_type == "sample":
        return model_output, (x_t - a * model_output) / s
    if a == 0:
        raise TinyldmError("with rescale_betas_zero_snr the last training timestep is only noise, "
                           "from which epsilon prediction cannot find the picture: prediction_type "
                           "must be v_prediction")
    return (x_t - s * model_output) / a, model_output


def target(schedule, x_start, noise, timesteps):
    """What the model should predict for schedule.add_noise(x_start, noise, timesteps).

    x_start, noise (B,...), timesteps (B,) integers -> (B,...).
    """
    if schedule.prediction_type == "v_prediction":
        a, s = schedule.scales_like(x_start, timesteps)
        return a * noise - s * x_start
    return noise if schedule.prediction_type == "epsilon" else x_start


def sample_timesteps(rng, n, T):
    """n training timesteps in 0 .. T - 1, three in five of them between 0.2 T and 0.6 T.

    There the model decides on shapes: with less noise they are plain to see, with more they are
    hidden.
    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1, logit-normal sampling.
    """
    return (T / (1 + np.exp(-rng.normal(-0.4, 1, n)))).astype(int)


def uniform_timesteps(rng, n, T):
    """n training timesteps in 0 .. T - 1, each as likely as any other (Ho et al., algorithm 1)."""
    return rng.integers(T, size=n)


def min_snr_weights(schedule, timesteps, gamma):
    """The weight of each timestep's squared error: min(SNR, gamma) of x_start's.

        SNR = alpha_bar / (1 - alpha_bar),     error of x_start = error of noise / SNR
                                                                = error of v / (SNR + 1)

    timesteps (B,) -> (B,) float64. At zero terminal SNR the weight of noise is its limit, 1.
    Source: Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy",
    arXiv:2303.09556, section 3.4; for v as the public scripts have it.
    """
    alpha_bar = schedule.alphas_cumprod[timesteps].astype(np.float64)
    snr = alpha_bar / (1 - alpha_bar)
    if schedule.prediction_type == "epsilon":
        return gamma / np.maximum(snr, gamma)
    cut = np.minimum(snr, gamma)
    return cut / (snr + 1) if schedule.prediction_type == "v_prediction" else cut


def uninformed_loss(schedule, timesteps):
    """The mean squared error of the best model that knows nothing but x_t, one per timestep.

    It is of data of variance 1 whose entries are independent, as latents nearly are: such a model
    answers sqrt(1 - alpha_bar) x_t as the noise. A trained model is below it at every timestep.
    timesteps (B,) -> (B,) float64: alpha_bar of noise, 1 - alpha_bar of x_start, and 1 of v.
    """
    alpha_bar = schedule.alphas_cumprod[timesteps].astype(np.float64)
    return {"epsilon": alpha_bar, "sample": 1 - alpha_bar,
            "v_prediction": np.ones_like(alpha_bar)}[schedule.prediction_type]
