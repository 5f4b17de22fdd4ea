"""python -m tinyldm.inspect: folders, files, pictures, and anything else."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image, PngImagePlugin

from tests.support.extra import torch
from tests.support.keys import original_rows, published_shapes
from tests.support.small_pipelines import change_json
from tinyldm.checkpoints import write_safetensors
from tinyldm.checkpoints.components import MODELS
from tinyldm.checkpoints.single_file.kinds import family, layout_of
from tinyldm.cli import draw
from tinyldm.inspect.__main__ import main

ROOT = Path(__file__).parents[2]
UNET = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def said(capsys):
    """What the command prints for a file, with one space between columns."""
    def run(path):
        assert main([str(path)]) == 0
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    return run


def refused(path, capsys):
    """The line about something that cannot be inspected."""
    assert main([str(path)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1, error
    return error


class Shape(NamedTuple):
    """Stands in for a tensor in a file."""

    shape: tuple


# ---- weights --------------------------------------------------------------------------------

def test_a_pipelines_folder(weights, said):
    lines = said(weights)
    assert lines[:3] == [f"{weights}: StableDiffusionPipeline", "layout: diffusers",
                         "scheduler: DDIMScheduler, the model predicts epsilon"]
    for part, model, layout, kind in [
            ("text_encoder", "CLIPTextModel", "transformers", "text encoder"),
            ("unet", "UNet2DConditionModel", "diffusers", "UNet, with a context of width 8"),
            ("vae", "AutoencoderKL", "diffusers", "VAE")]:
        start = lines.index(f"{weights / part}: {model}")
        stored = safetensors.numpy.load_file(next((weights / part).glob("*.safetensors")))
        numbers = sum(tensor.size for tensor in stored.values())
        assert lines[start + 1:start + 5] == [
            f"layout: {layout}", f"kind: {kind}", f"precision: {len(stored)} x F32",
            "module tensors parameters"]
        total = lines.index(f"total {len(stored):,} {numbers:,}", start)
        assert lines[total + 1:total + 4] == ["missing: none", "unexpected: none",
                                              "wrong shape: none"]
        rows = [row.split() for row in lines[start + 5:total]]
        assert sum(int(row[1].replace(",", "")) for row in rows) == len(stored)
        assert sum(int(row[2].replace(",", "")) for row in rows) == numbers
    assert "conv_in 2 296" in lines and any(row.startswith("up_blocks.1 ") for row in lines)


def test_what_does_not_fit_the_config(weights, tmp_path, said):
    folder = shutil.copytree(weights / "unet", tmp_path / "unet")
    stored = safetensors.numpy.load_file(folder / UNET)
    del stored["conv_in.bias"]
    stored["conv_out.bias"] = np.zeros(9, np.float32)
    stored["extra.positions"] = np.arange(3)
    stored["conv_norm_out.weight"] = stored["conv_norm_out.weight"].astype(np.float16)
    safetensors.numpy.save_file(stored, folder / UNET)
    lines = said(folder)
    assert lines[-3:] == ["missing: 1: conv_in.bias", "unexpected: 1: extra.positions",
                          "wrong shape: 1: conv_out.bias (expected (4,), found (9,))"]
    assert set(lines[3].removeprefix("precision: ").split(", ")) == {
        f"{len(stored) - 2} x F32", "1 x F16", "1 x I64"}
    assert said(folder / UNET) == [str(folder / UNET), *lines[1:-3]]    # a file has no config


def test_a_pipeline_in_pieces(weights, tmp_path, said):
    """A part that is missing or unknown gets a line, and the rest is described."""
    folder = shutil.copytree(weights, tmp_path / "pieces")
    shutil.rmtree(folder / "text_encoder")
    (folder / "vae" / UNET).rename(folder / "vae" / "weights.other")
    change_json(folder / "unet" / "config.json", _class_name="UNet3D")
    lines = said(folder)
    assert "missing: the folder text_encoder" in lines
    assert any(line.startswith("not read: expected weights in") for line in lines)
    assert lines.index(f"{folder / 'unet'}: UNet3D") < lines.index(
        f"not compared with a model: {folder / 'unet' / 'config.json'} names the model UNet3D, "
        f"supported are {', '.join(model.__name__ for model in MODELS)}")


@pytest.mark.parametrize("name, layout, kind", [
    ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "kohya", "LoRA"),
    ("unet.down_blocks.0.attentions.0.to_k.lora_A.weight", "peft", "LoRA"),
    ("base_model.model.down_blocks.0.to_k.lora_A.default.weight", "peft", "LoRA"),
    ("lora_unet_mid_block_resnets_0_conv1.hada_w1_a", "LyCORIS, LoHa", "LoRA"),
    ("lora_unet_mid_block_resnets_0_conv1.lokr_w2", "LyCORIS, LoKr", "LoRA"),
    ("lora_unet_mid_block_resnets_0_conv1.dora_scale", "LyCORIS", "DoRA (not supported)"),
    ("lora_unet_mid_block_resnets_0_conv1.oft_blocks", "LyCORIS or peft",
     "OFT or BOFT (not supported)"),
    ("down_blocks.0.attn1.processor.to_q_lora.down.weight", "diffusers, oldest", "LoRA"),
    ("clip_g", "web interface", "textual inversion"),
    ("string_to_param.*", "web interface", "textual inversion"),
    ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "original",
     "Stable Diffusion 3 (not supported)"),
    ("double_blocks.0.img_attn.qkv.weight", "original", "Flux (not supported)"),
    ("first_stage_model.decoder.conv_in.weight", "original", "VAE"),
    ("decoder.mid.block_1.conv1.weight", "unknown", "unknown, with keys such as decoder.mid.bl"),
    ("encoder.down.0.block.0.conv1.weight", "original", "VAE"),
    ("controlnet_cond_embedding.conv_in.weight", "diffusers", "ControlNet (not supported)"),
    ("vision_model.encoder.layers.0.mlp.fc1.weight", "transformers", "image encoder"),
    ("emb_params", "web interface", "textual inversion")])
def test_kinds_of_files(name, layout, kind, tmp_path, said):
    write_safetensors({name: np.zeros((2, 3), np.float16)}, tmp_path / "file.safetensors")
    lines = said(tmp_path / "file.safetensors")
    assert lines[1] == f"layout: {layout}" and lines[2].startswith(f"kind: {kind}")
    assert lines[3] == "precision: 1 x F16" and lines[-1] == "total 1 6"


def original(width, channels):
    return {"model.diffusion_model.input_blocks.0.0.weight": Shape((320, channels, 3, 3)),
            "model.diffusion_model.x.attn2.to_k.weight": Shape((320, width)),
            "cond_stage_model.transformer.y": Shape((3,))}


@pytest.mark.parametrize("width, channels, expected", [
    (768, 4, "Stable Diffusion 1"), (768, 9, "Stable Diffusion 1 for inpainting"),
    (768, 8, "Stable Diffusion 1 for editing"), (1024, 4, "Stable Diffusion 2"),
    (2048, 4, "Stable Diffusion XL"), (1280, 4, "Stable Diffusion XL's refiner")])
def test_families(width, channels, expected):
    tensors = original(width, channels)
    assert layout_of(tensors) == ("original", "single file")
    assert family(tensors) == expected


@pytest.mark.parametrize("model, expected", [("SD 1.5", "Stable Diffusion 1"),
                                             ("SD 2.1", "Stable Diffusion 2")])
def test_published_folders(model, expected):
    shapes = {part: published_shapes(model, part) for part in ("unet", "vae", "text_encoder")}
    assert {part: layout_of(keys) for part, keys in shapes.items()} == {
        "unet": ("diffusers", "UNet"), "vae": ("diffusers", "VAE"),
        "text_encoder": ("transformers", "text encoder")}
    assert family({name: Shape(shape) for name, shape in shapes["unet"].items()}) == expected


@pytest.mark.parametrize("table, expected", [
    ("sd1", "Stable Diffusion 1"), ("sd2", "Stable Diffusion 2"), ("sdxl", "Stable Diffusion XL"),
    ("sdxl_refiner", "Stable Diffusion XL's refiner")])
def test_published_single_files(table, expected):
    tensors = {name: Shape(shape) for _, name, shape, *_ in original_rows(table)}
    assert len(tensors) > 1000 and layout_of(tensors) == ("original", "single file")
    assert family(tensors) == expected


def test_a_header_as_long_as_a_pickles_first_bytes(tmp_path, said):
    """A safetensors file begins with any length, such as 0x280, then JSON; a pickle does not."""
    for pad in range(2000):
        header = json.dumps({"__metadata__": {"pad": "x" * pad}}).encode()
        if len(header) == 0x280:
            break
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    lines = said(tmp_path / "x.safetensors")
    assert lines[2:4] == ["kind: unknown, with keys such as none", "precision: no tensors"]


def test_names_of_tensors_do_not_steer_the_terminal(tmp_path, said):
    names = ["a\x1b[2J.b", "c\n  total 9 9", "d\u202e.e", "total", "x" * 1000]
    write_safetensors({name: np.ones(2, np.float32) for name in names}, tmp_path / "a.safetensors")
    lines = said(tmp_path / "a.safetensors")
    assert max(map(len, lines)) < 1000 and all(map(str.isprintable, lines))
    assert {"a?[2J 1 2", "c total 9 9 1 2", "d? 1 2", "total 1 2"} < set(lines)
    assert lines[-1] == "total 5 10"


def test_a_table_of_many_modules_is_cut(tmp_path, said):
    tensors = {f"{i:05}": np.ones(1, np.float32) for i in range(5000)}
    write_safetensors(tensors, tmp_path / "a.safetensors")
    lines = said(tmp_path / "a.safetensors")
    assert len(lines) < 110 and lines[-2:] == ["and 4,900 more modules", "total 5,000 5,000"]


# ---- pictures -------------------------------------------------------------------------------

def test_a_picture(weights, tmp_path, said):
    path = tmp_path / "out.png"
    assert draw.main(["a red cat", "--weights", str(weights), "--steps", "1", "--seed", "9",
                      "--negative", "löw", "--noise", "numpy", "--output", str(path)]) == 0
    assert said(path)[-4:] == [
        f"{path}: a picture of 16x16 pixels, mode RGB, which records", "a red cat",
        "Negative prompt: löw",
        "Steps: 1, Sampler: ddim, CFG scale: 7.5, Seed: 9, Size: 16x16, "
        f"Model: {weights.name}, Noise: numpy"]


def write_png(path, **texts):
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        chunks.add_text(key, text)
    Image.new("RGB", (4, 4)).save(path, pnginfo=chunks)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_picture_that_records_nothing(format, tmp_path, said):
    Image.new("L", (4, 6)).convert("RGB").save(tmp_path / "a", format)
    with Image.open(tmp_path / "a") as image:
        mode = image.mode
    assert said(tmp_path / "a") == [f"{tmp_path / 'a'}: a picture of 4x6 pixels, mode {mode}, "
                                    "which says nothing about how it was made"]


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF"])
def test_a_picture_of_another_format(format, tmp_path, said):
    text, exif = "a cat\nSteps: 20, Sampler: Euler a, Seed: 5", Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    more = {"comment": text.encode()} if format == "GIF" else {"exif": exif}
    Image.new("RGB", (4, 4)).save(tmp_path / "a", format, **more)
    assert said(tmp_path / "a")[1:] == text.splitlines()


def test_a_picture_of_comfyui(tmp_path, said):
    nodes = {"1": {"class_type": "KSampler", "inputs": {
        "seed": 7, "steps": 20, "positive": ["2", 0], "negative": ["3", 0],
        "latent_image": ["4", 0]}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "a dog"}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 32}},
        "5": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd.ckpt"}}}
    write_png(tmp_path / "a.png", prompt=json.dumps(nodes), workflow="{}")
    assert said(tmp_path / "a.png")[1:] == [
        "a cat", "Negative prompt: a dog", "Steps: 20, Seed: 7, Size: 64x32, Model: sd.ckpt"]
    write_png(tmp_path / "b.png", prompt=json.dumps({"1": {"class_type": "Other" * 999}}))
    line, = said(tmp_path / "b.png")[1:]
    assert line.startswith('{"1": {"class_type"') and len(line) < 600


def test_a_picture_does_not_steer_the_terminal(tmp_path, said):
    write_png(tmp_path / "a.png", parameters="a \x1b[2Jcat")
    assert said(tmp_path / "a.png")[-1] == "a ?[2Jcat"


def test_a_damaged_picture(tmp_path, capsys):
    """Cut anywhere: one line and status 2, or the record if only the end is missing."""
    write_png(tmp_path / "whole.png", parameters="a cat " * 9)
    data = (tmp_path / "whole.png").read_bytes()
    for size in range(9, len(data)):
        (tmp_path / "cut.png").write_bytes(data[:size])
        status = main([str(tmp_path / "cut.png")])
        out, error = capsys.readouterr()
        assert status == 0 and "a cat a cat" in out or (
            status == 2 and out == "" and error.startswith("error: ") and error.count("\n") == 1)


# ---- what cannot be inspected ---------------------------------------------------------------

@pytest.mark.parametrize("content, message", [
    (None, "cannot read .*No such file"), (b"", "is empty, a truncated or corrupt download"),
    (b"\xff" * 99, "missing, truncated or corrupt"), (b"PK\x03\x04" + b"\0" * 99, "corrupt"),
    (b"\x80\x02}q\0X" + b"\0" * 99, "bare pickle"), (b"\x80\x04\x95", "bare pickle"),
    (b"\x89PNG\r\n\x1a\n", "is a damaged PNG"), (b"GIF89a" + b"\0" * 99, "is a picture")])
def test_other_files(content, message, tmp_path, capsys):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    assert re.search(message, refused(path, capsys))


def test_a_name_that_is_too_long(capsys):
    assert "too long" in refused("x" * 5000, capsys)


def test_a_folder_of_neither(tmp_path, capsys):
    assert "neither a model_index.json" in refused(tmp_path, capsys)


def test_a_file_of_torch(tmp_path, said):
    """A pickle is described, too; it is read as data."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"conv_in.weight": torch.ones(8, 4, 3, 3).half()}, path)
    assert "precision: 1 x F16" in " ".join(said(path))


def test_the_command():
    process = subprocess.run(
        [sys.executable, "-m", "tinyldm.inspect", "weights/shapes"], cwd=ROOT,
        capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert process.stderr == "" and "weights/shapes/unet: UNet2DConditionModel" in process.stdout
    process = subprocess.run([sys.executable, "-m", "tinyldm.inspect"], cwd=ROOT,
                             capture_output=True, text=True, timeout=300)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("error: the following arguments are required: file")
