"""UnCLIPScheduler, karlo's, is DDPM with timesteps of its own: each step against diffusers'."""
import numpy as np
import pytest

from tests.support.extra import diffusers, torch
from tests.support.tolerance import assert_close
from tinyldm.diffusion.samplers import SAMPLERS, default_sampler, own_options
from tinyldm.diffusion.schedule import Schedule

C = 6
MIX = np.random.default_rng(3).standard_normal((C, 2 * C)) / 2


def network(x, t, outputs):
    """In place of a prior: mixes channels, bends, and depends on t."""
    return np.tanh(x @ MIX[:, :outputs * C] + np.sin(t / 200))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "as published"])
@pytest.mark.parametrize("steps", [25, 7, 2])
@pytest.mark.parametrize("config", [
    {"variance_type": "fixed_small_log", "prediction_type": "sample", "clip_sample_range": 5.0},
    {"variance_type": "fixed_small_log", "clip_sample_range": 0.5}, {},
    {"variance_type": "learned_range", "prediction_type": "epsilon"},
    {"clip_sample": False, "prediction_type": "sample"}], ids=str)
def test_every_step(config, steps, exact):
    """The public class rounds two numbers: alpha_t = 1 - beta_t, which is 1e-6 next to t = 999; and
    1 - alpha_bar_0 = beta_0, which is 4e-5. With its tables in float64 the steps are the same, as
    far as our tables go, which are float32.
    """
    pytest.importorskip("diffusers")
    config = {"_class_name": "UnCLIPScheduler", **config}
    scheduler = diffusers.UnCLIPScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    if exact:
        scheduler.betas = scheduler.betas.double()
        scheduler.alphas = 1 - scheduler.betas
        scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    rng, draws = np.random.default_rng(0), torch.Generator().manual_seed(4)
    outputs = 2 if config.get("variance_type") == "learned_range" else 1
    start = rng.standard_normal((3, C))

    x, expected = torch.from_numpy(start.copy()), []
    timesteps = [int(t) for t in scheduler.timesteps]
    for t, following in zip(timesteps, [*timesteps[1:], None]):
        output = torch.from_numpy(network(x.numpy(), t, outputs))
        # the noise has the output's shape, of which the variance's half is left out
        x = scheduler.step(output, t, x, prev_timestep=following, generator=draws).prev_sample
        expected.append(x.numpy())

    noises = torch.Generator().manual_seed(4)
    schedule, sampler = Schedule.from_config(config), default_sampler(config)
    assert sampler == "ddpm"
    states = SAMPLERS[sampler](
        lambda x, t: network(x, t, outputs), start, schedule, steps,
        lambda: torch.randn((3, C), generator=noises, dtype=torch.float64).numpy(),
        **own_options(config, sampler))
    for state, theirs, t in zip(states, expected, timesteps, strict=True):
        assert state.timestep == t
        assert_close(state.latents, theirs, 3e-5 if exact else 2e-3, f"after timestep {t}")


def test_timesteps_of_the_public_code():
    schedule = Schedule.from_config({"_class_name": "UnCLIPScheduler"})
    found = schedule.timesteps(25, "leading").round().astype(int)
    assert found.tolist() == [
        999, 957, 916, 874, 832, 791, 749, 708, 666, 624, 583, 541, 500, 458, 416, 375, 333, 291,
        250, 208, 166, 125, 83, 42, 0]
    assert schedule.timesteps(7, "leading").round().tolist() == [999, 832, 666, 500, 333, 166, 0]
