"""DDPM in pixels against diffusers' pipelines: whole drawings, files, labels, bad options."""
import json
from functools import cache

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import tinyldm
from tests.support import strict
from tests.support.models import PIXELS
from tests.support.pictures import picture
from tests.support.reference import float32_noise, randomise, widen_embeddings
from tests.support.tolerance import assert_allclose, assert_close
from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.errors import TinyldmError
from tinyldm.models import UNet2DModel
from tinyldm.pipelines.ddpm import DDPM

SMALL = PIXELS | {"sample_size": 8, "norm_eps": 1e-6, "downsample_padding": 0,
                  "flip_sin_to_cos": False, "freq_shift": 1}
LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02,
          "beta_schedule": "linear", "clip_sample": True}
KINDS = ["DDPM", "DDIM", "PNDM"]


@cache
def reference(kind="DDPM", variance_type="fixed_large", skip_prk_steps=True, **changes):
    """diffusers' pipeline with a small random UNet."""
    torch.manual_seed(0)
    unet = randomise(diffusers.UNet2DModel(**SMALL | changes)).eval()
    with torch.no_grad():
        unet.conv_out.weight *= 0.3                     # noise of about the right size
    own = {"DDPM": {"variance_type": variance_type}, "DDIM": {},
           "PNDM": {"skip_prk_steps": skip_prk_steps}}
    scheduler = getattr(diffusers, f"{kind}Scheduler")(
        **{key: value for key, value in LINEAR.items() if kind != "PNDM" or key != "clip_sample"},
        **own[kind])
    pipe = getattr(diffusers, f"{kind}Pipeline")(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def to_root(folder):
    """The layout of google/ddpm-cifar10-32: no folder for the model and the scheduler."""
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            file.rename(folder / file.name)
        (folder / part).rmdir()


def pictures(pipe, seed, steps, **options):
    """Ours: the last step's images, (B,H,W,3) in [0, 1]."""
    *_, state = pipe.stream(seed=seed, num_inference_steps=steps, **options)
    return pipe.decode(state.latents) / 2 + 0.5


def in_float64(pipe, seed, steps):
    """Theirs, computed in float64 from float32's noise."""
    pipe.unet.double()
    widen_embeddings(pipe)
    hook = pipe.unet.register_forward_pre_hook(     # PNDM's pipeline draws float32
        lambda unet, inputs: (inputs[0].double(), *inputs[1:]))
    with float32_noise():
        found = pipe(generator=torch.Generator().manual_seed(seed), num_inference_steps=steps,
                     output_type="np").images
    hook.remove()
    pipe.unet.float()
    return found


@pytest.mark.parametrize("kind", [("DDPM", "fixed_small"), ("DDPM", "fixed_large"), ("DDIM",),
                                  ("PNDM",), ("PNDM", "", False)], ids=str)
@pytest.mark.parametrize("root", [False, True])
def test_whole_drawings(kind, root, tmp_path):
    theirs = in_float64(reference(*kind), 3, 6)
    reference(*kind).save_pretrained(tmp_path)
    if root:
        to_root(tmp_path)
    pipe = tinyldm.load(tmp_path)
    ours = pictures(pipe, 3, 6)
    assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    image, = pipe(seed=3, num_inference_steps=6)
    assert abs(np.asarray(image) - 255 * theirs[0]).max() < 1


def test_the_oldest_files(tmp_path):
    """As google/ddpm-cifar10-32: a pickle, with the first names of attention's matrices."""
    reference().save_pretrained(tmp_path, safe_serialization=False)
    to_root(tmp_path)
    expected = pictures(tinyldm.load(tmp_path), 0, 2)
    file = tmp_path / "diffusion_pytorch_model.bin"
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = torch.load(file)
    for new, old in words.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    torch.save(tensors, file)
    np.testing.assert_array_equal(pictures(tinyldm.load(tmp_path), 0, 2), expected)


@pytest.mark.parametrize("kind, sampler", [("DDPM", "ddpm"), ("DDIM", "ddim"), ("PNDM", "pndm")])
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_from_a_picture(kind, sampler, strength, tmp_path):
    """SDEdit: noise of the first step that is made is added to the picture, then as always.

    diffusers' scheduler and UNet, step by step; the seed's first numbers are that noise.
    """
    theirs = reference(kind)
    theirs.save_pretrained(tmp_path)
    image = picture(size=(8, 8))
    x_start = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double() / 127.5 - 1
    unet, scheduler, generator = theirs.unet.double(), theirs.scheduler, torch.Generator()
    widen_embeddings(theirs)
    scheduler.set_timesteps(6)
    generator.manual_seed(3)
    timesteps = scheduler.timesteps[6 - int(6 * strength):]     # PNDM's by PLMS: a call more
    with float32_noise(), torch.no_grad():
        noise = torch.randn((1, 3, 8, 8), generator=generator).double()
        x = scheduler.add_noise(x_start, noise, timesteps[:1])
        for t in timesteps:
            options = {"generator": generator} if kind == "DDPM" else {}
            x = scheduler.step(unet(x, t).sample, t, x, **options).prev_sample
    unet.float()
    pipe = tinyldm.load(tmp_path)
    states = list(pipe.stream(seed=3, num_inference_steps=6, image=image, strength=strength,
                              sampler=sampler))
    assert_close(states[-1].latents, x.permute(0, 2, 3, 1).numpy(), 1e-4)
    request = pipe.complete(pipe.request((), {"image": image, "num_inference_steps": 6,
                                              "strength": strength}))
    assert pipe.steps_made(request) == int(6 * strength)


def test_a_picture_is_kept_more_with_less_strength():
    pipe, image = random_pipe(), picture(size=(8, 8))
    far = [abs(np.asarray(pipe(image=image, strength=strength, num_inference_steps=50)[0], int)
               - np.asarray(image)).mean() for strength in (0.02, 0.2, 0.8)]
    assert far[0] < 5 and far[0] < far[1] < far[2]
    default, given = (pipe(image=image, num_inference_steps=5, **options)[0]
                      for options in ({}, {"strength": 0.8}))
    assert np.array_equal(default, given)


def test_several_pictures_from_one_and_between_two():
    pipe, image, other = random_pipe(num_class_embeds=5), picture(size=(8, 8)), picture(1, (8, 8))
    options = {"num_inference_steps": 4, "strength": 0.5, "seed": 3}
    both = pipe(image=image, label=[1, 4], **options)
    for label, drawn in zip((1, 4), both):
        assert abs(np.asarray(drawn, int)
                   - np.asarray(pipe(image=image, label=label, **options)[0])).max() <= 1
    ends = [pipe(image=tinyldm.Between(image, other, weight), label=1, **options)[0]
            for weight in (0.0, 0.5, 1.0)]
    assert np.array_equal(ends[0], pipe(image=image, label=1, **options)[0])
    assert np.array_equal(ends[2], pipe(image=other, label=1, **options)[0])
    assert not np.array_equal(ends[1], ends[0])


def test_pictures_of_other_sizes_and_colours():
    grey, large = random_pipe(in_channels=1, out_channels=1), picture(mode="RGBA")
    options = {"num_inference_steps": 50, "strength": 0.02}
    with pytest.warns(UserWarning, match="image of 70x59 pixels is resized to 8x8, the size of"):
        drawn, = grey(image=large, **options)
    wanted = np.asarray(large.convert("RGB").convert("L").resize((8, 8), Image.Resampling.LANCZOS))
    assert abs(np.asarray(drawn.convert("L"), int) - wanted).mean() < 6


def test_the_published_tiny_pipeline():
    """test_ddpm.py of diffusers: torch's initialisation and noise from seed 0."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4, sample_size=8,
        in_channels=3, out_channels=3, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    ours = UNet2DModel(dict(unet.config))
    ours.load_state_dict(unet.state_dict())
    found = pictures(DDPM(ours, {"_class_name": "DDPMScheduler"}), 0, 2)
    assert_allclose(found[0, -3:, -3:, -1].reshape(-1), [
        0.0, 0.9996672, 0.00329116, 1.0, 0.9995991, 1.0, 0.0060907, 0.00115037, 0.0],
        atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_save_writes_diffusers_draws(kind, tmp_path):
    reference(kind).save_pretrained(tmp_path / "pipe")
    pipe = tinyldm.load(tmp_path / "pipe")
    tinyldm.save(pipe, tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    theirs = getattr(diffusers, index["_class_name"]).from_pretrained(tmp_path / "again")
    theirs.set_progress_bar_config(disable=True)
    assert_allclose(pictures(pipe, 1, 4), in_float64(theirs, 1, 4), atol=1e-4, rtol=0)
    np.testing.assert_array_equal(pictures(tinyldm.load(tmp_path / "again"), 1, 4),
                                  pictures(pipe, 1, 4))


@pytest.mark.parametrize("kind, steps, sampler", [
    ("DDPM", 1000, "ddpm"), ("DDIM", 50, "ddim"), ("PNDM", 50, "pndm")])
def test_defaults(kind, steps, sampler):
    unet = UNet2DModel(SMALL)
    scheduler = LINEAR | {"_class_name": "DDPMScheduler", "skip_prk_steps": True}
    pipe = DDPM(unet, scheduler, kind=f"{kind}Pipeline")
    assert (pipe.num_inference_steps, pipe.sampler()) == (steps, sampler)
    short = DDPM(unet, LINEAR | {"num_train_timesteps": 20})
    assert short.num_inference_steps == 20


@pytest.mark.filterwarnings("error::UserWarning")
def test_pndm_begins_by_runge_kutta_unless_the_file_says_otherwise():
    pipe = DDPM(random_pipe().unet, LINEAR, kind="PNDMPipeline")
    assert len(list(pipe.stream(num_inference_steps=6))) == 15
    assert pipe(num_inference_steps=4)
    with pytest.raises(TinyldmError, match="at least 4 steps, not 3: take more, or another"):
        pipe(num_inference_steps=3)
    assert pipe(num_inference_steps=3, sampler="ddim")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddpm")
    reference().save_pretrained(folder)
    return tinyldm.load(folder)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if "_karras" not in name])
def test_any_sampler_draws(pipe, sampler):
    images = pipe(seed=1, num_inference_steps=3, sampler=sampler)
    assert [image.size for image in images] == [(8, 8)]


def test_images_latents_and_seeds(pipe):
    first, second = pipe(seed=5, num_inference_steps=3, num_images=2)
    alone, = pipe(6, 3)
    assert (np.asarray(second) == np.asarray(alone)).all()
    latents = tinyldm.noise.randn((1, 3, 8, 8), 5).transpose(0, 2, 3, 1)
    given, = pipe(seed=5, num_inference_steps=3, latents=latents, sampler="ddim")
    drawn, = pipe(seed=5, num_inference_steps=3, sampler="ddim")
    assert (np.asarray(given) == np.asarray(drawn)).all()
    assert repr(pipe).startswith("<DDPM: unet ")


def random_pipe(variance_type="fixed_small", steps=None, **changes):
    """Ours alone, with random weights."""
    rng, unet = np.random.default_rng(0), UNet2DModel(SMALL | changes)
    for parameter in unet.parameters():
        size = np.prod(parameter.shape[:-1]) if len(parameter.shape) > 1 else 100
        parameter.data = (rng.standard_normal(parameter.shape) / size ** 0.5).astype(np.float32)
    return DDPM(unet, LINEAR | {"_class_name": "DDPMScheduler", "variance_type": variance_type})


@pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small"])
def test_a_model_that_also_predicts_the_variance(variance_type):
    """Twice as many channels. DDPM uses them; other samplers, and a fixed variance, do not."""
    pipe = random_pipe(variance_type, out_channels=6)
    noise = pipe(seed=1, num_inference_steps=3)
    pipe.unet.conv_out.bias.data[3:] += 1               # a larger variance
    changed = pipe(seed=1, num_inference_steps=3)
    assert (np.asarray(noise[0]) != np.asarray(changed[0])).any() == (
        variance_type == "learned_range")
    assert pipe(seed=1, num_inference_steps=3, sampler="euler")


def test_learned_range_as_diffusers(tmp_path):
    theirs = reference("DDPM", "learned_range", out_channels=6)
    theirs.save_pretrained(tmp_path)
    assert_allclose(pictures(tinyldm.load(tmp_path), 2, 5), in_float64(theirs, 2, 5), atol=1e-4,
                    rtol=0)


def test_labels_are_the_class_labels_of_the_unet():
    pipe = random_pipe(num_class_embeds=5)
    two = pictures(pipe, 4, 3, label=[1, 4], num_images=2)
    assert two.shape == (4, 8, 8, 3)
    for i, (label, seed) in enumerate([(1, 4), (1, 5), (4, 4), (4, 5)]):
        assert_close(two[i], pictures(pipe, seed, 3, label=label)[0], 1e-4)
    assert abs(two[0] - two[2]).max() > 1e-3


def test_labels_of_the_other_kinds():
    times = random_pipe(class_embed_type="timestep")
    assert abs(pictures(times, 4, 3, label=7.5) - pictures(times, 4, 3, label=90)).max() > 1e-3
    vectors = random_pipe(class_embed_type="identity")
    a, b = np.zeros(32), np.ones(32)
    assert_close(pictures(vectors, 4, 3, label=[a, b])[1], pictures(vectors, 4, 3, label=b)[0],
                 1e-4)


@pytest.mark.parametrize("changes, options, message", [
    ({}, {"label": 3}, "has no classes: leave the label out"),
    ({"num_class_embeds": 5}, {}, "give a label, a whole number from 0 to 4"),
    ({"num_class_embeds": 5}, {"label": 5}, "a label must be a whole number from 0 to 4, not 5"),
    ({"num_class_embeds": 5}, {"label": "cat"}, "from 0 to 4, not 'cat'"),
    ({"num_class_embeds": 5}, {"label": [1, None]}, "from 0 to 4, not None"),
    ({"num_class_embeds": 5}, {"label": [1, True]}, "label must be a number, not True"),
    ({}, {"num_images": True}, "num_images must be a number, not True: give one, or leave it out"),
    ({"num_class_embeds": 5}, {"label": []}, "must have at least one"),
    ({"class_embed_type": "timestep"}, {}, "give a label, a number"),
    ({"class_embed_type": "timestep"}, {"label": [1, None]}, "must be a finite number, not None"),
    ({"class_embed_type": "identity"}, {"label": [1.0]}, "a label must be 32 finite numbers"),
    ({"class_embed_type": "identity"}, {"label": [1.0] * 32}, "or several a list of such"),
    ({"class_embed_type": "identity"}, {}, "give a label, 32 numbers"),
    ({}, {"strength": 0.5}, "a mask or a strength needs an image: give one"),
    ({}, {"image": "a.png"}, "image must be a PIL image, not a str"),
    ({}, {"image": picture(), "strength": 1.5}, "strength must be from 0 to 1"),
    ({}, {"image": picture(), "strength": 0.1}, "strength 0.1 leaves none of 2 steps: take at"),
    ({}, {"image": picture(), "mask": picture()}, "there is no option 'mask'"),
    ({}, {"num_inference_steps": 1001}, "the number of steps must be a whole number"),
    ({}, {"latents": np.zeros((1, 4, 8, 3))}, r"of shape \(1, 8, 8, 3\)"),
    ({}, {"latents": np.full((1, 8, 8, 3), np.nan)}, "they hold NaN, infinity or larger numbers"),
    ({}, {"prompt": "a cat"}, "there is no option 'prompt'"),
    ({}, {"sampler": "dpm7"}, "unknown sampler"),
])
def test_bad_options_end_in_one_line(changes, options, message):
    with pytest.raises(TinyldmError, match=message) as error:
        random_pipe(**changes)(**{"num_inference_steps": 2} | options)
    assert "\n" not in str(error.value)


def test_a_learned_variance_that_the_model_does_not_predict():
    with pytest.raises(TinyldmError, match="variance_type learned needs a model that"):
        random_pipe("learned")(num_inference_steps=2)


@pytest.mark.parametrize("changes, message", [
    ({"in_channels": 4}, "in_channels and out_channels are 4 and 3"),
    ({"out_channels": 4}, "in_channels and out_channels are 3 and 4"),
    ({"sample_size": None}, "sample_size.* is None: expected multiples of 2"),
    ({"sample_size": [8, 7]}, r"is \[8, 7\]: expected multiples of 2"),
])
def test_models_that_give_no_pictures(changes, message):
    with pytest.raises(TinyldmError, match=message):
        DDPM(UNet2DModel(SMALL | changes), LINEAR)


@pytest.mark.parametrize("dtype, allowed", [("float32", 0), ("float16", 3)])
def test_on_a_gpu(dtype, allowed, tmp_path):
    """The stand-in for CuPy: the same picture as on the CPU."""
    tinyldm.save(random_pipe(num_class_embeds=5), tmp_path / "pipe")
    options = {"seed": 1, "label": [1, 2], "num_inference_steps": 3}
    expected = tinyldm.load(tmp_path / "pipe")(**options)
    with strict.installed():
        found = tinyldm.load(tmp_path / "pipe", device="cuda", dtype=dtype)(**options)
    for ours, theirs in zip(found, expected, strict=True):
        assert abs(np.asarray(ours, int) - np.asarray(theirs)).max() <= allowed


def test_grey_pictures():
    image, = random_pipe(in_channels=1, out_channels=1)(num_inference_steps=2)
    pixels = np.asarray(image)
    assert pixels.shape == (8, 8, 3) and (pixels == pixels[..., :1]).all()
