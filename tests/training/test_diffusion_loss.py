"""DiffusionLoss: what the public scripts compute, its draws, and what is to be expected of it."""
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr

from tests.support.extra import diffusers
from tests.support.reference import nchw, nhwc
from tests.support.tolerance import assert_allclose
from tinyldm.diffusion.objective import min_snr_weights, uninformed_loss
from tinyldm.diffusion.schedule import PREDICTION_TYPES, Schedule
from tinyldm.training.objectives import TIMESTEPS, DiffusionLoss, drop_captions, generators

SCHEDULES = {
    "linear": {}, "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {},
    "zero terminal SNR": {"beta_schedule": "scaled_linear", "beta_start": 0.00085,
                          "beta_end": 0.012, "rescale_betas_zero_snr": True},
}
T = np.array([0, 30, 146, 500, 998])


def schedule_of(name, prediction_type):
    """Ours and diffusers'."""
    config = {"beta_schedule": name, "prediction_type": prediction_type} | SCHEDULES[name]
    return Schedule.from_config(config), diffusers.DDPMScheduler(**config)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("gamma", [0, 5.0])
def test_the_loss_and_its_gradient_are_the_scripts(name, prediction_type, gamma, rng):
    schedule, scheduler = schedule_of(name, prediction_type)
    latents, noise, output = rng.standard_normal((3, len(T), 4, 4, 3))
    loss, gradient, _ = DiffusionLoss(schedule, gamma)(output, latents, noise, T)

    t, z, e, prediction = torch.tensor(T), nchw(latents), nchw(noise), nchw(output)
    prediction.requires_grad_()
    wanted = {"epsilon": e, "v_prediction": scheduler.get_velocity(z, e, t), "sample": z}
    squares = (prediction - wanted[prediction_type]) ** 2
    theirs = squares.mean()
    if gamma:                                           # train_text_to_image.py
        snr = compute_snr(scheduler, t)
        cut = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
        weights = {"epsilon": cut / snr, "v_prediction": cut / (snr + 1), "sample": cut}
        theirs = (squares.mean(dim=(1, 2, 3)) * weights[prediction_type]).mean()
    theirs.backward()
    assert_allclose(loss, theirs.item(), rtol=1e-5)
    assert_allclose(gradient, nhwc(prediction.grad), rtol=1e-5, atol=1e-9)
    assert_allclose(schedule.add_noise(latents, noise, T), nhwc(scheduler.add_noise(z, e, t)),
                    rtol=1e-6, atol=1e-6)


def test_the_published_weights():
    """Of Stable Diffusion's schedule, and their means over all timesteps."""
    epsilon, v = (schedule_of("scaled_linear", kind)[0] for kind in PREDICTION_TYPES[:2])
    t = [0, 10, 50, 100, 200, 500, 900, 999]
    assert_allclose(min_snr_weights(epsilon, t, 5), [.00425, .04831, .25444, .59145, 1, 1, 1, 1],
                    atol=1e-5)
    assert_allclose(min_snr_weights(v, t, 5), [.00425, .04784, .24212, .52888, .75369, .27633,
                                               .01415, .00466], atol=1e-5)
    assert_allclose([min_snr_weights(kind, np.arange(1000), 5).mean() for kind in (epsilon, v)],
                    [0.917, 0.294], atol=5e-4)


def test_the_weight_of_noise_where_nothing_is_left():
    """0 / 0 in the public scripts."""
    schedule, _ = schedule_of("zero terminal SNR", "epsilon")
    assert schedule.alphas_cumprod[999] == 0 and min_snr_weights(schedule, [999], 5) == 1


@pytest.mark.parametrize("gamma", [0, 5])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_what_a_model_that_knows_nothing_gets(prediction_type, gamma, rng):
    schedule, _ = schedule_of("scaled_linear", prediction_type)
    latents, noise = rng.standard_normal((2, 5, 64, 64, 4))
    t = np.array([3, 100, 400, 700, 999])
    a, s = schedule.scales_like(latents, t)
    x_t = a * latents + s * noise
    output = {"epsilon": s * x_t, "v_prediction": 0 * x_t, "sample": a * x_t}[prediction_type]
    loss, _, expected = DiffusionLoss(schedule, gamma)(output, latents, noise, t)
    assert_allclose(loss, expected, rtol=0.02)


def test_the_published_means():
    """Over all timesteps: of Stable Diffusion's schedule, of DDPM's; and of v 1."""
    means = [uninformed_loss(schedule_of(name, kind)[0], np.arange(1000)).mean() for name, kind in (
        ("scaled_linear", "epsilon"), ("linear", "epsilon"), ("linear", "v_prediction"))]
    assert_allclose(means, [0.373, 0.276, 1], atol=5e-4)


def test_shards_add_up(rng):
    schedule, _ = schedule_of("linear", "v_prediction")
    loss = DiffusionLoss(schedule, min_snr=5)
    arrays = [*rng.standard_normal((3, 5, 4, 4, 3)), T]
    whole, gradient, expected = loss(*arrays)
    parts = [loss(*(array[start:stop] for array in arrays), (stop - start) / 5)
             for start, stop in ((0, 2), (2, 5))]
    assert_allclose(sum(part[0] for part in parts), whole, rtol=1e-12)
    assert_allclose(np.concatenate([part[1] for part in parts]), gradient, rtol=1e-12)
    assert_allclose(sum(part[2] for part in parts), expected, rtol=1e-12)


# ---- draws ------------------------------------------------------------------------------------

@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_a_samples_draws_depend_on_nothing_else(timesteps):
    schedule, _ = schedule_of("linear", "epsilon")
    loss = DiffusionLoss(schedule, timesteps=timesteps)
    latents = np.zeros((6, 4, 4, 3), np.float32)
    whole = loss.noisy(latents, generators(7, 3, 6))
    part = loss.noisy(latents[4:], generators(7, 3, 6)[4:])
    for ours, theirs in zip(part, whole):
        np.testing.assert_array_equal(ours, theirs[4:])
    for seed, batch in ((8, 3), (7, 4)):
        other = loss.noisy(latents, generators(seed, batch, 6))
        assert not np.isin(other[2], whole[2]).any()
    assert len(np.unique(whole[2])) == whole[2].size


def test_uniform_timesteps(rng):
    """999 included, 1000 not."""
    drawn = TIMESTEPS["uniform"](rng, 100_000, 1000)
    assert drawn.min() == 0 and drawn.max() == 999
    counts = np.bincount(drawn // 100)
    assert abs(counts - 10_000).max() < 500


def test_the_noise_offset_is_one_number_for_each_channel():
    schedule, _ = schedule_of("linear", "epsilon")
    latents = np.zeros((400, 4, 4, 3), np.float32)
    plain, offset = (DiffusionLoss(schedule, noise_offset=size).noisy(
        latents, generators(0, 0, 400)) for size in (0, 0.5))
    difference = offset[2] - plain[2]
    assert_allclose(np.ptp(difference, axis=(1, 2)), 0, atol=1e-6)
    assert difference[:, 0, 0].std() == pytest.approx(0.5, rel=0.05)
    np.testing.assert_array_equal(offset[1], plain[1])  # the same timesteps


def test_dropped_captions():
    captions = [f"picture {i}" for i in range(4000)]
    found = drop_captions(captions, 0.1, generators(0, 0, 4000))
    dropped = np.array([caption == "" for caption in found])
    np.testing.assert_array_equal(np.array(found)[~dropped], np.array(captions)[~dropped])
    assert dropped.mean() == pytest.approx(0.1, abs=0.02)


# ---- validation -------------------------------------------------------------------------------

def test_the_profile_tells_models_apart_and_repeats(rng):
    schedule, _ = schedule_of("scaled_linear", "epsilon")
    loss, latents = DiffusionLoss(schedule), rng.standard_normal((3, 8, 8, 4))
    seen = []

    def nothing(x_t, timesteps):
        seen.append(timesteps)
        return 0 * x_t

    def uninformed(x_t, timesteps):
        return schedule.scales_like(x_t, timesteps)[1] * x_t
    first = loss.profile(nothing, latents)
    assert [*first] == ["t 62", "t 187", "t 312", "t 437", "t 562", "t 687", "t 812", "t 937"]
    assert [int(t[0]) for t in seen] == [int(name[2:]) for name in first]
    assert loss.profile(nothing, latents) == first
    for name, value in loss.profile(uninformed, latents).items():
        alpha_bar = schedule.alphas_cumprod[int(name[2:])]
        assert value == pytest.approx(alpha_bar, rel=0.3) and value < first[name]
