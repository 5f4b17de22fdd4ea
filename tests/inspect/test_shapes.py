"""python -m tinyldm.inspect FOLDER --shapes: against real calls, and the trace of the tutorials."""
import json
import re
import time

import numpy as np
import pytest

from tests.support import models, sd15
from tests.support.models import CIFAR10, TRACE
from tests.support.small_unclip import unclip
from tinyldm.inspect import shapes
from tinyldm.inspect.__main__ import main
from tinyldm.layers import forward_hooks, named_modules
from tinyldm.models.inception import InceptionV3

# From tutorials: the channels and the side of each residual block and resampling, one by one.
DOWN = [[(128, 128)] * 2 + [(128, 64)], [(128, 64)] * 2 + [(128, 32)],
        [(256, 32)] * 2 + [(256, 16)], [(256, 16)] * 2 + [(256, 8)],
        [(512, 8)] * 2 + [(512, 4)], [(512, 4)] * 2]
UP = [[(512, 4)] * 3 + [(512, 8)], [(512, 8)] * 3 + [(512, 16)], [(256, 16)] * 3 + [(256, 32)],
      [(256, 32)] * 3 + [(256, 64)], [(128, 64)] * 3 + [(128, 128)], [(128, 128)] * 3]


def rows_of(lines):
    """{name: the last shape printed, as in PyTorch} of the lines on one call."""
    return {row[0]: line[line.rindex("("):] for line in lines if "(" in line
            and (row := line.split())}


def write(folder, config, name="UNet2DModel"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": name}))
    return folder


def test_the_trace_of_the_tutorials(tmp_path, capsys):
    began = time.monotonic()
    assert main([str(write(tmp_path, TRACE)), "--shapes"]) == 0
    assert time.monotonic() - began < 30                # nothing is computed: a second or so
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}: UNet2DModel, 108,414,979 parameters"
    rows = rows_of(lines[1:])
    assert rows["latents"] == rows["conv_out"] == "(1, 3, 128, 128)"
    assert rows["conv_in"] == "(1, 128, 128, 128)" and rows["time_embedding"] == "(1, 512)"
    for way, blocks in ("down", DOWN), ("up", UP):
        for i, block in enumerate(blocks):
            names = [f"resnets.{n}" for n in range(3 if way == "up" else 2)]
            names += [f"{way}samplers.0"] * (len(block) > len(names))
            for name, (channels, side) in zip(names, block, strict=True):
                found = rows[f"{way}_blocks.{i}.{name}"]
                assert found == f"(1, {channels}, {side}, {side})", (way, i, name)
    assert rows["mid_block.attentions.0"] == "(1, 512, 4, 4)"


def test_the_trace_of_a_picture_of_32_pixels(tmp_path, capsys):
    assert main([str(write(tmp_path, TRACE)), "--shapes", "--size", "32"]) == 0
    rows = rows_of(capsys.readouterr().out.splitlines()[1:])
    assert rows["latents"] == "(1, 3, 32, 32)" and rows["mid_block"] == "(1, 512, 1, 1)"
    assert rows["down_blocks.0"] == "(1, 128, 16, 16)"


@pytest.mark.parametrize("name", models.cases())
def test_the_shapes_are_those_of_a_real_call(name):
    """Every model of the tests, at the sizes of its own inputs."""
    module, arrays = models.make(name), models.inputs(name)
    expected, seen = {}, {}

    def recorded(table, layer_name):
        def hook(forward, *inputs, **options):
            y = forward(*inputs, **options)
            table[layer_name] = shapes._shown(y)
            return y
        return hook
    layers = dict(named_modules(module))
    with forward_hooks({layer: recorded(expected, key) for key, layer in layers.items()}):
        models.outputs(module, arrays)
    for parameter in module.parameters():
        parameter.data = np.broadcast_to(np.float32(0), parameter.shape)
    seen = dict(shapes.trace(module, lambda: models.outputs(module, arrays)))
    assert len(seen) > 5
    for key in seen.keys() - {"output"}:
        assert seen[key] == expected[key], key


@pytest.mark.parametrize("name", models.cases())
def test_every_model_of_the_tests_has_inputs(name):
    model, config = models.cases()[name]
    any_size = "UNet" in name or "Autoencoder" in name
    lines = shapes.of_model("it", model(config), 16 if any_size else None)
    assert lines[0].startswith(f"it: {model.__name__}, ") and len(lines) > 8


def test_kernels_that_are_not_square():
    lines = shapes.of_model("it", InceptionV3(), 299)
    assert rows_of(lines)["Mixed_6e"] == "(1, 768, 17, 17)"


def test_a_pipeline_and_its_parts(weights, capsys):
    """Of a folder only config.json is read; a part that cannot be built gets a line."""
    assert main([str(weights), "--shapes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for part, model in ("text_encoder", "CLIPTextModel"), ("vae", "AutoencoderKL"):
        assert any(line.startswith(f"{weights / part}: {model}, ") for line in lines)


def test_a_part_that_is_unknown(tmp_path, capsys):
    write(tmp_path / "unet", CIFAR10)
    write(tmp_path / "other", {}, "UNet3D")
    (tmp_path / "model_index.json").write_text("{}")
    assert main([str(tmp_path), "--shapes"]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'other'}: not built: " in out and "35,746,307 parameters" in out


def test_a_file_of_one_component(weights, capsys):
    file, = (weights / "vae").glob("*.safetensors")
    assert main([str(file), "--shapes", "--size", "16"]) == 0
    assert "decoder.conv_out" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["--shapes", "--size", "30"], "cannot be called .*multiples of 32.*choose another --size"),
    (["--shapes", "--size", "0"], "--size must be from 1 to 8192"),
    (["--size", "32"], "--size must be from 1 to 8192, and is for --shapes"),
    (["--shapes", "--size", "x"], "--size"),
])
def test_bad_sizes_end_in_one_line(arguments, message, tmp_path, capsys):
    assert main([str(write(tmp_path, TRACE)), *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert re.search(message, error), error


def test_the_real_stable_diffusion_takes_no_time(tmp_path):
    began = time.monotonic()
    lines = shapes.describe_shapes(write(tmp_path, sd15.UNET, "UNet2DConditionModel"))
    assert time.monotonic() - began < 60
    assert "859,520,964 parameters" in lines[0]


def test_a_pipeline_with_a_prior_and_a_normalizer(tmp_path, capsys):
    assert main([str(unclip(tmp_path / "pipe")), "--shapes"]) == 0
    printed = capsys.readouterr().out
    for model in ("PriorTransformer", "StableUnCLIPImageNormalizer, 40 parameters"):
        assert model in printed
    assert re.search(r"latents \(input\) +\(1, 20\)", printed)
