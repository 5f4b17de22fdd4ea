"""Between two prompts, seeds or pictures: torch mixes them, and diffusers draws."""
import numpy as np
import pytest

from tests.support.drawing import NEGATIVE, STEPS, Reference, assert_same_pictures
from tests.support.extra import diffusers, torch
from tests.support.pictures import SIZE, hole, picture
from tests.support.reference import float32_noise, nchw
from tests.support.small_pipelines import sd1, sdxl
from tests.support.tolerance import assert_allclose, assert_close
from tinyldm import Between, TinyldmError, load
from tinyldm.images import from_pil
from tinyldm.noise import get_generator
from tinyldm.pipelines.interpolation import BetweenGenerator, slerp

FIRST, SECOND = "a photo of an astronaut", "red cat, " * 40     # the second is read in two chunks

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:the prompt .* is read in 2 chunks")]


@pytest.fixture(scope="module", params=[sd1, sdxl], ids=lambda make: make.__name__)
def both(request, tmp_path_factory):
    folder = request.param(tmp_path_factory.mktemp(request.param.__name__))
    return load(folder), Reference(folder).pipe


def array(images):
    return np.stack([np.asarray(image) for image in images])


def draw(pipe, prompt, **options):
    return array(pipe(prompt, num_inference_steps=STEPS, guidance_scale=7.5, **options))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def on_the_arc(a, b, weight):
    angle = torch.arccos(torch.dot((a / a.norm()).flatten(), (b / b.norm()).flatten()))
    return (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)


# ---- against diffusers ----------------------------------------------------------------------

@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_prompts(both, weight):
    pipe, reference = both
    short = "red cat, made of glass"
    theirs = [reference.encode_prompt(text, device="cpu", num_images_per_prompt=1,
                                      do_classifier_free_guidance=True, negative_prompt=NEGATIVE)
              for text in (FIRST, short)]
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
             "negative_pooled_prompt_embeds"][:len(theirs[0])]
    mixed = {name: torch.lerp(one, other, weight) for name, one, other in zip(names, *theirs)}
    with float32_noise():
        images = reference(**mixed, num_inference_steps=STEPS, guidance_scale=7.5,
                           generator=generator(3)).images
    ours = draw(pipe, Between(FIRST, short, weight), negative_prompt=NEGATIVE, seed=3)
    assert_same_pictures(ours, array(images))


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_seeds(both, weight):
    pipe, reference = both
    a, b = (torch.randn((1, 4, 8, 8), generator=generator(seed)).double() for seed in (3, 11))
    images = reference(FIRST, latents=on_the_arc(a, b, weight), num_inference_steps=STEPS,
                       guidance_scale=7.5).images
    assert_same_pictures(draw(pipe, FIRST, seed=Between(3, 11, weight)), array(images))


@pytest.mark.parametrize("weight", [0.3, 0.5])
def test_pictures(both, weight):
    """diffusers also takes latents as image: here those between two, from its own VAE."""
    pipe, reference = both
    xl = "XL" if hasattr(reference, "text_encoder_2") else ""
    img2img = getattr(diffusers, f"StableDiffusion{xl}Img2ImgPipeline")(
        **reference.components, **({} if xl else {"requires_safety_checker": False}))
    img2img.set_progress_bar_config(disable=True)
    pictures, draws = (picture(0), picture(1)), generator(3)
    factor = pipe.vae.vae_scale_factor
    z = torch.randn((1, 4, SIZE[1] // factor, SIZE[0] // factor), generator=draws)
    size = z.shape[3] * factor, z.shape[2] * factor
    with torch.no_grad():
        latents = [reference.vae.encode(nchw(from_pil(image, size)).double()).latent_dist
                   for image in pictures]
    a, b = ((one.mean + one.std * z) * reference.vae.config.scaling_factor for one in latents)
    with float32_noise():
        images = img2img(FIRST, image=torch.lerp(a, b, weight), strength=0.7, generator=draws,
                         num_inference_steps=STEPS, guidance_scale=7.5).images
    ours = draw(pipe, FIRST, image=Between(*pictures, weight), strength=0.7, seed=3)
    assert_same_pictures(ours, array(images))


# ---- without a reference --------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, {"mask": hole()}])
def test_the_ends_are_those_between_which_it_lies(small, options):
    one = {"prompt": FIRST, "seed": 3, "image": picture(0)}
    other = {"prompt": SECOND, "seed": 8, "image": picture(1)}
    options = {"num_inference_steps": 3, "sampler": "euler_ancestral", "num_images": 2, **options}

    def last(arguments):
        *_, state = small.stream(**arguments, **options)
        return state.latents

    ends = [last({name: Between(one[name], other[name], weight) for name in one})
            for weight in (0, 1)]
    # The shorter prompt gets as many chunks as the longer, so the end differs a little.
    assert_close(ends[1], last(other), 1e-5, "the second")
    one["prompt"] = other["prompt"] = FIRST
    assert_close(last({name: Between(one[name], other[name], 0) for name in one}), last(one),
                 1e-5, "the first")


def test_noise_on_the_arc_stays_noise():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 64, 64), np.float32)
    for weight in (0, 0.25, 0.5, 1):
        assert abs(slerp(a, b, weight).std() - 1) < 0.02
    assert np.array_equal(slerp(a, b, 0), a) and np.array_equal(slerp(a, b, 1), b)
    assert np.array_equal(slerp(a, a, 0.5), a)


def test_one_direction_whose_cosine_is_rounded_above_1():
    for seed in range(20):
        a = np.random.default_rng(seed).standard_normal(5)
        assert_allclose(slerp(a, 3 * a, 0.5), 2 * a, rtol=1e-5, atol=1e-8)


def test_the_numbers_between_two_seeds_are_of_the_precision_of_either():
    first, second = map(get_generator("torch-cpu"), (1, 2))
    assert BetweenGenerator(first, second, 0.3).randn((1, 2)).dtype == first.randn((1,)).dtype


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan"), "half", None])
def test_a_wrong_weight(small, weight):
    message = "weight of a Between must be from 0 to 1"
    for arguments in ({"prompt": Between("a", "b", weight)},
                      {"prompt": "a", "seed": Between(1, 2, weight)},
                      {"prompt": "a", "image": Between(picture(0), picture(1), weight)}):
        with pytest.raises(TinyldmError, match=message):
            small.stream(**arguments)


@pytest.mark.parametrize("arguments, message", [
    ({"prompt": Between("a", 5, 0.5)}, "a prompt must be a string of valid Unicode, got 5"),
    ({"prompt": "a", "seed": Between(1, 0.5, 0.5)}, "seed"),
    ({"prompt": "a", "image": Between(picture(), "b.png", 0.5)}, "image must be a PIL image"),
])
def test_wrong_ends(small, arguments, message):
    with pytest.raises(TinyldmError, match=message):
        small.stream(**arguments)
