"""The original DDPM's description and weight names: the same network, from a folder or a file."""
import json

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch

import tinyldm
from tests.support.original_ddpm import Model
from tests.support.reference import assert_same_gradients, nchw, nhwc, randomise
from tests.support.tolerance import assert_close
from tinyldm.checkpoints.components import build_model, save_model
from tinyldm.checkpoints.single_file.ddpm import public_config, public_name
from tinyldm.errors import TinyldmError
from tinyldm.layers import Tape
from tinyldm.models import UNet2DModel

SMALL = {"ch": 32, "out_ch": 3, "ch_mult": [1, 2, 1], "num_res_blocks": 1, "in_channels": 3,
         "attn_resolutions": [8], "resamp_with_conv": True, "resolution": 16}
CIFAR10 = SMALL | {"ch": 128, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 2, "resolution": 32,
                   "attn_resolutions": [16], "dropout": 0.1}
DESCRIPTIONS = {
    "as published": SMALL, "no attention, two blocks": SMALL | {"attn_resolutions": [],
                                                               "num_res_blocks": 2},
    "pooling": SMALL | {"resamp_with_conv": False},
    "one level": SMALL | {"ch_mult": [1], "attn_resolutions": [16, 8]},
}


def reference_of(description):
    description = {key: value for key, value in description.items() if key != "dropout"}
    return randomise(Model(**description).double()).eval()


def write(folder, description, tensors, name="diffusion_pytorch_model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(description))
    if name.endswith("safetensors"):
        safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()},
                                    folder / name)
    else:
        torch.save(dict(tensors), folder / name)
    return folder


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_the_same_network(name, tmp_path):
    reference = reference_of(DESCRIPTIONS[name])
    module = tinyldm.load_model(write(tmp_path, DESCRIPTIONS[name], reference.state_dict()),
                                dtype="float64")
    rng = np.random.default_rng(0)
    images, dy = rng.standard_normal((2, 2, 16, 16, 3))
    x, t = nchw(images).requires_grad_(), np.array([3.0, 981.0])
    theirs, tape = reference(x, torch.from_numpy(t)), Tape()
    ours = module(images, t, tape)
    assert_close(ours, nhwc(theirs), 1e-10, "output")
    theirs.backward(nchw(dy))
    assert_close(module.backward(dy, tape).latents, nhwc(x.grad), 1e-6, "dlatents")

    last = len(DESCRIPTIONS[name]["ch_mult"]) - 1
    renamed = torch.nn.Module()
    renamed.named_parameters = lambda: [
        (key, flat(key, tensor)) for key, tensor in
        ((public_name(key, last), tensor) for key, tensor in reference.named_parameters())]
    assert_same_gradients(renamed, module)


def flat(name, tensor):
    """The gradient, and so the shape, of a matrix in place of a 1x1 convolution's."""
    if ".attentions." in name and tensor.ndim == 4:
        matrix = tensor.detach()[:, :, 0, 0]
        matrix.grad = tensor.grad[:, :, 0, 0]
        return matrix
    return tensor


@pytest.mark.parametrize("file, prefix", [("ddpm_ema.pt", "module."), ("model-790000.ckpt", ""),
                                          ("model.safetensors", "")])
def test_a_file_beside_a_description(file, prefix, tmp_path):
    reference = reference_of(SMALL).float()
    write(tmp_path, SMALL, {prefix + key: tensor for key, tensor in
                            reference.state_dict().items()}, file)
    module = tinyldm.load_model(tmp_path / file)
    images = np.random.default_rng(0).standard_normal((1, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = nhwc(reference(nchw(images), torch.tensor([7.0])))
    assert_close(module(images, np.array([7.0])), theirs, 1e-3)


def test_the_published_networks_have_the_public_config():
    """CIFAR-10's, built by diffusers from our translation."""
    config = public_config(CIFAR10)
    assert config.keys() <= {*diffusers.UNet2DModel.__init__.__wrapped__.__code__.co_varnames,
                             "_class_name"}
    assert UNet2DModel(config).config == config
    assert sum(np.prod(parameter.shape) for parameter in
               UNet2DModel(config).parameters()) == 35_746_307
    assert config["down_block_types"] == ["DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * 2]


def test_what_save_model_writes_diffusers_reads(tmp_path):
    module = tinyldm.load_model(write(tmp_path / "original", SMALL,
                                      reference_of(SMALL).state_dict()), dtype="float64")
    save_model(module, tmp_path / "public", "float64")
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "public", torch_dtype=torch.float64)
    images = np.random.default_rng(0).standard_normal((1, 16, 16, 3))
    with torch.no_grad():
        expected = nhwc(theirs(nchw(images), torch.tensor([7])).sample)
    assert_close(module(images, np.array([7.0])), expected, 1e-6)


def test_the_tutorials_description_builds(tmp_path):
    write(tmp_path, {"ch": 64, "out_ch": 3, "ch_mult": [1, 2, 4], "num_res_blocks": 2,
                     "attn_resolutions": [16], "resamp_with_conv": True, "resolution": 128}, {})
    settings = build_model(tmp_path).settings
    assert settings.block_out_channels == [64, 128, 256] and settings.sample_size == 128
    assert set(settings.down_block_types) == {"DownBlock2D"}    # 128, 64 and 32: never 16


@pytest.mark.parametrize("change, message", [
    ({"ch_mult": []}, "ch_mult must be a list of 1 to 8"),
    ({"ch": "64"}, "ch must be a positive whole number"),
    ({"ch_mult": [2, 4]}, "ch_mult must begin with 1"),
    ({"ch": 48}, "32 does not divide 48"),
    ({"resolution": 30}, "resolution must be a multiple of 4"),
    ({"attn_resolutions": 16}, "attn_resolutions must be a list"),
    ({"attn_type": "linear"}, "attn_type"),
    ({"num_res_blocks": None}, "num_res_blocks must be"),
    ({"z_channels": 4}, "names the model None"),        # the description of the original VAE
])
def test_bad_descriptions_end_in_one_line(change, message, tmp_path):
    with pytest.raises(TinyldmError, match=message) as error:
        tinyldm.load_model(write(tmp_path, SMALL | change, {}))
    assert "\n" not in str(error.value)


def test_a_file_without_a_description(tmp_path):
    write(tmp_path, SMALL, reference_of(SMALL).state_dict(), "model-790000.ckpt")
    (tmp_path / "config.json").unlink()
    with pytest.raises(TinyldmError, match="original DDPM code: put a config.json with its desc"):
        tinyldm.load_model(tmp_path / "model-790000.ckpt")


def test_an_incomplete_description(tmp_path):
    with pytest.raises(TinyldmError, match="original DDPM .*lacks num_res_blocks, resolution"):
        tinyldm.load_model(write(tmp_path, {"ch": 64, "ch_mult": [1, 2]}, {}))


def test_an_unknown_key_is_noted(tmp_path):
    write(tmp_path, SMALL | {"extra_layers": 3}, reference_of(SMALL).state_dict())
    with pytest.warns(UserWarning, match="extra_layers"):
        tinyldm.load_model(tmp_path)


def test_weights_that_do_not_fit_are_three_lists(tmp_path):
    tensors = reference_of(SMALL).state_dict()
    tensors.pop("mid.attn_1.q.weight")
    tensors["down.0.block.7.conv1.bias"] = torch.zeros(3)
    with pytest.raises(TinyldmError, match="missing: 1: mid_block.attentions.0.to_q.w") as error:
        tinyldm.load_model(write(tmp_path, SMALL, tensors))
    assert "unexpected: 1: down_blocks.0.resnets.7.conv1.bias" in str(error.value)
