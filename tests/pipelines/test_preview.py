"""States show what the picture will be: decoded, or by a linear map of the latents."""
import copy
import io
import pickle

import numpy as np
import pytest
from PIL import Image

import tinyldm
from tests.support.small_pipelines import cascade
from tests.support.tolerance import within
from tinyldm.diffusion.samplers.shared import State
from tinyldm.pipelines.loading import load
from tinyldm.pipelines.preview import Preview

PROMPT = "a big red star left of a small blue circle on a yellow background"


@pytest.fixture(scope="module")
def pipe():
    return tinyldm.load()


def test_a_small_preview_is_the_decoded_picture(pipe):
    *_, state = pipe.stream(PROMPT, num_inference_steps=3)
    image, = state.show()
    expected = (pipe.decode(state.pred_x0)[0] / 2 + 0.5) * 255
    within(max(abs(np.asarray(image) - expected).max() - 0.5, 0), 0.01, "a pixel, beyond rounding")


def test_a_large_preview_is_nearly_it(pipe, monkeypatch):
    """A linear map of the latents gives the picture's colours, but a star's edges only roughly."""
    *_, state = pipe.stream(PROMPT, num_images=2)
    exact = np.asarray([*Preview(pipe)(state.latents)], float)
    monkeypatch.setattr("tinyldm.pipelines.preview.DECODED", 0)
    preview = Preview(pipe)
    close = np.asarray([*preview(state.latents)], float)
    assert close.shape == exact.shape == (2, 64, 64, 3)
    for picture in range(2):
        assert np.corrcoef(close[picture].ravel(), exact[picture].ravel())[0, 1] > 0.85
    monkeypatch.setattr(pipe, "decode", None)           # the map is fitted once
    preview(state.latents)


def test_a_state_shows_itself_in_a_notebook(small):
    state = next(small.stream("a red cat", num_images=2, num_inference_steps=2))
    pictures = state.show()
    assert len(pictures) == 2 and state._repr_png_() == pictures._repr_png_()
    expected = tinyldm.to_pil(small.decode(state.pred_x0))
    assert [np.array_equal(*pair) for pair in zip(pictures, expected, strict=True)] == [True, True]


def test_both_stages_of_a_cascade_show_themselves(tmp_path):
    for state in load(cascade(tmp_path)).stream("cat", num_inference_steps=1, super_res_steps=1):
        assert state.show()[0].size == (16, 16)


def test_a_state_is_one_of_the_samplers_and_its_copies_leave_the_models_behind(small):
    state = next(small.stream("a red cat", num_inference_steps=2))
    step, timestep, latents, x_start, repeats = state
    assert isinstance(state, State) and x_start is state.pred_x0 and repr(state).startswith("State")
    for again in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert type(again) is State and np.array_equal(again.latents, latents)
        assert again[:2] == (step, timestep) and again.repeats is repeats


# ---- pictures -----------------------------------------------------------------------------------

def sheet(pictures):
    return np.asarray(Image.open(io.BytesIO(pictures._repr_png_())))


@pytest.mark.parametrize("count, side, times, columns", [
    (1, 64, 4, 1), (2, 64, 4, 2), (4, 64, 4, 4), (5, 64, 2, 5), (9, 64, 2, 8), (3, 300, 1, 3),
    (2, 2000, 1, 1)])
def test_pictures_show_themselves_on_one_sheet(count, side, times, columns):
    """Small ones enlarged, in rows of about a thousand pixels, each where it belongs."""
    pixels = np.random.default_rng(0).uniform(-1, 1, (count, side, side, 3))
    pictures = tinyldm.to_pil(pixels)
    shown, cell = sheet(pictures), side * times + 4
    assert shown.shape == (-(-count // columns) * cell - 4, min(count, columns) * cell - 4, 3)
    for i, picture in enumerate(pictures):
        y, x = i // columns * cell, i % columns * cell
        large = np.asarray(picture).repeat(times, axis=0).repeat(times, axis=1)
        assert np.array_equal(shown[y:y + cell - 4, x:x + cell - 4], large)


def test_pictures_of_several_sizes_share_a_sheet_and_none_shows_nothing():
    pictures = tinyldm.to_pil(np.ones((1, 300, 256, 3)))
    pictures += tinyldm.to_pil(-np.ones((1, 256, 300, 3)))
    shown = sheet(pictures)
    assert shown.shape == (300, 604, 3) and (shown[:256, 304:] == 0).all()
    assert (shown[:, :304] == 255).all() and (shown[256:] == 255).all()
    assert tinyldm.to_pil(np.ones((1, 8, 8, 3)))[:0] == [] and type(pictures)()._repr_png_() is None
