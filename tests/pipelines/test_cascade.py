"""The cascade of pixel models against diffusers' stages of DeepFloyd IF, and against loops of its
classes; CLIP's context stands in for T5's."""
import functools
import shutil
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image

import tinyldm
from tests.support.command import run
from tests.support.drawing import NEGATIVE, PROMPT, assert_same_drawing
from tests.support.extra import F, diffusers, torch, transformers
from tests.support.pictures import picture
from tests.support.reference import float32_noise, nchw, nhwc, widen_embeddings
from tests.support.small_pipelines import cascade, change_json
from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.errors import TinyldmError
from tinyldm.images import to_pil
from tinyldm.pipelines.cascade import CascadeRequest
from tinyldm.pipelines.loading import load

STEPS, SUPER_RES_STEPS = 4, 3
SMALL, LARGE = (6, 6), (16, 16)
LOW = picture(size=SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """DDPM with a learned variance and dynamic thresholding."""
    return cascade(tmp_path_factory.mktemp("cascade"))


@pytest.fixture(scope="module")
def ddim_folder(tmp_path_factory):
    """DDIM with v-prediction and static thresholding."""
    return cascade(tmp_path_factory.mktemp("ddim"), variance=False)


@pytest.fixture(scope="module")
def pipe(folder):
    return load(folder)


class Reference:
    """The parts of a folder in diffusers, in float64."""

    def __init__(self, folder):
        diffusers.utils.logging.set_verbosity_error()
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").double()
        self.unets = [diffusers.UNet2DConditionModel.from_pretrained(
            folder / part, torch_dtype=torch.float64) for part in ("unet", "super_res")]
        for unet in self.unets:
            widen_embeddings(unet)
        self.schedulers, self.states = [self.scheduler(folder / part) for part in (
            "scheduler", "super_res_scheduler", "low_res_scheduler")], []
        for scheduler in self.schedulers:
            self.keep_states(scheduler)

    @staticmethod
    def scheduler(folder):
        config = tinyldm.files.read_json(folder / "scheduler_config.json")
        return getattr(diffusers, config["_class_name"]).from_config(config)

    def keep_states(self, scheduler):
        step = scheduler.step

        @functools.wraps(step)                          # diffusers asks for its signature
        def kept(*arguments, **keywords):
            output = step(*arguments, **keywords)
            self.states.append(nhwc(output[0]))
            return output
        scheduler.step = kept

    def context(self, text):
        ids = self.tokenizer(text, padding="max_length", max_length=77, truncation=True,
                             return_tensors="pt").input_ids
        with torch.no_grad():
            return self.encoder(ids).last_hidden_state

    def by_deepfloyd(self, generator, scales, noise_level, image=None):
        """Both stages by IFPipeline and IFSuperResolutionPipeline; image: without the first."""
        unet, super_res = self.unets
        rest = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor",
                              "watermarker")) | {"requires_safety_checker": False}
        options = {"prompt_embeds": self.context(PROMPT), "output_type": "pt",
                   "negative_prompt_embeds": self.context(NEGATIVE), "generator": generator}
        if image is None:
            base = diffusers.IFPipeline(unet=unet, scheduler=self.schedulers[0], **rest)
            base.set_progress_bar_config(disable=True)
            image = base(guidance_scale=scales[0], num_inference_steps=STEPS, **options).images
        upscaler = diffusers.IFSuperResolutionPipeline(
            unet=super_res, scheduler=self.schedulers[1],
            image_noising_scheduler=self.schedulers[2], **rest)
        upscaler.set_progress_bar_config(disable=True)
        upscaler(image=image, height=LARGE[0], width=LARGE[1], guidance_scale=scales[1],
                 noise_level=noise_level, num_inference_steps=SUPER_RES_STEPS, **options)

    @torch.no_grad()
    def by_hand(self, generator, scales, noise_level):
        """Both stages as loops, for schedulers that DeepFloyd's pipelines do not take."""
        context = torch.cat([self.context(NEGATIVE), self.context(PROMPT)])

        def sample(unet, scheduler, steps, scale, x, *beside, **labels):
            scheduler.set_timesteps(steps)
            for t in scheduler.timesteps:
                uncond, cond = unet(torch.cat([torch.cat([x, *beside], 1)] * 2), t, context,
                                    **labels).sample.chunk(2)
                x = scheduler.step(uncond + scale * (cond - uncond), t, x).prev_sample
            return x

        def noise(size):
            return torch.randn((1, 3, *size), generator=generator).double()

        small = sample(self.unets[0], self.schedulers[0], STEPS, scales[0], noise(SMALL))
        x = noise(LARGE)
        low = F.interpolate(small, LARGE, mode="bilinear", align_corners=True)
        level = torch.tensor([noise_level])
        low = self.schedulers[2].add_noise(low, noise(LARGE), level)
        sample(self.unets[1], self.schedulers[1], SUPER_RES_STEPS, scales[1], x, low,
               class_labels=torch.cat([level] * 2))

    def drawing(self, way, seed, scales, noise_level, **options):
        with float32_noise():
            way(torch.Generator().manual_seed(seed), scales, noise_level, **options)
        pictures = (self.states[-1] / 2 + 0.5).clip(0, 1) * 255
        return self.states, pictures.round().astype(np.uint8)


def ours(pipe, seed, scales, noise_level, **options):
    options |= {"negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "seed": seed,
                "super_res_steps": SUPER_RES_STEPS, "guidance_scale": scales[0],
                "super_res_guidance_scale": scales[1], "noise_level": noise_level}
    states = list(pipe.stream(PROMPT, **options))
    assert [state.step for state in states] == list(range(len(states)))
    images = pipe(PROMPT, **options)
    return [state.latents for state in states], np.stack([np.asarray(image) for image in images])


# ---- against diffusers ----------------------------------------------------------------------

@pytest.mark.parametrize("seed, scales, noise_level", [
    (0, (7.0, 4.0), 250), (3, (3.0, 3.0), 0), (5, (2.0, 6.0), 999)])
def test_both_stages_are_those_of_deepfloyd(folder, pipe, seed, scales, noise_level):
    reference = Reference(folder)
    theirs = reference.drawing(reference.by_deepfloyd, seed, scales, noise_level)
    found = ours(pipe, seed, scales, noise_level)
    assert len(found[0]) == STEPS + SUPER_RES_STEPS
    assert_same_drawing(found, theirs)


def test_super_resolution_of_a_picture(folder, pipe):
    reference = Reference(folder)
    theirs = reference.drawing(reference.by_deepfloyd, 2, (1.0, 4.0), 100, image=LOW)
    assert_same_drawing(ours(pipe, 2, (1.0, 4.0), 100, image=LOW), theirs)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_schedulers(ddim_folder, dtype):
    reference = Reference(ddim_folder)
    theirs = reference.drawing(reference.by_hand, 4, (7.0, 4.0), 120)
    assert_same_drawing(ours(load(ddim_folder, dtype=dtype), 4, (7.0, 4.0), 120), theirs)


@pytest.mark.parametrize("how, changes", [
    ("static", {"clip_sample": True, "thresholding": False}),
    ("dynamic", {"thresholding": True, "sample_max_value": 1e9}),
    ("none", {"clip_sample": False, "thresholding": False})])
def test_thresholding(ddim_folder, tmp_path, how, changes):
    """The option does what a scheduler's own config does."""
    config = {"clip_sample": False} | changes
    copied = shutil.copytree(ddim_folder, tmp_path / "copy")
    for part in ("scheduler", "super_res_scheduler"):
        change_json(copied / part / "scheduler_config.json", **config)
    reference = Reference(copied)
    theirs = reference.drawing(reference.by_hand, 1, (7.0, 4.0), 50)
    states, _ = ours(load(ddim_folder), 1, (7.0, 4.0), 50, thresholding=how)
    for state, expected in zip(states, theirs[0], strict=True):
        np.testing.assert_allclose(state, expected, atol=1e-4 * expected.std())


def test_thresholding_keeps_the_pixels_within_their_range(folder, pipe):
    def largest(how):
        return max(abs(state.pred_x0).max() for state in pipe.stream(
            "cat", num_inference_steps=3, guidance_scale=15, sampler="ddim", thresholding=how))
    assert largest("none") > 2
    assert largest("static") <= 1 and largest("dynamic") <= 1 and largest(None) <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws(ddim_folder, sampler):
    *_, state = load(ddim_folder).stream("cat", num_inference_steps=2, sampler=sampler)
    assert state.latents.shape == (1, *LARGE, 3) and np.isfinite(state.latents).all()


# ---- the interface --------------------------------------------------------------------------

def test_defaults(pipe):
    request = pipe.complete(pipe.request(("cat",), {}))
    assert (request.num_inference_steps, request.super_res_steps, request.noise_level,
            request.sampler, request.super_res_sampler) == (50, 50, 100, "ddpm", "ddpm")
    assert request.guidance_scale == request.super_res_guidance_scale == 7
    assert pipe.steps_made(request) == 100 and pipe.picture_size(request) == LARGE
    assert [field.name for field in fields(CascadeRequest)][:5] == [
        "prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "noise_level"]
    request = pipe.complete(pipe.request(("cat",), {"sampler": "DDIM", "super_res_sampler": "UniPC",
                                                    "image": LOW, "num_inference_steps": 3}))
    assert (request.sampler, request.super_res_sampler) == ("ddim", "unipc")
    assert pipe.steps_made(request) == 3
    assert repr(pipe).startswith("<Cascade 6x6 to 16x16: text_encoder ")


def test_several_pictures(pipe):
    one, two = pipe("cat", num_inference_steps=2, seed=3, num_images=2)
    for seed, image in ((3, one), (4, two)):
        again, = pipe("cat", num_inference_steps=2, seed=seed)
        assert abs(np.asarray(image, int) - np.asarray(again)).max() <= 1
    assert len(pipe(["cat", "a red cat"], num_inference_steps=1, image=LOW)) == 2


def test_given_latents_and_previews(pipe):
    noise = tinyldm.noise.randn((1, 3, *SMALL), 5).transpose(0, 2, 3, 1)
    given = next(pipe.stream("cat", num_inference_steps=2, latents=noise, seed=5, sampler="ddim"))
    seeded = next(pipe.stream("cat", num_inference_steps=2, seed=5, sampler="ddim"))
    np.testing.assert_array_equal(given.latents, seeded.latents)
    small = pipe.decode(given.pred_x0)
    assert small.shape == (1, *LARGE, 3) and abs(small).max() <= 1
    np.testing.assert_allclose(small[:, ::15, ::15], given.pred_x0[:, ::5, ::5], atol=1e-6)


def test_an_image_of_another_size_is_resized_and_named(pipe):
    with pytest.warns(UserWarning, match="image of 70x59 pixels is resized to 6x6, which"):
        image, = pipe("cat", image=picture(), super_res_steps=1)
    assert image.size == LARGE


@pytest.mark.parametrize("options, message", [
    ({"noise_level": 1000}, "noise_level must be a whole number from 0 to 999, not 1000"),
    ({"noise_level": -1}, "noise_level must be"), ({"noise_level": 0.5}, "noise_level must be"),
    ({"thresholding": "strong"}, "thresholding must be none, static or dynamic, not 'strong'"),
    ({"thresholding": True}, "thresholding must be none, static or dynamic, not True"),
    ({"super_res_steps": 0}, "super_res_steps must be a whole number from 1 to 1000, not 0"),
    ({"super_res_guidance_scale": "x"}, "super_res_guidance_scale must be a finite number"),
    ({"super_res_sampler": "x"}, "unknown sampler 'x'"), ({"sampler": "y"}, "unknown sampler 'y'"),
    ({"sampler": "euler"}, "thresholding = true.*: choose ddpm"),
    ({"super_res_sampler": "pndm"}, "thresholding = true.*: choose ddpm"),
    ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number"),
    ({"prompt": 3}, "a prompt must be a string"), ({"image": 3}, "image must be a PIL image"),
    ({"latents": np.zeros((1, *LARGE, 3))}, r"shape \(1, 6, 6, 3\)"),
    ({"latents": np.zeros((1, *SMALL, 3)), "image": LOW}, r"shape \(1, 16, 16, 3\)"),
    ({"width": 64}, "there is no option 'width'"), ({"clip_skip": 5}, "clip_skip must be from 0"),
    ({"super_res_steps": True}, "super_res_steps must be a number, not True"),
    ({"seed": [False]}, "seed must be a number, not False"),
    ({"super_res_guidance_scale": np.True_}, "super_res_guidance_scale must be a number, not True"),
    ({"seed": tinyldm.Between(1, True, 0.5)}, "seed must be a number, not True"),
])
def test_wrong_options(pipe, options, message):
    with pytest.raises(TinyldmError, match=message) as error:
        pipe.stream(**({"prompt": "cat"} | options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("latents, message", [
    (np.zeros((1, 8, 8, 3)), r"the sides \(6, 6\) or \(16, 16\), not \(1, 8, 8, 3\)"),
    (np.zeros((1, *SMALL, 4)), "must be pixels of shape"), (np.zeros(3), "must be pixels"),
    (np.full((1, *LARGE, 3), np.nan), "must be finite")])
def test_wrong_pixels(pipe, latents, message):
    with pytest.raises(TinyldmError, match=message):
        pipe.decode(latents)


def test_the_command_draws(folder, pipe, tmp_path):
    done = run("red cat", "--weights", folder, "--steps", "2", "--noise-level", "30", "--output",
               "out.png", "--animate", "film.gif", folder=tmp_path)
    assert not done.returncode, done.stderr
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == LARGE and "Noise level: 30" in image.text["parameters"]
        expected, = pipe("red cat", num_inference_steps=2, noise_level=30)
        assert abs(np.asarray(image, int) - np.asarray(expected)).max() <= 1
    with Image.open(tmp_path / "film.gif") as film:
        assert film.size == LARGE and film.n_frames == 4
    done = run("red cat", "--weights", folder, "--width", "64", folder=tmp_path)
    assert done.returncode == 2
    assert "error: the cascade draws without --width: leave it out" in done.stderr


# ---- folders --------------------------------------------------------------------------------

def test_saving(pipe, tmp_path):
    tinyldm.save(pipe, tmp_path / "saved")
    again = load(tmp_path / "saved")
    for one, two in zip(pipe.stream("cat", num_inference_steps=2),
                        again.stream("cat", num_inference_steps=2), strict=True):
        np.testing.assert_array_equal(one.latents, two.latents)
    reference = Reference(tmp_path / "saved")           # diffusers reads every part
    theirs = reference.drawing(reference.by_deepfloyd, 0, (7.0, 4.0), 250)
    assert_same_drawing(ours(again, 0, (7.0, 4.0), 250), theirs)
    assert to_pil(pipe.decode(nhwc(nchw(one.latents))))[0].size == LARGE


def test_a_prediction_type_is_that_of_both_stages(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    change_json(copied / "super_res_scheduler" / "scheduler_config.json", prediction_type="epsilon")
    with pytest.warns(UserWarning, match="predicts epsilon: v_prediction is used, as asked for"):
        pipe = load(copied, prediction_type="v_prediction")
    assert [schedule.prediction_type for schedule in
            (pipe.schedule, pipe.super_res_schedule, pipe.low_res_schedule)] == [
                "v_prediction", "v_prediction", "epsilon"]


def test_more_steps_than_the_second_stage_has(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    change_json(copied / "super_res_scheduler" / "scheduler_config.json", num_train_timesteps=40)
    with pytest.raises(TinyldmError, match="super_res_steps must be .* from 1 to 40, not 50"):
        load(copied).stream("cat")


@pytest.mark.parametrize("part, changes, message", [
    ("super_res/config.json", {"class_embed_type": None}, "unexpected"),
    ("super_res/config.json", {"in_channels": 3}, "wrong shape"),
    ("super_res/config.json", {"sample_size": None}, "sample_size, .* is null: expected a number"),
    ("super_res/config.json", {"sample_size": 5}, "of 6x6 pixels, and super_res makes them 5x5"),
    ("unet/config.json", {"sample_size": "6"}, "sample_size must be"),
    ("unet/config.json", {"_class_name": "UNet3D"}, "names the model UNet3D"),
    ("super_res_scheduler/scheduler_config.json", {"thresholding": "dynamic"},
     "thresholding must be true or false"),
    ("scheduler/scheduler_config.json", {"dynamic_thresholding_ratio": 7},
     "dynamic_thresholding_ratio must be a number between 0 and 1, not 7"),
    ("low_res_scheduler/scheduler_config.json", {"beta_schedule": "x"}, "beta_schedule must be"),
    ("model_index.json", {"_class_name": "ImagenPipeline"}, "names the pipeline ImagenPipeline"),
])
def test_damaged_folders(folder, tmp_path, part, changes, message):
    copied = shutil.copytree(folder, tmp_path / "copy")
    change_json(copied / part, **changes)
    with pytest.raises(TinyldmError, match=message):
        load(copied)


def test_parts_that_do_not_fit(pipe):
    def with_parts(unet=None, super_res=None):
        unet, super_res = (type(own)(own.config | (changes or {})) for own, changes in (
            (pipe.unet, unet), (pipe.super_res, super_res)))
        return type(pipe)(pipe.tokenizer, pipe.text_encoder, unet, super_res, pipe.scheduler,
                          pipe.super_res_scheduler, pipe.low_res_scheduler)

    for changes, message in (
            ({"unet": {"in_channels": 4}}, "the UNet's in_channels is 4, but a picture has 3"),
            ({"unet": {"class_embed_type": "timestep"}}, "the UNet's class embedding is timestep"),
            ({"super_res": {"out_channels": 4}}, "super_res UNet's out_channels is 4, but two"),
            ({"super_res": {"class_embed_type": None, "num_class_embeds": 9}},
             "super_res UNet's class embedding is a table, but this pipeline's is timestep")):
        with pytest.raises(TinyldmError, match=message) as error:
            with_parts(**changes)
        assert "\n" not in str(error.value)
