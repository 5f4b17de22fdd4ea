"""Bad input to python -m tinyldm: one clear line, exit status 2, nothing written."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tests.support.command import ROOT, assert_refused, run
from tests.support.small_pipelines import change_json
from tinyldm.cli.draw import main
from tinyldm.diffusion.samplers import SAMPLERS

# ---- bad arguments --------------------------------------------------------------------------

IN = ROOT / "weights" / "shapes" / "samples.png"


@pytest.mark.parametrize("arguments, message", [
    (["--width", 18], "width must be a multiple of 4, not 18: the nearest is 16 or 20"),
    (["--height", 0], "height must be from 1 to 8192 pixels, not 0"),
    (["--steps", 0], "from 1 to 1000, not 0"), (["--steps", 1001], "from 1 to 1000, not 1001"),
    (["--steps", "many"], "invalid int value: 'many'; give a whole number, such as 4"),
    (["--guidance", "7,5"], "invalid float value: '7,5'; give a number, such as 0.5"),
    (["--image", "https://a.org/in.png"], "https://a.org/in.png is an address, not a file on this "
     "machine: name one; what is on the web must be downloaded first"),
    (["--mask", "http://a.org/in.png"], "http://a.org/in.png is an address, not a file"),
    (["--image", "file:///in.png"], "file:///in.png is an address, .* name the file by its path"),
    (["--image", "~nobody-has-this/in.png"], "cannot read ~nobody-has-this/in.png as a picture"),
    (["--output", "new/"], "there is no folder new/: make it, .* such as new/out.png"),
    (["--output", "out.palm"], "cannot write out.palm .*Palm.*: choose another format"),
    (["--guidance", "nan"], "guidance_scale must be a finite number"),
    (["--seed", 2**64], "a seed is a whole number"), (["--count", 0], "--count must be at least 1"),
    (["--guidance-rescale", 2], "guidance_rescale must be from 0 to 1, not 2"),
    (["--lora", "nowhere.safetensors:0.5"], "nowhere.safetensors is missing"),
    (["--lora", "a.pt:nan"], "weight must be a finite number, not nan"),
    (["--embedding", "nowhere.pt"], "nowhere.pt is missing"),
    (["--sampler", "dpm2"], f"unknown sampler 'dpm2'; known: {', '.join(SAMPLERS)}"),
    (["--noise", "mps"], "unknown noise 'mps'; known: torch-cpu, torch-cuda, numpy"),
    (["--noise", "numpy", "--seed", -1], r"a seed is a whole number from 0 to 2\*\*32 - 1, got -1"),
    (["--negative", "\udcff"], "valid Unicode"),
    (["--output", "nowhere/out.png"], "there is no folder nowhere"),
    (["--output", "."], "it is a folder"), (["--output", "x" * 300 + ".png"], "too long"),
    (["--output", "out.txt"], r"out.txt must end as a picture format .* \.jpg .*\.png"),
    (["--output", "out.jxl"], "such as .gif .jpg .pdf .png .tif or .webp$"),
    (["--output", "out"], "must end as a picture format"),
    (["--output", "out.h5"], "cannot write out.h5 .*HDF5"),
    (["--output", "out.blp", "--count", "2"], "cannot write out-0.blp: BLP does not take"),
    (["--device", "tpu"], "device must be cpu or cuda, not 'tpu'"),
    (["--dtype", "bfloat16"], "dtype must be float16, float32 or float64, not 'bfloat16'"),
    (["--colour", "red"], "unrecognized arguments: --colour red"),
    (["--weights", "nowhere"], "there is no folder nowhere"),
    (["--image", "nowhere.png"], r"cannot read nowhere.png as a picture \(.*No such file"),
    (["--image", __file__], r"cannot read .*test_refusals.py as a picture: give a PNG, a JPEG"),
    (["--mask", IN, "--image", __file__], "cannot read .*test_refusals.py as a picture"),
    (["--mask", __file__, "--image", IN], "cannot read .*test_refusals.py as a picture"),
    (["--mask", IN], "a mask or a strength needs an image: give one"),
    (["--strength", 0.5], "a mask or a strength needs an image: give one"),
    (["--image", IN, "--strength", 1.5], "strength must be from 0 to 1, not 1.5"),
    (["--image", IN, "--strength", 0.01, "--steps", 9], "0.01 leaves none of 9 steps: take at "),
    (["--to-image", IN], "--to-image needs an --image to lead from: give both"),
    (["--to-seed", 5, "--count", 1], "--count must be at least 2, not 1"),
    (["--to-seed", 5, "--variation", 0.5], "--variation and --to-... exclude each other"),
    (["--variation", 1.5], "--variation must be from 0 to 1, not 1.5"),
    (["--variation", "nan"], "--variation must be from 0 to 1, not nan"),
])
def test_bad_arguments(arguments, message, weights, out):
    process = run("a cat", "--weights", weights, *arguments, folder=out)
    assert_refused(process, message, out)


def test_a_folder_in_the_place_of_a_later_picture(weights, out, capsys):
    (out / "out-1.png").mkdir()
    arguments = ["a cat", "--weights", str(weights), "--count", "2", "--output"]
    assert main([*arguments, str(out / "out.png")]) == 2
    assert "out-1.png: it is a folder" in capsys.readouterr().err
    assert main([*arguments, str(out)]) == 2
    assert "out: it is a folder" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["out-1.png"]


@pytest.mark.parametrize("count, name", [(1, "out.gif"), (2, "out-0.gif")])
def test_a_film_that_would_replace_the_picture(weights, out, count, name, capsys):
    assert main(["a cat", "--weights", str(weights), "--count", str(count), "--output",
                 str(out / "out.gif"), "--animate", str(out / "out.gif")]) == 2
    assert f"out/{name}: name two files" in capsys.readouterr().err
    assert not list(out.iterdir())


@pytest.mark.parametrize("arguments, message", [
    (["a (dog:1000)"], "the prompt gives 'dog' the weight 1000"),
    (["--count", 2, "--seed", 2 ** 64 - 1], "a seed is a whole number from"),
    (["--to-prompt", "a (dog:1000)"], "the prompt gives 'dog' the weight 1000"),
])
def test_a_mistake_in_a_later_picture_is_found_before_the_first(
        arguments, message, weights, out, capsys):
    arguments = ["a cat", *map(str, arguments), "--weights", str(weights)]
    assert main([*arguments, "--output", str(out / "out.png")]) == 2
    assert message in capsys.readouterr().err and not list(out.iterdir())


def test_no_prompt(out):
    assert_refused(run(folder=out), "required: prompt", out)


def test_no_gpu(weights, out):
    try:
        import cupy
        if cupy.cuda.runtime.getDeviceCount():
            pytest.skip("this machine has a GPU")
    except Exception:                                   # no CuPy, or no driver: run the test
        pass
    process = run("a cat", "--weights", weights, "--device", "cuda", folder=out)
    assert_refused(process, "device cuda needs .*--device cpu", out)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write in")
def test_a_folder_that_cannot_be_written_in(weights, out):
    process = run("a cat", "--weights", weights, "--output", "/proc/out.png", folder=out)
    assert_refused(process, "cannot write /proc/out.png", out)
    assert "loading" not in process.stderr              # found at once


# ---- bad weights ----------------------------------------------------------------------------

UNET = "unet/diffusion_pytorch_model.safetensors"


def truncate(folder):
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-100])


def corrupt(folder):
    (folder / UNET).write_bytes(b"\xff" * 1000)


def change(**changes):
    """Replace some tensors of the weights; None removes one."""
    def spoil(folder):
        tensors = safetensors.numpy.load_file(folder / UNET)
        tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        safetensors.numpy.save_file(kept, folder / UNET)
    return spoil


def remove(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize("spoil, message", [
    (remove(UNET), "expected weights in .*unet .* is the folder complete"),
    (remove("model_index.json"), "expected a file .*model_index.json"),
    (remove("vae/config.json"), "expected a file .*vae/config.json"),
    (remove("scheduler/scheduler_config.json"), "scheduler_config.json"),
    (lambda folder: shutil.rmtree(folder / "tokenizer"), "expected a folder .*tokenizer"),
    (truncate, f"{UNET} is missing, truncated or corrupt"),
    (corrupt, f"{UNET} is missing, truncated or corrupt"),
    (change(conv_in__bias=np.zeros(9, np.float32)),
     r"wrong shape: 1: conv_in.bias \(expected \(8,\), found \(9,\)\)"),
    (change(conv_in__bias=None), "missing: 1: conv_in.bias\n"),
    (change(extra__bias=np.zeros(1, np.float32)), "unexpected: 1: extra.bias\n"),
    (change(conv_in__bias=np.full(8, np.nan, np.float32)), "conv_in.bias holds NaN"),
    (lambda folder: (folder / "unet" / "config.json").write_text('{"in_channels": 4,'),
     "unet/config.json is not readable JSON"),
    (lambda folder: change_json(folder / "unet" / "config.json", _class_name="UNet3D"),
     "names the model UNet3D, supported are"),
    (lambda folder: change_json(folder / "unet" / "config.json", act_fn="mish"),
     'act_fn = "mish" is not'),
    (lambda folder: change_json(folder / "scheduler" / "scheduler_config.json",
                                _class_name="FlowMatchEulerDiscreteScheduler"),
     "scheduler class 'FlowMatchEulerDiscreteScheduler' is not supported"),
    (lambda folder: change_json(folder / "scheduler" / "scheduler_config.json",
                                beta_schedule="sideways"),
     'beta_schedule must be .*, not "sideways"'),
    (lambda folder: change_json(folder / "model_index.json", _class_name="FluxPipeline"),
     "names the pipeline FluxPipeline"),
])
def test_bad_weights(spoil, message, bad_weights, out):
    spoil(bad_weights)
    process = run("a cat", "--weights", bad_weights, "--steps", 1, folder=out)
    assert_refused(process, message, out)


def test_an_index_that_is_no_index(bad_weights, out):
    (bad_weights / "model_index.json").write_text(json.dumps([1]))
    process = run("a cat", "--weights", bad_weights, folder=out)
    assert_refused(process, "must hold a JSON object", out)
