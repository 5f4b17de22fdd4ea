"""The losses of both stages: their gradients, and what they measure."""
import numpy as np
import pytest

from tests.support.models import SMALL_TEXT, SMALL_UNET, SMALL_VAE
from tests.support.tolerance import assert_allclose
from tinyldm.diffusion.objective import sample_timesteps, target, to_x_start_and_noise
from tinyldm.diffusion.schedule import Schedule
from tinyldm.models import AutoencoderKL
from tinyldm.shapes import autoencoder as vae_stage
from tinyldm.shapes import configs, drawing
from tinyldm.shapes import denoiser as unet_stage
from tinyldm.training import objectives
from tinyldm.training.optim import initialise


def in_float64(*modules):
    for module in modules:
        for parameter in module.parameters():
            parameter.data = parameter.data.astype(np.float64)


def directional(loss, named, rng, h=1e-5):
    """(central difference, sum of gradient * direction) of loss() along a random direction."""
    for _, parameter in named:
        parameter.grad = None
    loss()
    direction = [rng.standard_normal(parameter.shape) for _, parameter in named]
    expected = sum((p.grad * d).sum() for (_, p), d in zip(named, direction))
    values = []
    for sign in (1, -1):
        for (_, parameter), d in zip(named, direction):
            parameter.data = parameter.data + sign * h * d
        values.append(loss()["loss"])
        for (_, parameter), d in zip(named, direction):
            parameter.data = parameter.data - sign * h * d
    return (values[0] - values[1]) / (2 * h), expected


class Float64Noise:
    """A generator whose normal numbers are float64, whatever is asked for."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.normal = self.rng.normal

    def standard_normal(self, shape, dtype):
        return self.rng.standard_normal(shape)


@pytest.mark.parametrize("decoder_only", [False, True])
def test_vae_loss_gradient(decoder_only):
    rng = np.random.default_rng(0)
    vae = AutoencoderKL(SMALL_VAE)
    initialise(vae, rng)
    in_float64(vae)
    for _, parameter in vae.named_parameters():         # off zero, where last layers start
        parameter.data = parameter.data + 0.1 * rng.standard_normal(parameter.shape)
    trained = vae_stage.decoder_parameters(vae) if decoder_only else list(vae.named_parameters())
    images = drawing.batch(rng, 2)[0].astype(np.float64)
    difference, expected = directional(
        lambda: objectives.vae_loss(vae, images, Float64Noise(1), 0.5, decoder_only),
        trained, rng, h=1e-8)                           # small: |x| has a corner at every pixel
    assert_allclose(expected, difference, rtol=1e-4)
    touched = {name for name, p in vae.named_parameters() if p.grad is not None}
    assert touched == {name for name, _ in trained}


def test_diffusion_loss_gradient(monkeypatch):
    monkeypatch.setattr(unet_stage, "UNET", SMALL_UNET)
    monkeypatch.setattr(unet_stage, "TEXT_ENCODER", SMALL_TEXT)
    rng = np.random.default_rng(0)
    text_encoder, unet = unet_stage.build({"no_caption": np.full(77, 20)})
    initialise(text_encoder, rng)
    initialise(unet, rng)
    in_float64(text_encoder, unet)
    named = list(unet_stage.named_parameters(text_encoder, unet))
    for _, parameter in named:
        parameter.data = parameter.data + 0.1 * rng.standard_normal(parameter.shape)
    schedule = Schedule.from_config(configs.SCHEDULER)
    latents = rng.standard_normal((2, 8, 8, configs.LATENT_CHANNELS))
    ids = rng.integers(0, 21, (2, 77))
    difference, expected = directional(
        lambda: objectives.diffusion_loss(text_encoder, unet, schedule, latents, ids,
                                          Float64Noise(1), 0.5), named, rng)
    assert_allclose(expected, difference, rtol=1e-4)


def test_timesteps_are_mostly_in_the_middle():
    timesteps = sample_timesteps(np.random.default_rng(0), 100_000, 1000)
    assert timesteps.dtype.kind == "i" and 0 <= timesteps.min() and timesteps.max() < 1000
    assert ((timesteps >= 200) & (timesteps < 600)).mean() == pytest.approx(0.6, abs=0.05)


def test_the_loss_is_that_of_the_noise_over_alpha_bar():
    """What the file's docstring says: a network that answers v, measured by its noise."""
    schedule, rng = Schedule.from_config(configs.SCHEDULER), np.random.default_rng(0)
    latents, noise, answer = rng.standard_normal((3, 5, 8, 8, 4))
    timesteps, alpha_bar = np.array([0, 20, 300, 700, 999]), schedule.alphas_cumprod
    x_t = schedule.add_noise(latents, noise, timesteps)
    v_error = (answer - target(schedule, latents, noise, timesteps)) ** 2
    for i, t in enumerate(timesteps):
        a, s = np.sqrt(alpha_bar[t]), np.sqrt(1 - alpha_bar[t])
        _, noise_pred = to_x_start_and_noise(schedule, answer[i], x_t[i], a, s)
        expected = ((noise_pred - noise[i]) ** 2).mean() / alpha_bar[t]
        assert_allclose(v_error[i].mean(), expected, rtol=1e-4)
