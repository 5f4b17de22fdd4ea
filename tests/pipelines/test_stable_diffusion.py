"""The pipeline against diffusers' on the same random weights: ids, context, latents, picture."""
import inspect

import numpy as np
import pytest

from tests.support.drawing import NEGATIVE, PROMPT, Reference, assert_same_drawing, ours
from tests.support.extra import diffusers, torch
from tests.support.reference import nchw, nhwc
from tests.support.small_pipelines import CONFIGURATIONS, change_json, sd1, smallest
from tests.support.tolerance import assert_close
from tinyldm.checkpoints import save
from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.diffusion.schedule import Schedule
from tinyldm.errors import TinyldmError
from tinyldm.noise import CudaGenerator, randn
from tinyldm.pipelines.interpolation import Between
from tinyldm.pipelines.loading import load
from tinyldm.pipelines.stable_diffusion import StableDiffusion

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module", params=CONFIGURATIONS, ids=lambda make: make.__name__)
def both(request, tmp_path_factory):
    folder = request.param(tmp_path_factory.mktemp(request.param.__name__))
    return load(folder), Reference(folder)


@pytest.fixture(scope="module")
def sd1_folder(tmp_path_factory):
    return sd1(tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def both_sd1(sd1_folder):
    return load(sd1_folder), Reference(sd1_folder)


# ---- against diffusers ----------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore:the prompt .* is read in . chunks")
def test_every_configuration_draws_the_same(both):
    pipe, reference = both
    for text in (PROMPT, "", "word " * 100):
        ids = reference.pipe.tokenizer(text, padding="max_length", max_length=77, truncation=True,
                                       return_tensors="np").input_ids
        assert np.array_equal(pipe.tokenizer(text), ids)
        context, _ = reference.pipe.encode_prompt(text, "cpu", 1, False)
        first = pipe.encode_prompt(text)[:, :77]        # diffusers cuts long prompts
        assert_close(first, context.detach().numpy(), 1e-4, "context")
    assert_same_drawing(ours(pipe, negative_prompt=NEGATIVE, seed=7),
                        reference([7], negative_prompt=NEGATIVE))


def test_every_configuration_draws_the_same_in_float64(both):
    _, reference = both
    pipe = load(reference.folder, dtype="float64")
    assert_same_drawing(ours(pipe, negative_prompt=NEGATIVE, seed=7),
                        reference([7], negative_prompt=NEGATIVE))


def test_images_of_one_call_have_consecutive_seeds(both):
    pipe, reference = both
    assert_same_drawing(ours(pipe, seed=3, num_images=2), reference([3, 4]))


@pytest.mark.parametrize("options", [
    {"guidance_scale": 1.0}, {"guidance_scale": 0.0, "negative_prompt": NEGATIVE},
    {"guidance_scale": 3.5, "negative_prompt": NEGATIVE}, {"width": 72, "height": 56},
    {"guidance_rescale": 0.7}, {"guidance_rescale": 1.0, "guidance_scale": 1.0},
    {"width": 8, "height": 24}])
def test_options(both_sd1, options):
    pipe, reference = both_sd1
    assert_same_drawing(ours(pipe, **options), reference(**options))


def test_given_latents(both_sd1):
    pipe, reference = both_sd1
    latents = np.random.default_rng(0).standard_normal((2, 5, 8, 4), np.float32)
    latents.flags.writeable = False
    drawing = ours(pipe, latents=latents, num_images=2)
    assert_same_drawing(drawing, reference([0, 1], latents=latents, height=40, width=64))


@pytest.mark.parametrize("name, scheduler", [
    ("ddpm", "DDPMScheduler"), ("ddim", "DDIMScheduler"), ("euler", "EulerDiscreteScheduler"),
    ("euler_ancestral", "EulerAncestralDiscreteScheduler"),
    ("dpmpp_2m", "DPMSolverMultistepScheduler"), ("heun", "HeunDiscreteScheduler"),
    ("dpmpp_2m_sde", "DPMSolverMultistepScheduler"),
    ("unipc", "UniPCMultistepScheduler"), ("lcm", "LCMScheduler")])
def test_another_sampler(sd1_folder, both_sd1, name, scheduler):
    pipe, _ = both_sd1
    reference = Reference(sd1_folder)
    config = {**reference.pipe.scheduler.config, "clip_sample": False,
              "algorithm_type": "sde-dpmsolver++" if "sde" in name else "dpmsolver++"}
    reference.pipe.scheduler = getattr(diffusers, scheduler).from_config(config)
    assert_same_drawing(ours(pipe, sampler=name), reference())


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", [None, "ddim", "euler", "euler_ancestral", "dpmpp_2m", "unipc"])
def test_timestep_spacing(sd1_folder, both_sd1, name, spacing):
    pipe, _ = both_sd1
    reference = Reference(sd1_folder)
    scheduler = type(reference.pipe.scheduler) if name is None else getattr(diffusers, {
        "ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler",
        "euler_ancestral": "EulerAncestralDiscreteScheduler",
        "unipc": "UniPCMultistepScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}[name])
    reference.pipe.scheduler = scheduler.from_config({
        **reference.pipe.scheduler.config, "clip_sample": False, "timestep_spacing": spacing,
        "_use_default_values": []})
    assert_same_drawing(ours(pipe, sampler=name, timestep_spacing=spacing), reference())


@pytest.mark.parametrize("sampler", ["lcm", "dpmpp_2m_karras"])
def test_some_samplers_have_timesteps_of_their_own(small, sampler):
    expected = [state.timestep for state in small.stream("cat", sampler=sampler)]
    with pytest.warns(UserWarning, match=f"{sampler} has timesteps of its own: .*'linspace' plays"):
        states = small.stream("cat", sampler=sampler, timestep_spacing="linspace")
    assert [state.timestep for state in states] == expected


def test_decode(both_sd1):
    pipe, reference = both_sd1
    latents = np.random.default_rng(1).standard_normal((2, 3, 5, 4), np.float32)
    images = pipe.decode(latents)
    with torch.no_grad():
        scaled = nchw(latents).double() / reference.pipe.vae.config.scaling_factor
        theirs = nhwc(reference.pipe.vae.decode(scaled).sample)
    assert_close(images, theirs.clip(-1, 1), 1e-3, "decoded")
    assert images.min() >= -1 and images.max() <= 1


# ---- the interface --------------------------------------------------------------------------

def test_stream_is_lazy_and_complete(small):
    states = small.stream("red cat", num_inference_steps=3, num_images=2)
    first = next(states)
    assert (first.step, first.timestep) == (0, 667)
    assert first.latents.shape == first.pred_x0.shape == (2, 4, 4, 4)
    last = list(states)[-1]
    assert last.step == 2
    assert small.encode_prompt("red cat").shape == (1, 77, 8)
    assert small.decode(last.latents).shape == (2, 16, 16, 3)


def test_same_seed_same_picture(small):
    one, two = small("cat", seed=5), small("cat", seed=5)
    other, = small("cat", seed=6)
    assert np.array_equal(one[0], two[0]) and not np.array_equal(one[0], other)
    assert one[0].size == (16, 16) and one[0].mode == "RGB"


@pytest.mark.parametrize("kind, draw", [
    ("torch-cpu", lambda seed: randn((1, 4, 4, 4), seed)),
    ("torch-cuda", lambda seed: CudaGenerator(seed).randn((1, 4, 4, 4))),
    ("numpy", lambda seed: np.random.RandomState(seed).standard_normal((1, 4, 4, 4)))])
def test_kinds_of_noise(small, kind, draw):
    """Image i starts from torch's numbers for seed + i, with channels first."""
    latents = np.concatenate([draw(5), draw(6)]).transpose(0, 2, 3, 1)
    options = {"num_inference_steps": 2, "num_images": 2}
    *_, expected = small.stream("cat", latents=latents, **options)
    *_, state = small.stream("cat", seed=5, noise=kind, **options)
    assert np.array_equal(state.latents, expected.latents)


def test_fresh_noise_is_of_the_same_kind(small):
    """DDPM's steps continue the random stream of the first latents."""
    options = {"sampler": "ddpm", "num_inference_steps": 2, "guidance_scale": 1.0}
    state = np.random.RandomState(8)
    first, second = (state.standard_normal((1, 4, 4, 4)).transpose(0, 2, 3, 1) for _ in range(2))
    drawn, _ = small.stream("cat", noise="numpy", seed=8, **options)
    # With given latents, the seed's first numbers are the first step's fresh noise.
    given, _ = small.stream("cat", latents=first, noise="numpy", seed=8, **options)
    difference = drawn.latents - given.latents
    assert np.corrcoef(difference.reshape(-1), (second - first).reshape(-1))[0, 1] > 0.9999


def test_float64_weights_draw_the_same(small_folder, small):
    exact = load(small_folder, dtype="float64")
    *_, state = exact.stream("cat", num_inference_steps=4)
    *_, single = small.stream("cat", num_inference_steps=4)
    assert state.latents.dtype == np.float64
    assert_close(single.latents, state.latents, 1e-3)


def test_number_of_steps(small_folder, small, tmp_path):
    assert len(list(small.stream("cat", sampler="pndm", num_inference_steps=4))) == 5
    assert len(list(small.stream("cat", sampler="heun", num_inference_steps=4))) == 7
    assert len(list(small.stream("cat"))) == 50
    folder = tmp_path / "own"
    smallest(folder)
    change_json(folder / "model_index.json", _num_inference_steps=7)
    assert len(list(load(folder).stream("cat"))) == 7
    Reference(folder)                                   # ignores a key with an underscore


def test_the_weights_own_guidance_scale(small, tmp_path):
    smallest(tmp_path / "own")
    change_json(tmp_path / "own" / "model_index.json", _guidance_scale=2.5)
    save(load(tmp_path / "own"), tmp_path / "again")
    own, other = (load(tmp_path / name) for name in ("own", "again"))
    expected = np.asarray(own("cat", num_inference_steps=2, guidance_scale=2.5)[0])
    for pipe in (own, other):
        assert np.array_equal(pipe("cat", num_inference_steps=2)[0], expected)
    assert not np.array_equal(own("cat", num_inference_steps=2, guidance_scale=7.5)[0], expected)
    Reference(tmp_path / "again")


BAD = [
    ({"timestep_spacing": "karras"}, "leading, linspace or trailing, not 'karras'"),
    ({"timestep_spacing": ["trailing"]}, r"or trailing, not \['trailing'\]"),
    ({"prompt": "(cat:1000)"}, "the weight 1000: use -100 to 100"),
    ({"negative_prompt": "(cat:1000)", "guidance_scale": 1}, "the weight 1000: use -100 to 100"),
    ({"prompt": 5}, "prompt must be a string"), ({"prompt": ["a", 5]}, "prompt must be a string"),
    ({"prompt": [["a"], ["b"]]}, r"prompt must be a string .* got \['a'\]"),
    ({"prompt": None}, "prompt must be a string"), ({"prompt": []}, "at least one: give one"),
    ({"negative_prompt": ["a", "b"]}, "as long as prompt's, 1, not 2"),
    ({"prompt": ["a", "b"], "negative_prompt": ["a"]}, "as long as prompt's, 2, not 1"),
    ({"negative_prompt": "\udcff", "guidance_scale": 1}, "valid Unicode"),
    ({"num_inference_steps": 0}, "from 1 to 1000, not 0"),
    ({"num_inference_steps": 1001}, "from 1 to 1000, not 1001"),
    ({"num_inference_steps": 2.5}, "whole number from 1"),
    ({"guidance_scale": float("nan")}, "finite number, not nan"),
    ({"guidance_scale": float("inf")}, "finite number, not inf"),
    ({"guidance_scale": "7"}, "finite number, not '7'"),
    ({"guidance_rescale": 1.5}, "guidance_rescale must be from 0 to 1, not 1.5"),
    ({"guidance_rescale": -0.1}, "from 0 to 1, not -0.1"),
    ({"guidance_rescale": None}, "guidance_rescale must be a finite number"),
    ({"seed": 1.5}, "seed is a whole number"), ({"seed": None}, "seed is a whole number"),
    ({"width": 18}, "width must be a multiple of 4, not 18: the nearest is 16 or 20"),
    ({"height": 2}, "height must be a multiple of 4, not 2: the nearest is 4"),
    ({"width": 0}, "from 1 to 8192 pixels, not 0"), ({"height": -8}, "not -8"),
    ({"height": 10**9}, "8192 pixels"), ({"width": 16.5}, "whole number of pixels"),
    ({"width": "16"}, "whole number of pixels"),
    ({"num_images": 0}, "num_images must be"), ({"num_images": None}, "num_images must be"),
    ({"sampler": "dpm2"}, f"unknown sampler 'dpm2'; known: {', '.join(SAMPLERS)}"),
    ({"sampler": "lcm", "num_inference_steps": 51}, "lcm takes from 1 to 50 steps .* not 51"),
    ({"num_images": 10**9}, "num_images must be a whole number from 1 to 10000, not 1000000000"),
    ({"prompt": ["a"] * 6000, "num_images": 2}, "images must be .* from 1 to 10000, not 12000"),
    ({"seed": [1, 2]}, "one for each of 1 images, not 2"), ({"seed": [1.5]}, "a whole number"),
    ({"seed": 2**64}, "a whole number"), ({"seed": -2**63 - 1}, "a whole number"),
    ({"seed": 2**64 - 1, "num_images": 2}, "a whole number"),
    ({"seed": np.random.default_rng(0)}, "a whole number"),
    ({"seed": None, "num_images": 2}, "a whole number"),
    ({"sampler": ["euler"]}, r"unknown sampler \['euler'\]"), ({"sampler": 5}, "unknown sampler 5"),
    ({"sampler": "Euler b"}, "unknown sampler 'Euler b'; known: .*; did you mean euler"),
    ({"noise": ["numpy"]}, r"unknown noise \['numpy'\]; known"),
    ({"latents": [[1], [2, 3]]}, "latents must be an array of numbers, not a list"),
    ({"latents": "noise"}, "latents must be an array of numbers, not a str"),
    ({"clip_skip": -1}, "clip_skip must be a whole number from 0 to 100, not -1"),
    ({"clip_skip": 1.5}, "not 1.5"), ({"clip_skip": "1"}, "not '1'"),
    ({"clip_skip": 2}, "clip_skip must be from 0 to 1, as the text encoder has 2 layers, not 2"),
    ({"generator": 5}, "no option generator: seed= is what generator= is elsewhere"),
    ({"output_type": "np"}, "no option output_type: .* PIL images"),
    ({"num_inference_step": 5}, "no option 'num_inference_step': did you mean num_inference_steps"),
    ({"negative_promt": "x"}, "did you mean negative_prompt"),
    ({"qqq": 5}, "no option 'qqq': known are prompt, negative_prompt, num_inference_steps"),
    ({"steps": 5, "num_inference_steps": 5}, "num_inference_steps .*are one option"),
    ({"latents": np.zeros((2, 4, 4, 4))}, r"shape \(1, 4, 4, 4\) .*, not \(2, 4, 4, 4\)"),
    ({"latents": np.zeros((4, 4))}, "latents must be finite and of shape"),
    ({"latents": np.zeros((1, 4, 4, 4)), "width": 32}, r"shape \(1, 4, 8, 4\)"),
    ({"latents": np.full((1, 4, 4, 4), np.nan)}, "latents must be finite"),
]


@pytest.mark.parametrize("options, message", BAD)
def test_bad_arguments_are_refused_before_drawing(small, options, message):
    with pytest.raises(TinyldmError, match=message):
        small.stream(**{"prompt": "cat", **options})


def test_a_schedule_that_the_sampler_cannot_take_is_refused_before_drawing(small):
    small.schedule = Schedule.from_config({"rescale_betas_zero_snr": True})
    with pytest.raises(TinyldmError, match="pndm divides by alpha_bar"):
        small.stream("cat", sampler="pndm")


def last_latents(pipe, *arguments, **options):
    *_, state = pipe.stream(*arguments, num_inference_steps=2, **options)
    return state.latents


def test_options_as_other_programs_name_them(small):
    expected = last_latents(small, "cat", "dog", guidance_scale=3.0, num_images=2, sampler="euler")
    for other in (
            {"negative": "dog", "guidance": 3.0, "count": 2, "sampler": "k_euler"},
            {"negative_prompt": ["dog"], "cfg_scale": 3, "num_images_per_prompt": 2.0,
             "scheduler": "EulerDiscreteScheduler", "width": np.float32(16),
             "height": np.int8(16)}):
        assert np.array_equal(last_latents(small, "cat", **other), expected)
    *_, state = small.stream("cat", "dog", steps=2, guidance=3, count=2, sampler_name="Euler")
    assert np.array_equal(state.latents, expected)
    assert np.array_equal(last_latents(small, "cat", negative_prompt=None),
                          last_latents(small, "cat"))


@pytest.mark.parametrize("seed", [np.int8(127), np.uint8(255), 255.0, np.array(255), -1])
def test_seeds_of_any_type_do_not_wrap(small, seed):
    latents = last_latents(small, "cat", seed=seed, num_images=2)
    for i in (0, 1):
        one = last_latents(small, "cat", seed=int(seed) + i)
        assert_close(latents[i:i + 1], one, 1e-4)


def test_a_seed_for_each_image(small):
    latents = last_latents(small, "cat", seed=[7, np.uint8(3)], num_images=2)
    for row, seed in zip(latents, (7, 3)):
        assert_close(row[None], last_latents(small, "cat", seed=seed), 1e-4)


@pytest.mark.filterwarnings("ignore:the prompt .* is read in . chunks")
def test_a_list_of_prompts_draws_each_from_the_same_seeds(small):
    prompts, negatives = ["cat", Between("red", "dog", 0.3), "word " * 100], ["", "dog", "red cat"]
    latents = last_latents(small, prompts, negatives, seed=5, num_images=2)
    assert latents.shape[0] == 6
    for i, prompt in enumerate(prompts[:2]):
        longer = last_latents(small, [prompt, prompts[2]], [negatives[i], ""], seed=5)
        assert_close(latents[2 * i:2 * i + 1], longer[:1], 1e-4)        # to one length
        assert not np.array_equal(latents[2 * i], latents[2 * i + 1])
    two = last_latents(small, ("cat", "dog"), "red", seed=5)
    for i, prompt in enumerate(("cat", "dog")):
        assert_close(two[i:i + 1], last_latents(small, prompt, "red", seed=5), 1e-4)
    assert len(small(["cat", "dog"], num_inference_steps=1, num_images=2)) == 4


@pytest.mark.parametrize("latents", [[], "latents", [[1], [2, 3]], None, np.zeros((0, 4, 4, 4)),
                                     np.zeros((1, 4, 4, 4), complex)], ids=repr)
def test_decode_refuses_what_are_no_latents(small, latents):
    with pytest.raises(TinyldmError, match="latents must "):
        small.decode(latents)


def test_options_by_name_and_by_position(small):
    options = list(inspect.signature(small.stream).parameters)
    assert options == [
        "prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "seed", "width",
        "height", "num_images", "sampler", "latents", "noise", "guidance_rescale", "image",
        "strength", "mask", "timestep_spacing", "clip_skip"]
    values = ["cat", "dog", 2, 3.0, 5, 20, 24, 2, "ddim", None, "numpy", 0.5]
    by_position, by_name = small.stream(*values), small.stream(**dict(zip(options, values)))
    for one, other in zip(by_position, by_name, strict=True):
        assert one.latents.shape == (2, 6, 5, 4)
        np.testing.assert_array_equal(one.latents, other.latents)
    with pytest.raises(TypeError, match="'colour'"):
        small.stream("cat", colour="red")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_latents_that_are_not_finite_are_not_decoded(small, value):
    with pytest.raises(TinyldmError, match="latents must be finite, but they hold NaN or infinity"):
        small.decode(np.full((1, 2, 2, 4), value))


def test_bad_latents_for_decode(small):
    with pytest.raises(TinyldmError, match=r"shape \(images, height, width, 4\), not \(1, 4, 2, 2"):
        small.decode(np.zeros((1, 4, 2, 2), np.float32))


def test_bad_loads(tmp_path):
    for options, message in [({"device": "tpu"}, "cpu or cuda"), ({"dtype": "bfloat16"}, "dtype"),
                             ({"dtype": "int8"}, "dtype")]:
        with pytest.raises(TinyldmError, match=message):
            load(smallest(tmp_path / str(options)), **options)


def test_a_value_that_is_corrected_is_checked_first(tmp_path):
    folder = smallest(tmp_path / "words")
    change_json(folder / "scheduler" / "scheduler_config.json", clip_sample="false")
    with pytest.raises(TinyldmError, match="clip_sample must be true or false, or null, not"):
        load(folder)


def test_unsupported_scheduler_still_draws_with_a_sampler(tmp_path):
    folder = smallest(tmp_path / "flow")
    config = folder / "scheduler" / "scheduler_config.json"
    change_json(config, _class_name="FlowMatchEulerDiscreteScheduler")
    pipe = load(folder)
    assert "FlowMatchEulerDiscreteScheduler, 50 steps" in repr(pipe)
    with pytest.raises(TinyldmError, match="FlowMatch.*or choose a sampler: ddpm"):
        pipe.stream("cat")
    assert len(list(pipe.stream("cat", num_inference_steps=2, sampler="euler"))) == 2


def test_the_first_token_beyond_the_text_encoders_table(tmp_path):
    pipe = load(smallest(tmp_path))
    largest, encoder = int(pipe.tokenizer("cat").max()), pipe.text_encoder
    encoder.config = encoder.config | {"vocab_size": largest + 1}
    pipe.encode_prompt("cat")
    encoder.config = encoder.config | {"vocab_size": largest}
    with pytest.raises(TinyldmError, match=f"token {largest}, but the text encoder only {largest}"):
        pipe.encode_prompt("cat")


def test_parts_must_fit_together(small, both_sd1):
    other, _ = both_sd1
    parts = [small.tokenizer, small.text_encoder, small.unet, small.vae, small.scheduler]
    with pytest.raises(TinyldmError, match="cross_attention_dim is 8, but .* 32"):
        StableDiffusion(small.tokenizer, other.text_encoder, *parts[2:])
    xl = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
          "projection_class_embeddings_input_dim": 68}
    for changes, message in [(xl, "no second text encoder"),
                             ({"in_channels": 8}, "in_channels is 8, but the VAE's .* 4")]:
        before, small.unet.config = small.unet.config, small.unet.config | changes
        with pytest.raises(TinyldmError, match=message):
            StableDiffusion(*parts)
        small.unet.config = before
    small.tokenizer.model_max_length = 100
    with pytest.raises(TinyldmError, match="model_max_length is 100, .* 77"):
        StableDiffusion(*parts)
