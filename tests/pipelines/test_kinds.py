"""The other kinds of Stable Diffusion, each against diffusers' own pipeline for it."""
import inspect
from functools import partial

import numpy as np
import pytest

from tests.support import small_pipelines
from tests.support.drawing import NEGATIVE, PROMPT, Reference, assert_same_drawing, ours
from tests.support.extra import diffusers, torch
from tests.support.models import spoil
from tests.support.pictures import hole, picture
from tests.support.small_pipelines import change_json, lcm, sd1, sd_turbo, sdxl, sdxl_turbo
from tests.support.tolerance import assert_close
from tinyldm.errors import TinyldmError
from tinyldm.pipelines.loading import load
from tinyldm.pipelines.request import Request
from tinyldm.pipelines.stable_diffusion import StableDiffusion
from tinyldm.text.prompt import apply_weights


def both(make, tmp_path_factory):
    folder = make(tmp_path_factory.mktemp(make.__name__))
    return load(folder), Reference(folder)


# ---- Stable Diffusion XL --------------------------------------------------------------------

@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return both(sdxl, tmp_path_factory)


@pytest.mark.parametrize("options", [
    {}, {"negative_prompt": NEGATIVE}, {"guidance_scale": 1.0, "negative_prompt": NEGATIVE},
    {"width": 40, "height": 24}, {"guidance_rescale": 0.7, "negative_prompt": NEGATIVE}], ids=str)
def test_stable_diffusion_xl(xl, options):
    pipe, reference = xl
    options = {"guidance_scale": 7.5, **options}        # diffusers' own is 5
    assert_same_drawing(ours(pipe, seed=7, **options), reference([7], **options))


def test_images_of_one_call(xl):
    pipe, reference = xl
    assert_same_drawing(ours(pipe, seed=3, num_images=2), reference([3, 4], guidance_scale=7.5))


def test_an_empty_negative_prompt_may_be_read(tmp_path):
    folder = sdxl(tmp_path)
    zeros = ours(load(folder))
    change_json(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    read = ours(load(folder))
    assert_same_drawing(read, Reference(folder)(guidance_scale=7.5))
    assert abs(read[0][-1] - zeros[0][-1]).max() > 0.01


@pytest.mark.parametrize("make", [sd1, sdxl], ids=lambda make: make.__name__)
def test_clip_skip(make, tmp_path, monkeypatch):
    """With text encoders of four layers, since Stable Diffusion XL never uses the last one."""
    monkeypatch.setattr(small_pipelines, "make_text_encoder",
                        partial(small_pipelines.make_text_encoder, num_hidden_layers=4))
    folder = make(tmp_path)
    pipe, reference = load(folder), Reference(folder)
    encoder = reference.pipe.text_encoder
    if not hasattr(encoder, "text_model"):              # of transformers 5; diffusers asks for it
        encoder.__dict__["text_model"] = encoder
    most = 3 if make is sd1 else 2
    last = [ours(pipe, negative_prompt=NEGATIVE)[0][-1]]
    for clip_skip in range(1, most + 1):
        options = {"clip_skip": clip_skip, "guidance_scale": 7.5, "negative_prompt": NEGATIVE}
        drawn = ours(pipe, **options)
        assert_same_drawing(drawn, reference(**options))
        last.append(drawn[0][-1])
    assert all(abs(a - b).max() > 0.01 for a, b in zip(last, last[1:]))
    assert np.array_equal(ours(pipe, negative_prompt=NEGATIVE, clip_skip=0)[0][-1], last[0])
    with pytest.raises(TinyldmError, match=f"from 0 to {most}, as the text encoder has 4 layers"):
        pipe.stream("cat", clip_skip=most + 1)


@pytest.mark.parametrize("make, drawing, editing, inpainting", [
    (sd1, (50, 7.5, None), (7.5, 0.8), (7.5, 1.0)),
    (sdxl, (50, 5.0, None), (5.0, 0.3), (7.5, 0.9999)),
    (lcm, (4, 8.5, None), (8.5, 0.8), (8.5, 1.0))], ids=["sd1", "sdxl", "lcm"])
def test_defaults_are_those_of_the_public_pipeline(make, drawing, editing, inpainting, tmp_path):
    """Read from the signatures of diffusers' pipelines, too."""
    pytest.importorskip("diffusers")
    pipe = load(make(tmp_path))

    def own(*names, **options):
        request = pipe.complete(Request("cat", **options))
        return tuple(getattr(request, name) for name in names)

    name = {sd1: "StableDiffusion", sdxl: "StableDiffusionXL", lcm: "LatentConsistencyModel"}[make]
    pair = ("guidance_scale", "strength")
    for task, options, values in [("", {}, drawing[1:]),
                                  ("Img2Img", {"image": picture()}, editing),
                                  ("Inpaint", {"image": picture(), "mask": hole()}, inpainting)]:
        assert own(*pair, **options) == values
        theirs = getattr(diffusers, f"{name}{task}Pipeline", None)
        if theirs:
            expected = inspect.signature(theirs.__call__).parameters
            assert values == tuple(expected[key].default if key in expected else None
                                   for key in pair)
            assert expected["num_inference_steps"].default == drawing[0]
    assert own("num_inference_steps") == drawing[:1]
    assert own(*pair, guidance_scale=3, image=picture(), strength=0.5) == (3, 0.5)


def test_drawing_with_the_defaults_of_stable_diffusion_xl(xl):
    pipe, reference = xl
    assert_same_drawing(ours(pipe, guidance_scale=None), reference())


def test_sdxl_turbo(tmp_path_factory):
    pipe, reference = both(sdxl_turbo, tmp_path_factory)
    for options in ({"guidance_scale": 0.0}, {"guidance_scale": 3.0, "negative_prompt": NEGATIVE}):
        assert_same_drawing(ours(pipe, **options), reference(**options))
    state, = pipe.stream(PROMPT, num_inference_steps=1, guidance_scale=0.0)
    assert state.timestep == 999


def conditioning(pipe, *args):
    return pipe._conditioner(*args, 7.5, 64, 64)


@torch.no_grad()
def encode(reference, text):
    context, _, pooled, _ = reference.pipe.encode_prompt(text, None, "cpu", 1, False)
    return context.numpy(), pooled.numpy()


def test_chunks_and_weights_of_both_encoders(xl):
    """Each half of the context has its own chunks and weights; the vector is the first chunk's."""
    pipe, reference = xl
    contexts, vectors = zip(*(encode(reference, text) for text in ("a red cat", "low!", "")))
    with pytest.warns(UserWarning, match="is read in 2 chunks"):
        negative, positive = conditioning(pipe, "a red cat BREAK low!", "low!")
    assert_close(positive["context"], np.concatenate(contexts[:2], axis=1), 1e-4)
    assert_close(positive["text_embeds"], vectors[0], 1e-4)
    assert_close(negative["context"], np.concatenate(contexts[1:], axis=1), 1e-4)
    assert_close(negative["text_embeds"], vectors[1], 1e-4)

    _, weighed = conditioning(pipe, "a red (cat:1.5)", "")
    ids, plain = pipe.tokenizer("a red"), pipe.tokenizer("a red cat")
    weights = np.where((plain == pipe.tokenizer.end) | (ids == plain), 1, 1.5)
    assert (weights != 1).any()
    halves = np.split(contexts[0], [pipe.text_encoder.config["hidden_size"]], axis=-1)
    assert_close(weighed["context"],
                 np.concatenate([apply_weights(half, weights) for half in halves], axis=-1), 1e-4)
    assert_close(weighed["text_embeds"], vectors[0], 1e-4)


def test_a_word_that_is_padding_to_one_encoder_only(xl):
    """"!" is the second tokenizer's padding: for it "!!!" is three tokens, for the first one."""
    pipe, reference = xl
    context, pooled = encode(reference, "cat!!!")
    _, positive = conditioning(pipe, "cat!!!", "")
    assert_close(positive["context"], context, 1e-4)
    assert_close(positive["text_embeds"], pooled, 1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_errors_of_the_second_encoder(tmp_path):
    pipe = load(sdxl(tmp_path))
    parts = [pipe.tokenizer, pipe.text_encoder, pipe.unet, pipe.vae, pipe.scheduler]
    with pytest.raises(TinyldmError, match="cross_attention_dim is 40, but the .* is 16"):
        StableDiffusion(*parts)
    second = {"tokenizer_2": pipe.tokenizer_2, "text_encoder_2": pipe.text_encoder_2}
    pipe.unet.config["addition_time_embed_dim"] = 4
    with pytest.raises(TinyldmError, match="_input_dim is 68, but .* make 44"):
        StableDiffusion(*parts, **second)
    pipe.unet.config["addition_time_embed_dim"] = 8
    spoil(pipe.text_encoder_2, "text_projection.weight")
    with pytest.raises(TinyldmError, match="'cat': .* is text_projection of CLIPTextModelWithProj"):
        pipe.stream("cat")


# ---- the others -----------------------------------------------------------------------------

def test_sd_turbo(tmp_path_factory):
    pipe, reference = both(sd_turbo, tmp_path_factory)
    for options in ({"guidance_scale": 0.0}, {"negative_prompt": NEGATIVE}):
        assert_same_drawing(ours(pipe, seed=1, num_images=2, **options),
                            reference([1, 2], **options))


@pytest.mark.parametrize("make", [sdxl, sdxl_turbo, sd_turbo, lcm], ids=lambda make: make.__name__)
def test_in_float64(make, tmp_path):
    folder, options = make(tmp_path), {"guidance_scale": 7.5}
    if make is not lcm:
        options["negative_prompt"] = NEGATIVE
    assert_same_drawing(ours(load(folder, dtype="float64"), seed=7, **options),
                        Reference(folder)([7], **options))


@pytest.fixture(scope="module")
def consistent(tmp_path_factory):
    return both(lcm, tmp_path_factory)


@pytest.mark.parametrize("options", [
    {"guidance_scale": 8.5}, {"guidance_scale": 1.0, "width": 40, "height": 24},
    {"guidance_scale": 0.0}], ids=str)
def test_latent_consistency_model(consistent, options):
    pipe, reference = consistent
    assert_same_drawing(ours(pipe, seed=1, num_images=2, **options), reference([1, 2], **options))


def test_the_guidance_embedding_has_the_contexts_dtype(consistent):
    """It is computed in float64, but the UNet must not go on in float64."""
    only, = conditioning(consistent[0], "cat", "")
    assert only["timestep_cond"].dtype == only["context"].dtype == np.float32


def test_a_latent_consistency_model_knows_no_negative_prompt(consistent):
    pipe, _ = consistent
    assert len(list(pipe.stream(PROMPT))) == 4
    with pytest.warns(UserWarning, match="imitates guidance, .* plays no part") as said:
        only, = pipe._conditioner("cat", NEGATIVE, 7.5, 64, 64)
    assert only.keys() == {"context", "timestep_cond"}
    with pytest.warns(UserWarning, match="imitates guidance") as said:
        *_, state = pipe.stream("cat", NEGATIVE)
    assert said[0].filename == __file__
    *_, expected = pipe.stream("cat")
    assert np.array_equal(state.latents, expected.latents)
