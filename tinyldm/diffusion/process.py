"""The chain from picture to noise in float64, and its respacing: likelihoods are computed with it.

schedule.py has the same chain as the samplers of PyTorch have it, in float32. Here the betas are
those of Improved DDPM's code, which sums logarithms of small variances. Indices t run from 0 to
T - 1; alpha_bar before the first is 1.

    q(x_t | x_start)          = N(sqrt(alpha_bar_t) x_start, 1 - alpha_bar_t)
    q(x_{t-1} | x_t, x_start) = N(c x_start + d x_t, beta~_t)
    c = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t)
    d = sqrt(1 - beta_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)
    beta~_t = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)

Source: Ho et al. 2020, arXiv:2006.11239, eq. 4, 6 and 7; Nichol & Dhariwal 2021, "Improved
Denoising Diffusion Probabilistic Models", arXiv:2102.09672, sections 3 and 4.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from ..backend import asarray, to_host
from ..errors import TinyldmError
from .schedule import PREDICTION_TYPES

MOST_STEPS = 100_000


@dataclass(frozen=True, eq=False)
class Process:
    """The tables of a chain of T steps, each (T,) float64.

    betas: the share of noise added at each step, all between 0 and 1. timesteps: what the model
    calls each step; None: 0 ... T - 1. model_scale: the model sees timestep times this number.
    prediction_type: what the model predicts, see objective.py.
    Raises TinyldmError for betas that are none.
    """

    betas: np.ndarray = field(repr=False)
    timesteps: np.ndarray | None = field(default=None, repr=False)
    model_scale: float = 1.0
    prediction_type: str = "epsilon"

    @classmethod
    def linear(cls, T, rescale_timesteps=False, prediction_type="epsilon"):
        """From 1e-4 to 0.02 at T = 1000; other T scale both, so that the end is as noisy.

        rescale_timesteps: the model sees numbers between 0 and 1000, whatever T is.
        """
        scale = 1000 / whole_number("the number of steps", T)
        return cls(np.linspace(1e-4 * scale, 0.02 * scale, T), None,
                   scale if rescale_timesteps else 1.0, prediction_type)

    @classmethod
    def cosine(cls, T, rescale_timesteps=False, prediction_type="epsilon"):
        """alpha_bar falls as a squared cosine: slowly at both ends. rescale_timesteps: see linear.

            f(u) = cos^2((u + 0.008) / 1.008 pi / 2)
            beta_t = min(1 - f((t + 1) / T) / f(t / T), 0.999)

        0.008 keeps the first noise just below one of the 256 values of a pixel.
        Source: arXiv:2102.09672, eq. 17.
        """
        T = whole_number("the number of steps", T)
        alpha_bar = [math.cos((i / T + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(T + 1)]
        betas = [min(1 - after / before, 0.999) for before, after in zip(alpha_bar, alpha_bar[1:])]
        return cls(np.array(betas), None, 1000 / T if rescale_timesteps else 1.0, prediction_type)

    @classmethod
    def of(cls, schedule):
        """The chain of a Schedule, from its float32 betas."""
        return cls(schedule.betas.astype(np.float64), prediction_type=schedule.prediction_type)

    def __post_init__(self):
        betas = np.asarray(self.betas, np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise TinyldmError("the betas of a diffusion process must be a row of numbers above 0 "
                               f"and at most 1, not {self.betas!r:.80}")
        if self.prediction_type not in PREDICTION_TYPES:
            raise TinyldmError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, not "
                               f"{self.prediction_type!r:.80}")
        timesteps = np.arange(len(betas)) if self.timesteps is None else np.asarray(self.timesteps)
        alpha_bar = np.cumprod(1 - betas)
        if alpha_bar[-1] == 0 and self.prediction_type == "epsilon":
            raise TinyldmError("the last step of this process is only noise, from which epsilon "
                               "prediction cannot find the picture: prediction_type must be "
                               "v_prediction")
        before = np.append(1.0, alpha_bar[:-1])
        variance = betas * (1 - before) / (1 - alpha_bar)           # 0 at the first step
        tables = {
            "betas": betas, "timesteps": timesteps, "alphas_cumprod": alpha_bar,
            "posterior_variance": variance,
            # The logarithm of 0 is replaced by that of the second step.
            "posterior_logvar": np.log(np.append(variance[1:2] if len(betas) > 1 else betas,
                                                 variance[1:])),
            "posterior_x_start": betas * before ** 0.5 / (1 - alpha_bar),               # c
            "posterior_x_t": (1 - before) * (1 - betas) ** 0.5 / (1 - alpha_bar)}       # d
        for name, table in tables.items():
            object.__setattr__(self, name, table)

    @property
    def num_train_timesteps(self):
        return len(self.betas)

    def at(self, table, t, like):
        """Entries of a table -> (B,1,...,1), with the dtype and on the device of `like` (B,...).

        t: (B,) whole numbers from 0 to T - 1. Raises TinyldmError for others.
        """
        t, T = np.asarray(to_host(t)), len(self.betas)
        if t.shape != like.shape[:1] or t.dtype.kind not in "iu" or t.size and not (
                0 <= t.min() and t.max() < T):
            raise TinyldmError(f"t must be {len(like)} whole numbers from 0 to {T - 1}, one for "
                               f"each picture, not {t!r:.80}")
        values = table[t].reshape(-1, *[1] * (like.ndim - 1))
        return asarray(values.astype(like.dtype), like=like)

    def scales_like(self, x, t):
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) -> two arrays (B,1,...,1), as x (B,...) is.
        """
        return (self.at(self.alphas_cumprod ** 0.5, t, x),
                self.at((1 - self.alphas_cumprod) ** 0.5, t, x))

    def add_noise(self, x_start, noise, t):
        """Draw from q(x_t | x_start). x_start, noise (B,...), t (B,) -> (B,...)."""
        a, s = self.scales_like(x_start, t)
        return a * x_start + s * noise

    def posterior(self, x_start, x_t, t):
        """q(x_{t-1} | x_t, x_start) -> its mean (B,...) and the logarithm of its variance (B,1,..).

        At t = 0 the variance is 0; its logarithm is replaced by that at t = 1.
        """
        mean = (self.at(self.posterior_x_start, t, x_t) * x_start
                + self.at(self.posterior_x_t, t, x_t) * x_t)
        return mean, self.at(self.posterior_logvar, t, x_t)

    def model_timesteps(self, t, like):
        """What the model gets at steps t (B,) -> (B,), with the dtype and on the device of `like`.
        """
        return self.at(self.timesteps * self.model_scale, t, like).reshape(-1)

    def respaced(self, sections):
        """The chain that visits only some steps -> Process. sections: see kept_timesteps.

        beta = 1 - alpha_bar_t / alpha_bar of the kept step before it; the tables follow from these.
        The model still sees the timesteps that it was trained on.
        """
        kept = kept_timesteps(len(self.betas), sections)
        alpha_bar = self.alphas_cumprod[kept]
        betas = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
        return replace(self, betas=betas, timesteps=self.timesteps[kept])


def kept_timesteps(T, sections):
    """Which of T steps a respaced chain visits -> rising whole numbers.

    sections: "250" or 250, so many, evenly from the first to the last; "10,10,10" or [10, 10, 10],
    so many in each third; "ddim50", every so-manyth step that gives exactly 50.
    Source: the code of arXiv:2102.09672, section 4; for "ddim" Song et al. 2020, arXiv:2010.02502.
    Raises TinyldmError for what cannot be.
    """
    if isinstance(sections, str) and sections.startswith("ddim"):
        wanted = whole_number("the number after ddim", sections.removeprefix("ddim"))
        for stride in range(1, T + 1):
            if len(range(0, T, stride)) == wanted:
                return np.arange(0, T, stride)
        raise TinyldmError(f"no stride gives exactly {wanted} of {T} timesteps: choose another "
                           f"number, or {wanted} without ddim")
    counts = sections.split(",") if isinstance(sections, str) else sections
    counts = list(counts) if isinstance(counts, (list, tuple)) and counts else [counts]
    counts = [whole_number("a number of timesteps", count) for count in counts]
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = T // len(counts) + (i < T % len(counts))
        if count > size:
            raise TinyldmError(f"{count} timesteps cannot be chosen from a section of {size}: give "
                               "a smaller number")
        stride = (size - 1) / (count - 1) if count > 1 else 1
        place = 0.0                                     # a running sum, rounded to even
        for _ in range(count):
            kept.append(start + round(place))
            place += stride
        start += size
    return np.array(sorted(set(kept)))


def whole_number(what, value):
    """A whole number from 1 to MOST_STEPS, also as text -> int. Raises TinyldmError for others."""
    number = value
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        number = int(value.strip()[:9])
    is_whole = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    if not is_whole or not 1 <= number <= MOST_STEPS:
        raise TinyldmError(f"{what} must be a whole number from 1 to {MOST_STEPS}, not "
                           f"{value!r:.80}")
    return int(number)
