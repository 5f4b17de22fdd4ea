"""The x4 upscaler's single file, as x4-upscaler-ema.ckpt: against its folder and diffusers."""
import diffusers
import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

import tinyldm
from tests.support import single_files
from tests.support.pictures import picture
from tests.support.reference import to_ours
from tests.support.single_files import as_file, assert_same_weights
from tests.support.tolerance import assert_allclose
from tinyldm.checkpoints import kind_of
from tinyldm.checkpoints.single_file.kinds import UPSCALER
from tinyldm.cli.draw import main
from tinyldm.errors import TinyldmError
from tinyldm.models import UNet2DConditionModel
from tinyldm.pipelines.upscale import Upscaler

LOW = picture(size=(12, 8))
# What the original code's low_scale_model and its schedule register as buffers.
TABLES = ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
          "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
          "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
BUFFERS = {start + name: np.linspace(0, 1, 1000, dtype=np.float32) for name in TABLES
           for start in ("", "low_scale_model.")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return single_files.upscaler(tmp_path_factory.mktemp("upscaler"))


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_it_draws_what_its_folder_draws(folder, suffix, tmp_path, monkeypatch):
    file = as_file(folder, tmp_path / f"model{suffix}", monkeypatch, **BUFFERS)
    assert kind_of(file) == "StableDiffusionUpscalePipeline"
    pipe, other = tinyldm.load(file), tinyldm.load(folder)
    assert isinstance(pipe, Upscaler) and pipe.max_noise_level == 350
    assert_same_weights(pipe, other)
    for schedule in ("schedule", "low_res_schedule"):
        assert np.array_equal(getattr(pipe, schedule).betas, getattr(other, schedule).betas)
    assert pipe.schedule.prediction_type == "v_prediction" and pipe.sampler() == "ddim"
    options = {"image": LOW, "num_inference_steps": 3, "noise_level": 50}
    assert np.array_equal(pipe("red cat", **options)[0], other("red cat", **options)[0])
    tinyldm.save(pipe, tmp_path / "saved")
    again = tinyldm.load(tmp_path / "saved")
    assert np.array_equal(again("red cat", **options)[0], other("red cat", **options)[0])


def test_diffusers_reads_the_same_from_the_file(folder, tmp_path, monkeypatch):
    """Offline, with the configs of the folder; it converts UNet and VAE, key by key."""
    file = as_file(folder, tmp_path / "model.safetensors", monkeypatch, **BUFFERS)
    pipe = tinyldm.load(file)
    for part, kind in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        theirs = kind.from_single_file(str(file), config=str(folder), subfolder=part,
                                       local_files_only=True, torch_dtype=torch.float32)
        theirs = dict(theirs.named_parameters())
        ours = dict(pipe.models[part].named_parameters())
        assert ours.keys() == theirs.keys()
        for name, parameter in ours.items():
            assert_allclose(parameter.data, to_ours(theirs[name].detach()), atol=0)


def test_the_command_draws(folder, tmp_path, monkeypatch, capsys):
    file = as_file(folder, tmp_path / "model.safetensors", monkeypatch)
    LOW.save(tmp_path / "low.png")
    given = ["red cat", "--weights", str(file), "--image", str(tmp_path / "low.png"), "--steps",
             "2", "--output", str(tmp_path / "out.png")]
    assert main([*given, "--noise-level", "30"]) == 0
    expected, = tinyldm.load(folder)("red cat", LOW, 30, num_inference_steps=2)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(expected))
    assert main([*given, "--strength", "0.5"]) == 2
    assert "error: the upscaler draws without --strength: leave it out" in capsys.readouterr().err


def test_parts_that_are_missing_or_too_many(folder, tmp_path, monkeypatch):
    file = as_file(folder, tmp_path / "model.safetensors", monkeypatch, drop="first_stage_model.")
    with pytest.raises(TinyldmError, match="the x4 upscaler. holds no VAE: name one with --vae"):
        tinyldm.load(file)
    assert_same_weights(tinyldm.load(file, vae=folder / "vae"), tinyldm.load(folder))
    more = {"model.diffusion_model.label_emb.bias": np.zeros(3, np.float32)}
    file = as_file(folder, tmp_path / "more.safetensors", monkeypatch, **more)
    with pytest.raises(TinyldmError, match=r"unexpected: 1: model.diffusion_model.label_emb.bias"):
        tinyldm.load(file)


def test_its_unet_alone(folder, tmp_path, monkeypatch):
    whole = safetensors.numpy.load_file(as_file(folder, tmp_path / "a.safetensors", monkeypatch))
    start = "model.diffusion_model."
    file = tmp_path / "unet.safetensors"
    safetensors.numpy.save_file({name.removeprefix(start): tensor for name, tensor in whole.items()
                                 if name.startswith(start)}, file)
    unet, expected = tinyldm.load_model(file), tinyldm.load(folder).unet
    assert isinstance(unet, UNet2DConditionModel)
    theirs = expected.state_dict()
    assert all(np.array_equal(value, theirs[name]) for name, value in unet.state_dict().items())


def test_the_small_config_differs_from_the_real_one_in_sizes_alone(folder):
    """What shrink changes for the tests above; the rest is the built-in config's."""
    small, real = tinyldm.load(folder).unet.config, UPSCALER.unet
    sizes = {"block_out_channels", "norm_num_groups", "sample_size", "cross_attention_dim",
             "attention_head_dim"}
    assert {key for key, value in real.items() if key in small and small[key] != value} <= sizes


def test_stable_unclip_is_named(tmp_path):
    file = tmp_path / "sd21-unclip-h.safetensors"
    names = ("noise_augmentor.data_mean", "model.diffusion_model.input_blocks.0.0.weight")
    safetensors.numpy.save_file({name: np.zeros((1, 4), np.float32) for name in names}, file)
    with pytest.raises(TinyldmError, match="Stable unCLIP .supported only as a folder.") as error:
        tinyldm.load(file)
    assert "\n" not in str(error.value)
