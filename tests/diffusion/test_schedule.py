"""The noise schedule and the targets against diffusers; and bad scheduler configs."""
import diffusers
import numpy as np
import pytest
import torch

from tests.support.reference import has_avx2
from tests.support.tolerance import assert_allclose, within
from tinyldm.diffusion.objective import target, to_x_start_and_noise
from tinyldm.diffusion.schedule import Schedule
from tinyldm.errors import TinyldmError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
BETAS = [
    {},
    {"beta_schedule": "linear"},
    SD,
    {**SD, "num_train_timesteps": 51},
    {**SD, "num_train_timesteps": 1},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3},
]


@pytest.mark.parametrize("config", BETAS)
def test_tables_are_bitwise(config):
    theirs, ours = diffusers.DDIMScheduler.from_config(config), Schedule.from_config(config)
    exact = has_avx2()      # else torch.linspace rounds 3 times more, and the squares twice that
    assert_allclose(ours.betas, theirs.betas.numpy(), rtol=0 if exact else 6 * 2**-23)
    assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=0 if exact else 1e-5)
    assert ours.betas.dtype == ours.alphas_cumprod.dtype == ours.sigmas.dtype == np.float32
    assert ours.num_train_timesteps == len(theirs.betas)


@pytest.mark.parametrize("config", [SD, {}, {**SD, "num_train_timesteps": 51}])
def test_zero_terminal_snr(config, exact_sqrt):
    """Of the same betas: rescaling magnifies their last digits."""
    betas = Schedule.from_config(config).betas.tolist()
    config = {**config, "rescale_betas_zero_snr": True, "trained_betas": betas}
    theirs, ours = diffusers.DDIMScheduler.from_config(config), Schedule.from_config(config)
    assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-5)
    assert ours.alphas_cumprod[-1] == 0
    sigmas = diffusers.EulerDiscreteScheduler.from_config(config).sigmas.numpy()
    assert_allclose(ours.sigmas, sigmas[::-1][1:], rtol=1e-5)
    within(abs(ours.sigmas[-1] - 4096), 1e-3)


def test_published_numbers():
    schedule = Schedule.from_config(SD)
    assert_allclose(schedule.alphas_cumprod[[0, 1, 500, 999]],
                               [0.99914998, 0.99829602, 0.27633247, 0.00466010], atol=1e-8)
    assert_allclose(schedule.sigmas[[0, 999]], [0.02916753, 14.61464691], atol=1e-7)


@pytest.mark.parametrize("spacing", [None, "leading", "linspace", "trailing"])
def test_timesteps(spacing):
    """Each class at every number of steps, T except where diffusers leaves the table."""
    config = {**SD, **({"timestep_spacing": spacing} if spacing else {})}
    schedule = Schedule.from_config(config)
    ddim = diffusers.DDIMScheduler.from_config(config)
    euler = diffusers.EulerDiscreteScheduler.from_config(config)
    dpm = diffusers.DPMSolverMultistepScheduler.from_config(config)
    for n in [*range(1, 70), 103, 250, 333, 500, 501, 998]:
        for theirs, default, spare in ((ddim, "leading", 0), (euler, "linspace", 0),
                                       (dpm, "linspace", 1)):
            theirs.set_timesteps(n)
            ours = schedule.timesteps(n, default, spare)
            assert ours.shape == (n,)
            # float rounding gives diffusers one timestep too many, -1, at 61 trailing steps
            expected = theirs.timesteps[:n].numpy()
            ours = ours.astype(np.float32) if theirs is euler else ours.round()
            np.testing.assert_array_equal(ours, expected, err_msg=f"{type(theirs)} {n}")


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("spare", [0, 1])
def test_as_many_steps_as_training_timesteps(spacing, spare):
    schedule = Schedule.from_config({**SD, "timestep_spacing": spacing})
    np.testing.assert_array_equal(schedule.timesteps(1000, "leading", spare), np.arange(1000)[::-1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3, 4, 5, 4), (3, 7)])
def test_noise_and_targets(dtype, shape):
    rng = np.random.default_rng(0)
    x_start, noise = rng.standard_normal((2, *shape)).astype(dtype)
    timesteps = np.array([0, 500, 999])
    for array in (x_start, noise, timesteps):
        array.flags.writeable = False
    tensors = [torch.tensor(array) for array in (x_start, noise, timesteps)]
    theirs = diffusers.DDPMScheduler.from_config(SD)
    schedules = {kind: Schedule.from_config({**SD, "prediction_type": kind})
                 for kind in ("epsilon", "v_prediction", "sample")}

    x_t = schedules["epsilon"].add_noise(x_start, noise, timesteps)
    velocity = target(schedules["v_prediction"], x_start, noise, timesteps)
    assert x_t.dtype == velocity.dtype == dtype
    assert_allclose(x_t, theirs.add_noise(*tensors).numpy(), atol=5e-7)
    assert_allclose(velocity, theirs.get_velocity(*tensors).numpy(), atol=5e-7)
    assert target(schedules["epsilon"], x_start, noise, timesteps) is noise
    assert target(schedules["sample"], x_start, noise, timesteps) is x_start


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_to_x_start_and_noise_undoes_add_noise(kind):
    schedule = Schedule.from_config({**SD, "prediction_type": kind})
    rng = np.random.default_rng(0)
    x_start, noise = rng.standard_normal((2, 1, 8, 8, 4))
    t = np.array([400])
    x_t, model_output = schedule.add_noise(x_start, noise, t), target(schedule, x_start, noise, t)
    found = to_x_start_and_noise(schedule, model_output, x_t, *schedule.scales(400))
    assert_allclose(found, [x_start, noise], atol=1e-6)


@pytest.mark.parametrize("field, value, message", [
    ("beta_schedule", "sigmoid", "scaled_linear"),
    ("prediction_type", "flow_prediction", "v_prediction"),
    ("timestep_spacing", "karras", "trailing"),
    ("final_sigmas_type", "one", "sigma_min"),
    ("beta_start", "small", "number"),
    ("beta_start", -1, "between 0 and 1"),
    ("beta_end", 2.0, "between 0 and 1"),
    ("beta_end", float("nan"), "between 0 and 1"),
    ("num_train_timesteps", 0, "positive"),
    ("num_train_timesteps", [], "number"),
    ("steps_offset", None, "number"),
    ("trained_betas", [0.1, 0.2], "1000 numbers"),
    ("trained_betas", [0.1] * 999 + [1.5], "between 0 and 1"),
    ("thresholding", "dynamic", "true or false"),
    ("dynamic_thresholding_ratio", 1.5, "between 0 and 1"),
    ("sample_max_value", float("inf"), "between 0 and 1e"),
])
def test_bad_config(field, value, message):
    with pytest.raises(TinyldmError, match=message) as error:
        Schedule.from_config({**SD, field: value})
    assert field in str(error.value) and "\n" not in str(error.value)


def test_zero_snr_needs_more_than_epsilon():
    with pytest.raises(TinyldmError, match="at least 2"):
        Schedule.from_config({"num_train_timesteps": 1, "rescale_betas_zero_snr": True})
    schedule = Schedule.from_config({**SD, "rescale_betas_zero_snr": True})
    x = np.ones(3, np.float32)
    with pytest.raises(TinyldmError, match="v_prediction"):
        to_x_start_and_noise(schedule, x, x, schedule.alphas_cumprod[-1], 1.0)
