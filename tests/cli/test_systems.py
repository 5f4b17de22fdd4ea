"""The command line with other systems: DDPM, which has labels and neither prompt nor size."""
import numpy as np
import pytest
from PIL import Image

import tinyldm
from tests.support.models import random_weights
from tests.support.pictures import picture
from tinyldm.cli.draw import main
from tinyldm.images import read_parameters
from tinyldm.models import UNet2DModel
from tinyldm.pipelines.ddpm import DDPM

CONFIG = {"sample_size": 8, "block_out_channels": [8, 8], "layers_per_block": 1,
          "norm_num_groups": 4, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
          "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "num_class_embeds": 3}


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A folder of a DDPM with three classes."""
    unet = UNet2DModel(CONFIG)
    unet.load_state_dict(random_weights(unet, 1))
    folder = tmp_path_factory.mktemp("systems") / "ddpm"
    tinyldm.save(DDPM(unet, {"_class_name": "DDPMScheduler"}, num_inference_steps=3), folder)
    return folder


def test_a_picture_of_each_label(classes, out):
    arguments = ["--weights", str(classes), "--label", "2", "--label", "0", "--count", "2",
                 "--seed", "5", "--output", str(out / "out.png")]
    assert main(arguments) == 0
    expected = tinyldm.load(classes)(label=[2, 0], num_images=2, seed=5)
    for i, image in enumerate(expected):
        assert np.array_equal(np.asarray(Image.open(out / f"out-{i}.png")), np.asarray(image))
    assert (out / "out-sheet.png").exists()


@pytest.mark.parametrize("labels", [["1", "7"], ["1", "cat"], ["1", "2", "-1"]])
def test_a_wrong_label_is_found_before_the_first_picture(labels, classes, out, capsys):
    given = [f"--label={label}" for label in labels]
    assert main(["--weights", str(classes), *given, "--output", str(out / "out.png")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: a label must be a whole number from 0 to 2, not ")
    assert not list(out.iterdir())


def test_a_picture_is_drawn_again_from_its_own_file(classes, out):
    first, second = out / "a.png", out / "b.png"
    assert main(["--weights", str(classes), "--label", "1", "--steps", "2", "--sampler", "Euler",
                 "--output", str(first)]) == 0
    assert read_parameters(first) == ("Steps: 2, Sampler: euler, Label: 1, Seed: 0, Model: ddpm")
    assert main(["--weights", str(classes), "--like", str(first), "--output", str(second)]) == 0
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(second)))


@pytest.mark.parametrize("arguments, said", [
    (["a cat"], "DDPM draws without a prompt: leave it out"),
    (["--label", "1", "--negative", "x"], "DDPM draws without --negative: leave it out"),
    (["--label", "1", "--width", "8"], "DDPM draws without --width: leave it out"),
    (["--label", "1", "--guidance", "0"], "DDPM draws without --guidance: leave it out"),
    (["--label", "1", "--to-prompt", "x"], "DDPM draws without --to-prompt: leave it out"),
    (["--label", "1", "--random"], "DDPM draws without --random: leave it out"),
    (["--label", "1", "--lora", "x"], "DDPM takes no --lora: leave it out"),
    (["--label", "1", "--steps", "0"], "the number of steps must be a whole number from 1 to"),
    ([], "this model draws pictures of a class: give a label, a whole number from 0 to 2"),
    (["--label", "3"], "a label must be a whole number from 0 to 2, not 3"),
    (["--label", "cat"], "a label must be a whole number from 0 to 2, not 'cat'"),
    (["--label", "1", "--vae", "x"], "which has no VAE: leave vae out"),
])
def test_what_means_nothing_there_ends_in_one_line(arguments, said, classes, out, tmp_path, capsys,
                                                   monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    assert main([*arguments, "--weights", str(classes), "--output", str(out / "out.png")]) == 2
    message = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert message.startswith("error: ") and said in message
    assert not list(out.iterdir())


@pytest.mark.parametrize("arguments, said", [
    (["a cat", "--label", "1"], "Stable Diffusion draws without --label: leave it out"),
    (["a cat", "--noise-level", "1"], "Stable Diffusion draws without --noise-level: leave it out"),
    ([], "the following arguments are required: prompt"),
])
def test_stable_diffusion_has_no_labels(arguments, said, out, capsys):
    assert main([*arguments, "--output", str(out / "out.png")]) == 2
    assert said in capsys.readouterr().err


def test_from_a_picture(classes, out, tmp_path):
    picture(size=(8, 8)).save(tmp_path / "a.png")
    given = ["--weights", str(classes), "--label", "1", "--image", str(tmp_path / "a.png")]
    assert main([*given, "--strength", "0.5", "--steps", "4", "--output", str(out / "a.png")]) == 0
    expected, = tinyldm.load(classes)(label=1, image=Image.open(tmp_path / "a.png"), strength=0.5,
                                      num_inference_steps=4)
    assert np.array_equal(np.asarray(Image.open(out / "a.png")), np.asarray(expected))
    assert "Denoising strength: 0.5" in read_parameters(out / "a.png")
    assert main([*given, "--mask", "m.png", "--output", str(out / "b.png")]) == 2


def test_a_film_and_previews_of_pixels(classes, out):
    assert main(["--weights", str(classes), "--label", "1", "--preview", "2", "--animate",
                 str(out / "film.gif"), "--profile", "--output", str(out / "out.png")]) == 0
    assert {path.name for path in out.iterdir()} == {"film.gif", "out.png", "out-step2.png"}


def test_a_label_that_is_no_whole_number(out, tmp_path):
    unet = UNet2DModel(CONFIG | {"num_class_embeds": None, "class_embed_type": "timestep"})
    unet.load_state_dict(random_weights(unet, 1))
    tinyldm.save(DDPM(unet, {"_class_name": "DDPMScheduler"}, 2), tmp_path / "times")
    first, second = out / "a.png", out / "b.png"
    assert main(["--weights", str(tmp_path / "times"), "--label=-0.5", "--output",
                 str(first)]) == 0
    assert main(["--weights", str(tmp_path / "times"), "--like", str(first), "--output",
                 str(second)]) == 0
    expected, = tinyldm.load(tmp_path / "times")(label=-0.5)
    for file in (first, second):
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(expected))


def test_parameters_of_another_system_are_left_out_with_a_note(classes, out, capsys):
    text = "a cat\nNegative prompt: dog\nSteps: 2, CFG scale: 3, Clip skip: 2, Seed: 5"
    assert main(["--weights", str(classes), "--label", "1", "--from-parameters", text, "--output",
                 str(out / "a.png")]) == 0
    told = capsys.readouterr().err
    assert "DDPM draws without some of the parameters, which are not used: " in told
    assert "prompt: a cat, " in told and "guidance: 3.0" in told and "clip skip: 1" in told
    expected, = tinyldm.load(classes)(label=1, seed=5, num_inference_steps=2)
    assert np.array_equal(np.asarray(Image.open(out / "a.png")), np.asarray(expected))
    assert main(["--weights", str(classes), "--label", "1", "--from-parameters", text,
                 "--guidance", "4", "--output", str(out / "b.png")]) == 2
    assert "DDPM draws without --guidance: leave it out" in capsys.readouterr().err


def test_weights_that_are_not_there_are_named_first(out, tmp_path, capsys):
    assert main(["--weights", str(tmp_path / "no"), "--label", "1", "--output",
                 str(out / "a.png")]) == 2
    assert str(tmp_path / "no") in capsys.readouterr().err.splitlines()[-1]
