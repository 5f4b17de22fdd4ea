"""Folders: tinyldm loads what diffusers and transformers save, and they load what tinyldm saves."""
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch

from tests.support.files import UNET, assert_holds, diffusers_unet, diffusers_vae, transformers_clip
from tests.support.reference import reference_names
from tinyldm.checkpoints import (
    components,
    load_model,
    load_pipeline_parts,
    places,
    resolve,
    save_model,
)
from tinyldm.errors import TinyldmError


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """A whole random pipeline's folder (the tokenizer's files do not matter here)."""
    root = tmp_path_factory.mktemp("pipeline")
    diffusers_unet().save_pretrained(root / "unet")
    diffusers_vae().save_pretrained(root / "vae")
    transformers_clip().save_pretrained(root / "text_encoder")
    diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1).save_pretrained(root / "scheduler")
    (root / "tokenizer").mkdir()
    (root / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return root


@pytest.fixture
def folder_copy(pipeline_folder, tmp_path):
    return Path(shutil.copytree(pipeline_folder, tmp_path / "copy"))


# ---- one component --------------------------------------------------------------------------

@pytest.mark.parametrize("make", [diffusers_unet, diffusers_vae, transformers_clip])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_what_the_reference_saves_loads(make, variant, tmp_path):
    reference = make()
    if variant:
        reference = reference.half()
    reference.save_pretrained(tmp_path, variant=variant)
    model = load_model(tmp_path)
    assert type(model).__name__ == type(reference).__name__
    assert_holds(model, dict(reference_names(reference)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("make", [diffusers_unet, diffusers_vae, transformers_clip])
def test_the_reference_loads_what_is_saved(make, dtype, tmp_path):
    reference = make()
    reference.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    model.config.pop("dtype", None)                     # older transformers did not write it
    save_model(model, tmp_path / "ours", dtype)
    loaded, info = type(reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == torch.float32                # whatever the file holds
    stored = getattr(torch, np.dtype(dtype).name)
    state = loaded.state_dict()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(state[name].float(), tensor.to(stored).float()), name
    expected = {name: tensor.to(stored) for name, tensor in reference_names(reference)}
    assert_holds(load_model(tmp_path / "ours"), expected)
    stem = "model" if make is transformers_clip else "diffusion_pytorch_model"
    assert sorted(os.listdir(tmp_path / "ours")) == ["config.json", f"{stem}.safetensors"]


@pytest.mark.parametrize("squeeze", [True, False])
def test_old_vae_attention_names(squeeze, tmp_path):
    vae = diffusers_vae()
    vae.save_pretrained(tmp_path)
    old = {}
    for name, tensor in vae.state_dict().items():
        match = re.fullmatch(r"(.*mid_block.attentions.0)\.(to_q|to_k|to_v|to_out\.0)\.(\w+)", name)
        if match:
            new = ("to_q", "to_k", "to_v", "to_out.0")
            word = ("query", "key", "value", "proj_attn")[new.index(match[2])]
            name = f"{match[1]}.{word}.{match[3]}"
            if match[3] == "weight" and not squeeze:
                tensor = tensor[:, :, None, None]
        old[name] = tensor.contiguous()
    assert sum("query" in name for name in old) == 4
    safetensors.torch.save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    assert_holds(load_model(tmp_path), vae.state_dict())
    old["decoder.mid_block.attentions.0.to_q.bias"] = torch.zeros(12)           # both names at once
    safetensors.torch.save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(TinyldmError, match="unexpected: 1: decoder.mid_block.*.query.bias"):
        load_model(tmp_path)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_text_encoder_prefix_and_position_ids(prefix, tmp_path):
    clip = transformers_clip()
    clip.save_pretrained(tmp_path)
    state = {name: tensor.detach() for name, tensor in reference_names(clip)}
    stored = {prefix + name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    stored[prefix + "embeddings.position_ids"] = torch.arange(77)[None]
    safetensors.torch.save_file(stored, tmp_path / "model.safetensors")
    assert_holds(load_model(tmp_path), state)


def test_plain_weights_come_before_fp16_and_shards_are_read(tmp_path):
    unet = diffusers_unet()
    unet.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert_holds(load_model(tmp_path), unet.state_dict())
    shard = min(tmp_path.glob("*-00002-of-*"))
    shard.unlink()
    with pytest.raises(TinyldmError, match=shard.name):
        load_model(tmp_path)
    unet.half().save_pretrained(tmp_path / "both", variant="fp16")
    other = diffusers.UNet2DConditionModel(**UNET)
    other.save_pretrained(tmp_path / "both")
    assert_holds(load_model(tmp_path / "both"), other.state_dict())


def test_no_weights_and_a_pickle_that_is_none(folder_copy):
    weights = folder_copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    with pytest.raises(TinyldmError, match="expected weights in .*vae .*none"):
        load_model(folder_copy / "vae")
    (folder_copy / "vae" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(TinyldmError, match="diffusion_pytorch_model.bin is a bare pickle"):
        load_model(folder_copy / "vae")


def test_half_a_download(folder_copy):
    """The message names an incomplete file, as browsers and the hub's client call it."""
    weights = folder_copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name(f"{weights.name}.incomplete"))
    with pytest.raises(TinyldmError, match=r"expected weights in .*vae .*found none \(it holds 2: "
                       r"config.json, diffusion_pytorch_model.safetensors.incomplete\): is the"):
        load_pipeline_parts(folder_copy)


def test_an_index_of_shards_that_lacks_one_is_found_before_any_weight(folder_copy, monkeypatch):
    unet = diffusers_unet()
    shutil.rmtree(folder_copy / "unet")
    unet.save_pretrained(folder_copy / "unet", max_shard_size="20KB")
    shards = sorted((folder_copy / "unet").glob("*.safetensors"))
    shards[1].rename(f"{shards[1]}.incomplete")
    monkeypatch.setattr(components, "read_files", None)
    with pytest.raises(TinyldmError, match=rf"diffusion_pytorch_model.safetensors.index.json lists "
                       rf"{len(shards)} files of weights, of which the folder lacks 1: "
                       rf"{shards[1].name}: is the download complete"):
        load_pipeline_parts(folder_copy)


@pytest.mark.parametrize("content", ['{"weight_map": {}}', '{"weight_map": ["x"]}', "{}"])
def test_an_index_of_shards_that_is_none(content, tmp_path):
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    with pytest.raises(TinyldmError, match="must list files under weight_map, but does not"):
        components.find_weights(tmp_path)


@pytest.mark.parametrize("content, expected", [
    (None, "expected a file .*config.json"), ("{", "not readable JSON"), ("", "not readable JSON"),
    ("[1]", "JSON object, not a list"), ("{}", "names the model None"),
    ("[" * 100000, "not readable JSON"), (b"\xff\xfe{", "not readable JSON"),
    ('{"_class_name": "SD3Transformer2DModel"}', "SD3Transformer2DModel, supported are UNet2DCond"),
    ('{"_class_name": ["x"]}', "names the model x"), ('{"_class_name": {"a": 1}}', "supported are"),
    ('{"architectures": ["SiglipVisionModel"]}', "SiglipVisionModel, supp"),
    ('{"architectures": ["CLIPTextModel"]}', "config.json does not describe a CLIPTextModel"),
    ('{"_class_name": "UNet2DConditionModel", "block_out_channels": "wide"}', "describe a UNet2D"),
    ('{"_class_name": "AutoencoderKL", "block_out_channels": [3, null]}', "describe a Autoenc"),
])
def test_bad_configs(content, expected, tmp_path):
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(TinyldmError, match=expected):
        load_model(tmp_path)


def test_what_is_not_finite_is_not_written(pipeline_folder, tmp_path):
    model = load_model(pipeline_folder / "vae")
    model.parameters()[0].data.flat[0] = 1e5
    with pytest.raises(TinyldmError, match="not finite in float16"):
        save_model(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    save_model(model, tmp_path / "new", np.float32)
    (tmp_path / "file").write_text("")
    with pytest.raises(TinyldmError, match="cannot make the folder"):
        save_model(model, tmp_path / "file" / "new", np.float32)


# ---- a whole folder -------------------------------------------------------------------------

def test_pipeline_parts(pipeline_folder):
    parts = load_pipeline_parts(pipeline_folder, np.float64)
    assert_holds(parts.models["unet"], diffusers_unet().state_dict(), np.float64)
    assert_holds(parts.models["vae"], diffusers_vae().state_dict(), np.float64)
    assert_holds(parts.models["text_encoder"], dict(reference_names(transformers_clip())),
                 np.float64)
    assert parts.schedulers["scheduler"]["_class_name"] == "PNDMScheduler"
    assert parts.schedulers["scheduler"]["steps_offset"] == 1
    assert parts.folders == {"tokenizer": pipeline_folder / "tokenizer"}


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline", None])
def test_other_pipelines_are_named(name, folder_copy):
    (folder_copy / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(TinyldmError, match=f"names the pipeline {name}, supported are StableDif"):
        load_pipeline_parts(folder_copy)


def test_the_refiner_is_named(folder_copy):
    (folder_copy / "model_index.json").write_text(json.dumps({
        "_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True,
        "text_encoder": [None, None]}))
    with pytest.raises(TinyldmError, match="holds the refiner of Stable Diffusion XL, .* base mod"):
        load_pipeline_parts(folder_copy)


@pytest.mark.parametrize("part", [
    "model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler",
    "unet/config.json", "scheduler/scheduler_config.json",
    "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"])
def test_missing_parts_are_named(part, folder_copy):
    (folder_copy / part).rename(folder_copy.parent / "away")
    with pytest.raises(TinyldmError) as error:
        load_pipeline_parts(folder_copy)
    assert str((folder_copy / part).parent) in str(error.value)
    assert Path(part).name in str(error.value)


def test_a_config_that_an_editor_marked_as_utf_8(folder_copy):
    for file in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        text = (folder_copy / file).read_text()
        (folder_copy / file).write_text(text, encoding="utf-8-sig")
    assert load_pipeline_parts(folder_copy).index == json.loads(
        (folder_copy / "model_index.json").read_text(encoding="utf-8-sig"))


def test_swapped_parts_are_named(folder_copy):
    (folder_copy / "unet").rename(folder_copy / "x")
    (folder_copy / "vae").rename(folder_copy / "unet")
    (folder_copy / "x").rename(folder_copy / "vae")
    with pytest.raises(TinyldmError, match="must name a UNet2DConditionModel, not a AutoencoderKL"):
        load_pipeline_parts(folder_copy)


def test_resolve_local(tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path and resolve(str(tmp_path)) == tmp_path
    for name in ("model.safetensors", "model.ckpt", "model"):
        (tmp_path / name).write_bytes(b"")
        assert resolve(tmp_path / name) == tmp_path / name
    for name in ("nowhere.ckpt", "owner/model.safetensors"):
        with pytest.raises(TinyldmError, match=f"there is no file {name}"):
            resolve(name)
    for name in ("nowhere", "/no/such/folder", "a b/c", "../up", "owner/name/more"):
        with pytest.raises(TinyldmError, match="there is no folder"):
            resolve(name)
    package = tmp_path / "site" / "tinyldm"
    (package / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr(places, "__file__", str(package / "checkpoints" / "places.py"))
    with pytest.raises(TinyldmError, match="bundled model is missing"):
        resolve()
    for root in (package.parent, package):              # the repository, then an installed wheel
        (root / "weights" / "shapes").mkdir(parents=True)
        (root / "weights" / "shapes" / "model_index.json").write_text("{}")
        assert resolve() == root / "weights" / "shapes"
