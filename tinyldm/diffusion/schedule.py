"""The noise schedule: how much of the picture is left at each training timestep.

    x_t = sqrt(alpha_bar_t) x_start + sqrt(1 - alpha_bar_t) noise

Read from a scheduler_config.json. A sampler goes down its timesteps, training picks them at random.

| here | DDPM paper | DDIM paper |
|---|---|---|
| `alphas_cumprod[t]`, `alpha_bar` | alpha_bar_t | alpha_t |

`sigmas[t]` = sqrt((1 - alpha_bar_t) / alpha_bar_t) is the noise per unit of picture, the sigma of
Karras et al. The tables are float32 and rounded where PyTorch's schedulers round: at t = 0,
1 - alpha_bar = 0.00085 keeps only four digits, so a more exact table would give other numbers.
"""
import math
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from ..backend import asarray, to_host
from ..configs import Config, one_of, within
from ..errors import TinyldmError

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range")
FINAL_SIGMAS = ("zero", "sigma_min")
# What UnCLIPScheduler, karlo's DDPM, has where its file does not say it.
UNCLIP = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "linspace"}


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig(Config):
    """The public scheduler_config.json of any class: which values its keys may have.

    What they mean is read below, and in samplers/__init__.py, where each class has defaults and
    switches of its own. None stands for an absent key.
    """

    _class_name: str | None = None
    num_train_timesteps: int = within(1, 100_000, 1000)
    beta_start: float = within(0, 1, 1e-4)
    beta_end: float = within(0, 1, 0.02)
    beta_schedule: str | None = one_of(*BETA_SCHEDULES, default=None)
    trained_betas: list[float] | None = within(0, 1, None, lengths=range(1, 100_001))
    rescale_betas_zero_snr: bool | None = None
    prediction_type: str | None = one_of(*PREDICTION_TYPES, default=None)
    timestep_spacing: str | None = one_of(*SPACINGS, default=None)
    steps_offset: int = within(0, 100_000, 0)
    set_alpha_to_one: bool | None = None
    clip_sample: bool | None = None
    clip_sample_range: float = within(0, 1e6, 1.0)
    thresholding: bool | None = None                    # for pixels; latents have no fixed range
    dynamic_thresholding_ratio: float = within(0, 1, 0.995, ends=True)
    sample_max_value: float = within(0, 1e6, 1.0)
    final_sigmas_type: str | None = one_of(*FINAL_SIGMAS, default=None)
    # Of single classes.
    skip_prk_steps: bool | None = None
    use_karras_sigmas: bool | None = None
    use_exponential_sigmas: bool | None = None
    use_beta_sigmas: bool | None = None
    use_flow_sigmas: bool | None = None
    use_lu_lambdas: bool | None = None
    lower_order_final: bool | None = None
    euler_at_final: bool | None = None
    predict_x0: bool | None = None
    solver_order: int | None = within(1, 3, None)
    solver_type: str | None = None
    algorithm_type: str | None = None
    variance_type: str | None = one_of(*VARIANCE_TYPES, default=None)
    interpolation_type: str | None = None
    timestep_type: str | None = None
    original_inference_steps: int | None = within(1, 100_000, None)
    timestep_scaling: float | None = within(0, 1e6, None)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The numbers that training and the samplers share. T = num_train_timesteps.

    Three fields may be None where the file leaves them out: then each sampler has its own default.
    """

    # (T,) float32, the share of noise added at each step
    betas: np.ndarray = field(repr=False)
    prediction_type: str = "epsilon"        # what the model predicts: objective.py
    timestep_spacing: str | None = None
    steps_offset: int = 0                   # added to every timestep of "leading" spacing
    set_alpha_to_one: bool | None = None    # is alpha_bar 1 beyond the last step, or alpha_bar[0]?
    clip_sample: bool | None = None         # clip x_start to +-clip_sample_range?
    clip_sample_range: float = 1.0
    thresholding: bool = False              # instead: x_start by shared.dynamic_threshold?
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    final_sigmas_type: str = "zero"         # where Euler and DPM-Solver++ end: 0, or sigmas[0]

    @classmethod
    def from_config(cls, config):
        """Read the dict of a scheduler_config.json; of its `_class_name` only UNCLIP's counts.

        Raises TinyldmError for a value that SchedulerConfig refuses, and for betas that do not
        describe a schedule.
        """
        own = UNCLIP if config.get("_class_name") == "UnCLIPScheduler" else {}
        try:
            config = SchedulerConfig.read(own | config)
            betas = _betas(config)
        except TinyldmError as error:
            raise TinyldmError(f"scheduler_config.json: {error}") from None
        return cls(
            betas=betas,
            prediction_type=config.prediction_type or PREDICTION_TYPES[0],
            timestep_spacing=config.timestep_spacing,
            steps_offset=config.steps_offset,
            set_alpha_to_one=config.set_alpha_to_one,
            clip_sample=config.clip_sample,
            clip_sample_range=config.clip_sample_range,
            thresholding=bool(config.thresholding),
            dynamic_thresholding_ratio=config.dynamic_thresholding_ratio,
            sample_max_value=config.sample_max_value,
            final_sigmas_type=config.final_sigmas_type or FINAL_SIGMAS[0],
        )

    def __post_init__(self):
        # cumprod in float64, rounded once: what PyTorch does on the CPU
        alphas_cumprod = np.cumprod(1 - self.betas, dtype=np.float64).astype(np.float32)
        # alpha_bar = 0 (zero terminal SNR) would give sigma = inf: take float16's smallest number
        alpha_bar = np.where(alphas_cumprod == 0, np.float32(2 ** -24), alphas_cumprod)
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)
        object.__setattr__(self, "sigmas", np.sqrt((1 - alpha_bar) / alpha_bar))

    @property
    def num_train_timesteps(self):
        return len(self.betas)

    def check_steps(self, num_inference_steps, name="the number of steps"):
        """Raise TinyldmError, with the name, unless 1 <= num_inference_steps <= T."""
        n, T = num_inference_steps, self.num_train_timesteps
        if not isinstance(n, (int, np.integer)) or not 1 <= n <= T:
            raise TinyldmError(f"{name} must be a whole number from 1 to {T}, not {n!r}")

    def timesteps(self, num_inference_steps, default_spacing, spare=0):
        """Where to call the model: (num_inference_steps,) float64, falling.

        They are whole numbers except with "linspace". spare: this many more points are laid out,
        and the lowest are left out again (DPM-Solver++ wants one).
        Source: Lin et al. 2023, arXiv:2305.08891, table 2.
        Raises TinyldmError as check_steps does.
        """
        self.check_steps(num_inference_steps)
        n, T = num_inference_steps, self.num_train_timesteps
        spacing = self.timestep_spacing or default_spacing
        points = min(n + spare, T)
        if spacing == "linspace":
            grid = np.linspace(0, T - 1, points)[::-1]
        elif spacing == "leading":
            grid = np.arange(points)[::-1] * float(T // points)
            grid += min(self.steps_offset, T - 1 - grid[0])     # n = T leaves no room for an offset
        else:
            grid = np.round(np.arange(T, 0, -T / n)) - 1
        return grid[:n]                     # T / n is rounded, so arange may return n + 1 points

    def scales(self, t):
        """The signal scale sqrt(alpha_bar_t) and the noise scale sqrt(1 - alpha_bar_t), float32.

        t: a timestep or an array of them; None stands for the end, where the scales are 1 and 0.
        """
        if t is None:
            return 1.0, 0.0
        alpha_bar = self.alphas_cumprod[t]
        return alpha_bar ** 0.5, (1 - alpha_bar) ** 0.5

    def scales_like(self, x, timesteps):
        """x (B,...), timesteps (B,) -> the scales, two arrays (B,1,...,1) of x's dtype and device.
        """
        timesteps = np.asarray(to_host(timesteps))
        if timesteps.shape != x.shape[:1] or timesteps.dtype.kind not in "iu":
            raise TinyldmError(f"timesteps must be {len(x)} whole numbers, one for each sample, "
                               f"not {timesteps!r:.80}")
        shape = (-1, *[1] * (x.ndim - 1))
        return tuple(asarray(scale.reshape(shape).astype(x.dtype), like=x)
                     for scale in self.scales(timesteps))

    def add_noise(self, x_start, noise, timesteps):
        """x_t = sqrt(alpha_bar_t) x_start + sqrt(1 - alpha_bar_t) noise, one t per sample.

        x_start, noise (B,...), timesteps (B,) integers -> (B,...). Source: arXiv:2006.11239, eq. 4.
        """
        a, s = self.scales_like(x_start, timesteps)
        return a * x_start + s * noise


# ---- betas ----------------------------------------------------------------------------------

def _betas(config):
    """(T,) float32 betas of a SchedulerConfig.

    scaled_linear: evenly spaced in sqrt(beta), from latent diffusion's own code.
    squaredcos_cap_v2: the cosine schedule of Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17.
    """
    T, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    schedule = config.beta_schedule or BETA_SCHEDULES[0]
    if config.trained_betas is not None:
        if len(config.trained_betas) != T:
            raise TinyldmError(f"trained_betas must be {T} numbers (num_train_timesteps), "
                               f"not {len(config.trained_betas)}")
        betas = np.array(config.trained_betas, np.float32)
    elif schedule == "squaredcos_cap_v2":
        alpha_bar = [math.cos((i / T + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(T + 1)]
        ratios = [after / before for before, after in pairwise(alpha_bar)]
        betas = np.array([min(1 - ratio, 0.999) for ratio in ratios], np.float32)
    elif schedule == "linear":
        betas = _linspace(start, end, T)
    else:
        betas = _linspace(start ** 0.5, end ** 0.5, T) ** 2
    if not ((1 - betas > 0) & (1 - betas < 1)).all():   # in float32
        raise TinyldmError("beta_start, beta_end or trained_betas are too near to 0 or 1 for a "
                           "schedule: those of Stable Diffusion are 0.00085 and 0.012")
    return _zero_terminal_snr(betas) if config.rescale_betas_zero_snr else betas


def _linspace(start, end, count):
    """Equal to torch.linspace in float32: a float32 step, counted from the nearer end."""
    start, end = np.float32(start), np.float32(end)
    step, i = np.float64((end - start) / np.float32(max(count - 1, 1))), np.arange(count)
    values = np.where(i < max(count // 2, 1), start + step * i, end - step * (count - 1 - i))
    return values.astype(np.float32)


def _zero_terminal_snr(betas):
    """Shift and scale sqrt(alpha_bar) so that the last entry becomes 0 and the first stays.

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
