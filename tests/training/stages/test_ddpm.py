"""The stage `ddpm`: against torch and diffusers; its folder; what it goes on with and refuses."""
import re

import diffusers
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import tinyldm
from tests.support import improved_ddpm, pixel_models, small_pipelines, strict
from tests.support.command import assert_one_line
from tests.support.pixel_models import write_classes, write_model
from tests.support.reference import nchw, to_ours, widen_embeddings
from tests.support.tolerance import assert_allclose, within
from tinyldm import backend
from tinyldm.models import UNet2DModel
from tinyldm.pipelines.ddpm import DDPM
from tinyldm.pipelines.loading import load
from tinyldm.tape import nbytes_of, observed
from tinyldm.training import memory
from tinyldm.training.__main__ import main
from tinyldm.training.options import parse
from tinyldm.training.report import read_log
from tinyldm.training.stages import ddpm
from tinyldm.training.stages.ddpm import Stage
from tinyldm.training.stages.denoising import Denoising

RATE, CLIP = 1e-3, 0.5
BY_CLASS = ["--classes", "names"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A function from write_model's arguments to a folder."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(*arguments):
        if arguments not in made:
            made[arguments] = write_model(root / str(len(made)), *arguments)
        return made[arguments]
    return folder


@pytest.fixture
def train(pictures, tmp_path, capsys):
    """A function that runs the command -> status, standard output, standard error."""
    def run(*more, output="out", steps=2):
        status = main(["ddpm", "--data", str(pictures), "--steps", str(steps), "--batch", "3",
                       "--warmup", "0", "--validate-every", "0", "--output",
                       str(tmp_path / output), *map(str, more)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err
    return run


# ---- against torch ------------------------------------------------------------------------------

CASES = {"plain": ("plain", []), "v, dropped classes": (
             "guided", "fixed_large", "v_prediction", [*BY_CLASS, "--class-dropout", "0.3"]),
         "learned variance": ("plain", "learned", "epsilon", 1000, "squaredcos_cap_v2", []),
         "as Improved DDPM's files": ("rescaled", "learned", "epsilon", 50, []),
         "learned variance by class": ("guided", "learned", "epsilon", 50, BY_CLASS),
         "DiT": ("dit", "learned", BY_CLASS)}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_as_in_torch(case, dtype, weights, pictures, tmp_path, monkeypatch):
    """Losses, gradient norms and weights, these in units of the learning rate: Adam makes a step of
    about that size of any gradient, also where it is nothing but rounding errors."""
    *arguments, more = CASES[case]
    folder, exact, batches = weights(*arguments), dtype == np.float64, []
    own = Denoising.batch
    monkeypatch.setattr(Denoising, "batch", lambda self, *arguments: batches.append(
        own(self, *arguments)) or batches[-1])
    monkeypatch.setattr(ddpm, "load_weights", lambda place: load(place, dtype=dtype))
    options = ["--weights", folder, "--output", tmp_path / "out", "--steps", 20, "--batch", 3,
               "--learning-rate", RATE, "--clip", CLIP, "--warmup", 0, "--ema", 0,
               "--validate-every", 0, *more]
    stage = Stage(parse(["ddpm", "--data", str(pictures), *map(str, options)]))
    stage.train()
    kind = torch.float64 if exact else torch.float32
    network = getattr(diffusers, type(stage.network).__name__).from_pretrained(
        folder / stage.pipe.network).to(kind).eval()
    if exact:
        widen_embeddings(network)
    losses, norms = torch_steps(network, stage, batches, kind)
    ours = np.array([loss for _, loss in stage.loop.history])
    assert len(batches) == len(ours) == len(losses) == 20
    assert max(norms) > CLIP, "clipping must matter"
    found = [line["gradient"] for line in read_log(tmp_path / "out") if "gradient" in line]
    assert_allclose(found, norms, rtol=1e-6 if exact else 1e-2)
    assert_allclose(ours[0], losses[0], rtol=1e-12 if exact else 1e-5)
    assert_allclose(ours, losses, rtol=1e-8 if exact else 1e-3)
    theirs, errors = dict(network.named_parameters()), []
    for name, parameter in stage.network.named_parameters():
        assert parameter.data.dtype == dtype
        errors.append((parameter.data - to_ours(theirs[name])).ravel() / RATE)
    within((np.concatenate(errors) ** 2).mean() ** 0.5, 1e-4 if exact else 0.05, "weights, rms")


def torch_steps(network, stage, batches, dtype):
    """The same steps by autograd and torch.optim -> losses, gradient norms."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0)
    betas, losses, norms = stage.pipe.schedule.betas.astype(np.float64), [], []
    alpha_bar = stage.pipe.schedule.alphas_cumprod
    for batch in batches:
        t, labels = torch.from_numpy(batch.timesteps), {}
        if batch.labels is not None:
            labels = {"class_labels": torch.from_numpy(batch.labels)}
        x_start, x_t, noise = (nchw(x).to(dtype) for x in (batch.x_start, batch.x_t, batch.noise))
        scale = 1000 / len(betas) if getattr(stage.pipe, "rescale_timesteps", False) else 1
        output = network(x_t, scale * t, **labels).sample
        if output.shape == noise.shape:
            a, s = (torch.from_numpy(np.sqrt(x[batch.timesteps]))[:, None, None, None]
                    for x in (alpha_bar, 1 - alpha_bar))
            v = stage.pipe.schedule.prediction_type == "v_prediction"
            loss = ((output - (a * noise - s * x_start if v else noise)) ** 2).mean()
        else:
            loss = improved_ddpm.losses(betas, *(x.movedim(1, -1) for x in (
                output, x_start, noise, x_t)), t, "rescaled_mse").mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)))
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses), norms


# ---- the command --------------------------------------------------------------------------------

SMALL = {"small": pixel_models.PIXELS | {"norm_num_groups": 4}}
LEARNED = ["--variance", "learned", "--beta-schedule", "squaredcos_cap_v2"]


@pytest.fixture
def tiny(monkeypatch):
    """--model small and dit become as small as the tests'."""
    monkeypatch.setattr("tinyldm.training.stages.new_models.UNETS", SMALL)
    monkeypatch.setattr("tinyldm.training.stages.new_models.DIT", pixel_models.DIT)


def weights_of(folder):
    return load_file(next(folder.glob("[ut]*/diffusion_pytorch_model.safetensors")))


def test_diffusers_draws_the_same_picture(train, tiny, tmp_path):
    """With a fixed and with a learned variance, by its own pipeline."""
    for name, more in (("fixed", []), ("learned", LEARNED)):
        status, out, err = train("--resolution", 16, *more, output=name)
        assert status == 0 and f"checked: {tmp_path / name}, read back" in out, err
        theirs = diffusers.DDPMPipeline.from_pretrained(tmp_path / name)
        theirs.set_progress_bar_config(disable=True)
        expected = theirs(generator=torch.Generator().manual_seed(3), num_inference_steps=5,
                          output_type="np").images[0]
        found, = tinyldm.load(tmp_path / name)(seed=3, num_inference_steps=5)
        assert abs(np.asarray(found) - 255 * expected).max() < 1.01
        assert f"draw with it: python -m tinyldm --weights {tmp_path / name}\n" in out


def test_a_model_by_class(train, tiny, tmp_path):
    """Drawn by name, with guidance; and by diffusers' UNet the same prediction."""
    status, out, err = train(*BY_CLASS, "--resolution", 16, "--sample-every", 1,
                             "--validate-every", 1)
    assert status == 0 and "classes: 0 cat, 1 dog, 2 emu" in out, err
    assert "step 2: validation loss" in err
    assert (tmp_path / "out" / "samples.png").exists()
    pipe = tinyldm.load(tmp_path / "out")
    assert pipe.names == {"cat": 0, "dog": 1, "emu": 2} and pipe.kind == "GuidedDDPMPipeline"
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    x = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    t, labels = np.array([3, 700]), np.array([1, 3])
    expected = theirs(nchw(x), torch.from_numpy(t), torch.from_numpy(labels)).sample
    assert_allclose(pipe.unet(x, t, class_labels=labels), expected.detach().numpy().transpose(
        0, 2, 3, 1), atol=1e-5)
    assert main_draws(tmp_path, "--label", "emu", "--guidance", "3")


def main_draws(tmp_path, *more):
    from tinyldm.cli.draw import main as draw
    return draw(["--weights", str(tmp_path / "out"), "--steps", "2", "--output",
                 str(tmp_path / "emu.png"), *more]) == 0 and (tmp_path / "emu.png").exists()


def test_a_dit_by_class(train, tiny, tmp_path):
    status, out, err = train(*BY_CLASS, "--model", "dit", "--resolution", 16, *LEARNED)
    assert status == 0, err
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    assert theirs.config.out_channels == 2 * theirs.config.in_channels
    assert tinyldm.load(tmp_path / "out")("dog", num_inference_steps=2)[0].size == (16, 16)
    assert len([*(tmp_path / "out" / "latents").glob("*.npz")]) == 9


@pytest.mark.parametrize("more", [
    [], ["--accumulate", 2, "--flip", "--ema", 0], [*BY_CLASS, *LEARNED],
    [*BY_CLASS, "--model", "dit", "--variance", "learned", "--checkpoints"]], ids=str)
def test_two_and_two_steps_are_four(more, train, tiny, tmp_path):
    """Bitwise."""
    more = [*more, "--resolution", 16, "--learning-rate", 1e-2]
    assert train(*more, output="whole", steps=4)[0] == 0
    assert train(*more)[0] == 0
    halfway = weights_of(tmp_path / "out")
    status, _, err = train(*more, "--resume", steps=4)
    assert status == 0, err
    whole, parts = (weights_of(tmp_path / name) for name in ("whole", "out"))
    assert whole.keys() == parts.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name])
    assert any((array != halfway[name]).any() for name, array in whole.items())


@pytest.mark.parametrize("more", [LEARNED, [*BY_CLASS, "--model", "dit"]], ids=str)
def test_on_a_device(more, train, tiny, tmp_path):
    """On strict arrays in place of CuPy's: the same folder, up to rounding."""
    more = [*more, "--resolution", 16, "--learning-rate", 1e-2, "--held-out", 2, "--bits-steps", 2]
    assert train(*more, output="host")[0] == 0
    with strict.installed(), backend.plain():
        status, _, err = train(*more, "--device", "cuda", output="device")
    assert status == 0, err
    host, device = (weights_of(tmp_path / name) for name in ("host", "device"))
    errors = np.concatenate([(array - device[name]).ravel() for name, array in host.items()])
    within((errors ** 2).mean() ** 0.5, 1e-5, "weights, rms")   # the learning rate is 1e-2
    with strict.installed(), backend.plain():
        status, _, err = train(*more, "--device", "cuda", "--dtype", "float16", output="half")
    assert status == 0, err


@pytest.mark.parametrize("more", [[*BY_CLASS, *LEARNED], [*BY_CLASS, "--model", "dit"]], ids=str)
def test_float16(more, train, tiny, tmp_path):
    """Like float32, up to the rounding of the gradients; exact in going on, as in float32."""
    more = [*more, "--resolution", 16, "--ema", 0, "--learning-rate", 1e-2]
    assert train(*more, output="whole", steps=4)[0] == 0
    half = [*more, "--dtype", "float16"]
    status, _, err = train(*half, "--held-out", 0, output="half", steps=4)
    assert status == 0, err
    assert train(*half)[0] == 0 and train(*half, "--resume", steps=4)[0] == 0
    whole, found, parts = (weights_of(tmp_path / name) for name in ("whole", "half", "out"))
    errors = []
    for name, array in whole.items():
        np.testing.assert_array_equal(found[name], parts[name])
        errors.append((found[name] - array).ravel() / 1e-2)
    within((np.concatenate(errors) ** 2).mean() ** 0.5, 0.5, "in units of the learning rate")


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("more", [[], LEARNED, [*BY_CLASS, "--model", "dit"]], ids=str)
def test_the_estimate_of_memory(more, checkpoints, pictures, tiny, tmp_path):
    """Against the tape of a whole batch."""
    stage = stage_of(pictures, tmp_path, *more, "--resolution", 16, "--batch", 4)
    found, denoising, batch = [], stage.denoising, stage.denoising.batch(0, 4)
    side, least = (stage.network.settings.sample_size, None) if "dit" in more else (16, 4)
    estimate = max(memory.places(denoising.step, side, checkpoints, least))
    assert all(parameter.grad is None for parameter in stage.network.parameters())
    denoising.checkpoints = checkpoints
    with observed(lambda entries: found.append(sum(size for _, size in nbytes_of(entries)))):
        denoising.part_loss(batch, 1.0, range(4), 1.0)
    # A DiT's table of positions is the same for all pictures, and is measured with one.
    within(abs(4 * estimate / max(found) - 1), 1e-2 if "dit" in more else 1e-3, "memory")


def test_the_line_on_memory(train, tiny, monkeypatch):
    """Four pictures are four shards, of which two threads compute two at once."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(memory, "places", lambda step, side, checkpoints=False, least=None: [
        2 ** 30, (3 - checkpoints) * 2 ** 30])
    monkeypatch.setattr(memory, "available", lambda: 2 ** 30)
    status, out, err = train("--resolution", 16, "--batch", 4)
    assert status == 0, err
    assert "activations 6.0 GiB (4.0 GiB with --checkpoints); only 1.0 GiB are free" in out
    assert memory.division(4) == (4, 4, 2)
    assert memory.waiting([10, 30], memory.Division(4, 8, 2)) == 8 * 10 + 2 * 20


def test_from_weights(train, weights, tmp_path):
    """They keep their schedule and their classes; untouched parts are copied."""
    folder = weights("guided", "learned", "epsilon", 50)
    status, out, err = train("--weights", folder, *BY_CLASS, "--held-out", 3, "--bits-steps", 5)
    assert status == 0, err
    for part in ("scheduler/scheduler_config.json", "unet/config.json"):
        assert (folder / part).read_text() == (tmp_path / "out" / part).read_text()
    assert re.search(r"bits per dimension of 3 held-out pictures: \d+\.\d{3}, in 5 of 50 steps",
                     out)
    before, after = weights_of(folder), weights_of(tmp_path / "out")
    assert all((array != after[name]).any() for name, array in before.items())


def test_classes_keep_the_numbers_that_the_weights_names_have(weights, pictures, tmp_path, train):
    stage = stage_of(pictures, tmp_path, "--weights", weights("named"), *BY_CLASS)
    assert stage.classes == ["cat", "dog", "emu"] and stage.numbers == [1, 2, 0]
    for sample, label in zip(stage.pictures.samples(0, 0, 9), stage.denoising.batch(0, 9).labels):
        name = stage.pictures.items[sample.index].name.split("_")[0]
        assert label in (3, stage.pipe.names[name])
    write_classes(tmp_path / "more")
    (tmp_path / "more" / "cat_0.png").rename(tmp_path / "more" / "yak_0.png")
    status, _, err = train("--data", tmp_path / "more", "--weights", weights("named"), *BY_CLASS)
    assert status == 2 and "the weights know no class 'yak', but 3: emu, cat, dog" in err


def test_the_authors_files_go_on(train, weights, tmp_path):
    """Their UNet sees rescaled timesteps, which the result keeps."""
    status, _, err = train("--weights", weights("rescaled", "learned", "epsilon", 50))
    assert status == 0 and tinyldm.load(tmp_path / "out").rescale_timesteps, err


def test_the_vae_of_a_new_dit(tmp_path):
    """A pipeline's folder, its VAE's, or its VAE's file: the same VAE with the config's factor."""
    folder = small_pipelines.smallest(tmp_path / "weights")
    small_pipelines.change_json(folder / "vae" / "config.json", scaling_factor=0.7)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    for place in folder, folder / "vae", file:
        vae = ddpm.vae_of(place)
        assert vae.scaling_factor == 0.7 and vae.dtype == np.float32
        for name, array in load_file(file).items():
            np.testing.assert_array_equal(vae.state_dict()[name], array)


def stage_of(pictures, tmp_path, *more):
    return Stage(parse(["ddpm", "--data", str(pictures), "--output", str(tmp_path / "a"),
                        *map(str, more)]))


def test_what_is_held_out_is_not_trained_on(weights, pictures, tmp_path):
    stage = stage_of(pictures, tmp_path, "--weights", weights("plain"), "--held-out", 3)
    held = stage.denoising.held_out
    assert held == [0, 3, 6]
    seen = {sample.index for step in range(10) for sample in stage.pictures.samples(0, step, 6)}
    assert seen == set(range(9)) - set(held)
    bits = [stage.denoising.bits(kind, 4).total for kind in ("fixed_small",) * 2 + ("fixed_large",)]
    assert bits[0] == bits[1] != bits[2]


def test_classes_are_dropped(weights, pictures, tmp_path):
    folder = weights("guided", "learned", "epsilon", 50)
    some, none = (stage_of(pictures, tmp_path, "--weights", folder, *BY_CLASS, "--class-dropout",
                           share).denoising for share in (0.3, 0))
    labels = np.concatenate([some.batch(i, 6).labels for i in range(60)])
    assert 0.2 < (labels == 3).mean() < 0.4 and set(labels) == {0, 1, 2, 3}
    for i in range(3):                                  # the noise is the same
        (_, a, *_), (_, b, *_, labels) = some.batch(i, 6), none.batch(i, 6)
        np.testing.assert_array_equal(a, b)
        assert 3 not in labels


REFUSED = {
    "no class in a name": (["--classes", "folders"], "--classes folders: 9 of the pictures have"),
    "a resolution of no whole maps": (["--resolution", 17], "sample_size, .* 17: expected multi"),
    "a DiT without classes": (["--model", "dit"], "a DiT draws by class: give --classes"),
    "a DiT of no whole patches": (["--model", "dit", *BY_CLASS, "--resolution", 20],
                                  "--resolution must be a multiple of 8"),
    "a VAE for a UNet": (["--vae", "x"], "--vae is for --model dit"),
    "all held out": (["--held-out", 9], "cannot be held out"),
    "min-SNR with a bound": (["--min-snr", 5, *LEARNED], "the loss has a bound, of uniform time"),
    "an offset with a bound": (["--noise-offset", 0.1, *LEARNED], "leave --min-snr, --noise-of"),
    "other timesteps with a bound": (["--timesteps", "logit-normal", *LEARNED], "has a bound, of"),
    "too few timesteps": (["--train-timesteps", 20], "needs more than 20 timesteps"),
    "no such model": (["--model", "large"], "argument --model: invalid choice"),
    "no state": (["--resume"], "no training to go on with"),
    "a share of one": (["--class-dropout", 1], "--class-dropout: expected a number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_line_for_bad_input(case, train, tmp_path):
    more, said = REFUSED[case]
    status, _, err = train(*more)
    assert_one_line(status, err, said)
    assert not (tmp_path / "out" / "model_index.json").exists()


@pytest.mark.parametrize("kind, more, said", [
    ("plain", BY_CLASS, "the weights know no classes, and --classes names finds 3"),
    ("guided", [], "the weights know 3 classes, and --classes is not given, which finds 0"),
    ("plain", ["--resolution", 8], "--resolution must be 16, the size of these weights' pict"),
    ("plain", ["--variance", "learned"], "--variance is for a new model"),
    ("plain", ["--model", "small"], "--model is for a new model")])
def test_weights_that_do_not_fit(kind, more, said, train, weights):
    status, _, err = train("--weights", weights(kind), *more)
    assert status == 2 and said in err.splitlines()[-1], err


@pytest.mark.parametrize("config, scheduler, said", [
    ({"in_channels": 1, "out_channels": 1}, {}, "the weights are of grey pictures, or their"),
    ({"class_embed_type": "timestep"}, {}, "or their classes are no numbers"),
    ({"sample_size": [16, 8]}, {}, "pictures of 8x16 pixels: this stage trains on squares"),
    ({"out_channels": 6}, {"variance_type": "learned"}, "this stage trains learned_range")])
def test_weights_that_are_not_trained(config, scheduler, said, train, tmp_path):
    unet = pixel_models.filled(UNet2DModel(pixel_models.PIXELS | {"sample_size": 16} | config))
    tinyldm.save(DDPM(unet, {"_class_name": "DDPMScheduler"} | scheduler), tmp_path / "weights")
    status, _, err = train("--weights", tmp_path / "weights")
    assert status == 2 and said in err.splitlines()[-1], err


def test_weights_of_another_system(train, places):
    status, _, err = train("--weights", places[0]("toy"))
    assert status == 2 and "this stage trains DDPM, Improved DDPM and DiT" in err


def test_resuming_otherwise(train, tiny):
    assert train("--resolution", 16)[0] == 0
    status, _, err = train("--resolution", 16, *LEARNED, "--resume", steps=4)
    assert status == 2 and "--variance is learned, it was fixed_large" in err
    assert "--beta-schedule is squaredcos_cap_v2, it was linear" in err
    status, _, err = train("--resolution", 16)
    assert status == 2 and "exists already" in err
