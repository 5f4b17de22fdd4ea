"""The pipeline as a library: any function as its UNet, what it shows of itself, its signature."""
import inspect
import io
import re
import sys
import types

import numpy as np
import pytest
from PIL import Image

import tinyldm
from tests.support.extra import torch
from tinyldm.diffusion.samplers.shared import State
from tinyldm.layers import Linear
from tinyldm.pipelines.request import Request

OPTIONS = {"num_inference_steps": 3, "seed": 3, "guidance_scale": 4.0}


def pixels(pictures):
    return [np.asarray(picture) for picture in pictures]


# ---- any function as the UNet ---------------------------------------------------------------

def test_a_function_with_any_names_stands_in_for_the_unet(small):
    unet, calls = small.unet, []
    expected = pixels(small("a red cat", **OPTIONS))

    def mine(x, t, c):
        calls.append((x.shape, t.shape, c.shape, x.dtype))
        return unet(x, t, c)

    small.unet = mine
    assert np.array_equal(pixels(small("a red cat", **OPTIONS)), expected)
    assert len(calls) == 3 and calls[0][0][0] == calls[0][1][0] == calls[0][2][0] == 2
    assert calls[0][3] == np.float32
    small.unet = unet
    assert small.unet is unet and np.array_equal(pixels(small("a red cat", **OPTIONS)), expected)


def test_a_function_may_give_a_tensor_and_wider_numbers(small):
    def double(x, t, c):
        return torch.from_numpy(x.astype(np.float64)).requires_grad_() * 0.5

    small.unet = double
    state, = small.stream("a red cat", num_inference_steps=1)
    assert state.latents.dtype == np.float32 and np.isfinite(state.latents).all()


def test_an_untouched_pipeline_part_stays_where_it_was_found(small):
    small.unet = lambda x, t, c: x
    assert small.size() == (small.vae.vae_scale_factor * small.unet.settings.sample_size,) * 2
    assert repr(small).startswith("<Stable Diffusion: ")


@pytest.mark.parametrize("wrong, said", [
    (lambda x, t, c: x.transpose(0, 3, 1, 2), r"must return an array of shape \(2, 8, 8, 4\), "
     r"channels last, not one of \(2, 4, 8, 8\)"),
    (lambda x, t, c: x[:1], r"not one of \(1, 8, 8, 4\)"), (lambda x, t, c: None, "not 'NoneType'"),
    (lambda x, t, c: (x, x), "not 'tuple'")])
def test_what_a_function_returns_is_checked(small, wrong, said):
    small.unet = wrong
    with pytest.raises(tinyldm.TinyldmError, match=said):
        small("a red cat", width=8 * small.vae.vae_scale_factor,
              height=8 * small.vae.vae_scale_factor, **OPTIONS)


def test_nan_from_a_function_is_found_without_layers(small):
    small.unet = lambda x, t, c: x * np.float32("nan")
    with pytest.raises(tinyldm.TinyldmError, match="NaN or infinite at step 1 "):
        small("a red cat", **OPTIONS)


def test_a_pipeline_with_a_function_is_not_saved(small, tmp_path):
    small.unet = lambda x, t, c: x
    with pytest.raises(tinyldm.TinyldmError, match="unet is a function, which no folder can hold"):
        tinyldm.save(small, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_pipeline_is_built_with_a_real_unet(small):
    with pytest.raises(tinyldm.TinyldmError, match="built with a UNet2DConditionModel: set pipe"):
        tinyldm.StableDiffusion(small.tokenizer, small.text_encoder, lambda x, t, c: x, small.vae,
                                small.scheduler)


# ---- what it shows of itself ----------------------------------------------------------------

def test_pictures_show_themselves_in_a_notebook(small):
    pictures = small("a red cat", num_images=2, num_inference_steps=1)
    assert isinstance(pictures, list) and len(pictures) == 2
    shown, times = np.asarray(Image.open(io.BytesIO(pictures._repr_png_()))), 256 // 16
    for i, picture in enumerate(pictures):
        left = i * (256 + 4)
        assert np.array_equal(shown[::times, left:left + 256:times], np.asarray(picture))


def test_a_notebook_shows_a_progress_bar_of_the_steps(small, monkeypatch, capfd):
    small("a red cat", num_inference_steps=3, sampler="heun")
    assert capfd.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    small("a red cat", num_inference_steps=3, sampler="heun")
    assert re.findall(r"drawing: +100%.* 3/3 ", capfd.readouterr().err)
    small("a red cat", num_inference_steps=4, sampler="pndm", strength=0.5,
          image=Image.new("RGB", (64, 64)))
    assert re.findall(r"drawing: +100%.* 2/2 ", capfd.readouterr().err)


def test_to_pil_is_public(small):
    latents = np.zeros((2, 8, 8, 4), np.float32)
    pictures = tinyldm.to_pil(small.decode(latents))
    assert [type(picture) for picture in pictures] == [Image.Image] * 2
    assert np.asarray(tinyldm.to_pil([[[[-1.0, 0, 9]]]])[0]).tolist() == [[[0, 128, 255]]]


def test_the_repr_of_a_pipeline_is_one_telling_line():
    assert repr(tinyldm.load()) == (
        "<Stable Diffusion: text_encoder 0.683M, unet 5.9M, vae 1.54M; float32 on cpu; dpmpp_2m, "
        "25 steps>")


def test_the_repr_of_a_state_leaves_out_the_numbers():
    latents = np.zeros((1, 64, 64, 4), np.float32)
    assert repr(State(3, 751.0, latents, latents)) == (
        "State(step=3, timestep=751, latents=<float32 (1, 64, 64, 4)>, pred_x0=<float32 "
        "(1, 64, 64, 4)>)")
    assert repr(State(0, 1.5, None, None)) == (
        "State(step=0, timestep=1.5, latents=None, pred_x0=None)")


def test_the_reprs_of_parts_are_short(small):
    assert repr(Linear(3, 4)) == "<Linear: 16 parameters>"
    assert repr(Linear(3, 4).bias) == "<Parameter (4,): not filled>"
    assert repr(small.unet.conv_in.bias) == "<Parameter (8,): float32>"
    assert repr(small.schedule).startswith("Schedule(prediction_type='epsilon', ")


# ---- the signature --------------------------------------------------------------------------

def test_the_signature_is_that_of_the_request(small):
    expected = list(inspect.signature(Request).parameters.values())
    for method in (small.__call__, small.stream, tinyldm.StableDiffusion.stream):
        found = list(inspect.signature(method).parameters.values())
        assert found[-len(expected):] == expected
        assert [parameter.name for parameter in found[:-len(expected)]] in ([], ["self"])
    assert inspect.signature(small).parameters["guidance_scale"].name == "guidance_scale"
