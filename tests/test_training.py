"""Training: the optimiser against torch's, both losses' gradients, resuming, and export."""
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from tinyldm import load_model
from tinyldm.diffusion.schedule import Schedule
from tinyldm.errors import TinyldmError
from tinyldm.layers import Parameter
from tinyldm.metrics.evaluate import round_trip
from tinyldm.models import AutoencoderKL, UNet2DConditionModel
from tinyldm.training import configs, data, export
from tinyldm.training import unet as unet_stage
from tinyldm.training import vae as vae_stage
from tinyldm.training.loop import Trainer, split_batch
from tinyldm.training.optim import AdamW, Muon, initialise, learning_rate, load_ema
from tinyldm.training.widen import widen

SMALL_VAE = configs.VAE | {"block_out_channels": [8, 8, 8], "norm_num_groups": 4}
SMALL_UNET = configs.UNET | {"block_out_channels": [8, 8, 16], "norm_num_groups": 4,
                             "cross_attention_dim": 16}
SMALL_TEXT = configs.TEXT_ENCODER | {"hidden_size": 16, "intermediate_size": 32,
                                     "num_hidden_layers": 1}


def parameters(rng, dtype=np.float64):
    named = [("a", Parameter(3, 4)), ("b", Parameter(5))]
    for _, parameter in named:
        parameter.data = rng.standard_normal(parameter.shape).astype(dtype)
    return named


def test_adamw_equals_torch():
    rng = np.random.default_rng(0)
    named = parameters(rng)
    theirs = [torch.nn.Parameter(torch.from_numpy(p.data.copy())) for _, p in named]
    reference = torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
    optimizer = AdamW(named, weight_decay=0.01, clip=1.0)
    ema, steps = optimizer.data.copy(), 12
    for step in range(steps):
        scale = 10.0 ** (step % 3 - 1)                  # some steps are clipped, some are not
        for (_, parameter), tensor in zip(named, theirs):
            grad = rng.standard_normal(parameter.shape) * scale
            parameter.add_grad(grad)
            tensor.grad = torch.from_numpy(grad.copy())
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        reference.step()
        assert optimizer.step(0.1) == pytest.approx(norm.item(), rel=1e-9)
        decay = min(0.999, (2 + step) / (11 + step))
        ema = decay * ema + (1 - decay) * optimizer.data
    for (_, parameter), tensor in zip(named, theirs):
        np.testing.assert_allclose(parameter.data, tensor.detach().numpy(), rtol=1e-9, atol=1e-12)
        assert parameter.grad is None
    np.testing.assert_allclose(optimizer.ema, ema, rtol=1e-12)


def test_muon_moves_matrices_alike_in_all_directions_and_the_rest_as_adamw():
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 8, 16), "linear": (24, 9), "few": (1, 1, 4, 16), "bias": (16,)}
    both = []
    for kind in (Muon, AdamW):
        named = [(name, Parameter(*shape)) for name, shape in shapes.items()]
        for seed, (_, parameter) in enumerate(named):
            parameter.data = np.random.default_rng(seed).standard_normal(parameter.shape)
        both.append((kind(named, clip=1e9), dict(named)))
    start = {name: p.data.copy() for name, p in both[0][1].items()}
    for _ in range(3):
        grads = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        for optimizer, named in both:
            for name, parameter in named.items():
                parameter.add_grad(grads[name].copy())
            optimizer.step(0.1)
    (muon, ours), (_, adams) = both
    for name in ("few", "bias"):
        np.testing.assert_allclose(ours[name].data, adams[name].data, rtol=1e-12)
    for name in ("conv", "linear"):
        before = ours[name].data.copy()
        for other, parameter in ours.items():
            parameter.add_grad(grads[other].copy())
        muon.step(0.1)
        move = (0.999 * before - ours[name].data).reshape(-1, before.shape[-1])
        values = np.linalg.svd(move, compute_uv=False) / (0.1 * 0.2 * np.sqrt(max(move.shape)))
        assert 0.5 < values.min() and values.max() < 1.3
        assert not np.allclose(before, start[name])


def test_ema_of_muon():
    parameter, rng = Parameter(8, 9), np.random.default_rng(0)
    parameter.data = rng.standard_normal((8, 9))
    optimizer = Muon([("a", parameter)])
    ema = optimizer.data.copy()
    for step in range(4):
        parameter.add_grad(rng.standard_normal((8, 9)))
        optimizer.step(0.1)
        decay = (2 + step) / (11 + step)
        ema = decay * ema + (1 - decay) * optimizer.data
    np.testing.assert_allclose(optimizer.ema, ema, rtol=1e-12)


def test_a_parameter_without_gradient_is_named():
    named = parameters(np.random.default_rng(0))
    named[0][1].add_grad(np.zeros((3, 4)))
    with pytest.raises(AssertionError, match="b has no gradient"):
        AdamW(named).step(0.1)


def test_learning_rate():
    rates = [learning_rate(step, 2.0, 10, 110) for step in range(130)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2.0 * (0.05 + 0.95 / 2))
    assert rates[110] == rates[129] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    again = [learning_rate(step, 2.0, 10, 110, begun=50) for step in range(50, 70)]
    assert again[0] == pytest.approx(rates[50] / 10) and again[9:] == rates[59:70]


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
    images = data.batch(rng, 2)[0].astype(np.float64)
    difference, expected = directional(
        lambda: vae_stage.vae_loss(vae, images, Float64Noise(1), 0.5, decoder_only),
        trained, rng, h=1e-8)                           # small: |x| has a corner at every pixel
    assert expected == pytest.approx(difference, rel=1e-4)
    touched = {name for name, p in vae.named_parameters() if p.grad is not None}
    assert touched == {name for name, _ in trained}


def test_more_latent_channels_change_nothing_at_first():
    rng, few = np.random.default_rng(0), {"in_channels": 4, "out_channels": 4}
    vae, unet = AutoencoderKL(SMALL_VAE | {"latent_channels": 4}), UNet2DConditionModel(
        SMALL_UNET | few)
    for model in (vae, unet):
        initialise(model, rng)
        assert widen(model, 4) is model
    more = widen(vae, 8)
    images, noise = data.batch(rng, 2)[0], rng.standard_normal((2, 16, 16, 8), np.float32)
    (mean, logvar), (wide_mean, wide_logvar) = vae.encode(images), more.encode(images)
    np.testing.assert_allclose(wide_mean[..., :4], mean, atol=1e-5)
    np.testing.assert_allclose(wide_logvar[..., :4], logvar, atol=1e-5)
    assert (wide_logvar[..., 4:] == -6).all() and wide_mean[..., 4:].std() > 0.1
    np.testing.assert_allclose(more.decode(noise), vae.decode(noise[..., :4]), atol=1e-5)
    context, t = rng.standard_normal((2, 77, 16), np.float32), np.array([5, 900])
    np.testing.assert_allclose(widen(unet, 8).forward(noise, t, context)[..., :4],
                               unet.forward(noise[..., :4], t, context), atol=1e-5)


class NothingLost:
    """A VAE whose latents are the picture."""

    def encode(self, images):
        return images, None

    def decode(self, z):
        return z


def test_the_round_trip_of_a_vae_that_loses_nothing():
    scenes = data.held_out_scenes(5, seed=0)
    drawings = np.stack([data.draw(scene) for scene in scenes.values()])
    shares, pictures = round_trip(NothingLost(), drawings, list(scenes), at_once=2)
    np.testing.assert_array_equal(pictures, drawings)
    assert shares["all"] == 1


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
        lambda: unet_stage.diffusion_loss(text_encoder, unet, schedule, latents, ids,
                                          Float64Noise(1), 0.5), named, rng)
    assert expected == pytest.approx(difference, rel=1e-4)


def test_timesteps_are_mostly_in_the_middle():
    timesteps = unet_stage.sample_timesteps(np.random.default_rng(0), 100_000, 1000)
    assert timesteps.dtype.kind == "i" and 0 <= timesteps.min() and timesteps.max() < 1000
    assert ((timesteps >= 200) & (timesteps < 600)).mean() == pytest.approx(0.6, abs=0.05)


def test_the_loss_is_that_of_the_noise_over_alpha_bar():
    """What the file's docstring says: a network that answers v, measured by its noise."""
    schedule, rng = Schedule.from_config(configs.SCHEDULER), np.random.default_rng(0)
    latents, noise, answer = rng.standard_normal((3, 5, 8, 8, 4))
    timesteps, alpha_bar = np.array([0, 20, 300, 700, 999]), schedule.alphas_cumprod
    x_t = schedule.add_noise(latents, noise, timesteps)
    v_error = (answer - schedule.target(latents, noise, timesteps)) ** 2
    for i, t in enumerate(timesteps):
        a, s = np.sqrt(alpha_bar[t]), np.sqrt(1 - alpha_bar[t])
        _, noise_pred = schedule.split(answer[i], x_t[i], a, s)
        expected = ((noise_pred - noise[i]) ** 2).mean() / alpha_bar[t]
        assert v_error[i].mean() == pytest.approx(expected, rel=1e-4)


def test_shards_add_up_to_the_batch():
    seen = []

    def loss(rows, rng, share):
        seen.append((rows.start, rows.stop))
        return {"loss": share * 2.0}
    assert split_batch(loss, 7, np.random.default_rng(0)) == {"loss": pytest.approx(2.0)}
    assert sorted(seen)[0][0] == 0 and sorted(seen)[-1][1] == 7


def quadratic(path, steps):
    """A training of one vector towards noisy targets; its state lies in path."""
    parameter = Parameter(6)
    parameter.data = np.zeros(6)
    trainer = Trainer(path, [("x", parameter)], steps, 0.1, warmup=2)

    def batch_loss(rng):
        difference = parameter.data - rng.standard_normal(6)
        parameter.add_grad(difference)
        return {"loss": float((difference ** 2).sum())}
    trainer.train(batch_loss)
    return parameter, trainer


def test_a_resumed_training_goes_on_as_if_never_stopped(tmp_path):
    whole, trainer = quadratic(tmp_path / "whole.npz", 9)
    for steps in (4, 9):                                # the rates differ by the plan's length ...
        part, _ = quadratic(tmp_path / "part.npz", steps)
    again, _ = quadratic(tmp_path / "whole.npz", 9)     # ... and a finished one stays as it is
    np.testing.assert_array_equal(whole.data, again.data)
    assert len(trainer.history) == 9
    with np.load(tmp_path / "part.npz") as state:
        assert state["steps"] == 9 and len(state["history"]) == 9
        ema = state["ema"]
    loaded = Parameter(6)
    load_ema(tmp_path / "part.npz", [("x", loaded)])
    np.testing.assert_array_equal(loaded.data, ema)


def test_two_trainings_of_one_file(tmp_path):
    """The second to save stops and leaves what the first has written."""
    path, parameter = tmp_path / "x.npz", Parameter(2)
    parameter.data = np.zeros(2)
    first, second = (Trainer(path, [("x", parameter)], 5, 0.1) for _ in range(2))
    first.save()
    content = path.read_bytes()
    with pytest.raises(TinyldmError, match="another training wrote .*x.npz meanwhile"):
        second.save()
    assert path.read_bytes() == content
    first.save()


def test_a_loss_that_is_not_a_number_stops(tmp_path):
    parameter = Parameter(2)
    parameter.data = np.zeros(2)
    trainer = Trainer(tmp_path / "x.npz", [("x", parameter)], 5, 0.1)
    with pytest.raises(FloatingPointError, match="step 0"):
        trainer.train(lambda rng: {"loss": math.nan})


@pytest.mark.parametrize("stage", ["unet", "decoder", "export"])
def test_command_line_says_what_is_missing(stage, tmp_path):
    command = [sys.executable, "-m", "tinyldm.training", stage, "--run", tmp_path / "none"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and "tinyldm.training vae" in done.stderr


def test_from_training_to_a_folder(tmp_path, monkeypatch):
    """All stages, small and short: diffusers and tinyldm load the averaged weights they leave."""
    from diffusers import StableDiffusionPipeline

    for stage, name, value in ((vae_stage, "VAE", SMALL_VAE), (vae_stage, "BATCH", 4),
                               (unet_stage, "UNET", SMALL_UNET), (unet_stage, "POOL", 64),
                               (unet_stage, "TEXT_ENCODER", SMALL_TEXT)):
        monkeypatch.setattr(stage, name, value)
    run, output = tmp_path / "run", tmp_path / "weights"
    with pytest.raises(TinyldmError, match="training vae"):
        export.export(run, output)
    vae_stage.train_vae(run, 2)
    unet_stage.train_unet(run, 2, batch=4)
    before = (run / "vae.npz").read_bytes()
    vae_stage.train_decoder(run, 3)
    assert (run / "vae.npz").read_bytes() == before
    export.export(run, output)

    reference = StableDiffusionPipeline.from_pretrained(output)
    factor = reference.vae.config.scaling_factor
    with np.load(run / "pool.npz") as pool:
        latents = factor * (pool["mean"] + pool["std"] * np.random.default_rng(0).standard_normal(
            pool["mean"].shape))
        assert latents.std() == pytest.approx(1, abs=0.02)
        assert pool["ids"].shape == (64, 77)
    text_encoder, unet, vae = (load_model(output / p) for p in ("text_encoder", "unet", "vae"))
    exported = {"unet": unet_stage.named_parameters(text_encoder, unet),
                "decoder": vae_stage.decoder_parameters(vae)}
    for stage, named in exported.items():
        flat = np.concatenate([p.data.reshape(-1) for _, p in named])
        with np.load(run / f"{stage}.npz") as state:
            np.testing.assert_allclose(flat, state["ema"], rtol=1e-3, atol=1e-6)
    assert (output / "loss.png").stat().st_size > 1000

    drawings = np.stack([data.draw(scene) for scene in data.held_out_scenes(3, seed=0).values()])
    shares, pictures = round_trip(vae, drawings, data.held_out_prompts(3, seed=0), at_once=2)
    assert np.shape(pictures) == drawings.shape and 0 <= shares["all"] <= 1

    again = tmp_path / "again"
    export.restore(output, again)
    with np.load(again / "unet.npz") as state, np.load(run / "unet.npz") as trained:
        np.testing.assert_allclose(state["data"], trained["ema"], rtol=1e-3, atol=1e-6)
        assert state["begun"] == trained["steps"] == 2 and state["steps"] == 0
    vae_stage.train_vae(again, 3)                       # one step more
    with np.load(again / "decoder.npz") as state:
        assert state["begun"] == 3
    with pytest.raises(TinyldmError, match="holds a training already"):
        export.restore(output, again)
