"""DDPM's sampler: the published numbers, and every type of variance against diffusers."""
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from tests.support.arrays import read_only
from tests.support.tolerance import assert_allclose, assert_close
from tinyldm.diffusion.samplers import SAMPLERS, check_sampler, own_options
from tinyldm.diffusion.samplers.ddpm import std
from tinyldm.diffusion.samplers.shared import Origin
from tinyldm.diffusion.schedule import VARIANCE_TYPES, Schedule
from tinyldm.errors import TinyldmError

LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02,
          "beta_schedule": "linear", "clip_sample": True, "_class_name": "DDPMScheduler"}
# Of diffusers' test_scheduler_ddpm.py: the sum and the mean of the absolute values at the end.
PUBLISHED = {"epsilon": (258.9606, 0.3372), "v_prediction": (202.0296, 0.2631)}
START = (np.arange(768).reshape(3, 8, 8, 4) / 768).astype(np.float32)   # theirs, in our axes
START = START.transpose(3, 1, 2, 0)                     # (4,8,8,3)


def network(x, t):
    return x * np.float32(t) / np.float32(t + 1)


def drawer(dtype=np.float32):
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randn((4, 3, 8, 8), generator=generator).numpy().transpose(
        0, 2, 3, 1).astype(dtype)


@pytest.mark.parametrize("prediction", PUBLISHED)
def test_the_published_loop(prediction):
    schedule = Schedule.from_config(LINEAR | {"prediction_type": prediction})
    *_, last = SAMPLERS["ddpm"](network, read_only(START), schedule, 1000, drawer())
    total, mean = PUBLISHED[prediction]
    assert abs(abs(last.latents).sum() - total) < 1e-2
    assert abs(abs(last.latents).mean() - mean) < 1e-3


def test_the_published_loop_from_a_picture():
    """The last two steps, from the picture with the noise of the first of them."""
    schedule = Schedule.from_config(LINEAR)
    ramp = START[::-1, ::-1, ::-1, ::-1]
    origin = Origin(picture=START, first=998)
    *_, last = SAMPLERS["ddpm"](network, ramp, schedule, 1000, drawer(), origin)
    assert abs(abs(last.latents).sum() - 387.9466) < 1e-2
    assert abs(abs(last.latents).mean() - 0.5051) < 1e-3


@pytest.mark.parametrize("variance_type, expected", [
    ("fixed_small", (5.45348e-5, 9.79154e-3, .01999996)),
    ("fixed_small_log", (7.38477e-3 ** 2, .0989522 ** 2, .1414212 ** 2)),     # it returns the std
    ("fixed_large", (1.19925e-4, 9.80097e-3, .01999998)),
])
def test_published_variances(variance_type, expected):
    alpha_bar = Schedule.from_config(LINEAR).alphas_cumprod
    for t, variance in zip((1, 487, 999), expected):
        beta = 1 - alpha_bar[t] / alpha_bar[t - 1]
        beta_tilde = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta
        assert_allclose(std(variance_type, beta, beta_tilde) ** 2, variance, rtol=1e-5)


def test_learned_range_is_between_the_two_fixed_ones():
    beta, beta_tilde = np.float32(0.02), np.float32(0.005)
    found = std("learned_range", beta, beta_tilde, np.array([-1.0, 0.0, 1.0]))
    assert_allclose(found ** 2, [0.005, 0.01, 0.02], rtol=1e-6)


def two_halves(x, t):
    """A network that also predicts a variance, from x in torch or NumPy, channels last."""
    values = x ** 2 / (1 + x ** 2) * 0.05 + 1e-3        # positive, for "learned"
    return network(x, t), values


@pytest.mark.parametrize("steps", [10, 3])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_every_type_of_variance(variance_type, prediction, steps):
    config = LINEAR | {"variance_type": variance_type, "prediction_type": prediction}
    reference, latents = DDPMScheduler.from_config(config), torch.randn(
        (4, 3, 8, 8), generator=torch.Generator().manual_seed(1)).double()
    x, generator, expected = latents, torch.Generator().manual_seed(0), []
    reference.alphas_cumprod = reference.alphas_cumprod.double()
    reference.set_timesteps(steps)
    learned = variance_type.startswith("learned")
    for t in reference.timesteps:
        output, values = two_halves(x.numpy(), int(t))
        output = np.concatenate([output, values], 1) if learned else output
        noise = torch.randn((4, 3, 8, 8), generator=generator).double() if t else None
        x = step(reference, torch.from_numpy(output), t, x, noise)
        expected.append(x.numpy().transpose(0, 2, 3, 1))

    def predict(x_t, t):
        output, values = two_halves(x_t, t)
        return np.concatenate([output, values], -1) if learned else output
    schedule = Schedule.from_config(config)
    object.__setattr__(schedule, "alphas_cumprod", schedule.alphas_cumprod.astype(float))
    options = own_options(config, "ddpm")
    assert options == {"variance_type": variance_type}
    states = SAMPLERS["ddpm"](predict, read_only(latents.numpy().transpose(0, 2, 3, 1)), schedule,
                              steps, drawer(np.float64), **options)
    for state, theirs in zip(states, expected, strict=True):
        assert_close(state.latents, theirs, 1e-10, f"step {state.step}")


def step(scheduler, output, t, x, noise):
    """scheduler.step, with this noise in place of what it draws."""
    with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor",
                    lambda *_, **__: noise):
        return scheduler.step(output, t, x).prev_sample


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_a_learned_variance_needs_a_model_that_predicts_it(variance_type):
    schedule, options = Schedule.from_config(LINEAR), {"variance_type": variance_type}
    check_sampler("ddpm", schedule, 5, options=options, outputs=2)
    with pytest.raises(TinyldmError, match=f"variance_type {variance_type} needs a model that"):
        check_sampler("ddpm", schedule, 5, options=options)


def test_a_variance_that_no_scheduler_can_use_is_refused():
    """diffusers takes the root of a logarithm below 0 there."""
    with pytest.raises(TinyldmError, match='variance_type must be .*, not "fixed_large_log"'):
        Schedule.from_config(LINEAR | {"variance_type": "fixed_large_log"})
