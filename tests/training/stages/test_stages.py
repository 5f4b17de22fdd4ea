"""The commands `lora` and `textual-inversion`: what they write, go on with, and refuse."""
import re

import diffusers
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file

from tests.support import small_pipelines, strict
from tests.support.command import assert_one_line
from tests.support.pictures_to_train import write_pictures
from tests.support.tolerance import within
from tinyldm import backend
from tinyldm.layers import NO_TAPE, Tape
from tinyldm.models.lora import DIFFUSERS, TEXT_DIFFUSERS, add_lora
from tinyldm.pipelines.loading import load
from tinyldm.training import memory
from tinyldm.training.__main__ import main
from tinyldm.training.data.latents import LatentCache
from tinyldm.training.options import diffusion_loss_from, parse
from tinyldm.training.stages.conditions import Texts
from tinyldm.training.stages.fine_tuning import FineTuning, Source
from tinyldm.training.stages.lora import put_into
from tinyldm.training.stages.stage import Stage

WORD = ["--token", "<s>", "--initializer", "cat"]
STAGES = {"lora": [], "textual-inversion": WORD}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return small_pipelines.smallest(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture
def train(weights, pictures, tmp_path, capsys):
    """A function that runs a command -> status, standard output, standard error."""
    def run(stage, *more, output="dog.safetensors", steps=2):
        status = main([stage, "--weights", str(weights), "--data", str(pictures), "--steps",
                       str(steps), "--batch", "3", "--learning-rate", "1e-2", "--output",
                       str(tmp_path / output), *STAGES[stage], *map(str, more)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err
    return run


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_written_and_said(stage, train, tmp_path):
    status, out, err = train(stage, "--layout", "kohya", "--save-as", "float16")
    assert status == 0, err
    file = tmp_path / "dog.safetensors"
    assert "memory: about" in out and f"checked: with {file} read back" in out
    assert {array.dtype for array in load_file(file).values()} == {np.dtype(np.float16)}
    option = "--lora" if stage == "lora" else "--embedding"
    assert re.search(f"draw with it: python -m tinyldm '.*' {option} {file} --weights", out)
    with safetensors.safe_open(file, "numpy") as opened:
        header = opened.metadata()
    assert header["ss_steps"] == "2" and header["ss_sd_model_name"] == "tiny"
    assert str(tmp_path.parent) not in str(header)
    assert "numbers became 0" in out


@pytest.mark.parametrize("stage, more", [
    ("lora", []), ("lora", ["--train-text-encoder", "--accumulate", "2", "--flip"]),
    ("lora", ["--ema", "0.9"]), ("textual-inversion", ["--vectors", "2"])])
def test_two_and_two_steps_are_four(stage, more, train, tmp_path):
    """Bitwise."""
    assert train(stage, *more, output="whole.safetensors", steps=4)[0] == 0
    assert train(stage, *more, steps=2)[0] == 0
    halfway = load_file(tmp_path / "dog.safetensors")
    status, out, err = train(stage, *more, "--resume", steps=4)
    assert status == 0, err
    whole, parts = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "dog"))
    assert whole.keys() == parts.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name])
    assert any((array != halfway[name]).any() for name, array in whole.items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("stage", STAGES)
def test_stable_diffusion_xl(stage, layout, places, train, tmp_path):
    """Its file is read back with both text encoders, by diffusers, too."""
    more = ["--train-text-encoder"] if stage == "lora" else []
    folder = places[0]("sdxl")
    status, out, err = train(stage, "--weights", folder, "--layout", layout, *more)
    assert status == 0 and "checked: with" in out, err
    if stage == "lora":
        theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
        theirs.load_lora_weights(tmp_path / "dog.safetensors")
        assert theirs.get_list_adapters().keys() == {"unet", "text_encoder", "text_encoder_2"}
    elif layout == "diffusers":
        assert (tmp_path / "dog_2.safetensors").exists()


@pytest.mark.parametrize("stage, more", [("lora", ["--train-text-encoder", "--checkpoints"]),
                                         ("textual-inversion", ["--vectors", "2"])])
def test_on_a_device(stage, more, train, tmp_path):
    """On strict arrays in place of CuPy's: the same file, up to rounding."""
    assert train(stage, *more, output="host.safetensors")[0] == 0
    with strict.installed(), backend.plain():
        status, out, err = train(stage, *more, "--device", "cuda", output="device.safetensors")
    assert status == 0, err
    host, device = (load_file(tmp_path / f"{name}.safetensors") for name in ("host", "device"))
    for name, array in host.items():                    # in units of the learning rate, 1e-2
        within(abs(array - device[name]).max(), 1e-4, name)


def test_buckets(train, tmp_path):
    folder = write_pictures(tmp_path / "wide", 3, (96, 32))
    write_pictures(tmp_path / "wide" / "square", 2)
    status, out, err = train("lora", "--data", folder, "--buckets", steps=4)
    assert status == 0, err
    assert "cut in the middle to the sizes 16x16 (2), 24x8 (3)" in out


def test_samples_and_validation(weights, pictures, tmp_path):
    """Drawn and measured with what is trained in its place; nothing of it is random."""
    options = parse(["lora", "--weights", str(weights), "--data", str(pictures), "--output",
                     str(tmp_path / "a"), "--sample-prompt", "a cat", "--sample-prompt", "a dog"])
    stage = Stage(options)
    plain = [np.asarray(image) for image in stage.sample()]
    assert len(plain) == 2 and plain[0].shape == (16, 16, 3)
    layers = put_into(stage.pipe, options)
    assert (np.asarray(stage.sample()[0]) == plain[0]).all(), "B is 0: nothing changes"
    latents = LatentCache(stage.pictures, stage.pipe.vae, tmp_path / "latents")
    loss = diffusion_loss_from(options, stage.pipe.schedule)
    tuning = FineTuning(stage.pipe, [Source(stage.pictures, latents, 2)], loss, 0)
    before = tuning.validate()
    assert len(before) == 8 and before == tuning.validate()
    for layer in layers.values():
        layer.lora_B.weight.data += 0.1
    assert all(before[name] != value for name, value in tuning.validate().items())
    assert (np.asarray(stage.sample()[0]) != plain[0]).any()


def test_captions_are_left_out(weights, pictures, tmp_path):
    options = parse(["lora", "--weights", str(weights), "--data", str(pictures), "--output",
                     str(tmp_path / "a")])
    stage = Stage(options)
    latents = LatentCache(stage.pictures, stage.pipe.vae, tmp_path / "latents")
    loss = diffusion_loss_from(options, stage.pipe.schedule)
    source = Source(stage.pictures, latents, 5, prefix="sks ")
    some, none = (FineTuning(stage.pipe, [source], loss, 0, dropout=share) for share in (0.5, 0))
    found = [caption for i in range(40) for batch in some.batches(i) for caption in batch.captions]
    assert 70 < found.count("") < 130 and all(c.startswith("sks ") for c in found if c)
    for i in range(3):                                  # the noise is the same
        (a,), (b,) = some.batches(i), none.batches(i)
        np.testing.assert_array_equal(a.x_t, b.x_t)
        assert "" not in b.captions


def test_resuming_with_other_options(train):
    assert train("lora")[0] == 0
    status, _, err = train("lora", "--resume", "--rank", 2, "--train-text-encoder", steps=4)
    assert status == 2 and "--rank is 2, it was 4" in err and "--train-text-encoder" in err
    assert "--resume changed" in err


def test_several_folders_and_a_folder_as_output(train, tmp_path):
    status, out, err = train("lora", "--prior-data", tmp_path / "class", "--prior-prompt",
                             "a cat", "--prior-count", 2, "--trigger", "low", output="mine")
    assert status == 0, err
    assert (tmp_path / "mine" / "mine.safetensors").exists()
    assert (tmp_path / "mine" / "state.npz").exists()
    assert len(list((tmp_path / "class").glob("*.jpg"))) == 2
    assert "python -m tinyldm 'low " in out


REFUSED = {
    "rank 0": ("lora", ["--rank", 0], "--rank: expected a whole number from 1"),
    "a rank above a layer": ("lora", ["--rank", 9], "rank of a LoRA must be .* 1 to 8 for "),
    "no state": ("lora", ["--resume"], "no training to go on with"),
    "no folder": ("lora", ["--data", "nowhere"], "nowhere"),
    "a size of no whole latents": ("lora", ["--resolution", 18], "multiple of 4 .*not 18"),
    "half of the prior": ("lora", ["--prior-prompt", "a cat"], "go together"),
    "no number": ("lora", ["--learning-rate", "fast"], "--learning-rate: expected a number"),
    "an initializer of several tokens": (
        "textual-inversion", ["--initializer", "cathedral"], "one token, but 'cathedral' has"),
    "a word that is there": ("textual-inversion", ["--token", "cat</w>"], "vocabulary already"),
    "a caption without the word": (
        "textual-inversion", ["--caption", "a cat"], "must hold the new word, <s>"),
    "an option of the other": ("textual-inversion", ["--rank", 4], "unrecognized arguments"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_line_for_bad_input(case, train, tmp_path):
    stage, more, said = REFUSED[case]
    status, _, err = train(stage, *more)
    assert_one_line(status, err, said)
    assert not (tmp_path / "dog.safetensors").exists()


@pytest.mark.parametrize("name, said", [
    ("dit", "is DiT of .*, with no UNet that reads prompts"),
    ("inpainting", "a UNet for inpainting"),
    ("lcm", "imitates guidance")])
def test_weights_of_another_system(name, said, train, tmp_path):
    folder = getattr(small_pipelines, name)(tmp_path / name)
    status, _, err = train("lora", "--weights", folder)
    assert status == 2 and re.search(said, err) and "Stable Diffusion 1, 2 and XL" in err


@pytest.mark.parametrize("stage", STAGES)
def test_output_that_exists_stays(stage, train, tmp_path):
    file = tmp_path / "dog.safetensors"
    file.write_bytes(b"mine")
    status, _, err = train(stage)
    assert status == 2 and "exists already" in err and file.read_bytes() == b"mine"
    file.unlink()
    assert train(stage)[0] == 0
    assert train(stage)[0] == 2


def test_an_empty_folder_of_pictures(train, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _, err = train("lora", "--data", tmp_path / "empty")
    assert status == 2 and "holds no pictures" in err


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_estimate_of_memory(checkpoints, reads, side, places):
    """Against the tape of a whole batch. With checkpoints another block is the largest at 64."""
    pipe = load(places[0]("toy"))
    unet, texts, rng = pipe.unet, Texts(pipe), np.random.default_rng(0)
    texts.freeze()
    add_lora(unet, DIFFUSERS, 4, 4, rng)
    if reads:
        add_lora(pipe.text_encoder, TEXT_DIFFUSERS, 4, 4, rng)
    context = texts.frozen([""])["context"]
    estimate = memory.activations(unet, context, side, 2, checkpoints, texts if reads else None)
    assert all(parameter.grad is None for parameter in [*unet.parameters(), *texts.parameters()])
    tape = Tape(checkpoints, only_trained=True)
    latents = rng.standard_normal((2, side, side, 4)).astype(np.float32)
    ids = texts.ids(["a cat", "a dog"])
    context = texts(ids, tape if reads else NO_TAPE)["context"]
    gradients = unet.backward(unet(latents, np.zeros(2, int), context, tape), tape)
    if reads:
        texts.backward(gradients, tape)
    within(abs(estimate / tape.peak - 1), 1e-3, "memory")
    assert memory.weights(unet) == sum(p.data.nbytes for p in unet.parameters())
