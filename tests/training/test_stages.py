"""The commands `lora` and `textual-inversion`: what they write, go on with, and refuse."""
import re

import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file

from tests.support import small_pipelines
from tests.support.pictures_to_train import write_pictures
from tests.support.tolerance import within
from tinyldm.layers import Tape
from tinyldm.models.lora import DIFFUSERS, add_lora
from tinyldm.pipelines.loading import load
from tinyldm.training import memory
from tinyldm.training.__main__ import main

WORD = ["--token", "<s>", "--initializer", "cat"]
STAGES = {"lora": [], "textual-inversion": WORD}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return small_pipelines.smallest(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture
def train(weights, pictures, tmp_path, capsys):
    """A function that runs a command -> status, standard output, standard error."""
    def run(stage, *more, output="dog.safetensors", steps=2):
        status = main([stage, "--weights", str(weights), "--data", str(pictures), "--steps",
                       str(steps), "--batch", "3", "--learning-rate", "1e-2", "--output",
                       str(tmp_path / output), *STAGES[stage], *map(str, more)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err
    return run


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_written_and_said(stage, train, tmp_path):
    status, out, err = train(stage, "--layout", "kohya", "--save-as", "float16")
    assert status == 0, err
    file = tmp_path / "dog.safetensors"
    assert "memory: about" in out and f"checked: with {file} read back" in out
    assert {array.dtype for array in load_file(file).values()} == {np.dtype(np.float16)}
    option = "--lora" if stage == "lora" else "--embedding"
    assert re.search(f"draw with it: python -m tinyldm '.*' {option} {file} --weights", out)
    with safetensors.safe_open(file, "numpy") as opened:
        header = opened.metadata()
    assert header["ss_steps"] == "2" and header["ss_sd_model_name"] == "tiny"
    assert str(tmp_path.parent) not in str(header)
    assert "numbers became 0" in out


@pytest.mark.parametrize("stage, more", [
    ("lora", []), ("lora", ["--train-text-encoder", "--accumulate", "2", "--flip"]),
    ("lora", ["--ema", "0.9"]), ("textual-inversion", ["--vectors", "2"])])
def test_two_and_two_steps_are_four(stage, more, train, tmp_path):
    """Bitwise."""
    assert train(stage, *more, output="whole.safetensors", steps=4)[0] == 0
    assert train(stage, *more, steps=2)[0] == 0
    halfway = load_file(tmp_path / "dog.safetensors")
    status, out, err = train(stage, *more, "--resume", steps=4)
    assert status == 0, err
    whole, parts = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "dog"))
    assert whole.keys() == parts.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name])
    assert any((array != halfway[name]).any() for name, array in whole.items())


def test_resuming_with_other_options(train):
    assert train("lora")[0] == 0
    status, _, err = train("lora", "--resume", "--rank", 2, "--train-text-encoder", steps=4)
    assert status == 2 and "--rank is 2, it was 4" in err and "--train-text-encoder" in err
    assert "--resume changed" in err


def test_several_folders_and_a_folder_as_output(train, tmp_path):
    status, out, err = train("lora", "--prior-data", tmp_path / "class", "--prior-prompt",
                             "a cat", "--prior-count", 2, "--trigger", "low", output="mine")
    assert status == 0, err
    assert (tmp_path / "mine" / "mine.safetensors").exists()
    assert (tmp_path / "mine" / "state.npz").exists()
    assert len(list((tmp_path / "class").glob("*.jpg"))) == 2
    assert "python -m tinyldm 'low " in out


REFUSED = {
    "rank 0": ("lora", ["--rank", 0], "--rank: expected a whole number from 1"),
    "a rank above a layer": ("lora", ["--rank", 9], "rank of a LoRA must be .* 1 to 8 for "),
    "no state": ("lora", ["--resume"], "no training to go on with"),
    "no folder": ("lora", ["--data", "nowhere"], "nowhere"),
    "a size of no whole latents": ("lora", ["--resolution", 18], "multiple of 4 .*not 18"),
    "half of the prior": ("lora", ["--prior-prompt", "a cat"], "go together"),
    "no number": ("lora", ["--learning-rate", "fast"], "--learning-rate: expected a number"),
    "an initializer of several tokens": (
        "textual-inversion", ["--initializer", "cathedral"], "one token, but 'cathedral' has"),
    "a word that is there": ("textual-inversion", ["--token", "cat</w>"], "vocabulary already"),
    "a caption without the word": (
        "textual-inversion", ["--caption", "a cat"], "must hold the new word, <s>"),
    "an option of the other": ("textual-inversion", ["--rank", 4], "unrecognized arguments"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_line_for_bad_input(case, train, tmp_path):
    stage, more, said = REFUSED[case]
    status, _, err = train(stage, *more)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and re.search(said, lines[0]), err
    assert not (tmp_path / "dog.safetensors").exists()


@pytest.mark.parametrize("name, said", [
    ("dit", "is DiT of .*, with no UNet that reads prompts"),
    ("inpainting", "a UNet for inpainting"),
    ("lcm", "imitates guidance")])
def test_weights_of_another_system(name, said, train, tmp_path):
    folder = getattr(small_pipelines, name)(tmp_path / name)
    status, _, err = train("lora", "--weights", folder)
    assert status == 2 and re.search(said, err) and "Stable Diffusion 1, 2 and XL" in err


@pytest.mark.parametrize("stage", STAGES)
def test_output_that_exists_stays(stage, train, tmp_path):
    file = tmp_path / "dog.safetensors"
    file.write_bytes(b"mine")
    status, _, err = train(stage)
    assert status == 2 and "exists already" in err and file.read_bytes() == b"mine"
    file.unlink()
    assert train(stage)[0] == 0
    assert train(stage)[0] == 2


def test_an_empty_folder_of_pictures(train, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _, err = train("lora", "--data", tmp_path / "empty")
    assert status == 2 and "holds no pictures" in err


@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_estimate_of_memory(checkpoints, places):
    unet = load(places[0]("toy")).unet
    add_lora(unet, DIFFUSERS, 4, 4, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    context = rng.standard_normal((1, 77, 32)).astype(np.float32)
    estimate = memory.activations(unet, context, 32, 2, checkpoints)
    assert all(parameter.grad is None for parameter in unet.parameters())
    tape = Tape(checkpoints, only_trained=True)
    latents = rng.standard_normal((2, 32, 32, 4)).astype(np.float32)
    output = unet(latents, np.zeros(2, int), np.repeat(context, 2, axis=0), tape)
    unet.backward(output, tape)
    within(abs(estimate / tape.peak - 1), 0.05, "memory")
    assert memory.weights(unet) == sum(p.data.nbytes for p in unet.parameters())
