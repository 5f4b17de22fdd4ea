"""The noise schedule: how much of the picture is left at each training timestep.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise

Read from a scheduler_config.json. The samplers walk it downwards, training jumps into it anywhere.

| here | DDPM paper | DDIM paper |
|---|---|---|
| `alphas_cumprod[t]`, `alpha_bar` | alpha_bar_t | alpha_t |

`sigmas[t]` = sqrt((1 - alpha_bar_t) / alpha_bar_t) is the noise per unit of picture, the sigma of
Karras et al. Tables are float32, rounded where PyTorch's schedulers round: 1 - alpha_bar at t = 0,
0.00085, keeps only four digits of it, so a more exact table would be a different one.
"""
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..backend import asarray, to_host
from ..errors import TinyldmError

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
FINAL_SIGMAS = ("zero", "sigma_min")


@dataclass(frozen=True, eq=False)
class Schedule:
    """What training and the samplers must agree on. T = num_train_timesteps.

    Three fields may be None: the file does not name them, and each sampler has its own default.
    """

    betas: np.ndarray                       # (T,) float32, the share of noise added at each step
    prediction_type: str = "epsilon"        # what the model was trained to answer
    timestep_spacing: str | None = None
    steps_offset: int = 0                   # added to every timestep of "leading" spacing
    set_alpha_to_one: bool | None = None    # is alpha_bar 1 beyond the last step, or alpha_bar[0]?
    clip_sample: bool | None = None         # DDPM and DDIM hold x_0 in +-clip_sample_range
    clip_sample_range: float = 1.0
    final_sigmas_type: str = "zero"         # where Euler and DPM-Solver++ end: 0, or sigmas[0]

    @classmethod
    def from_config(cls, config):
        """From the dict of a scheduler_config.json, of whichever class.

        Raises TinyldmError for an unknown value of a field, naming the known ones.
        """
        if config.get("thresholding"):
            raise TinyldmError("the scheduler config asks for thresholding, which is made for "
                               "pixels and not supported: set it to false")
        spacing = config.get("timestep_spacing")
        return cls(
            betas=_betas(config),
            prediction_type=_known(config, "prediction_type", PREDICTION_TYPES),
            timestep_spacing=spacing and _known(config, "timestep_spacing", SPACINGS),
            steps_offset=_number(config, "steps_offset", 0, int),
            set_alpha_to_one=config.get("set_alpha_to_one"),
            clip_sample=config.get("clip_sample"),
            clip_sample_range=_number(config, "clip_sample_range", 1.0),
            final_sigmas_type=_known(config, "final_sigmas_type", FINAL_SIGMAS),
        )

    def __post_init__(self):
        # cumprod in float64, rounded once: what PyTorch does on the CPU
        alphas_cumprod = np.cumprod(1 - self.betas, dtype=np.float64).astype(np.float32)
        # alpha_bar = 0 (zero terminal SNR) would be sigma = inf; float16's smallest number serves
        alpha_bar = np.where(alphas_cumprod == 0, np.float32(2 ** -24), alphas_cumprod)
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)
        object.__setattr__(self, "sigmas", np.sqrt((1 - alpha_bar) / alpha_bar))

    @property
    def num_train_timesteps(self):
        return len(self.betas)

    def timesteps(self, num_inference_steps, default_spacing, spare=0):
        """Where to call the model: (num_inference_steps,) float64, falling; whole but for linspace.

        `spare` points are laid out below the last one and left out again (DPM-Solver++ wants one).
        Source: Lin et al. 2023, arXiv:2305.08891, table 2.
        Raises TinyldmError unless 1 <= num_inference_steps <= T.
        """
        n, T = num_inference_steps, self.num_train_timesteps
        if not isinstance(n, (int, np.integer)) or not 1 <= n <= T:
            raise TinyldmError(f"the number of steps must be a whole number from 1 to {T}, "
                               f"not {n!r}")
        spacing = self.timestep_spacing or default_spacing
        points = min(n + spare, T)
        if spacing == "linspace":
            grid = np.linspace(0, T - 1, points)[::-1]
        elif spacing == "leading":
            grid = np.arange(points)[::-1] * float(T // points)
            grid += min(self.steps_offset, T - 1 - grid[0])     # n = T leaves no room for an offset
        else:
            grid = np.round(np.arange(T, 0, -T / n)) - 1
        return grid[:n]                     # arange may return n + 1 points, T / n being rounded

    def to_x_start_and_noise(self, model_output, x_t, a, s):
        """What the model says x_t consists of: (x_start, noise), both of x_t's shape.

        x_t = a x_start + s noise with numbers a, s = sqrt(alpha_bar), sqrt(1 - alpha_bar) is solved
        for what the model did not predict; v = a noise - s x_start.
        Source: Ho et al. 2020, arXiv:2006.11239, eq. 4; for v Salimans & Ho 2022, arXiv:2202.00512,
        section 4 and appendix D.
        """
        a, s = float(a), float(s)           # python floats leave the arrays' dtype alone
        if self.prediction_type == "v_prediction":
            return a * x_t - s * model_output, a * model_output + s * x_t
        if self.prediction_type == "sample":
            return model_output, (x_t - a * model_output) / s
        if a == 0:
            raise TinyldmError("with rescale_betas_zero_snr the last training timestep is only "
                               "noise, where epsilon prediction says nothing of the picture: "
                               "prediction_type must be v_prediction")
        return (x_t - s * model_output) / a, model_output

    def add_noise(self, x_start, noise, timesteps):
        """x_t = sqrt(alpha_bar_t) x_start + sqrt(1 - alpha_bar_t) noise, one t per sample.

        x_start, noise (B,...), timesteps (B,) integers -> (B,...). Source: arXiv:2006.11239, eq. 4.
        """
        a, s = self._mix(x_start, timesteps)
        return a * x_start + s * noise

    def target(self, x_start, noise, timesteps):
        """What the model should answer to add_noise(x_start, noise, timesteps): (B,...).

        The noise, x_start, or v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x_start (Salimans
        & Ho 2022, arXiv:2202.00512), as prediction_type says.
        """
        if self.prediction_type == "v_prediction":
            a, s = self._mix(x_start, timesteps)
            return a * noise - s * x_start
        return noise if self.prediction_type == "epsilon" else x_start

    def _mix(self, x, timesteps):           # (B,...), (B,) -> two of (B,1,...,1), in x's dtype
        timesteps = to_host(timesteps)
        assert timesteps.shape == x.shape[:1], (timesteps.shape, x.shape)
        alpha_bar = self.alphas_cumprod[timesteps].reshape(-1, *[1] * (x.ndim - 1))
        a, s = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
        return asarray(a.astype(x.dtype), like=x), asarray(s.astype(x.dtype), like=x)


# ---- betas ----------------------------------------------------------------------------------

def _betas(config):
    """(T,) float32 betas of a scheduler config.

    scaled_linear is evenly spaced in sqrt(beta) (latent diffusion's own code); squaredcos_cap_v2 is
    the cosine schedule of Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17.
    """
    T = _number(config, "num_train_timesteps", 1000, int)
    start, end = _number(config, "beta_start", 1e-4), _number(config, "beta_end", 0.02)
    schedule = _known(config, "beta_schedule", BETA_SCHEDULES)
    if T < 1:
        raise TinyldmError(f"the scheduler config's num_train_timesteps must be positive, not {T}")
    if config.get("trained_betas") is not None:
        try:
            betas = np.array(config["trained_betas"], np.float32).reshape(T)
            if not ((betas > 0) & (betas < 1)).all():
                raise ValueError
        except (TypeError, ValueError):
            raise TinyldmError(f"the scheduler config's trained_betas must be {T} numbers "
                               "(num_train_timesteps) between 0 and 1") from None
    elif schedule == "squaredcos_cap_v2":
        alpha_bar = [math.cos((i / T + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(T + 1)]
        ratios = [after / before for before, after in pairwise(alpha_bar)]
        betas = np.array([min(1 - ratio, 0.999) for ratio in ratios], np.float32)
    elif not (0 < start < 1 and 0 < end < 1):
        raise TinyldmError("the scheduler config's beta_start and beta_end must lie between 0 and "
                           f"1, not {start} and {end}")
    elif schedule == "linear":
        betas = _linspace(start, end, T)
    else:
        betas = _linspace(start ** 0.5, end ** 0.5, T) ** 2
    return _zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr") else betas


def _linspace(start, end, count):
    """torch.linspace in float32, bitwise: a float32 step, counted from whichever end is nearer."""
    start, end = np.float32(start), np.float32(end)
    step, i = np.float64((end - start) / np.float32(max(count - 1, 1))), np.arange(count)
    values = np.where(i < max(count // 2, 1), start + step * i, end - step * (count - 1 - i))
    return values.astype(np.float32)


def _zero_terminal_snr(betas):
    """Shift and scale sqrt(alpha_bar) so that its last entry is 0 and its first stays.

    (T,) betas -> (T,) betas.

    Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed",
    arXiv:2305.08891, algorithm 1.
    """
    if len(betas) < 2:
        raise TinyldmError("rescale_betas_zero_snr needs at least 2 training timesteps")
    root = np.sqrt(np.cumprod(1 - betas, dtype=np.float64).astype(np.float32))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alpha_bar = root ** 2
    return 1 - np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


# ---- reading the config ---------------------------------------------------------------------

def _known(config, key, known):
    """config[key], or the first of the known values where the file leaves it out."""
    value = config.get(key) or known[0]
    if value not in known:
        raise TinyldmError(f"the scheduler config's {key} {value!r} is not supported; "
                           f"supported: {', '.join(known)}")
    return value


def _number(config, key, default, kind=float):
    try:
        return kind(config.get(key, default))
    except (TypeError, ValueError, OverflowError):
        raise TinyldmError(f"the scheduler config's {key} must be a number, "
                           f"not {config[key]!r}") from None
