"""The files of Improved DDPM and guided diffusion: recognised, read, the same numbers, drawn with.

Their authors' code cannot be installed; support/openai_unet.py is written from its description.
"""
import math
import re
from functools import cache

import diffusers
import numpy as np
import pytest
import safetensors.numpy
import torch

import tinyldm
from tests.support.arrays import read_only
from tests.support.improved_ddpm import tables
from tests.support.keys import digest
from tests.support.openai_unet import PUBLISHED, UNet
from tests.support.reference import nchw, nhwc, randomise
from tests.support.tolerance import assert_close, within
from tinyldm.checkpoints.places import kind_of
from tinyldm.checkpoints.single_file.openai import drawing, public_name, unet
from tinyldm.diffusion.process import kept_timesteps
from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.diffusion.schedule import Schedule
from tinyldm.errors import TinyldmError
from tinyldm.layers import Tape, file_shape, to_file
from tinyldm.models import UNet2DModel
from tinyldm.pipelines.ddpm import DDPM

# As published, but narrow, and with one or two residual blocks in a level.
SMALL = {
    "cifar10": {"ch": 32, "mult": (1, 2, 2, 2), "blocks": 2},
    "imagenet64": {"ch": 32, "mult": (1, 2, 3, 4), "blocks": 1, "size": 64},
    "imagenet64 with classes": {"ch": 32, "mult": (1, 2, 3, 4), "blocks": 1, "size": 64,
                                "classes": 7},
    "lsun256": {"ch": 32, "mult": (1, 1, 2, 2, 4, 4), "blocks": 1, "size": 256, "heads": 1,
                "attention": (16,), "shift": False},
    "no scale and shift": {"ch": 32, "mult": (1, 2, 2, 2), "blocks": 1, "heads": 1,
                           "shift": False},
    "fixed variance": {"ch": 32, "mult": (1, 2, 2, 2), "blocks": 1, "outputs": 3},
    "adm64": {"ch": 32, "mult": (1, 2, 3, 4), "blocks": 1, "size": 64, "attention": (32, 8),
              "head_dim": 64, "updown": True, "new_order": True, "classes": 7},
    "adm128": {"ch": 32, "mult": (1, 1, 2, 3, 4), "blocks": 1, "size": 128,
               "attention": (32, 16, 8), "updown": True, "classes": 7},
    "adm256": {"ch": 32, "mult": (1, 1, 2, 2, 4, 4), "blocks": 1, "size": 256,
               "attention": (32, 16, 8), "head_dim": 64, "updown": True},
}
# Those whose gradients are compared, too: every kind of block, attention and order is among them.
WITH_GRADIENTS = {"cifar10", "imagenet64 with classes", "no scale and shift", "adm64", "adm128"}
# The number of tensors, of numbers, and the digest of the names and shapes.
LISTS = {"cifar10": (446, 52_546_438, "7296e7e468465be0"),
         "imagenet64": (450, 121_063_942, "e98f1562894f95a8"),
         "imagenet64 with classes": (451, 273_049_350, "f9ddca29ef6eebf6"),
         "lsun256": (426, 113_676_678, None),
         "adm64": (541, 295_904_454, "3a55b98a9f28c286"),
         "adm256": (566, 552_814_086, None)}


def original(name="cifar10", dtype=torch.float32, **changes):
    return randomise(UNet(**SMALL[name] | changes)).to(dtype).eval()


def state(model):
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


@cache
def small_state():
    return state(original())


def write(path, tensors):
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
    return path


def inputs(name):
    """Maps as small as the levels allow; the networks do not mind."""
    side = 2 ** (len(SMALL[name]["mult"]) - 1)
    latents = np.random.default_rng(1).standard_normal((1 + (side < 32), side, side, 3))
    labels = {"class_labels": read_only([3, 0])} if "classes" in SMALL[name] else {}
    return read_only(latents), read_only([731.25, 1.0][:len(latents)]), labels


@pytest.mark.parametrize("name", SMALL)
def test_numbers_and_gradients(name, tmp_path):
    reference = original(name, torch.float64)
    torch.save(reference.state_dict(), tmp_path / "ema_0.9999_500000.pt")
    module = tinyldm.load_model(tmp_path / "ema_0.9999_500000.pt", dtype="float64")
    latents, timesteps, labels = inputs(name)
    x = nchw(latents).requires_grad_()
    theirs = reference(x, torch.from_numpy(timesteps.copy()),
                       *(torch.from_numpy(y.copy()) for y in labels.values()))
    tape = Tape()
    ours = module(latents, timesteps, tape, **labels)
    assert_close(ours, nhwc(theirs), 1e-10, "output")
    if name not in WITH_GRADIENTS:
        return
    dy = read_only(np.random.default_rng(2).standard_normal(ours.shape))
    theirs.backward(nchw(dy))
    assert_close(module.backward(dy, tape).latents, nhwc(x.grad), 1e-6, "dlatents")
    ours = {key: to_file(parameter.grad) for key, parameter in module.named_parameters()}
    for key, gradient in gradients(reference, SMALL[name]["blocks"]).items():
        found = ours.pop(key).reshape(gradient.shape)
        # Before a norm with one channel in a group some gradients are 0.
        within(abs(found - gradient).max(), 1e-6 * abs(gradient).max() + 1e-11, key)
    assert not ours


def gradients(reference, blocks):
    """The original's under our names, in the file's order of axes; q, k and v taken apart."""
    found = {}
    modules = dict(reference.named_modules())
    for key, parameter in reference.named_parameters():
        public, gradient = public_name(key, blocks), parameter.grad.numpy()
        if ".qkv." not in public:
            found[public] = gradient
            continue
        attention = modules[key.rpartition(".qkv.")[0]]
        for i, word in enumerate("qkv"):
            if attention.new_order:
                rows = np.split(gradient, 3)[i]
            else:
                heads = gradient.reshape(attention.heads, 3, -1, *gradient.shape[1:])
                rows = heads[:, i].reshape(-1, *gradient.shape[1:])
            found[public.replace("qkv", f"to_{word}")] = rows
    return found


@pytest.mark.parametrize("name", ["cifar10", "adm64"])
def test_the_other_order_of_q_k_and_v_gives_other_numbers(name, tmp_path):
    reference = original(name)
    module = tinyldm.load_model(write(tmp_path / "x.safetensors", state(reference)))
    for part in reference.modules():
        if hasattr(part, "new_order"):
            part.new_order = not part.new_order
    latents, timesteps, labels = inputs(name)
    latents = latents.astype(np.float32)
    with torch.no_grad():
        theirs = nhwc(reference(nchw(latents), torch.from_numpy(timesteps.copy()),
                                *(torch.from_numpy(y.copy()) for y in labels.values())))
    assert abs(module(latents, timesteps, **labels) - theirs).max() > 0.1 * theirs.std()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name):
    """The names and shapes are those of the real files, and our model of them has as many numbers.
    """
    with torch.device("meta"):
        reference = UNet(**PUBLISHED[name])
    shapes = {key: tuple(tensor.shape) for key, tensor in reference.state_dict().items()}
    if name in LISTS:
        count, numbers, expected = LISTS[name]
        assert len(shapes) == count and sum(map(math.prod, shapes.values())) == numbers
        assert expected in (None, digest([("model", *row) for row in shapes.items()]))
    options = PUBLISHED[name]
    config, _ = unet({key: Shape(shape) for key, shape in shapes.items()}, name)
    assert config["sample_size"] == options.get("size", 32)
    assert config["layers_per_block"] == options["blocks"]
    module = UNet2DModel(config)
    own = {key: file_shape(parameter) for key, parameter in module.named_parameters()}
    assert sum(map(math.prod, own.values())) == sum(map(math.prod, shapes.values()))
    for part in (*module.down_blocks, module.mid_block, *module.up_blocks):
        for attention in part.attentions:
            C = attention.to_q.weight.shape[0]
            assert attention.num_heads == (C // 64 if "head_dim" in options else
                                           options.get("heads", 4))


class Shape:
    """A stored tensor of which only the shape is known."""

    strides = (1, 1, 1)

    def __init__(self, shape):
        self.shape = shape

    def _replace(self, shape, strides):
        return Shape(shape)

    def rows(self, first, last):
        return Shape((last - first, *self.shape[1:]))

    def picked(self, spans):
        return Shape((sum(last - first for first, last in spans), *self.shape[1:]))


@pytest.mark.parametrize("name, expected", [
    ("cifar10", {"num_train_timesteps": 4000, "beta_schedule": "squaredcos_cap_v2"}),
    ("imagenet64", {"num_train_timesteps": 4000, "beta_schedule": "squaredcos_cap_v2"}),
    ("imagenet64 with classes", {"num_train_timesteps": 4000,
                                 "beta_schedule": "squaredcos_cap_v2"}),
    ("lsun256", {"beta_schedule": "linear", "beta_end": 0.02}),
    ("fixed variance", {"variance_type": "fixed_large"}),
    ("adm64", {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}),
    ("adm256", {"beta_schedule": "linear", "num_train_timesteps": 1000})])
def test_the_schedule_is_that_of_the_published_file(name, expected):
    with torch.device("meta"):
        tensors = UNet(**SMALL[name]).state_dict()
    config, _ = unet({key: Shape(tuple(tensor.shape)) for key, tensor in tensors.items()}, name)
    found, settings = drawing(config)
    assert ("_rescale_timesteps" in settings) == (name in ("cifar10", "imagenet64",
                                                           "fixed variance"))
    assert {"variance_type": "learned_range"} | found | expected == found
    Schedule.from_config(found)


def test_a_file_of_the_64_pixels_model_is_a_pipeline_with_classes(tmp_path):
    torch.save(original("adm64").state_dict(), tmp_path / "64x64_diffusion.pt")
    assert kind_of(tmp_path / "64x64_diffusion.pt") == "DDPMPipeline"
    pipe = tinyldm.load(tmp_path / "64x64_diffusion.pt")
    assert isinstance(pipe, DDPM) and pipe.num_inference_steps == 250 and pipe.size == (64, 64)
    with pytest.raises(TinyldmError, match="give a label, a whole number from 0 to 6"):
        pipe()


@pytest.mark.parametrize("name, sampler, kind", [
    ("cifar10", None, diffusers.DDPMScheduler),
    ("no scale and shift", "ddim", diffusers.DDIMScheduler)])
def test_drawing_equals_diffusers_sampler_on_the_original_network(name, sampler, kind, tmp_path):
    reference = original(name)
    torch.save(reference.state_dict(), tmp_path / "model.pt")
    pipe = tinyldm.load(tmp_path / "model.pt")
    states = pipe.stream(seed=0, num_inference_steps=2, sampler=sampler)
    theirs = kind.from_config({**pipe.scheduler, "_class_name": kind.__name__})
    theirs.set_timesteps(2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 32, 32, generator=generator)
    for ours, t in zip(states, theirs.timesteps, strict=True):
        with torch.no_grad():
            output = reference(x, t[None] * 1000 / theirs.config.num_train_timesteps)
        if kind is diffusers.DDPMScheduler:
            x = theirs.step(output, t, x, generator=generator).prev_sample
        else:                                           # which cannot learn a variance
            x = theirs.step(output[:, :3], t, x).prev_sample
        assert ours.timestep == t
        assert_close(ours.latents, nhwc(x), 2e-3, f"step {ours.step}")


def cheap(latents, timesteps):
    """Any smooth noise and share of the variance, in place of a network: 250 steps take long."""
    t = timesteps[0] / 1000
    return [0.7 * latents + 0.2 * np.sin(5 * t + latents), np.cos(3 * t + 2 * latents)]


def with_cheap_network(file):
    """A file's pipeline in float64 that calls `cheap`, and the list of timesteps that it sees."""
    pipe, seen = tinyldm.load(file, dtype="float64"), []

    def forward(latents, timesteps, tape=None, **labels):
        seen.append(timesteps[0])
        return np.concatenate(cheap(latents, timesteps), axis=-1)

    pipe.unet.forward = forward
    return pipe, seen


@pytest.mark.parametrize("name, T, scale", [
    ("adm64", 1000, 1), ("cifar10", 4000, 0.25), ("imagenet64", 4000, 0.25),
    ("imagenet64 with classes", 4000, 1)])
def test_the_default_steps_are_the_authors(name, T, scale, tmp_path):
    """250 respaced steps of all T, a clipped x_start, the variance between beta~ and beta. Our
    schedule is float32, theirs float64."""
    torch.save(original(name).state_dict(), tmp_path / "model.pt")
    pipe, seen = with_cheap_network(tmp_path / "model.pt")
    label = {"label": 3} if "classes" in SMALL[name] else {}
    states = list(pipe.stream(seed=5, **label))
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    kept = kept_timesteps(T, 250)
    alpha_bar = np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))[kept]
    betas = 1 - alpha_bar / np.append(1, alpha_bar[:-1])
    assert [state.timestep for state in states] == kept[::-1].tolist()
    assert seen == (kept[::-1] * scale).tolist()
    rows = {key: table.numpy().ravel() for key, table in tables(betas).items()}
    generator = torch.Generator().manual_seed(5)
    shape = 1, 3, *pipe.size
    x = nhwc(torch.randn(shape, generator=generator)).astype(np.float64)
    for state, i in zip(states, reversed(range(250)), strict=True):
        row = {key: table[i] for key, table in rows.items()}
        eps, v = cheap(x, [kept[i] * scale])
        x_start = x / row["alpha_bar"] ** 0.5 - (1 / row["alpha_bar"] - 1) ** 0.5 * eps
        x_start = x_start.clip(-1, 1)
        share = (v + 1) / 2
        logvar = share * row["log_beta"] + (1 - share) * row["low"]
        x = row["c1"] * x_start + row["c2"] * x
        if i:
            x = x + np.exp(logvar / 2) * nhwc(torch.randn(shape, generator=generator))
        assert_close(state.latents, x, 5e-4, f"step {state.step}")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_with_rescaled_timesteps(sampler, tmp_path):
    torch.save(original().state_dict(), tmp_path / "model.pt")
    pipe, seen = with_cheap_network(tmp_path / "model.pt")
    assert np.isfinite(list(pipe.stream(num_inference_steps=4, sampler=sampler))[-1].latents).all()
    assert 700 < max(seen) < 1000


def test_a_saved_folder_holds_the_same_pipeline(tmp_path):
    """diffusers loads it where all attentions have heads of one width."""
    torch.save(original().state_dict(), tmp_path / "model.pt")
    pipe = tinyldm.load(tmp_path / "model.pt")
    with pytest.warns(UserWarning, match="diffusers' classes cannot express"):
        tinyldm.save(pipe, tmp_path / "saved")
    theirs = diffusers.DDPMPipeline.from_pretrained(tmp_path / "saved")
    again = tinyldm.load(tmp_path / "saved")
    x = np.random.default_rng(5).standard_normal((1, 8, 8, 3)).astype(np.float32)
    with torch.no_grad():
        expected = nhwc(theirs.unet(nchw(x), torch.tensor([500])).sample)
    assert_close(again.unet(x, np.array([500.0])), expected, 1e-3)
    np.testing.assert_array_equal(theirs.scheduler.alphas_cumprod, again.schedule.alphas_cumprod)
    np.testing.assert_array_equal(again.schedule.betas, pipe.schedule.betas)
    first, second = (list(p.stream(num_inference_steps=2))[-1].latents for p in (pipe, again))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_wrapped_names_and_float16(prefix, tmp_path):
    tensors = {prefix + key: tensor.astype(np.float16) for key, tensor in state(original()).items()}
    module = tinyldm.load_model(write(tmp_path / "x.safetensors", tensors), dtype="float16")
    third = tensors[f"{prefix}middle_block.1.qkv.bias"].reshape(4, 3, 16)[:, 1].ravel()
    np.testing.assert_array_equal(module.mid_block.attentions[0].to_k.bias.data, third)


def without(*names):
    return lambda tensors: {name: x for name, x in tensors.items() if name not in names}


def replaced(name, change):
    return lambda tensors: {**tensors, name: change(tensors[name])}


QKV = "middle_block.1.qkv.weight"


@pytest.mark.parametrize("change, message", [
    (without("out.2.weight"), "only a part of a UNet of Improved DDPM, without out.2.weight"),
    (without("input_blocks.4.0.out_layers.3.weight"), "only a part|levels of"),
    (without("out.0.bias"), "missing: .*conv_norm_out.bias"),
    (lambda tensors: {name: x for name, x in tensors.items() if not name.startswith("output")},
     "without its way up, or a classifier"),
    (lambda tensors: {name: x for name, x in tensors.items() if "input_blocks.1." not in name},
     "only a part of a UNet"),
    (lambda tensors: {**tensors, "extra.weight": np.zeros(3, np.float32)},
     "unexpected: .*extra.weight"),
    (lambda tensors: {**tensors, "input_blocks.999.0.op.bias": np.zeros(3, np.float32)},
     "only a part of a UNet"),
    (replaced(QKV, lambda x: x[:100]), "missing: .*mid_block.attentions.0.to_q.weight"),
    (replaced(QKV, lambda x: np.float32(3).reshape(())), "missing: .*to_q"),
    (replaced(QKV, lambda x: x * np.nan), "holds NaN"),
    (replaced(QKV, lambda x: x.astype(np.int64)), "qkv.weight has dtype .*: convert the file"),
    (lambda tensors: {name.replace("output_blocks.2.", "output_blocks.29."): x
                      for name, x in tensors.items()}, "only a part|layers_per_block|levels of"),
    (replaced("time_embed.0.weight", lambda x: x[:, :30]), "with levels of 32, 64, 64, 64"),
    (replaced("input_blocks.1.0.emb_layers.1.weight", lambda x: x[0]), "of 2 axes"),
    (replaced("input_blocks.0.0.weight", lambda x: x[:, :0]), "without input_blocks.0.0.weight"),
])
def test_files_that_do_not_fit(change, message, tmp_path):
    file = write(tmp_path / "x.safetensors", change(dict(small_state())))
    with pytest.raises(TinyldmError) as error:
        tinyldm.load_model(file)
    assert re.search(message, str(error.value).replace("\n", " ")), error.value


@pytest.mark.parametrize("options, message", [
    ({"ch": 48}, "does not divide"), ({"mult": (1, 2, 2)}, "with levels of 32, 64, 64 channels"),
    ({"mult": (1, 4, 2, 2)}, "supported are those with factors of 1, 2, 2, 2; 1, 2, 3, 4;")])
def test_networks_that_were_not_published(options, message, tmp_path):
    if options.get("ch") == 48:                         # groups of 32 cannot be built
        tensors = {key: np.repeat(x, 2, axis=0)[:48] if x.shape[:1] == (32,) else x
                   for key, x in state(original()).items()}
        tensors["time_embed.0.weight"] = np.zeros((128, 48), np.float32)
        widths = (48, 96, 96, 96)
        for level, n in enumerate(range(1, 13, 3)):
            tensors[f"input_blocks.{n}.0.out_layers.3.weight"] = np.zeros(
                (widths[level], widths[level], 3, 3), np.float32)
    else:
        tensors = state(original(**options))
    file = write(tmp_path / "x.safetensors", tensors)
    with pytest.raises(TinyldmError, match=message) as error:
        tinyldm.load_model(file)
    assert "\n" not in str(error.value)


def test_bfloat16(tmp_path):
    """The rows are put in order before they are widened."""
    tensors = {key: tensor.bfloat16() for key, tensor in original().state_dict().items()}
    torch.save(tensors, tmp_path / "model.pt")
    module = tinyldm.load_model(tmp_path / "model.pt")
    third = tensors[QKV].float().reshape(4, 3, 16, 64)[:, 2].reshape(64, 64)
    np.testing.assert_array_equal(module.mid_block.attentions[0].to_v.weight.data, third)


def test_options_that_mean_nothing(tmp_path):
    file = write(tmp_path / "x.safetensors", dict(small_state()))
    with pytest.warns(UserWarning, match="ema, are a file of their own"):
        tinyldm.load(file, ema=True)
    with pytest.raises(TinyldmError, match="without a VAE: leave vae out"):
        tinyldm.load(file, vae=file)
    six = write(tmp_path / "up.safetensors", state(original(inputs=6)))
    assert tinyldm.load_model(six).settings.in_channels == 6    # an upsampler: a model, no pipeline
    with pytest.raises(TinyldmError, match="in_channels and out_channels are 6 and 6"):
        tinyldm.load(six)
