"""Image to image and inpainting against diffusers' pipelines: same weights, seed and picture."""
import numpy as np
import pytest
from PIL import Image

from tests.support.drawing import (
    PROMPT,
    STEPS,
    Editing,
    assert_same_drawing,
    assert_same_pictures,
    ours,
)
from tests.support.extra import diffusers, torch
from tests.support.pictures import SIZE, hole, picture, thin
from tests.support.reference import float32_noise, widen_embeddings
from tests.support.small_pipelines import (
    ddpm,
    dpmpp,
    euler_ancestral,
    inpainting,
    lcm,
    sd1,
    sd2,
    sd_turbo,
    sdxl,
    smallest,
)
from tests.support.tolerance import assert_same_pixels
from tinyldm import Between, load
from tinyldm.errors import TinyldmError
from tinyldm.images import from_pil, mask_from_pil
from tinyldm.noise import get_generator
from tinyldm.pipelines.editing import Edit

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


KINDS = [sd1, sd2, sd_turbo, euler_ancestral, dpmpp, ddpm, sdxl]


@pytest.fixture(scope="module", params=KINDS, ids=lambda make: make.__name__)
def both(request, tmp_path_factory):
    folder = request.param(tmp_path_factory.mktemp(request.param.__name__))
    return load(folder), Editing(folder)


@pytest.fixture(scope="module")
def both_sd1(tmp_path_factory):
    folder = sd1(tmp_path_factory.mktemp("sd1"))
    return load(folder), Editing(folder)


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    folder = inpainting(tmp_path_factory.mktemp("nine"))
    return load(folder), Editing(folder)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = lcm(tmp_path_factory.mktemp("lcm"))
    return load(folder), Editing(folder)


# ---- against diffusers ----------------------------------------------------------------------

@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0])
def test_image_to_image(both, strength):
    pipe, reference = both
    assert_same_drawing(ours(pipe, seed=5, image=picture(), strength=strength),
                        reference([5], image=picture(), strength=strength))


def assert_inpaints(pipe, reference, **options):
    options = {"height": 48, "width": 64, **options}
    assert_same_drawing(ours(pipe, seed=5, image=picture(), mask=hole(), **options),
                        reference([5], image=picture(), mask_image=hole(), **options))


def test_image_to_image_and_inpainting_in_float64(both):
    _, reference = both
    pipe = load(reference.folder, dtype="float64")
    assert_same_drawing(ours(pipe, seed=5, image=picture(), strength=0.6),
                        reference([5], image=picture(), strength=0.6))
    assert_inpaints(pipe, reference, strength=0.6)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_with_an_ordinary_model(both, strength):
    assert_inpaints(*both, strength=strength)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_with_a_model_made_for_it(nine, strength):
    assert_inpaints(*nine, strength=strength)


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_a_latent_consistency_model_makes_all_steps(few, strength):
    """All steps are made, from less noise; with a mask some are left out, as in other models."""
    pipe, reference = few
    img2img = diffusers.LatentConsistencyModelImg2ImgPipeline(
        **reference.pipe.components, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)
    widen_embeddings(img2img)
    with float32_noise():
        theirs = img2img(PROMPT, image=picture(), strength=strength, num_inference_steps=STEPS,
                         guidance_scale=7.5, generator=torch.Generator().manual_seed(5)).images
    states, images = ours(pipe, seed=5, image=picture(), strength=strength)
    assert len(states) == STEPS
    assert_same_pictures(images, np.stack([np.asarray(image) for image in theirs]))


def test_inpainting_with_a_latent_consistency_model(few):
    assert_inpaints(*few, strength=0.6)


def test_too_small_a_strength_for_a_latent_consistency_model(few):
    with pytest.raises(TinyldmError, match="lcm takes from 1 to 2 steps here, .* not 4 of 1000"):
        list(few[0].stream("cat", image=picture(), strength=0.05))


def test_strength_unless_given(both_sd1):
    pipe, reference = both_sd1
    assert_same_drawing(ours(pipe, image=picture()), reference(image=picture()))
    assert_inpaints(pipe, reference)


def test_large_pictures_in_tiles(tmp_path):
    """low_memory also encodes in tiles, those of diffusers' enable_tiling."""
    folder, large = sd1(tmp_path), picture(size=(96, 72))
    reference = Editing(folder)
    reference.pipe.vae.enable_tiling()
    assert_same_drawing(ours(load(folder, low_memory=True), image=large),
                        reference(image=large))


def test_what_is_transparent_lies_on_white(small):
    """So a mask's transparent parts are painted: programs that cut holes mean it so."""
    clear = picture(mode="RGBA")
    alpha = Image.eval(hole(), lambda value: 0 if value > 128 else 255)
    clear.putalpha(alpha)
    shown = picture()
    shown.paste("white", mask=Image.eval(alpha, lambda value: 255 - value))
    np.testing.assert_array_equal(from_pil(clear, SIZE), from_pil(shown, SIZE))
    clear.paste("black", mask=alpha)
    clear.putalpha(alpha)
    np.testing.assert_array_equal(mask_from_pil(clear, SIZE), mask_from_pil(
        hole().point(lambda value: 255 * (value > 128)), SIZE))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_pictures_of_other_modes(small, mode):
    """diffusers takes images in RGB only, masks in any mode."""
    image, options = picture(mode=mode), {"num_inference_steps": 2, "mask": hole()}
    *_, state = small.stream("cat", image=image, **options)
    *_, expected = small.stream("cat", image=image.convert("RGB"), **options)
    assert np.array_equal(state.latents, expected.latents)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "1"])
def test_masks_of_other_modes(both_sd1, mode):
    (pipe, reference), mask, size = both_sd1, hole().convert(mode), {"width": 64, "height": 56}
    assert_same_drawing(ours(pipe, image=picture(), mask=mask, **size),
                        reference(image=picture(), mask_image=mask, **size))


# ---- several images: each has its own seed --------------------------------------------------

@pytest.mark.parametrize("mask", [None, hole()])
def test_each_picture_is_that_of_its_seed(both_sd1, mask):
    pipe, _ = both_sd1
    options = {"num_inference_steps": 3, "image": picture(), "mask": mask, "strength": 0.7,
               "sampler": "euler_ancestral"}
    together = pipe("cat", seed=3, num_images=2, **options)
    apart = [pipe("cat", seed=seed, **options)[0] for seed in (3, 4)]
    assert [image.size for image in together] == [(64, 56)] * 2         # rounded down
    for one, other in zip(together, apart):
        assert_same_pixels(one, other)


def test_where_the_mask_is_black_the_latents_are_the_pictures(small):
    """In the last state of an ordinary model; inside the mask they differ."""
    image, mask = picture(size=(16, 16)), Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    *_, state = small.stream("cat", num_inference_steps=3, image=image, mask=mask)
    noise = small.draw_noise([get_generator("torch-cpu")(0)], (1, 4, 4, 4))
    clean = small.encode(small.array(from_pil(image, (16, 16))), noise)
    assert np.array_equal(state.latents[:, :, 2:], clean[:, :, 2:])
    assert abs(state.latents[:, :, :2] - clean[:, :, :2]).min() > 0


# ---- bad input ------------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    ({"strength": 1.5}, "strength must be from 0 to 1, not 1.5"),
    ({"strength": -0.1}, "strength must be from 0 to 1, not -0.1"),
    ({"strength": float("nan")}, "strength must be a finite number, not nan"),
    ({"strength": "much"}, "strength must be a finite number, not 'much'"),
    ({"strength": 0}, "strength 0 leaves none of 4 steps: take at least 0.25, or more steps"),
    ({"strength": 0.2}, "strength 0.2 leaves none of 4 steps"),
    ({"image": "in.png"}, "image must be a PIL image, not a str"),
    ({"mask": np.ones((16, 16))}, "mask must be a PIL image, not a ndarray"),
    ({"image": Between(picture(), None, 0.5)}, "image must be a PIL image, not a NoneType"),
    ({"mask": Between(hole(), hole(), 0.5)}, "mask must be a PIL image, not a Between"),
    ({"image": None}, "a mask or a strength needs an image: give one"),
    ({"mask": Image.new("L", (16, 16), 127)}, "the mask leaves nothing to paint: make it white"),
    ({"mask": thin(16)}, "in spots of at least 4x4 pixels"),
    ({"image": Image.new("RGB", (3, 16))}, "the image is 3x16 pixels, too small for mul"),
])
def test_bad_input(small, options, message):
    options = {"image": picture(size=(16, 16)), "strength": 0.5, **options}
    if "mask" in options:
        options["strength"] = 1.0
    with pytest.raises(TinyldmError, match=message):
        small.stream("cat", num_inference_steps=4, **options)


def test_the_least_strength_that_is_named_is_enough():
    for steps in range(1, 1001):
        with pytest.raises(TinyldmError) as refused:
            Edit(picture(), 0, None, False).steps_left_out(steps)
        least = float(str(refused.value).partition("at least ")[2].partition(",")[0])
        assert Edit(picture(), least, None, False).steps_left_out(steps) < steps


def test_a_model_for_inpainting_wants_both(nine):
    pipe, _ = nine
    for options in ({}, {"image": picture()}):
        with pytest.raises(TinyldmError, match="made for inpainting: give an image and a mask"):
            pipe.stream("cat", **options)


def test_a_mask_of_another_size_is_resized_and_said(small):
    options = {"num_inference_steps": 2, "image": picture(size=(16, 16))}
    message = "mask is 32x32 pixels and the image 16x16: .* resized"
    with pytest.warns(UserWarning, match=message) as said:
        *_, state = small.stream("cat", mask=hole((32, 32)), **options)
    assert [warning.filename for warning in said] == [__file__]         # the caller's line
    with pytest.warns(UserWarning, match=message) as said:
        small("cat", mask=hole((32, 32)), **options)
    assert len(said) == 1
    *_, expected = small.stream("cat", mask=hole((32, 32)).resize((16, 16), 1), **options)
    assert np.array_equal(state.latents, expected.latents)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_picture_that_is_encoded_to_nan_names_the_layer(tmp_path):
    pipe = load(smallest(tmp_path))
    weight = pipe.vae.encoder.conv_in.weight
    weight.data = np.full_like(weight.data, np.inf)
    with pytest.raises(TinyldmError, match="the picture is encoded to NaN or infinity: the first "
                                           r"layer to produce it is encoder\."):
        pipe.stream("cat", image=picture(size=(16, 16)))
