"""Stable unCLIP against diffusers' pipelines: of a prompt through the prior, and of a picture."""
import inspect

import numpy as np
import pytest

import tinyldm
from tests.support import strict
from tests.support.drawing import NEGATIVE, PROMPT, assert_same_drawing
from tests.support.extra import diffusers, torch
from tests.support.keys import CONFIGS, published_shapes
from tests.support.models import spoil
from tests.support.pictures import picture
from tests.support.reference import float32_noise, nchw, nhwc, sinusoidal, widen_embeddings
from tests.support.small_pipelines import change_json
from tests.support.small_unclip import EMBEDDING, unclip, unclip_img2img
from tests.support.tolerance import assert_close, within
from tinyldm.errors import TinyldmError
from tinyldm.files import read_json
from tinyldm.layers import file_shape
from tinyldm.models import UNet2DConditionModel
from tinyldm.noise import get_generator
from tinyldm.pipelines.interpolation import Between, slerp
from tinyldm.pipelines.loading import load
from tinyldm.pipelines.unclip import UnCLIPRequest

SMALL = {"num_inference_steps": 4, "prior_num_inference_steps": 5}


class Reference:
    """diffusers' pipeline of a folder, in float64, with its outputs in our layout."""

    def __init__(self, folder):
        pytest.importorskip("diffusers")
        diffusers.utils.logging.set_verbosity_error()
        self.pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float64)
        self.pipe.set_progress_bar_config(disable=True)
        widen_embeddings(self.pipe)
        if prior := getattr(self.pipe, "prior", None):
            width = prior.time_proj.num_channels
            prior.time_proj.forward = lambda t: sinusoidal(t, width, False, 0)

    def __call__(self, seeds=(0,), **options):
        """-> latents after every step [(B,h,w,4)], pictures (B,H,W,3) uint8."""
        states = []
        if "latents" in options:
            options["latents"] = nchw(options["latents"]).double()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def keep(step, t, latents):
            if latents.ndim == 4:                       # the prior's are vectors
                states.append(nhwc(latents))
        with float32_noise():
            images = self.pipe(num_images_per_prompt=len(seeds), callback=keep,
                               generator=generators if len(seeds) > 1 else generators[0],
                               **options).images
        return states, np.stack([np.asarray(image) for image in images])


def ours(pipe, *arguments, **options):
    states = [state.latents for state in pipe.stream(*arguments, **options)]
    return states, np.stack([np.asarray(image) for image in pipe(*arguments, **options)])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = unclip(tmp_path_factory.mktemp("unclip"))
    return load(folder), Reference(folder), folder


# ---- from a prompt --------------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    {}, {"negative_prompt": NEGATIVE, "noise_level": 300}, {"noise_level": 999},
    {"guidance_scale": 1.0}, {"prior_guidance_scale": 1.0, "guidance_scale": 3.0},
    {"width": 40, "height": 24}], ids=str)
def test_a_prompt(text, options):
    pipe, reference, _ = text
    options = SMALL | options
    assert_same_drawing(ours(pipe, PROMPT, seed=7, **options),
                        reference([7], prompt=PROMPT, **options))


def test_clip_skip(text):
    """Of the UNet's text encoder. diffusers' pipeline for pictures takes the option and ignores it.
    """
    pipe, reference, _ = text
    encoder = reference.pipe.text_encoder
    if not hasattr(encoder, "text_model"):              # of transformers 5; diffusers asks for it
        encoder.__dict__["text_model"] = encoder
    drawn = ours(pipe, PROMPT, seed=7, clip_skip=1, **SMALL)
    assert_same_drawing(drawn, reference([7], prompt=PROMPT, clip_skip=1, **SMALL))
    assert abs(drawn[0][-1] - ours(pipe, PROMPT, seed=7, **SMALL)[0][-1]).max() > 0.01


def test_images_of_one_call(text):
    pipe, reference, _ = text
    drawn = ours(pipe, PROMPT, seed=3, num_images=2, **SMALL)
    assert_same_drawing(drawn, reference([3, 4], prompt=PROMPT, **SMALL))
    alone = ours(pipe, PROMPT, seed=4, **SMALL)
    assert_close(drawn[0][-1][1:], alone[0][-1], 1e-4)


def test_latents_are_the_start(text):
    pipe, reference, _ = text
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    assert_same_drawing(ours(pipe, PROMPT, latents=latents, **SMALL),
                        reference(prompt=PROMPT, latents=latents, **SMALL))


def test_several_prompts_are_drawn_as_each_alone(text):
    pipe, *_ = text
    drawn = ours(pipe, ["red cat", PROMPT], seed=3, **SMALL)[0][-1]
    for row, prompt in zip(drawn, ["red cat", PROMPT]):
        assert_close(row[None], ours(pipe, prompt, seed=3, **SMALL)[0][-1], 1e-4)


def test_a_point_between_two_prompts(text):
    """The embeddings of both, from one seed, are mixed along the arc between them."""
    pipe, *_ = text

    def embeds(*prompts):
        request = pipe.complete(UnCLIPRequest(list(prompts), num_images=2, seed=3, **SMALL))
        return pipe.embed(request, request.generators())

    first, second = embeds("red cat"), embeds(PROMPT)
    found = embeds("red cat", Between("red cat", PROMPT, 0.25), Between("red cat", PROMPT, 1.0))
    expected = [slerp(a, b, 0.25) for a, b in zip(first, second)]
    assert_close(found, np.concatenate([first, expected, second]), 1e-4)
    assert ours(pipe, Between("red cat", PROMPT, 0.5), **SMALL)[1].shape == (1, 32, 32, 3)


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
def test_the_prior_alone(text, scheduler, tmp_path):
    """The embedding itself, by the scheduler that the file names."""
    folder = unclip(tmp_path, _class_name=scheduler)
    pipe, reference = load(folder, dtype=np.float64), Reference(folder)
    found = []
    reference.pipe.noise_image_embeddings = lambda image_embeds, **_: (
        found.append(image_embeds.detach().numpy()),
        torch.cat([image_embeds, image_embeds], 1))[1]
    reference(prompt=PROMPT, **SMALL)
    request = pipe.complete(UnCLIPRequest(PROMPT, **SMALL))
    embeds = pipe.embed(request, request.generators())
    assert embeds.shape == (1, EMBEDDING)
    assert_close(embeds, found[0], 1e-5)


def test_karlos_own_scheduler(tmp_path):
    """As karlo's pipeline steps, from each timestep to the next one of the list."""
    folder = unclip(tmp_path, _class_name="UnCLIPScheduler")
    pipe, reference = load(folder, dtype=np.float64), Reference(folder)
    scheduler = reference.pipe.prior_scheduler
    step, found = scheduler.step, []

    def with_following(output, timestep, sample, generator=None, **options):
        places = scheduler.timesteps.tolist() + [None]
        following = places[places.index(int(timestep)) + 1]
        return step(output, timestep, sample, prev_timestep=following,
                    generator=generator, **options)
    scheduler.step = with_following
    reference.pipe.noise_image_embeddings = lambda image_embeds, **_: (
        found.append(image_embeds.detach().numpy()),
        torch.cat([image_embeds, image_embeds], 1))[1]
    reference(prompt=PROMPT, **SMALL)
    request = pipe.complete(UnCLIPRequest(PROMPT, **SMALL))
    # The public class rounds two coefficients: see diffusion/test_unclip.py.
    assert_close(pipe.embed(request, request.generators()), found[0], 2e-3)


def test_a_long_prompt_is_cut_for_the_prior(text):
    pipe, reference, _ = text
    long = "red cat, " * 40 + PROMPT
    with pytest.warns(UserWarning, match="the prior reads only the first 75 of .* tokens"):
        found = pipe.text_prior._encode(long)
    device = torch.device("cpu")
    embeds, states, mask = reference.pipe._encode_prior_prompt(long, device, 1, False)
    assert_close(found["text_embeds"], embeds.detach().numpy(), 1e-5)
    assert_close(found["context"], states.detach().numpy(), 1e-5)
    assert np.array_equal(found["mask"], mask.numpy())


def test_noise_on_embeddings(text):
    pipe, reference, _ = text
    rng = np.random.default_rng(0)
    embeds, noise = (rng.standard_normal((2, EMBEDDING)).astype(np.float32) for _ in range(2))
    for level in (0, 20, 999):
        theirs = reference.pipe.noise_image_embeddings(
            torch.from_numpy(embeds).double(), level, torch.from_numpy(noise).double())
        found = pipe.noise_embeds(embeds, level, noise)
        assert found.shape == (2, 2 * EMBEDDING)
        assert_close(found, theirs.detach().numpy(), 1e-5)


def test_defaults_are_those_of_the_public_pipelines(text):
    pytest.importorskip("diffusers")
    request = text[0].complete(UnCLIPRequest("cat"))
    for name in ("StableUnCLIPPipeline", "StableUnCLIPImg2ImgPipeline"):
        public = inspect.signature(getattr(diffusers, name).__call__).parameters
        for key in ("num_inference_steps", "guidance_scale", "noise_level",
                    "prior_num_inference_steps", "prior_guidance_scale"):
            if key in public:
                assert getattr(request, key) == public[key].default, key


# ---- from a picture -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def image(tmp_path_factory):
    folder = unclip_img2img(tmp_path_factory.mktemp("unclip_img2img"))
    return load(folder), Reference(folder)


@pytest.mark.parametrize("options", [
    {}, {"prompt": PROMPT, "negative_prompt": NEGATIVE, "noise_level": 300},
    {"noise_level": 999}, {"guidance_scale": 1.0, "prompt": PROMPT},
    {"width": 40, "height": 24}], ids=str)
def test_a_picture(image, options):
    pipe, reference = image
    options = {"num_inference_steps": 4, "image": picture(), **options}
    assert_same_drawing(ours(pipe, seed=7, **options), reference([7], **options))


def test_each_seed_draws_another_variation(image):
    """As a call of the reference for each seed: in one call it adds the same noise to all."""
    pipe, reference = image
    options = {"num_inference_steps": 4, "image": picture(), "noise_level": 100}
    states, images = ours(pipe, seed=3, num_images=2, **options)
    for i, seed in enumerate((3, 4)):
        assert_same_drawing(([x[i:i + 1] for x in states], images[i:i + 1]),
                            reference([seed], **options))
    assert abs(images[0].astype(int) - images[1]).max() > 20


def test_between_two_pictures(image):
    """The embeddings are mixed along the arc between them; weight 0 and 1 are the pictures."""
    pipe, reference = image
    first, second = picture(), picture().rotate(90).point(lambda x: 255 - x)
    options = {"num_inference_steps": 4, "noise_level": 50}
    for weight, end in ((0.0, first), (1.0, second)):
        drawn = ours(pipe, image=Between(first, second, weight), seed=2, **options)
        assert_same_drawing(drawn, reference([2], image=end, **options))
    a, b = pipe.encode_image(first), pipe.encode_image(second)
    embeds = torch.from_numpy(slerp(a, b, 0.3))
    drawn = ours(pipe, image=Between(first, second, 0.3), seed=2, **options)
    assert_same_drawing(drawn, reference([2], prompt="", image_embeds=embeds, **options))


def test_the_embedding_is_that_of_the_image_encoder(image):
    pipe, reference = image
    for size in ((12, 12), (30, 17)):
        pixels = reference.pipe.feature_extractor(images=picture().resize(size),
                                                  return_tensors="pt").pixel_values.double()
        theirs = reference.pipe.image_encoder(pixels).image_embeds.detach().numpy()
        assert_close(pipe.encode_image(picture().resize(size)), theirs, 1e-5)


def test_what_only_a_prior_reads_is_noted(image):
    with pytest.warns(UserWarning, match="no prior, so prior_guidance_scale plays no part"):
        image[0].stream(image=picture(), prior_guidance_scale=2.0)


@pytest.mark.parametrize("options, message", [
    ({"prompt": "cat"}, "these weights draw variations of a picture, .*: give an image"),
    ({"image": Between(picture(), picture(), "x")}, "the weight of a Between must be from 0 to 1"),
    ({"image": np.zeros((8, 8, 3))}, "image must be a PIL image")], ids=["no image", "weight",
                                                                           "array"])
def test_a_wrong_picture_is_named_at_once(image, options, message):
    with pytest.raises(TinyldmError, match=message):
        image[0].stream(**options)


def test_only_an_image_encoder_encodes_pictures(text):
    with pytest.raises(TinyldmError, match="no image encoder: use weights of StableUnCLIPImg2Img"):
        text[0].encode_image(picture())


@pytest.mark.parametrize("file, changes, message", [
    ("feature_extractor/preprocessor_config.json", {"crop_size": 14},
     "gives pictures of 14x14 pixels, but the image encoder takes 12x12"),
    ("image_encoder/config.json", {"patch_size": 20}, "patch_size must be at most"),
    ("model_index.json", {"_class_name": "StableUnCLIPPipeline"}, "expected a folder .*prior")],
    ids=str)
def test_a_folder_of_an_image_encoder_whose_parts_do_not_fit(tmp_path, file, changes, message):
    folder = unclip_img2img(tmp_path)
    change_json(folder / file, **changes)
    with pytest.raises(TinyldmError, match=message):
        load(folder)


# ---- the public weights ---------------------------------------------------------------------

def test_the_names_in_stable_diffusion_2_1_unclip():
    """stabilityai/stable-diffusion-2-1-unclip: Stable Diffusion 2.1's UNet and a perceptron."""
    names = {name: file_shape(parameter) for name, parameter in UNet2DConditionModel(
        CONFIGS["SD 2.1"]["unet"] | {"class_embed_type": "projection",
                                     "projection_class_embeddings_input_dim": 2048}
    ).named_parameters()}
    added = {"class_embedding.linear_1.weight": (1280, 2048),
             "class_embedding.linear_1.bias": (1280,),
             "class_embedding.linear_2.weight": (1280, 1280),
             "class_embedding.linear_2.bias": (1280,)}
    assert names == published_shapes("SD 2.1", "unet") | added
    assert len(names) == 690
    assert sum(int(np.prod(shape)) for shape in names.values()) == 870_173_124


# ---- folders --------------------------------------------------------------------------------

def test_a_saved_folder_draws_the_same_here_and_there(text, tmp_path):
    pipe, _, _ = text
    tinyldm.save(pipe, tmp_path / "saved")
    drawn = ours(pipe, PROMPT, **SMALL)
    assert_same_drawing(drawn, Reference(tmp_path / "saved")(prompt=PROMPT, **SMALL))
    again = load(tmp_path / "saved")
    assert np.array_equal(ours(again, PROMPT, **SMALL)[1], drawn[1])
    assert (again.num_inference_steps, again.guidance_scale) == (20, 10.0)
    index = read_json(tmp_path / "saved" / "model_index.json")
    assert index["_class_name"] == "StableUnCLIPPipeline" and "safety_checker" not in index


def test_a_saved_folder_with_an_image_encoder(image, tmp_path):
    pipe, _ = image
    tinyldm.save(pipe, tmp_path / "saved")
    options = {"image": picture(), "num_inference_steps": 4}
    drawn = ours(pipe, **options)
    assert_same_drawing(drawn, Reference(tmp_path / "saved")(**options))
    assert np.array_equal(ours(load(tmp_path / "saved"), **options)[1], drawn[1])


@pytest.mark.parametrize("kind", ["text", "image"])
def test_what_the_reference_writes_is_read_without_a_note(kind, request, tmp_path, recwarn):
    pipe, reference, *_ = request.getfixturevalue(kind)
    reference.pipe.save_pretrained(tmp_path / "theirs")
    recwarn.clear()
    again = load(tmp_path / "theirs", dtype=np.float32)
    assert not recwarn.list
    options = SMALL if kind == "text" else {"image": picture(), "num_inference_steps": 4}
    assert_close(ours(again, PROMPT, **options)[0][-1], ours(pipe, PROMPT, **options)[0][-1], 1e-6)


# ---- what people do wrong -------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    ({}, "these weights draw a prompt: give one"),
    ({"prompt": "cat", "image": picture()}, "have a prior, which reads a prompt, but no image enc"),
    ({"prompt": "cat", "noise_level": 1000}, "noise_level must be a whole number from 0 to 999, "),
    ({"prompt": "cat", "noise_level": 0.5}, "noise_level must be a whole number from 0 to 999, "),
    ({"prompt": "cat", "prior_num_inference_steps": 0}, "prior_num_inference_steps must be a wh"),
    ({"prompt": "cat", "prior_guidance_scale": "4"}, "prior_guidance_scale must be a finite num"),
    ({"prompt": "cat", "guidance_scale": np.nan}, "guidance_scale must be a finite number"),
    ({"prompt": ["cat"], "negative_prompt": ["a", "b"]}, "a list as long as prompt's, 1, not 2"),
    ({"prompt": 3}, "a prompt must be a string"),
    ({"prompt": []}, "a list of prompts must have at least one"),
    ({"prompt": "cat", "image": "cat.png"}, "image must be"),
    ({"prompt": Between("a", "b", 2)}, "the weight of a Between must be from 0 to 1, not 2"),
    ({"prompt": "cat", "width": 30}, "width must be a multiple of 4, not 30"),
    ({"prompt": "cat", "latents": np.zeros((1, 8, 8, 3))}, r"of shape \(1, 8, 8, 4\)"),
    ({"prompt": "cat", "strength": 0.5}, "there is no option 'strength'")], ids=str)
def test_a_wrong_option_is_named_at_once(text, options, message):
    with pytest.raises(TinyldmError, match=message) as error:
        text[0].stream(**options)
    assert "\n" not in str(error.value)


def test_more_steps_than_the_prior_has(tmp_path):
    pipe = load(unclip(tmp_path / "few", num_train_timesteps=20))
    with pytest.raises(TinyldmError, match="^prior_num_inference_steps, the number of the prior's "
                       "steps, must be a whole number from 1 to 20, not 25"):
        pipe.stream("cat")
    assert list(pipe.stream("cat", num_inference_steps=1, prior_num_inference_steps=2))


@pytest.mark.parametrize("file, changes, message", [
    ("image_normalizer/config.json", {"embedding_dim": 19}, "does not fit"),
    ("unet/config.json", {"class_embed_type": "timestep"}, "does not fit"),
    ("prior/config.json", {"num_embeddings": 76}, "does not fit"),
    ("prior/config.json", {"_class_name": "AutoencoderKL"}, "does not describe|must name a Prior"),
    ("prior_scheduler/scheduler_config.json", {"beta_schedule": "sine"}, "beta_schedule must be"),
    ("image_noising_scheduler/scheduler_config.json", {"beta_start": 2}, "beta_start must be"),
    ("prior_tokenizer/tokenizer_config.json", {"model_max_length": 20},
     "tokenizer's model_max_length is 20, but the prior needs 77")], ids=str)
def test_a_folder_whose_parts_do_not_fit(tmp_path, file, changes, message):
    folder = unclip(tmp_path)
    change_json(folder / file, **changes)
    with pytest.raises(TinyldmError, match=message):
        load(folder)


def test_the_first_layer_that_gives_nan_is_named(tmp_path):
    pipe = load(unclip(tmp_path))
    spoil(pipe.prior, "transformer_blocks.1.ff.net.2.weight")
    with pytest.raises(TinyldmError, match="transformer_blocks.1.ff.* of PriorTransformer"):
        list(pipe.stream("cat", **SMALL))


@pytest.mark.parametrize("make, options", [
    (unclip, SMALL | {"prompt": Between("red cat", PROMPT, 0.5)}),
    (unclip_img2img, {"image": Between(picture(), picture().rotate(90), 0.5), "noise_level": 50,
                      "num_inference_steps": 4})], ids=["prompt", "picture"])
def test_on_strict_arrays(make, options, tmp_path):
    """What CuPy would refuse is refused; the picture is the same, in float16 nearly."""
    folder = make(tmp_path)
    expected = np.asarray(load(folder)(**options)[0], int)
    with strict.installed():
        for dtype, most in ((np.float32, 2), (np.float16, 10)):
            drawn, = load(folder, device="cuda", dtype=dtype)(**options)
            within(abs(np.asarray(drawn, int) - expected).max(), most)


def test_no_argument_is_written_to(text):
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    latents.flags.writeable = False
    text[0](PROMPT, latents=latents, **SMALL)


def test_the_numbers_of_a_seed_are_drawn_in_the_order_of_the_reference(text):
    """First the prior's, then the noise on the embedding, then the latents."""
    pipe, *_ = text
    request = pipe.complete(UnCLIPRequest(PROMPT, **SMALL | {"sampler": "ddim"}))
    generator = get_generator("torch-cpu")(0)
    embeds = pipe.embed(request, [generator])
    after = generator.randn((1, EMBEDDING)), generator.randn((1, 4, 8, 8)).transpose(0, 2, 3, 1)
    labels = pipe.noise_embeds(embeds, 0, after[0])
    assert_close(next(iter(pipe.stream(PROMPT, latents=after[1], **SMALL))).latents,
                 next(iter(pipe.stream(PROMPT, **SMALL))).latents, 1e-6)
    assert labels.shape == (1, 2 * EMBEDDING)
