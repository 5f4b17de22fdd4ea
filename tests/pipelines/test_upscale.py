"""The x4 upscaler as a pipeline against diffusers' StableDiffusionUpscalePipeline."""
import functools
import shutil
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image

import tinyldm
from tests.support.command import run
from tests.support.drawing import NEGATIVE, PROMPT, assert_same_drawing, assert_same_pictures
from tests.support.extra import diffusers, torch
from tests.support.pictures import picture
from tests.support.reference import float32_noise, nchw, nhwc, widen_embeddings
from tests.support.small_pipelines import change_json, make_vae, upscaler
from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.errors import TinyldmError
from tinyldm.pipelines.loading import load
from tinyldm.pipelines.upscale import UpscaleRequest

STEPS = 4
LOW = picture(size=(20, 16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return upscaler(tmp_path_factory.mktemp("upscaler"))


@pytest.fixture(scope="module")
def pipe(folder):
    return load(folder)


def reference(folder, image=LOW, seed=0, scheduler=None, prompt=PROMPT, **options):
    """diffusers in float64 -> latents after every step, pictures (B,H,W,3) uint8."""
    diffusers.utils.logging.set_verbosity_error()
    pipe = diffusers.StableDiffusionUpscalePipeline.from_pretrained(
        folder, torch_dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    if scheduler:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(
            pipe.scheduler.config, skip_prk_steps=True)
    widen_embeddings(pipe)
    step, states = pipe.scheduler.step, []

    @functools.wraps(step)                              # diffusers asks for its signature
    def kept(*arguments, **keywords):
        output = step(*arguments, **keywords)
        states.append(nhwc(output[0]))
        return output
    pipe.scheduler.step = kept
    if "latents" in options:
        options["latents"] = nchw(options["latents"]).double()
    with float32_noise():
        images = pipe(prompt, image, num_inference_steps=STEPS,
                      generator=torch.Generator().manual_seed(seed), **options).images
    return states, np.stack([np.asarray(image) for image in images])


def ours(pipe, image=LOW, prompt=PROMPT, **options):
    states = list(pipe.stream(prompt, image, num_inference_steps=STEPS, **options))
    images = pipe(prompt, image=image, num_inference_steps=STEPS, **options)
    return [state.latents for state in states], np.stack([np.asarray(image) for image in images])


# ---- against diffusers ----------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    {}, {"negative_prompt": NEGATIVE, "guidance_scale": 5.0}, {"guidance_scale": 1.0},
    {"noise_level": 0}, {"noise_level": 350, "seed": 11}, {"noise_level": 100},
    {"latents": np.random.default_rng(0).standard_normal((1, 16, 20, 4), np.float32)}])
def test_a_drawing(folder, pipe, options):
    assert_same_drawing(ours(pipe, **options), reference(folder, **options))


@pytest.mark.parametrize("size", [(21, 15), (4, 4), (7, 30), (33, 12)])
def test_sizes(folder, pipe, size):
    """Of 21x15 it reads 20x12; not every side of those is a multiple of the UNet's halvings."""
    low = picture(size=size)
    assert_same_drawing(ours(pipe, low), reference(folder, low))
    expected = tuple(side // 4 * 16 for side in size)
    assert pipe.picture_size(pipe.request(("cat", low), {})) == expected


def test_in_float64(folder):
    assert_same_drawing(ours(load(folder, dtype="float64")), reference(folder))


@pytest.mark.parametrize("sampler, scheduler", [
    ("ddpm", "DDPMScheduler"), ("pndm", "PNDMScheduler"), ("euler", "EulerDiscreteScheduler"),
    ("dpmpp_2m", "DPMSolverMultistepScheduler"), ("unipc", "UniPCMultistepScheduler")])
def test_other_samplers(folder, pipe, sampler, scheduler):
    assert_same_drawing(ours(pipe, sampler=sampler), reference(folder, scheduler=scheduler))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws(pipe, sampler):
    *_, state = pipe.stream("cat", LOW, num_inference_steps=3, sampler=sampler)
    assert state.latents.shape == (1, 16, 20, 4) and np.isfinite(state.latents).all()


# ---- the interface --------------------------------------------------------------------------

def test_defaults(pipe):
    request = pipe.complete(pipe.request(("cat", LOW), {}))
    assert (request.num_inference_steps, request.guidance_scale, request.sampler,
            request.noise_level) == (75, 9, "ddim", 20)
    assert [field.name for field in fields(UpscaleRequest)][:4] == [
        "prompt", "image", "noise_level", "guidance_scale"]
    assert repr(pipe).startswith("<x4 upscaler: text_encoder ")


def test_several_pictures(pipe):
    """Each equals the single one of its seed, as its two noises come from its own generator."""
    _, both = ours(pipe, seed=3, num_images=2)
    for seed, image in zip((3, 4), both):
        assert_same_pictures(ours(pipe, seed=seed)[1], image[None])
    _, prompts = ours(pipe, prompt=[PROMPT, "red cat"], seed=3)
    assert_same_pictures(ours(pipe, prompt="red cat", seed=3)[1], prompts[1:])


def test_noise_and_pictures_between_two(pipe):
    other = picture(1, LOW.size)
    same, = pipe("cat", tinyldm.Between(LOW, other, 0.0), num_inference_steps=2)
    assert np.array_equal(same, pipe("cat", LOW, num_inference_steps=2)[0])
    for changed in (pipe("cat", tinyldm.Between(LOW, other, 0.5), num_inference_steps=2),
                    pipe("cat", LOW, num_inference_steps=2, noise="numpy")):
        assert not np.array_equal(same, changed[0])


@pytest.mark.parametrize("options, message", [
    ({"image": None}, "an upscaler enlarges a picture: give an image"),
    ({"image": "cat.png"}, "image must be a PIL image, not a str"),
    ({"image": np.zeros((8, 8, 3))}, "image must be a PIL image, not a ndarray"),
    ({"image": Image.new("RGB", (3, 50))}, "the image is 3x50 pixels: give one of at least 4x4"),
    ({"image": Image.new("RGB", (2049, 8))},
     "is 2049x8 pixels, and would become 4 times .*: give one of at most 2048 pixels per side"),
    ({"noise_level": 351}, "noise_level must be a whole number from 0 to 350, not 351"),
    ({"noise_level": -1}, "noise_level must be"), ({"noise_level": 2.5}, "noise_level must be"),
    ({"noise_level": True}, "noise_level must be a number, not True"),
    ({"noise_level": None}, "noise_level must be"), ({"noise_level": "20"}, "not '20'"),
    ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
    ({"negative_prompt": ["a", "b"]}, "negative_prompt must be one text"),
    ({"prompt": 5}, "a prompt must be a string"), ({"clip_skip": 2}, "clip_skip must be from 0"),
    ({"num_inference_steps": 1001}, "the number of steps"), ({"sampler": "x"}, "unknown sampler"),
    ({"latents": np.zeros((1, 64, 80, 4))}, r"shape \(1, 16, 20, 4\)"),
    ({"strength": 0.5}, "there is no option 'strength'"), ({"width": 64}, "no option 'width'"),
])
def test_wrong_options(pipe, options, message):
    options = {"prompt": "cat", "image": LOW} | options
    with pytest.raises(TinyldmError, match=message) as error:
        pipe.stream(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_pictures_of_every_kind(pipe, mode):
    image, = pipe("cat", LOW.convert("L" if mode == "LA" else mode).convert(mode),
                  num_inference_steps=1)
    assert image.size == (80, 64)


def test_the_command_draws(folder, tmp_path):
    LOW.save(tmp_path / "low.png")
    done = run("red cat", "--weights", folder, "--image", "low.png", "--noise-level", "50",
               "--steps", "2", "--seed", "5", "--output", "high.png", folder=tmp_path)
    assert not done.returncode, done.stderr
    with Image.open(tmp_path / "high.png") as image:
        assert image.size == (80, 64) and "Noise level: 50" in image.text["parameters"]
        expected, = load(folder)("red cat", LOW, 50, num_inference_steps=2, seed=5)
        assert np.array_equal(image, expected)
    for given, message in [(["--weights", folder], "give an image"),
                           (["--weights", folder, "--image", "low.png", "--strength", "0.5"],
                            "the upscaler draws without --strength: leave it out"),
                           (["--weights", folder, "--image", "low.png", "--noise-level", "999"],
                            "noise_level must be a whole number from 0 to 350")]:
        done = run("red cat", *given, folder=tmp_path)
        assert done.returncode == 2 and message in done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("error: ")


# ---- folders --------------------------------------------------------------------------------

def test_saving(pipe, tmp_path):
    tinyldm.save(pipe, tmp_path / "saved")
    assert_same_drawing(ours(pipe), reference(tmp_path / "saved"))
    again = load(tmp_path / "saved")
    assert again.max_noise_level == 350
    assert np.array_equal(again("cat", LOW, num_inference_steps=2)[0],
                          pipe("cat", LOW, num_inference_steps=2)[0])


def test_diffusers_own_folder(pipe, folder, tmp_path):
    diffusers.StableDiffusionUpscalePipeline.from_pretrained(folder).save_pretrained(tmp_path)
    assert_same_drawing(ours(load(tmp_path)), reference(folder))


def test_old_files_of_the_vae_lack_its_scaling_factor(folder, tmp_path):
    """diffusers then puts in 0.08333 in place of Stable Diffusion's, and so does ours."""
    copied = shutil.copytree(folder, tmp_path / "copy")
    config = tinyldm.files.read_json(copied / "vae" / "config.json")
    del config["scaling_factor"]
    tinyldm.files.write_json(copied / "vae" / "config.json", config)
    assert_same_drawing(ours(load(copied)), reference(folder))
    change_json(copied / "vae" / "config.json", scaling_factor=0.2)
    with pytest.warns(UserWarning, match="scaling_factor is 0.2, but .* with 0.08333, which is"):
        assert load(copied).vae.scaling_factor == 0.08333


def test_another_vae_enlarges_otherwise_and_a_note_says_so(tmp_path):
    """diffusers, too, enlarges by the VAE's factor, here 8."""
    folder = upscaler(tmp_path / "x8", vae=make_vae((8, 8, 16, 16), scaling_factor=0.08333))
    with pytest.warns(UserWarning, match="downsampling factor is 8, so pictures become 8 times"):
        pipe = load(folder)
    low = picture(size=(17, 8))
    assert_same_drawing(ours(pipe, low), reference(folder, low))
    assert pipe("cat", low, num_inference_steps=1)[0].size == (128, 64)


@pytest.mark.parametrize("part, changes, message", [
    ("model_index.json", {"max_noise_level": 1000}, "max_noise_level is 1000, but .* 1000 levels"),
    ("model_index.json", {"max_noise_level": "350"}, "max_noise_level must be"),
    ("unet/config.json", {"num_class_embeds": None}, "unexpected"),
    ("unet/config.json", {"num_class_embeds": 100}, "wrong shape"),
    ("unet/config.json", {"only_cross_attention": False}, "wrong shape"),
    ("unet/config.json", {"only_cross_attention": [True]}, "only_cross_attention has 1 entries"),
    ("unet/config.json", {"in_channels": 4}, "wrong shape"),
    ("vae/config.json", {"latent_channels": 8}, "wrong shape"),
    ("low_res_scheduler/scheduler_config.json", {"beta_end": 3}, "beta_end must be"),
    ("low_res_scheduler/scheduler_config.json", {"num_train_timesteps": 350}, "350 levels"),
    ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type must be"),
])
def test_damaged_folders(folder, tmp_path, part, changes, message):
    copied = shutil.copytree(folder, tmp_path / "copy")
    change_json(copied / part, **changes)
    with pytest.raises(TinyldmError, match=message):
        load(copied)


def test_a_part_is_missing(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copied / "low_res_scheduler")
    with pytest.raises(TinyldmError, match="expected a folder .*low_res_scheduler, found none"):
        load(copied)


def test_parts_that_do_not_fit(pipe):
    def with_unet(**changes):
        unet = type(pipe.unet)(pipe.unet.config | changes)
        return type(pipe)(pipe.tokenizer, pipe.text_encoder, unet, pipe.vae, pipe.scheduler,
                          pipe.low_res_scheduler)

    for changes, message in (
            ({"in_channels": 4}, "in_channels is 4, but the VAE's latent_channels is 4 and a pict"),
            ({"num_class_embeds": None}, "class embedding is None, but this pipeline's is a table"),
            ({"class_embed_type": "timestep"}, "class embedding is timestep, but"),
            ({"cross_attention_dim": 8}, "cross_attention_dim is 8, but the text encoder's")):
        with pytest.raises(TinyldmError, match=message) as error:
            with_unet(**changes)
        assert "\n" not in str(error.value)
