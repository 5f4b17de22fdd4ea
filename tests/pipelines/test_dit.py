"""DiT as a pipeline against diffusers' DiTPipeline, and from the original's file."""
import shutil
from dataclasses import fields

import numpy as np
import pytest

import tinyldm
from tests.support.drawing import assert_same_drawing
from tests.support.extra import diffusers, torch
from tests.support.models import fill
from tests.support.original_dit import OriginalDiT
from tests.support.reference import float32_noise, nchw, nhwc, randomise, widen_embeddings
from tests.support.small_pipelines import change_json, dit
from tests.support.tolerance import assert_allclose, assert_close
from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.errors import TinyldmError
from tinyldm.noise import get_generator
from tinyldm.pipelines.dit import DiTOptions
from tinyldm.pipelines.loading import load

STEPS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return dit(tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def pipe(folder):
    return load(folder)


def reference(folder, labels, seeds, guidance_scale, scheduler=None, **config):
    """diffusers in float64 -> latents after every step, pictures (B,H,W,3) uint8."""
    pipe = diffusers.DiTPipeline.from_pretrained(folder, torch_dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    if scheduler:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **config)
    widen_embeddings(pipe)
    step, states = pipe.scheduler.step, []

    def kept(*arguments, **options):
        output = step(*arguments, **options)
        states.append(nhwc(output.prev_sample[:len(labels)]))
        return output
    pipe.scheduler.step = kept
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with float32_noise():
        images = pipe(labels, guidance_scale, generators, num_inference_steps=STEPS).images
    return states, np.stack([np.asarray(image) for image in images])


def ours(pipe, label, **options):
    states = list(pipe.stream(label, num_inference_steps=STEPS, **options))
    images = pipe(label, num_inference_steps=STEPS, **options)
    return [state.latents for state in states], np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("sampler, scheduler", [
    (None, None), ("dpmpp_2m", "DPMSolverMultistepScheduler"), ("unipc", "UniPCMultistepScheduler"),
    ("pndm", "PNDMScheduler"), ("deis", "DEISMultistepScheduler")])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_drawing(sampler, scheduler, guidance_scale, folder, pipe):
    found = ours(pipe, 207, seed=7, guidance_scale=guidance_scale, sampler=sampler)
    config = {"skip_prk_steps": True} if sampler == "pndm" else {}
    assert_same_drawing(found, reference(folder, [207], [7], guidance_scale, scheduler, **config))


def test_the_numbers_of_diffusers_own_test(tmp_path):
    """tests/pipelines/dit/test_dit.py there: weights of torch's seed 0, and a corner of a picture.
    """
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=4, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, out_channels=8, num_embeds_ada_norm=1000)
    diffusers.DiTPipeline(transformer.eval(), diffusers.AutoencoderKL().eval(),
                          diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    pipe = load(tmp_path)
    *_, state = pipe.stream(1, num_inference_steps=2)
    corner = pipe.decode(state.latents)[0, -3:, -3:, -1] / 2 + 0.5
    assert_allclose(corner.ravel(), [0.2946, 0.6601, 0.4329, 0.3296, 0.4144, 0.5319, 0.7273, 0.5013,
                                     0.4457], rtol=0, atol=1e-3)


def test_several_labels_and_seeds(folder, pipe):
    """By default guidance 4; each label from the same seeds, or from seeds of its own."""
    found = ours(pipe, [207, "umbrella"], seed=3, num_images=2)
    assert_same_drawing(found, reference(folder, [207, 207, 879, 879], [3, 4, 3, 4], 4.0))
    found = ours(pipe, ["goldfish", 1], seed=[5, 6])
    assert_same_drawing(found, reference(folder, [1, 1], [5, 6], 4.0))


def test_defaults(pipe):
    request = pipe.complete(pipe.request((207,), {}))
    assert (request.num_inference_steps, request.guidance_scale, request.sampler) == (50, 4, "ddim")
    assert [field.name for field in fields(DiTOptions)][:4] == [
        "label", "guidance_scale", "num_inference_steps", "seed"]
    assert pipe.picture_size(request) == (32, 32)
    assert repr(pipe).startswith("<DiT of 1000 classes: transformer ")


def test_given_latents_and_noise(pipe):
    noise = tinyldm.noise.randn((1, 4, 8, 8), 5).transpose(0, 2, 3, 1)
    given, = pipe(1, num_inference_steps=2, latents=noise)
    seeded, = pipe(1, num_inference_steps=2, seed=5)
    other, = pipe(1, num_inference_steps=2, seed=5, noise="numpy")
    assert np.array_equal(given, seeded) and not np.array_equal(other, seeded)
    end, = pipe(1, num_inference_steps=2, seed=tinyldm.Between(5, 6, 0.0))
    assert np.array_equal(end, seeded)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws(sampler, pipe):
    *_, state = pipe.stream("umbrella", num_inference_steps=3, sampler=sampler)
    assert state.latents.shape == (1, 8, 8, 4) and np.isfinite(state.latents).all()


# ---- labels -------------------------------------------------------------------------------------

@pytest.mark.parametrize("label, number", [
    ("tench", 0), ("Tinca tinca", 0), (" Golden Retriever", 207), ("207", 207), (np.int64(3), 3),
    (5.0, 5), ("crane", 517), (1000, 1000), ("carassius AURATUS", 1)])
def test_labels(label, number, pipe):
    """A name of two classes is the later one's, as in diffusers."""
    assert pipe.label_number(label) == number


@pytest.mark.parametrize("label, message", [
    ("golden retriver", r"no class 'golden retriver': did you mean 'golden retriever' \(207\)\?"),
    ("", "no class ''"), ("1001", "a class's name, a whole number from 0 to 999, or 1000 for"),
    (-1, "not -1"), (1.5, "not 1.5"), (True, "not True"), (None, "give a label, a"),
    ("-3", "no class"),
    ("9" * 5000, "not '99999"), (float("nan"), "not nan"), ([[1, 2]], r"not \[1, 2\]"),
    ([], "a list of labels must have at least one"), (tinyldm.Between(1, 2, 0.5), "not Between"),
    (np.zeros((2, 2)), r"not \[0.0, 0.0\]"), ([1] * 10001, "the number of images must be"),
])
def test_wrong_labels(label, message, pipe):
    with pytest.raises(TinyldmError, match=message) as error:
        pipe(label)
    assert "\n" not in str(error.value)


def test_weights_without_names(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    change_json(copied / "model_index.json", id2label=None)
    with pytest.raises(TinyldmError, match="no names of classes, so 'umbrella' is unknown"):
        load(copied)("umbrella")


def test_a_name_of_a_class_that_the_transformer_has_not(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    change_json(copied / "model_index.json", id2label={"1000": "crane"})
    with pytest.raises(TinyldmError, match="names class 1000 'crane', but .* classes 0 to 999"):
        load(copied)


@pytest.mark.parametrize("options, message", [
    ({"guidance_scale": "x"}, "guidance_scale must be a finite number"),
    ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number"),
    ({"num_inference_steps": 0}, "the number of steps"), ({"sampler": "x"}, "unknown sampler"),
    ({"num_images": -1}, "num_images must be"), ({"seed": "x"}, "seed"),
    ({"noise": "x"}, "noise"), ({"latents": np.zeros((1, 4, 8, 8))}, "latents must be finite and"),
    ({"latents": np.full((1, 8, 8, 4), np.nan)}, "latents must be finite"),
    ({"prompt": "a cat"}, "there is no option 'prompt'"), ({"width": 64}, "no option 'width'"),
    ({"timestep_spacing": "x"}, "timestep_spacing must be"), ({"strength": 1}, "no option"),
])
def test_wrong_options(options, message, pipe):
    with pytest.raises(TinyldmError, match=message) as error:
        pipe.stream(1, **options)
    assert "\n" not in str(error.value)


# ---- folders ------------------------------------------------------------------------------------

def test_saving(pipe, tmp_path):
    tinyldm.save(pipe, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert_same_drawing(ours(pipe, "umbrella"), reference(tmp_path / "saved", [879], [0], 4.0))
    assert np.array_equal(again("crane", seed=1)[0], pipe(517, seed=1)[0])
    theirs = diffusers.DiTPipeline.from_pretrained(tmp_path / "saved")
    assert theirs.get_label_ids(["Tinca tinca", "golden retriever"]) == [0, 207]


def test_diffusers_own_folder(pipe, folder, tmp_path):
    """As it writes one today, and with the wider class that the published folders name."""
    theirs = diffusers.DiTPipeline.from_pretrained(folder)
    theirs.save_pretrained(tmp_path)
    expected, = pipe(879, num_inference_steps=2)
    for name in ("DiTTransformer2DModel", "Transformer2DModel"):
        change_json(tmp_path / "model_index.json", transformer=["diffusers", name])
        change_json(tmp_path / "transformer" / "config.json", _class_name=name)
        assert np.array_equal(load(tmp_path)(879, num_inference_steps=2)[0], expected)


@pytest.mark.parametrize("part, changes, message", [
    ("model_index.json", {"id2label": 5}, "id2label must be"),
    ("model_index.json", {"id2label": {"x": "cat"}}, "id2label must have names by number"),
    ("model_index.json", {"id2label": {"1": 5}}, "id2label must have names by number"),
    ("model_index.json", {"_guided_channels": 0}, "_guided_channels must be"),
    ("transformer/config.json", {"in_channels": 8, "out_channels": 16}, "wrong shape"),
    ("transformer/config.json", {"_class_name": "PixArtTransformer2DModel"}, "names the model"),
    ("transformer/config.json", {"num_layers": 3}, "missing"),
    ("transformer/config.json", {"norm_type": "ada_norm_single"}, "norm_type must be"),
    ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "names the model"),
    ("scheduler/scheduler_config.json", {"beta_end": 3}, "beta_end must be"),
])
def test_damaged_folders(part, changes, message, folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    change_json(copied / part, **changes)
    with pytest.raises(TinyldmError, match=message):
        load(copied)


def test_parts_that_do_not_fit(pipe):
    other = type(pipe.transformer)(pipe.transformer.config | {"in_channels": 3})
    with pytest.raises(TinyldmError, match="in_channels is 3, but the VAE's latent_channels is 4"):
        type(pipe)(other, pipe.vae, pipe.scheduler)
    other = type(pipe.transformer)(pipe.transformer.config | {"out_channels": 5})
    with pytest.raises(TinyldmError, match="out_channels is 5, but .* 4, and twice as many"):
        type(pipe)(other, pipe.vae, pipe.scheduler)


# ---- the original's file ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def original(folder, tmp_path_factory):
    """-> the original class in float64, the file of its weights, a VAE's folder."""
    model = OriginalDiT(depth=2, width=64, heads=1, patch=2, size=8, classes=10)
    fixed = model.pos_embed.data.clone()
    model = randomise(model).eval()
    model.pos_embed.data = fixed
    file = tmp_path_factory.mktemp("original") / "DiT.pt"
    torch.save(model.state_dict(), file)
    return model.double(), file, folder / "vae"


def guided(model, label, guidance_scale):
    """x_t (1,8,8,4), t -> the original's guided prediction (1,8,8,8) by forward_with_cfg."""
    def predict(x_t, t):
        x = nchw(x_t).double()
        output = model.forward_with_cfg(torch.cat([x, x]), torch.tensor([t, t]),
                                        torch.tensor([label, 10]), guidance_scale)
        return nhwc(output[:1])
    return predict


def test_the_original_draws_with_guidance_on_three_channels(original):
    """And with diffusers' DDIM of the original's schedule."""
    model, file, vae = original
    pipe = load(file, vae=vae, dtype=np.float64)
    ours = list(pipe.stream(3, num_inference_steps=STEPS, sampler="ddim", seed=2))
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="linspace")
    scheduler.set_timesteps(STEPS)
    x, predict = tinyldm.noise.randn((1, 4, 8, 8), 2).transpose(0, 2, 3, 1), guided(model, 3, 4.0)
    for state, t in zip(ours, scheduler.timesteps, strict=True):
        noise = torch.from_numpy(predict(x, int(t))[..., :4])
        x = scheduler.step(noise, t, torch.from_numpy(x).double()).prev_sample.numpy()
        assert_close(state.latents, x, 1e-5, f"latents after step {state.step + 1}")
    pipe.guided_channels = None                         # as diffusers: the fourth one, too
    for three, four in zip(ours, pipe.stream(3, 4.0, STEPS, 2, sampler="ddim")):
        assert not np.allclose(three.latents, four.latents)


def test_the_originals_own_sampling(original):
    """Respaced DDPM whose variance the model predicts, written as the original's diffusion/ is."""
    model, file, vae = original
    pipe = load(file, vae=vae, dtype=np.float64)
    ours = list(pipe.stream(3, num_inference_steps=STEPS, seed=2))
    times = np.round(np.arange(STEPS) * 999 / (STEPS - 1)).astype(int)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[times]
    before = np.append(1.0, alpha_bar[:-1])
    betas = 1 - alpha_bar / before
    variances = betas * (1 - before) / (1 - alpha_bar)
    variances[0] = variances[1]                         # clipped for the logarithm
    draws, predict = get_generator("torch-cpu")(2), guided(model, 3, 4.0)
    x = draws.randn((1, 4, 8, 8)).transpose(0, 2, 3, 1).astype(float)
    for state, i in zip(ours, reversed(range(STEPS)), strict=True):
        assert state.timestep == times[i]
        noise, share = np.split(predict(x, int(times[i])), 2, axis=-1)
        x_start = (x - (1 - alpha_bar[i]) ** 0.5 * noise) / alpha_bar[i] ** 0.5
        mean = (betas[i] * before[i] ** 0.5 * x_start
                + (1 - before[i]) * (1 - betas[i]) ** 0.5 * x) / (1 - alpha_bar[i])
        share = (share + 1) / 2
        log_variance = share * np.log(betas[i]) + (1 - share) * np.log(variances[i])
        x = mean
        if i > 0:
            fresh = draws.randn((1, 4, 8, 8)).transpose(0, 2, 3, 1)
            x = mean + np.exp(log_variance / 2) * fresh
        assert_close(state.latents, x, 1e-4, f"latents after step {state.step + 1}")


def test_the_originals_250_timesteps(original):
    """space_timesteps(1000, [250]) of the original."""
    _, file, vae = original
    pipe = load(file, vae=vae)
    stride, at, expected = 999 / 249, 0.0, []
    for _ in range(250):
        expected.append(round(at))
        at += stride
    found = pipe.schedule.timesteps(pipe.num_inference_steps, "leading").round()
    assert found[::-1].tolist() == expected


def test_a_variance_that_the_model_does_not_predict(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    change_json(copied / "scheduler" / "scheduler_config.json", _class_name="DDPMScheduler",
                variance_type="learned_range")
    pipe = load(copied)
    assert len(list(pipe.stream(1, num_inference_steps=2))) == 2
    pipe.transformer = fill(type(pipe.transformer)(pipe.transformer.config | {"out_channels": 4}))
    with pytest.raises(TinyldmError, match="learned_range needs a model that also predicts"):
        pipe.stream(1, num_inference_steps=2)


def test_an_original_needs_a_vae(original):
    _, file, _ = original
    with pytest.raises(TinyldmError) as error:
        load(file)
    assert str(error.value) == (f"{file} (DiT) holds no VAE: name one with --vae (from Python "
                                "vae=), a file, a folder or a name on the hub")


def test_an_original_is_saved_as_what_it_is(original, tmp_path):
    _, file, vae = original
    pipe = load(file, vae=vae)
    assert (pipe.num_inference_steps, pipe.guidance_scale, pipe.guided_channels) == (250, 4, 3)
    with pytest.warns(UserWarning, match="differ from diffusers'"):
        tinyldm.save(pipe, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.guided_channels == 3 and again.transformer.config["freq_shift"] == 0
    assert np.array_equal(*(p(3, sampler="ddim", num_inference_steps=2)[0] for p in (pipe, again)))
