"""A saved pipeline draws the same in diffusers and here; a save that fails leaves nothing."""
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import tinyldm
from tests.support.drawing import Reference, assert_same_drawing, assert_same_pictures, ours
from tests.support.models import spoil
from tests.support.small_pipelines import (
    euler_ancestral,
    inpainting,
    lcm,
    sd1,
    sd2,
    sdxl,
    sdxl_turbo,
)
from tinyldm.errors import TinyldmError
from tinyldm.pipelines.loading import load

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def dtypes(folder):
    """The dtypes of all weights in a pipeline's folder."""
    return {str(tensor.dtype) for file in folder.glob("*/*.safetensors")
            for tensor in safetensors.numpy.load_file(file).values()}


def class_of(folder):
    return json.loads((folder / "model_index.json").read_text())["_class_name"]


@pytest.mark.parametrize("make", [sd1, sd2, euler_ancestral, sdxl, sdxl_turbo, lcm],
                         ids=lambda make: make.__name__)
def test_what_is_saved_draws_the_same(make, tmp_path):
    source, saved = make(tmp_path / "source"), tmp_path / "saved"
    pipe = load(source)
    pipe.force_zeros_for_empty_prompt = make is sdxl_turbo
    tinyldm.save(pipe, saved)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "saved"}
    assert class_of(saved) == class_of(source)
    assert dtypes(saved) == {"float16" if make is euler_ancestral else "float32"}
    again = load(saved)
    assert again.num_inference_steps == pipe.num_inference_steps
    drawing = ours(again, seed=7)
    assert_same_drawing(drawing, Reference(saved)([7], guidance_scale=7.5))
    assert np.array_equal(drawing[1], ours(pipe, seed=7)[1])


def test_a_saved_model_for_inpainting(tmp_path):
    source, saved = inpainting(tmp_path / "source"), tmp_path / "saved"
    tinyldm.save(load(source), saved)
    options = {"image": Image.new("RGB", (32, 32), "red"),
               "mask_image": Image.linear_gradient("L").resize((32, 32)), "strength": 1.0}
    assert class_of(saved) == class_of(source) == "StableDiffusionInpaintPipeline"
    theirs = Reference(saved)(**options)[1]
    assert_same_pictures(theirs, Reference(source)(**options)[1])
    options["mask"] = options.pop("mask_image")
    assert_same_pictures(ours(load(saved), **options)[1], theirs)


def test_the_dtype_of_saved_weights(tmp_path):
    folder = sdxl(tmp_path / "source")
    pipe = load(folder)
    for dtype in ("float16", "float32"):
        tinyldm.save(pipe, tmp_path / dtype, dtype)
        assert dtypes(tmp_path / dtype) == {dtype}
    tinyldm.save(load(tmp_path / "float16", dtype="float64", low_memory=True), tmp_path / "again")
    for file in (tmp_path / "float16").glob("*/*.safetensors"):
        again = tmp_path / "again" / file.parent.name / file.name
        assert again.read_bytes() == file.read_bytes()
    with pytest.raises(TinyldmError, match="dtype must be float16, float32 or float64, not 'int8'"):
        tinyldm.save(pipe, tmp_path / "new", "int8")


def test_a_save_that_fails_leaves_nothing(tmp_path):
    pipe, before = load(sd1(tmp_path / "source")), {"source", "empty", "full", "file"}
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    for file in (tmp_path / "full" / "x", tmp_path / "file"):
        file.write_text("")
    for name, message in [("full", "full exists already: name a new folder"),
                          ("file", "file exists already"), ("file/new", "cannot write .*file/new")]:
        with pytest.raises(TinyldmError, match=message):
            tinyldm.save(pipe, tmp_path / name)
    spoil(pipe.vae, "decoder.conv_out.bias")
    with pytest.raises(TinyldmError, match="decoder.conv_out.bias is not finite"):
        tinyldm.save(pipe, tmp_path / "empty")
    (tmp_path / "source" / "tokenizer" / "vocab.json").unlink()
    (tmp_path / "source" / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    pipe.vae.decoder.conv_out.bias.data[:] = 0
    with pytest.raises(TinyldmError, match="the tokenizer's files in .* are gone"):
        tinyldm.save(pipe, tmp_path / "empty")
    folder, pipe.tokenizer.folder = pipe.tokenizer.folder, None
    with pytest.raises(TinyldmError, match="not read from a folder"):
        tinyldm.save(pipe, tmp_path / "empty")
    pipe.tokenizer.folder = folder
    assert {path.name for path in tmp_path.iterdir()} == before
    assert not any((tmp_path / "empty").iterdir())
    shutil.copytree(load(sd1(tmp_path / "other")).tokenizer.folder, tmp_path / "source/tokenizer",
                    dirs_exist_ok=True)
    tinyldm.save(pipe, tmp_path / "empty")
    load(tmp_path / "empty")
