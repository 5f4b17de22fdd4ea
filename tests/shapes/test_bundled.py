"""The bundled model: small, the same picture in diffusers, and as good as its README says."""
import json
from pathlib import Path

import numpy as np
import pytest

import tinyldm
from tests.support.extra import diffusers, torch
from tests.support.tolerance import assert_same_pixels
from tinyldm import backend
from tinyldm.shapes import scenes
from tinyldm.shapes.judge import score

FOLDER = Path(__file__).parents[2] / "weights" / "shapes"


@pytest.fixture(scope="module")
def pipe():
    return tinyldm.load()


def test_size():
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 20e6


def test_saving_it_gives_its_files(pipe, tmp_path):
    tinyldm.save(pipe, tmp_path / "new")
    saved = [file for file in (tmp_path / "new").rglob("*") if file.is_file()]
    assert len(saved) == 12
    for file in saved:
        original = FOLDER / file.relative_to(tmp_path / "new")
        if file.parent.name == "tokenizer" and file.suffix == ".json":
            assert json.loads(file.read_text()) == json.loads(original.read_text())
        else:
            assert file.read_bytes() == original.read_bytes(), file.name


def test_readme_states_what_was_measured(pipe):
    readme = (FOLDER / "README.md").read_text()
    accuracy = json.loads((FOLDER / "accuracy.json").read_text())
    assert accuracy["prompts"] >= 200
    assert f"{accuracy['prompts']} held-out prompts" in readme
    for name, value in accuracy.items():
        if name != "prompts":
            assert f"| {name} | {100 * value:.1f} % |" in readme, name
    for part in ("vae", "text_encoder", "unet"):
        count = sum(p.data.size for p in getattr(pipe, part).parameters())
        assert f"| {count:,} |" in readme, (part, count)


def test_it_draws_what_is_asked(pipe):
    """Other prompts than those of accuracy.json, of which it can get a few less right."""
    stated = json.loads((FOLDER / "accuracy.json").read_text())
    prompts = list(scenes.held_out_scenes(24, seed=1))
    pictures = [pipe(prompt, num_inference_steps=15, seed=7)[0] for prompt in prompts]
    accuracy = score(list(map(np.asarray, pictures)), prompts)
    for name in ("background", "colour", "relation", "size", "shape"):
        assert accuracy[name] >= stated[name] - 0.15, name


@pytest.mark.parametrize("sampler", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_diffusers_draws_the_same_picture(pipe, sampler):
    reference = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    reference.scheduler = getattr(diffusers, sampler).from_config(reference.scheduler.config)
    reference.set_progress_bar_config(disable=True)
    prompt = "a small red star left of a big blue ring on a yellow background"
    for seed in (0, 1):
        theirs = reference(prompt, num_inference_steps=12, guidance_scale=pipe.guidance_scale,
                           generator=torch.Generator().manual_seed(seed)).images[0]
        ours = pipe(prompt, num_inference_steps=12, seed=seed,
                    sampler="euler" if sampler.startswith("Euler") else "dpmpp_2m")[0]
        assert_same_pixels(ours, theirs, 2)


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
def test_no_step_of_a_drawing_overflows_or_underflows_unintended(pipe, plain):
    """A program around it may have asked NumPy to raise for everything."""
    def draw():
        image, = pipe("a red circle on a blue background", num_inference_steps=3)
        return np.asarray(image)
    with backend.plain(plain):
        expected = draw()
        with np.errstate(all="raise"):
            np.testing.assert_array_equal(draw(), expected)
