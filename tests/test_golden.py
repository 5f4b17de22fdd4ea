"""Stored numbers of the reference: models, samplers, noise, token ids and a picture, without torch.

golden.py made them. With the test extra it makes them again here, so they cannot be out of date.
"""
import numpy as np
import pytest

import tinyldm
from tests.support import golden, models
from tests.support.extra import library
from tests.support.tolerance import assert_close, assert_same_pixels
from tests.support.words import END, SHAPES, TEXTS, write_settings, write_toy_vocabulary
from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.diffusion.schedule import Schedule
from tinyldm.noise import get_generator
from tinyldm.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def stored():
    with np.load(golden.FILE) as file:
        return dict(file)


@pytest.mark.parametrize("name", models.cases())
def test_models(name, stored):
    found = models.outputs(models.make(name), models.inputs(name))
    assert_close(golden.flat(found), stored[f"model {name}"], 1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", golden.SAMPLERS)
def test_samplers(name, prediction, stored):
    schedule = Schedule.from_config(golden.SCHEDULE | {"prediction_type": prediction})
    torch_cpu = get_generator("torch-cpu")
    draws = torch_cpu(1)
    states = SAMPLERS[name](golden.network, torch_cpu(0).randn(golden.LATENTS), schedule,
                            golden.STEPS, lambda: draws.randn(golden.LATENTS))
    for state, expected in zip(states, stored[f"sampler {name} {prediction}"], strict=True):
        # exact square roots: torch's may be off by a bit, which Heun's method magnifies
        allowed = 1e-3 if name == "heun" else 2e-5
        assert_close(state.latents, expected, allowed, f"after step {state.step + 1}")


def test_noise(stored):
    found = [tinyldm.noise.randn((size,), seed) for seed in golden.SEEDS for size in golden.SIZES]
    np.testing.assert_array_equal(np.concatenate(found).view(np.int32),
                                  stored["noise"].view(np.int32))


def test_token_ids(stored, tmp_path):
    write_toy_vocabulary(tmp_path)
    write_settings(tmp_path, END)
    for folder, rows in zip((tmp_path, SHAPES / "tokenizer"), stored["token_ids"], strict=True):
        tokenizer = Tokenizer.from_folder(folder)
        for text, row in zip(TEXTS, rows, strict=True):
            np.testing.assert_array_equal(tokenizer(text)[0], row, repr(text))


def test_picture(stored):
    image, = tinyldm.load()(golden.PROMPT, num_inference_steps=golden.STEPS, guidance_scale=7.5,
                            sampler="dpmpp_2m", seed=golden.SEED)
    assert_same_pixels(image, stored["picture"], 2)


@pytest.mark.parametrize("name", golden.arrays())
def test_the_reference_still_gives_them(name, stored):
    library("torch").Generator()                        # without it, the test ends here
    make, *args = golden.arrays()[name]
    expected, found = stored[name].astype(float), make(*args).astype(float)
    assert_close(found, expected, 1e-3)
