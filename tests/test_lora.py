"""LoRA files: the names of real ones, and pictures against diffusers and against torch's sums."""
import copy
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.utils import is_peft_available

from tinyldm.checkpoints import components
from tinyldm.checkpoints.layout import file_shape
from tinyldm.checkpoints.lora import place_of, spelled_layers
from tinyldm.errors import TinyldmError
from tinyldm.models import CLIPTextModel, CLIPTextModelWithProjection, UNet2DConditionModel
from tinyldm.pipeline import load

from . import small_pipelines, strict
from .reference import to_ours
from .test_pipeline import Reference, assert_same_drawing, ours

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
with_lists = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"no key lists at {REFERENCE}")
with_peft = pytest.mark.skipif(not is_peft_available(), reason="diffusers reads LoRAs with peft")
PARTS = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


# ---- random LoRAs, each layer {(part, name in diffusers): (down, up, alpha)} ------------------

def everything(name, layer):
    return True


def attention(name, layer):
    return "attn" in name


def make_lora(pipe, wanted=everything, rank=3, alphas=True, seed=0):
    """A pair for every layer that is wanted, of ranks and alphas that differ."""
    generator, pairs = torch.Generator().manual_seed(seed), {}
    for part in PARTS:
        for name, layer in getattr(pipe, part).named_modules():
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and wanted(name, layer):
                O, I, *kernel = layer.weight.shape
                r = rank + len(pairs) % 2
                down = torch.randn(r, I, *kernel, generator=generator) * layer.weight[0].numel() ** -0.5
                up = torch.randn(O, r, *[1] * len(kernel), generator=generator) * 0.3
                pairs[part, name] = down, up, 0.5 + len(pairs) % 5 if alphas else None
    return pairs


def merge(pipe, pairs, weight):
    """What a LoRA is, by torch on diffusers' model."""
    with torch.no_grad():
        for (part, name), (down, up, alpha) in pairs.items():
            W, rank = getattr(pipe, part).get_submodule(name).weight, len(down)
            change = up.flatten(1) @ down.flatten(1)
            W += weight * (1 if alpha is None else alpha / rank) * change.reshape(W.shape)


def public(part, name):
    prefix = "text_model." if part == "text_encoder" and not name.startswith("text_model.") else ""
    return prefix + name


def kohya(pairs):
    tensors = {}
    for (part, name), (down, up, alpha) in pairs.items():
        flat = PARTS[part] + public(part, name).replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    return tensors


def peft(pairs):
    return {f"{part}.{public(part, name)}.lora_{letter}.weight": tensor
            for (part, name), pair in pairs.items() for letter, tensor in zip("AB", pair)}


def diffusers_newer(pairs):
    words = {"unet": "lora", "text_encoder": "lora_linear_layer"}
    return {f"{part}.{public(part, name)}.{words[part]}.{way}.weight": tensor
            for (part, name), pair in pairs.items() for way, tensor in zip(("down", "up"), pair)}


def diffusers_oldest(pairs):
    tensors = {}
    for (part, name), pair in pairs.items():
        block, _, layer = public(part, name.replace("to_out.0", "to_out")).rpartition(".")
        block += ".processor" if part == "unet" else ""
        for way, tensor in zip(("down", "up"), pair):
            tensors[f"{part}.{block}.{OLD_TEXT.get(layer, layer)}_lora.{way}.weight"] = tensor
    return tensors


def bare(pairs):
    return {name.removeprefix("unet."): tensor for name, tensor in diffusers_oldest(pairs).items()
            if name.startswith("unet.")}


LAYOUTS = {
    # layout: (what writes it, which layers, whether it has alphas)
    "kohya": (kohya, everything, True), "kohya without alphas": (kohya, everything, False),
    "peft": (peft, everything, False),
    "diffusers, newer": (diffusers_newer, attention, False),
    "diffusers, oldest": (diffusers_oldest, attention, False),
}


def write(tensors, path, metadata=None):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
                                    path, metadata)
    else:
        torch.save(tensors, path)
    return path


# ---- pipelines ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_pipelines.sd1(tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def original(folder):
    return Reference(folder)


@pytest.fixture
def reference(original):
    """diffusers' pipeline, to be changed."""
    return copy.deepcopy(original)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    return small_pipelines.smallest(tmp_path_factory.mktemp("smallest"))


@pytest.fixture
def small(small_folder):
    return load(small_folder)


def weights(pipe):
    return {(part, name): parameter.data for part in PARTS
            for name, parameter in getattr(pipe, part).named_parameters()}


def assert_same_weights(pipe, reference):
    """Of our pipeline and of diffusers', up to the rounding of sums."""
    compared = 0
    for part in PARTS:
        theirs = {public(part, name): tensor
                  for name, tensor in getattr(reference, part).state_dict().items()}
        for name, parameter in getattr(pipe, part).named_parameters():
            np.testing.assert_allclose(parameter.data, to_ours(theirs[name]), atol=1e-6)
            compared += 1
    assert compared > 100


# ---- pictures -------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_draws_as_torch_merges(layout, folder, original, reference, tmp_path):
    names, wanted, alphas = LAYOUTS[layout]
    pairs = make_lora(reference.pipe, wanted, alphas=alphas)
    pipe = load(folder)
    pipe.load_lora(write(names(pairs), tmp_path / "style.safetensors"), 0.8)
    merge(reference.pipe, pairs, 0.8)
    assert_same_drawing(ours(pipe), theirs := reference())
    assert abs(theirs[1].astype(int) - original()[1]).mean() > 5, "the LoRA changes nothing"


@with_peft
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_draws_as_diffusers(layout, folder, reference, tmp_path):
    names, wanted, alphas = LAYOUTS[layout]
    # Where some of a kohya file's layers are convolutions, diffusers mistakes their alphas.
    file = write(names(make_lora(reference.pipe, wanted, alphas=alphas)), tmp_path / "a.safetensors")
    pipe = load(folder)
    pipe.load_lora(file, 0.8)
    reference.pipe.load_lora_weights(file)
    reference.pipe.fuse_lora(lora_scale=0.8)
    assert_same_drawing(ours(pipe), reference())
