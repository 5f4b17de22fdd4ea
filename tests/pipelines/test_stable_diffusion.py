"""The pipeline against diffusers' on the same random weights: ids, context, latents, picture."""
import inspect
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import tinyldm
from tests.support.reference import assert_close, nchw, nhwc
from tests.support.small_pipelines import CONFIGURATIONS, change_json, sd1, smallest
from tests.support.tolerance import assert_allclose, assert_same_pixels
from tinyldm import backend, load_model
from tinyldm.checkpoints import components, save_model
from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.diffusion.schedule import Schedule
from tinyldm.errors import TinyldmError
from tinyldm.layers import Tape
from tinyldm.noise import CudaGenerator
from tinyldm.pipelines.stable_diffusion import StableDiffusion, load
from tinyldm.training.optim import AdamW

PROMPT = "a photo of an astronaut riding a horse on mars, red cat"
NEGATIVE = "low quality!"
STEPS = 5
LATENTS_TOLERANCE = 1e-4            # of the reference's standard deviation, at every step

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Reference:
    """diffusers' pipeline of a folder, with its outputs in our layout."""

    def __init__(self, folder):
        diffusers.utils.logging.set_verbosity_error()
        half = any((folder / "unet").glob("*fp16*"))
        self.pipe = diffusers.DiffusionPipeline.from_pretrained(
            folder, torch_dtype=torch.float32, variant="fp16" if half else None)
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, seeds=(0,), prompt=PROMPT, **options):
        """-> latents after every step [(B,h,w,4)], pictures (B,H,W,3) uint8."""
        states = []
        if "latents" in options:
            options["latents"] = nchw(options["latents"])

        def keep(pipe, step, timestep, tensors):
            states.append(nhwc(tensors["latents"]))
            return {}

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = self.pipe(
            prompt, num_inference_steps=STEPS, num_images_per_prompt=len(seeds),
            generator=generators, callback_on_step_end=keep, **options).images
        return states, np.stack([np.asarray(image) for image in images])


def ours(pipe, **options):
    """The same of ours, the latents by stream and the pictures by a call."""
    states = list(pipe.stream(PROMPT, num_inference_steps=STEPS, **options))
    assert [state.step for state in states] == list(range(len(states)))
    images = pipe(PROMPT, num_inference_steps=STEPS, **options)
    return [state.latents for state in states], np.stack([np.asarray(image) for image in images])


def assert_same_drawing(ours, theirs):
    (our_states, our_images), (their_states, their_images) = ours, theirs
    assert len(our_states) == len(their_states)
    for step, (a, b) in enumerate(zip(our_states, their_states)):
        assert a.dtype == np.float32
        assert_close(a, b, LATENTS_TOLERANCE, f"latents after step {step + 1}")
    assert_same_pictures(our_images, their_images)


def assert_same_pictures(ours, theirs):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.uint8
    inside = (theirs > 0) & (theirs < 255)
    assert theirs.std() > 20 and inside.mean() > 0.5, "the reference's picture says nothing"
    assert_same_pixels(ours, theirs, 2)


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


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    return smallest(tmp_path_factory.mktemp("smallest"))


@pytest.fixture
def small(small_folder):
    return load(small_folder)


# ---- against diffusers ----------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore:the prompt .* is read in . chunks")
def test_every_configuration_draws_the_same(both):
    pipe, reference = both
    for text in (PROMPT, "", "word " * 100):
        ids = reference.pipe.tokenizer(text, padding="max_length", max_length=77, truncation=True,
                                       return_tensors="np").input_ids
        assert np.array_equal(pipe.tokenizer(text), ids)
        context, _ = reference.pipe.encode_prompt(text, "cpu", 1, False)
        first = pipe.encode_prompt(text)[:, :77]        # all but for a long prompt, which they cut
        assert_close(first, context.detach().numpy(), 1e-4, "context")
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


def test_decode(both_sd1):
    pipe, reference = both_sd1
    latents = np.random.default_rng(1).standard_normal((2, 3, 5, 4), np.float32)
    images = pipe.decode(latents)
    with torch.no_grad():
        scaled = nchw(latents) / reference.pipe.vae.config.scaling_factor
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
    ("torch-cpu", lambda seed: torch.randn(1, 4, 4, 4, generator=torch.manual_seed(seed)).numpy()),
    ("torch-cuda", lambda seed: CudaGenerator(seed).randn((1, 4, 4, 4))),
    ("numpy", lambda seed: np.random.RandomState(seed).standard_normal((1, 4, 4, 4)))])
def test_kinds_of_noise(small, kind, draw):
    """Image i starts from what seed + i gives elsewhere, where channels come first."""
    latents = np.concatenate([draw(5), draw(6)]).transpose(0, 2, 3, 1)
    options = {"num_inference_steps": 2, "num_images": 2}
    *_, expected = small.stream("cat", latents=latents, **options)
    *_, state = small.stream("cat", seed=5, noise=kind, **options)
    assert np.array_equal(state.latents, expected.latents)


def test_fresh_noise_is_of_the_same_kind(small):
    """DDPM's steps go on drawing where the first latents' stream stands."""
    options = {"sampler": "ddpm", "num_inference_steps": 2, "guidance_scale": 1.0}
    state = np.random.RandomState(8)
    first, second = (state.standard_normal((1, 4, 4, 4)).transpose(0, 2, 3, 1) for _ in range(2))
    drawn, _ = small.stream("cat", noise="numpy", seed=8, **options)
    # Given latents, the seed's first numbers are left for the first step's fresh noise.
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
    Reference(folder)                                   # which passes over the underscore's key


BAD = [
    ({"prompt": "(cat:1000)"}, "the weight 1000: use -100 to 100"),
    ({"negative_prompt": "(cat:1000)", "guidance_scale": 1}, "the weight 1000: use -100 to 100"),
    ({"prompt": 5}, "prompt must be a string"), ({"prompt": ["a", "b"]}, "prompt must be a string"),
    ({"negative_prompt": None}, "prompt must be a string"),
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
    ({"width": 0}, "from 4 to 8192 pixels, not 0"), ({"height": -8}, "not -8"),
    ({"height": 10**9}, "8192 pixels"), ({"width": 16.0}, "whole number of pixels"),
    ({"num_images": 0}, "num_images must be"), ({"num_images": None}, "num_images must be"),
    ({"sampler": "dpm2"}, f"unknown sampler 'dpm2'; known: {', '.join(SAMPLERS)}"),
    ({"sampler": "lcm", "num_inference_steps": 51}, "lcm takes from 1 to 50 steps .* not 51"),
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


def test_options_by_name_and_by_position(small):
    options = list(inspect.signature(small.stream).parameters)
    assert options == [
        "prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "seed", "width",
        "height", "num_images", "sampler", "latents", "noise", "guidance_rescale", "image",
        "strength", "mask"]
    values = ["cat", "dog", 2, 3.0, 5, 20, 24, 2, "ddim", None, "numpy", 0.5]
    by_position, by_name = small.stream(*values), small.stream(**dict(zip(options, values)))
    for one, other in zip(by_position, by_name, strict=True):
        assert one.latents.shape == (2, 6, 5, 4)
        np.testing.assert_array_equal(one.latents, other.latents)
    with pytest.raises(TypeError, match="'colour'"):
        small.stream("cat", colour="red")


def test_bad_latents_for_decode(small):
    with pytest.raises(TinyldmError, match=r"shape \(images, height, width, 4\), not \(1, 4, 2, 2"):
        small.decode(np.zeros((1, 4, 2, 2), np.float32))


def test_bad_loads(tmp_path):
    for options, message in [({"device": "tpu"}, "cpu or cuda"), ({"dtype": "bfloat16"}, "dtype"),
                             ({"dtype": "int8"}, "dtype")]:
        with pytest.raises(TinyldmError, match=message):
            load(smallest(tmp_path / str(options)), **options)


def test_unsupported_scheduler_still_draws_with_a_sampler(tmp_path):
    folder = smallest(tmp_path / "deis")
    config = folder / "scheduler" / "scheduler_config.json"
    change_json(config, _class_name="DEISMultistepScheduler")
    pipe = load(folder)
    with pytest.raises(TinyldmError, match="DEIS.*or choose a sampler: ddpm"):
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
    for changes, message in [({"addition_embed_type": "text_time"}, "no second text encoder"),
                             ({"in_channels": 8}, "in_channels is 8, but the VAE's .* 4")]:
        before, small.unet.config = small.unet.config, small.unet.config | changes
        with pytest.raises(TinyldmError, match=message):
            StableDiffusion(*parts)
        small.unet.config = before
    small.tokenizer.model_max_length = 100
    with pytest.raises(TinyldmError, match="model_max_length is 100, .* 77"):
        StableDiffusion(*parts)


# ---- NaN and infinity -----------------------------------------------------------------------

UNET_LAYERS = ["conv_in.weight", "time_embedding.linear_2.bias",
               "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.weight",
               "mid_block.resnets.1.conv2.weight", "up_blocks.1.resnets.0.norm1.weight",
               "conv_out.bias"]


@pytest.mark.parametrize("name", UNET_LAYERS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_in_the_unet_is_traced_to_its_layer(small, name):
    states = small.stream("cat", num_inference_steps=3)
    next(states)
    spoil(small.unet, name)
    layer = name.rpartition(".")[0]
    with pytest.raises(TinyldmError, match=rf"at step 2 \(timestep 334\): .* is {layer} of UNet2D"):
        next(states)
    assert "forward" not in vars(small.unet.conv_in)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_elsewhere(small):
    with pytest.raises(TinyldmError, match="at step 1 .*no layer is to blame, so lower guidance"):
        list(small.stream("cat", num_inference_steps=3, guidance_scale=1e39))
    spoil(small.vae, "decoder.up_blocks.0.resnets.1.conv1.weight")
    with pytest.raises(TinyldmError, match="picture 0 .* decoder.up_blocks.0.resnets.1.conv1 of"):
        small("cat", num_inference_steps=1)
    spoil(small.text_encoder, "text_model.encoder.layers.1.mlp.fc1.bias")
    with pytest.raises(TinyldmError, match="'dog': .* text_model.encoder.layers.1.mlp.fc1 of CLIP"):
        small.encode_prompt("dog")


def spoil(module, name):
    parameter = dict(module.named_parameters())[name]
    parameter.data = parameter.data.copy()
    parameter.data.flat[0] = np.nan


# ---- import ---------------------------------------------------------------------------------

def test_public_names():
    assert set(tinyldm.__all__) <= set(dir(tinyldm))
    for name in tinyldm.__all__:
        assert getattr(tinyldm, name)
    assert tinyldm.load is load and tinyldm.StableDiffusion is StableDiffusion
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'version = "{tinyldm.__version__}"' in project
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tinyldm.nothing  # noqa: B018


def test_importing_is_light():
    heavy = "{'PIL', 'tokenizers', 'safetensors', 'huggingface_hub', 'tqdm', 'threadpoolctl'}"
    code = (f"import sys, tinyldm; assert 'numpy' not in sys.modules; tinyldm.load; "
            f"tinyldm.noise.randn; assert not {heavy} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# ---- large float16 weights ------------------------------------------------------------------

def test_large_float16_weights_stay_and_draw_the_same(monkeypatch):
    """The bundled model with all but its smallest matrices float16: the numbers are the same."""
    wide = tinyldm.load(dtype="float32")
    monkeypatch.setattr(components, "LARGE", 2000)
    pipe = tinyldm.load()
    kept = {name for name, parameter in pipe.unet.named_parameters()
            if parameter.data.dtype == np.float16}
    assert len(kept) > 50 and all(name.endswith("weight") for name in kept)
    tables = [parameter.data for name, parameter in pipe.text_encoder.named_parameters()
              if "embedding" in name]
    assert [table.dtype for table in tables] == [np.float32] * 2
    options = dict(num_inference_steps=2, seed=3)
    assert_same_pixels(*(p("a red circle", **options)[0] for p in (pipe, wide)))
    with backend.plain():
        assert pipe.encode_prompt("a red circle").dtype == np.float32


def test_float16_weights_give_float32_gradients_and_are_not_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(components, "LARGE", 2000)
    pipe, wide = tinyldm.load(), tinyldm.load(dtype="float32")
    rng = np.random.default_rng(0)
    latents, dy = rng.standard_normal((2, 1, 8, 8, 4), np.float32)
    context = rng.standard_normal((1, 7, 128), np.float32)
    gradients = []
    for unet in (pipe.unet, wide.unet):
        tape = Tape()
        unet(latents, np.array([500]), context, tape)
        unet.backward(1e-6 * dy, tape)
        gradients.append({name: p.grad for name, p in unet.named_parameters()})
    for name, ours in gradients[0].items():
        assert ours.dtype == np.float32
        assert_allclose(ours, gradients[1][name], rtol=1e-3,
                                   atol=1e-4 * abs(gradients[1][name]).max())
    with pytest.raises(TinyldmError, match="weight is float16, too narrow to train"):
        AdamW(pipe.unet.named_parameters())
    save_model(pipe.unet, tmp_path)
    assert (load_model(tmp_path).mid_block.resnets[0].conv1.weight.data
            == wide.unet.mid_block.resnets[0].conv1.weight.data).all()
