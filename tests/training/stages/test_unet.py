"""The stage `unet`: against torch and diffusers; the folder it writes; what it refuses."""
import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.support import small_pipelines, strict
from tests.support.command import assert_one_line
from tests.support.drawing import Reference, assert_same_drawing, ours
from tests.support.fine_tuning import TorchSteps, stage_of
from tests.support.reference import to_ours
from tests.support.tolerance import assert_allclose, within
from tinyldm import backend
from tinyldm.checkpoints import components
from tinyldm.errors import TinyldmError
from tinyldm.files import read_json
from tinyldm.pipelines.loading import load
from tinyldm.training.__main__ import main
from tinyldm.training.stages.unet import choose, named_parameters

RATE, CLIP = 1e-4, 0.1
UNET = "unet/diffusion_pytorch_model.safetensors"

CASES = {
    "noise": ("toy", []),
    "v, zero terminal SNR": ("toy", ["--prediction-type", "v_prediction", "--zero-terminal-snr",
                                     "--min-snr", "5"]),
    "x_start, cosine": ("toy", ["--prediction-type", "sample", "--beta-schedule",
                                "squaredcos_cap_v2"]),
    "Stable Diffusion XL": ("sdxl", ["--train-text-encoder", "--checkpoints"]),
    "from scratch": ("toy", ["--from-scratch", "--train-text-encoder"]),
}


@pytest.mark.parametrize("case, dtype", [
    *((case, np.float64) for case in CASES if case != "from scratch"), ("noise", np.float32),
    ("from scratch", np.float32)])
def test_twenty_steps_as_in_torch(case, dtype, places, exact_sqrt, tmp_path, monkeypatch):
    """Losses, the gradients' norms and the weights, these in units of the learning rate: Adam makes
    a step of about that size of any gradient, also where it is nothing but rounding errors."""
    weights, pictures, _ = places
    name, more = CASES[case]
    exact = dtype == np.float64
    stage, batches = stage_of(
        ["unet", "--weights", weights(name), "--data", pictures, "--output", tmp_path / "out",
         "--steps", 20, "--batch", 3, "--learning-rate", RATE, "--clip", CLIP, "--decay-vectors",
         *more], monkeypatch, dtype)
    choose(stage.pipe, stage.options)
    named = named_parameters(stage.pipe)
    reference = TorchSteps(weights(name), torch.float64 if exact else torch.float32,
                           stage.options.min_snr)
    parameters = reference.add_all(named, stage.pipe.scheduler)
    begun = {name: parameter.data.copy() for name, parameter in named}
    found = record_norms(monkeypatch)
    stage.train(named, lambda: None, [])
    losses, norms = reference.train([*parameters.values()], batches, RATE, CLIP, 0.01)
    own = np.array([loss for _, loss in stage.loop.history])
    assert len(own) == len(losses) == len(norms) == 20 and max(norms) > CLIP
    assert any("" in batch["captions"] for step in batches for batch in step), "some are dropped"
    rounded = 1e-6 * (stage.options.min_snr > 0)        # torch's weights of min-SNR: float32, 6 ops
    if exact:
        assert_allclose(own[0], losses[0], rtol=max(1e-13, rounded))
    assert_allclose(own, losses, rtol=max(1e-8, rounded) if exact else 1e-4)
    assert_allclose(found, norms, rtol=1e-6 if exact else 1e-3)
    errors = []
    for name, parameter in named:
        theirs = to_ours(parameters[name])
        assert parameter.data.dtype == dtype and (parameter.data != begun[name]).any(), name
        errors.append((parameter.data - theirs).ravel() / RATE)
    errors = np.concatenate(errors).astype(np.float64)
    within((errors ** 2).mean() ** 0.5, 1e-5 if exact else 0.1, "weights, rms")


def record_norms(monkeypatch):
    """A list that gets the norm of each step's gradient."""
    from tinyldm.training.optim import AdamW

    norms, own = [], AdamW.step

    def step(self, *args, **options):
        norms.append(own(self, *args, **options))
        return norms[-1]
    monkeypatch.setattr(AdamW, "step", step)
    return norms


# ---- the command ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return small_pipelines.smallest(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture
def train(weights, places, tmp_path, capsys):
    """A function that runs the command -> status, standard output, standard error."""
    def run(*more, output="out", steps=2):
        status = main(["unet", "--weights", str(weights), "--data", str(places[1]), "--steps",
                       str(steps), "--batch", "3", "--learning-rate", "1e-3", "--output",
                       str(tmp_path / output), *map(str, more)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err
    return run


def tensors(folder):
    return {(file.parent.name, name): array for file in sorted(folder.glob("*/*.safetensors"))
            for name, array in load_file(file).items()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name, more", [
    ("sd1", ["--zero-terminal-snr", "--prediction-type", "v_prediction"]),
    ("dpmpp", ["--prediction-type", "sample", "--train-text-encoder"]),
    ("sdxl", ["--train-text-encoder", "--ema", "0.5"]),
    ("sd2", ["--save-as", "float16", "--from-scratch", "--beta-schedule", "linear"])])
def test_diffusers_draws_the_same_with_the_folder(name, more, places, train, tmp_path):
    status, out, err = train("--weights", places[0](name), *more)
    assert status == 0 and f"checked: with {tmp_path / 'out'} read back" in out, err
    assert f"--weights {tmp_path / 'out'}" in out
    # What does not change from call to call, as these samplers are: see test_stable_diffusion.py.
    pipe, options = load(tmp_path / "out"), {"guidance_scale": 2.0}
    size = pipe.size()
    assert_same_drawing(ours(load(tmp_path / "out", dtype=np.float64), **options),
                        Reference(tmp_path / "out")(height=size[1], width=size[0], **options))


def test_what_is_written(train, weights, tmp_path):
    """The parts that are not trained keep their numbers and their size; the UNet alone is new."""
    assert train("--train-text-encoder", "--save-every", 1)[0] == 0
    own, new = tensors(weights), tensors(tmp_path / "out")
    assert own.keys() == new.keys()
    for (part, name), array in own.items():
        changed = (array != new[part, name]).any()
        assert not changed if part == "vae" else new[part, name].dtype == np.float32
    assert any((array != new[key]).any() for key, array in own.items() if key[0] == "unet")
    assert any((array != new[key]).any() for key, array in own.items() if "text" in key[0])
    assert read_json(tmp_path / "out" / "scheduler" / "scheduler_config.json").items() >= read_json(
        weights / "scheduler" / "scheduler_config.json").items()
    assert {"log.jsonl", "state.npz", "model_index.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()}


def test_what_cannot_be_written_leaves_a_whole_folder(train, weights, tmp_path, monkeypatch):
    """model_index.json comes last, and each file is replaced whole or not at all."""
    def full(tensors, path, *more):
        if path.parent.name == "vae":
            raise TinyldmError(f"cannot write {path} (No space left on device): choose another")
        return own(tensors, path, *more)

    own = components.write_safetensors
    with monkeypatch.context() as patch:
        patch.setattr(components, "write_safetensors", full)
        status, _, err = train()
    assert status == 2 and "No space left" in err and (tmp_path / "out" / "unet").exists()
    assert not (tmp_path / "out" / "model_index.json").exists()
    status, _, err = train("--resume")                  # it was trained to the end, and is written
    assert status == 0, err
    assert load(tmp_path / "out").unet.dtype == np.float32


def test_a_narrow_unet_from_scratch(train, weights, tmp_path):
    """The seed decides on its first weights."""
    config = read_json(weights / "unet" / "config.json") | {"block_out_channels": [4, 8]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for output, seed in (("a", 1), ("b", 1), ("c", 2)):
        status, _, err = train("--unet-config", tmp_path / "config.json", "--seed", seed,
                               output=output)
        assert status == 0, err
    a, b, c = (tensors(tmp_path / name) for name in "abc")
    assert a["unet", "conv_in.weight"].shape[0] == 4
    assert all((array == b[key]).all() for key, array in a.items())
    assert (a["unet", "conv_in.weight"] != c["unet", "conv_in.weight"]).any()


@pytest.mark.parametrize("more", [
    [], ["--train-text-encoder", "--accumulate", "2", "--flip", "--ema", "0.9"],
    ["--from-scratch", "--checkpoints", "--zero-terminal-snr", "--prediction-type", "sample"],
    ["--dtype", "float16"]])
def test_two_and_two_steps_are_four(more, train, tmp_path):
    """Bitwise."""
    assert train(*more, output="whole", steps=4)[0] == 0
    assert train(*more, steps=2)[0] == 0
    halfway = tensors(tmp_path / "out")
    status, out, err = train(*more, "--resume", steps=4)
    assert status == 0, err
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    for key, array in whole.items():
        np.testing.assert_array_equal(array, parts[key])
    assert any((array != halfway[key]).any() for key, array in whole.items())


@pytest.mark.parametrize("more", [["--checkpoints", "--ema", "0.9"],
                                  ["--from-scratch", "--train-text-encoder"]])
def test_on_a_device(more, train, tmp_path):
    """On strict arrays in place of CuPy's: the same folder, up to rounding."""
    assert train(*more, output="host")[0] == 0
    with strict.installed(), backend.plain():
        status, out, err = train(*more, "--device", "cuda", output="device")
    assert status == 0, err
    host, device = tensors(tmp_path / "host"), tensors(tmp_path / "device")
    for key, array in host.items():                     # in units of the learning rate, 1e-3
        within(abs(array - device[key]).max(), 1e-4, key[1])


def test_samples_and_a_second_look(train, tmp_path):
    status, _, err = train("--sample-every", 1, "--sample-prompt", "red cat", "--ema", "0.5")
    assert status == 0, err
    assert len(list((tmp_path / "out" / "samples").glob("*.png"))) == 3
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert sum("validation" in json.loads(line) for line in lines) == 2
    status, _, err = train()
    assert status == 2 and "exists already" in err and "--resume" in err
    status, _, err = train("--resume", "--prediction-type", "sample", steps=4)
    assert status == 2 and "--prediction-type is sample, it was None" in err


REFUSED = {
    "noise at zero SNR": (["--zero-terminal-snr"], "pure noise.*give --prediction-type"),
    "no config": (["--unet-config", "nowhere.json"], "nowhere.json"),
    "a config of something else": (["--unet-config", "{vae}"], "--unet-config: "),
    "another context": (["--unet-config", {"cross_attention_dim": 9}],
                        "config.json: .*cross_attention_dim is 9, .*hidden_size is 8"),
    "a UNet for inpainting": (["--unet-config", {"in_channels": 9}], "a UNet for inpainting"),
    "another VAE": (["--unet-config", {"out_channels": 3}], "out_channels is 3, .* is 4"),
    "a type that is none": (["--prediction-type", "score"], "--prediction-type: invalid choice"),
    "a layout": (["--layout", "kohya"], "unrecognized arguments"),
    "a size of no whole latents": (["--resolution", 18], "multiple of 4 .*not 18"),
    "no pictures": (["--data", "nowhere"], "nowhere"),
    "no state": (["--resume"], "no training to go on with"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_line_for_bad_input(case, train, weights, tmp_path):
    more, said = REFUSED[case]
    if isinstance(changes := more[-1], dict):
        config = read_json(weights / "unet" / "config.json") | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        more = [more[0], tmp_path / "config.json"]
    elif more[-1] == "{vae}":
        more = [more[0], weights / "vae" / "config.json"]
    status, _, err = train(*more)
    assert_one_line(status, err, said)
    assert not (tmp_path / "out" / "model_index.json").exists()


@pytest.mark.parametrize("name, said", [
    ("dit", "is DiT of .*, with no UNet that reads prompts"), ("inpainting", "for inpainting"),
    ("lcm", "imitates guidance")])
def test_weights_of_another_system(name, said, places, train):
    status, _, err = train("--weights", places[0](name))
    assert status == 2 and re.search(said, err) and "Stable Diffusion 1, 2 and XL" in err
