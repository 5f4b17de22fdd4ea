"""The command `autoencoder`: what it writes, goes on with, and refuses."""
import json
import re

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from tests.support import models, small_pipelines, strict
from tests.support.command import assert_one_line
from tests.support.pictures_to_train import write_pictures
from tests.support.reference import nchw
from tests.support.tolerance import assert_allclose, within
from tinyldm import backend, load_model
from tinyldm.checkpoints import save_model
from tinyldm.files import write_json
from tinyldm.models import CLIPVisionModel
from tinyldm.models.discriminator import initialise
from tinyldm.training.__main__ import main
from tinyldm.training.report import read_log
from tinyldm.training.stages import autoencoder
from tinyldm.training.stages.stage import ROUNDED

WEIGHTS = "diffusion_pytorch_model.safetensors"
NEW = ["--channels", "4", "8", "--resolution", "24"]
ALL = ["--discriminator", "1", "--discriminator-channels", "4", "--perceptual", "bundled"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures", 7)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = small_pipelines.smallest(tmp_path_factory.mktemp("weights") / "tiny")
    small_pipelines.change_json(folder / "vae" / "config.json", scaling_factor=0.7)
    return folder


@pytest.fixture
def train(pictures, tmp_path, capsys):
    """A function that runs the command -> status, standard output, standard error."""
    def run(*more, output="vae", steps=2):
        status = main(["autoencoder", "--data", str(pictures), "--steps", str(steps), "--batch",
                       "3", "--learning-rate", "1e-2", "--output", str(tmp_path / output),
                       *map(str, more)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err
    return run


def weights_of(folder):
    return load_file(folder / WEIGHTS)


def test_what_is_written_and_said(train, pictures, tmp_path):
    """diffusers makes the same round trip with it, and knows the scaling factor."""
    status, out, err = train(*NEW, *ALL, "--set-scaling-factor", "--sample-every", 1, "--held-out",
                             2, "--layers", 2)
    assert status == 0, err
    folder = tmp_path / "vae"
    assert "captions are not used" in out and f"checked: {folder}, read back" in out
    found = re.search(r"round trip of 2 pictures: l1 (\S+), PSNR (\S+) dB, KL (\d+) bits per "
                      r"picture; the latents' standard deviation is (\S+), so", out)
    reference = diffusers.AutoencoderKL.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert reference.config.scaling_factor == config["scaling_factor"] == pytest.approx(
        1 / float(found[4]), rel=1e-2)
    assert config["sample_size"] == 24 and config["layers_per_block"] == 2
    image = np.random.default_rng(0).uniform(-1, 1, (1, 24, 24, 3)).astype(np.float32)
    ours = load_model(folder)
    with torch.no_grad():
        theirs = reference.decode(reference.encode(nchw(image)).latent_dist.mode()).sample
    mean, _ = ours.encode(image)
    within(abs(nchw(ours.decode(mean)) - theirs).max().item(), 1e-4, "round trip")

    first, second, *_ = [line for line in read_log(folder) if "loss" in line]
    assert {"l1", "psnr", "kl_bits", "latent_std", "perceptual"} <= first.keys()
    assert second.keys() - first.keys() == {"generator", "adaptive_weight", "discriminator",
                                            "real", "made"}
    assert [line["step"] for line in read_log(folder) if "validation" in line] == [0, 2]
    sheet = Image.open(folder / "samples.png")          # at steps 0, 1 and 2
    assert sheet.width == 256 and sheet.height > 3 * 256
    sample = Image.open(folder / "samples" / "0000002-0.png")
    assert sample.size == (50, 50), "two pictures of 24 above, two round trips below"
    both = np.asarray(sample).astype(int)
    first = np.asarray(Image.open(pictures / "0.png").resize((24, 24), Image.Resampling.LANCZOS))
    assert abs(both[:24, :24] - first).max() <= 1
    assert abs(both[:24, :24] - both[26:, :24]).max() > 30


@pytest.mark.parametrize("more", [
    [*NEW, *ALL], [*NEW, "--ema", "0.9", "--accumulate", "2", "--flip", "--random-crop"],
    ["--weights", "", "--decoder-only", "--discriminator", "3", "--discriminator-channels", "4",
     "--resolution", "24"]], ids=["all", "ema", "decoder"])
def test_two_and_two_steps_are_four(more, train, weights, tmp_path):
    """Bitwise, before and after the discriminator begins."""
    more = [weights if text == "" else text for text in more]
    assert train(*more, output="whole", steps=4)[0] == 0
    assert train(*more, steps=2)[0] == 0
    halfway = weights_of(tmp_path / "vae")
    status, out, err = train(*more, "--resume", steps=4)
    assert status == 0, err
    whole, parts = (weights_of(tmp_path / name) for name in ("whole", "vae"))
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name])
    assert any((array != halfway[name]).any() for name, array in whole.items())
    states = [np.load(tmp_path / name / "state.npz") for name in ("whole", "vae")]
    for name in ("data", "m", "v", "history"):          # the discriminator is in them
        np.testing.assert_array_equal(states[0][name], states[1][name])


@pytest.mark.parametrize("decoder_only", [False, True])
def test_from_weights(decoder_only, train, weights, tmp_path):
    """A pipeline's folder, its VAE's, or its VAE's file; the encoder may stay as it is."""
    more = ["--decoder-only"] if decoder_only else []
    for i, place in enumerate((weights, weights / "vae", weights / "vae" / WEIGHTS)):
        status, out, err = train("--weights", place, *more, output=f"{i}")
        assert status == 0, err
        assert "--set-scaling-factor" in out and "scaling_factor is" not in err
    before, after = weights_of(weights / "vae"), weights_of(tmp_path / "0")
    changed = {name.split(".")[0] for name in before if (before[name] != after[name]).any()}
    assert changed == ({"decoder", "post_quant_conv"} if decoder_only else
                       {"decoder", "post_quant_conv", "encoder", "quant_conv"})
    assert all((after[name] == weights_of(tmp_path / "1")[name]).all() for name in after)
    config = json.loads((weights / "vae" / "config.json").read_text())
    assert json.loads((tmp_path / "0" / "config.json").read_text()).items() >= config.items()


def test_a_config_file_and_half_precision(train, tmp_path):
    config = models.vae_config(models.VAES["two levels"]) | {"sample_size": 16}
    write_json(tmp_path / "mine.json", config)
    status, out, err = train("--config", tmp_path / "mine.json", "--save-as", "float16",
                             "--distance", "l2", "--checkpoints")
    assert status == 0 and "checked: " in out, err
    assert {array.dtype for array in weights_of(tmp_path / "vae").values()} == {np.dtype("float16")}
    assert "cut to 16x16" in out
    written = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert written.items() >= config.items()


def test_checkpoints_change_nothing(train, tmp_path):
    assert train(*NEW)[0] == train(*NEW, "--checkpoints", output="checkpoints")[0] == 0
    one, other = (weights_of(tmp_path / name) for name in ("vae", "checkpoints"))
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])


def test_on_a_device(train, tmp_path):
    """On strict arrays in place of CuPy's: the same losses and the same file, up to rounding."""
    assert train(*NEW, *ALL, output="host")[0] == 0
    with strict.installed(), backend.plain():
        status, out, err = train(*NEW, *ALL, "--device", "cuda", output="device")
    assert status == 0, err
    for host, device in zip(*(read_log(tmp_path / name) for name in ("host", "device"))):
        for name in host.keys() - {"step", "seconds", "validation"}:
            assert_allclose(device[name], host[name], rtol=1e-3, what=name)
    host, device = (weights_of(tmp_path / name) for name in ("host", "device"))
    apart = np.concatenate([abs(host[name] - device[name]).ravel() for name in host])
    # Where a gradient is nothing but rounding, Adam moves by the rate, 1e-2, either way.
    assert (apart > 1e-4).mean() < 0.05


@pytest.mark.parametrize("more", [
    [*NEW, *ALL], ["--weights", "", "--decoder-only", "--ema", "0.5", "--resolution", "24"]],
    ids=["all", "decoder"])
def test_float16(more, train, weights, tmp_path):
    """Like float32, up to the rounding of the gradients; exact in going on, as in float32. A frozen
    encoder stays as it is."""
    more = [weights if text == "" else text for text in more]
    assert train(*more, output="whole", steps=4)[0] == 0
    half = [*more, "--dtype", "float16"]
    status, out, err = train(*half, output="half", steps=4)
    assert status == 0 and "float16 is slower than float32 on a CPU" in err, err
    assert train(*half)[0] == 0 and train(*half, "--resume", steps=4)[0] == 0
    whole, found, parts = (weights_of(tmp_path / name) for name in ("whole", "half", "vae"))
    errors = []
    for name, array in whole.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], parts[name])
        errors.append((found[name] - array).ravel() / 1e-2)
    within((np.concatenate(errors) ** 2).mean() ** 0.5, 0.5, "in units of the learning rate")
    logs = [[line for line in read_log(tmp_path / name) if "loss" in line]
            for name in ("whole", "half")]
    for one, other in list(zip(*logs, strict=True))[:2]:         # then the weights are others
        for name in one.keys() - {"step", "seconds"}:
            assert_allclose(other[name], one[name], rtol=ROUNDED, what=name)
    if "--decoder-only" in more:
        before = weights_of(weights / "vae")
        assert all((array == before[name]).all() for name, array in found.items()
                   if name.startswith(("encoder", "quant_conv")))


def test_float16_on_a_device(train, tmp_path):
    with strict.installed(), backend.plain():
        status, out, err = train(*NEW, *ALL, "--device", "cuda", "--dtype", "float16")
    assert status == 0 and "slower" not in err, err


def test_features_of_a_clip(train, tmp_path):
    module = CLIPVisionModel(models.VISIONS["as L/14"])
    module.load_state_dict(models.random_weights(module, 0))
    save_model(module, tmp_path / "clip")
    status, out, err = train(*NEW, "--perceptual", tmp_path / "clip")
    assert status == 0, err
    assert all(line["perceptual"] > 0 for line in read_log(tmp_path / "vae") if "loss" in line)


def test_nan_names_the_discriminators_layer(train, monkeypatch, tmp_path):
    def spoilt(discriminator, rng):
        initialise(discriminator, rng)
        discriminator.main[3].weight.data[0] = np.nan
    monkeypatch.setattr(autoencoder, "initialise_discriminator", spoilt)
    status, _, err = train(*NEW, *ALL)
    assert status == 2 and "discriminator.main.3" in err and "keeps the last good state" in err


REFUSED = {
    "a new one and weights": (["--weights", "W", "--channels", 4], "--channels describes a new"),
    "a config and channels": (["--config", "C", "--latent-channels", 4],
                              "--latent-channels is in the file of --config"),
    "a decoder without an encoder": (["--decoder-only"], "name one with --weights"),
    "a scale that stays": (["--weights", "W", "--decoder-only", "--set-scaling-factor"],
                           "latents stay as they are"),
    "a size of no whole latents": (["--channels", 4, 8, 8, "--resolution", 18],
                                   "multiple of 4 for this VAE, not 18"),
    "a small picture": ([*NEW, "--resolution", 16, "--discriminator", 0],
                        "at least 24 pixels, not --resolution 16"),
    "a network of no pictures": (["--perceptual", "T", *NEW], "does not see pictures"),
    "no network": (["--perceptual", "nowhere", *NEW], "nowhere"),
    "a size that does not fit it": (["--channels", 4, "--resolution", 18, "--perceptual",
                                     "bundled"], "multiple of 4 for the VAE of --perceptual"),
    "no folder": ([*NEW, "--data", "nowhere"], "nowhere"),
    "no VAE": (["--weights", "T"], "CLIPTextModel, not a VAE"),
    "no config": (["--config", "nowhere.json"], "nowhere.json"),
    "a config of something else": (["--config", "U"], "does not describe a VAE that is supported"),
    "grey pictures": (["--config", "G"], "1 channels in"),
    "nothing left": ([*NEW, "--held-out", 7], "hold out fewer"),
    "no state": ([*NEW, "--resume"], "no training to go on with"),
    "a prompt": ([*NEW, "--sample-prompt", "a cat"], "unrecognized arguments"),
    "no number": ([*NEW, "--kl-weight", "x"], "--kl-weight: expected a number from 0"),
    "no step": ([*NEW, "--discriminator", "-1"], "--discriminator: expected a whole number"),
    "no channels": (["--channels", "0"], "--channels: expected a whole number from 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_line_for_bad_input(case, train, weights, tmp_path):
    more, said = REFUSED[case]
    write_json(tmp_path / "grey.json", models.vae_config(models.VAES["one level"])
               | {"in_channels": 1})
    places = {"W": weights, "T": weights / "text_encoder", "G": tmp_path / "grey.json",
              "C": weights / "vae" / "config.json", "U": weights / "unet" / "config.json"}
    status, _, err = train(*(places.get(word, word) for word in more))
    assert_one_line(status, err, said)
    assert not (tmp_path / "vae" / "config.json").exists()


def test_a_folder_with_a_model_stays(train, tmp_path):
    assert train(*NEW)[0] == 0
    before = weights_of(tmp_path / "vae")
    status, _, err = train(*NEW)
    assert status == 2 and "holds a model already" in err
    status, _, err = train(*NEW, "--resume", "--kl-weight", 1, "--perceptual", "bundled", steps=3)
    assert status == 2 and "--kl-weight is 1.0, it was 1e-06" in err and "--perceptual" in err
    assert all((before[name] == array).all()
               for name, array in weights_of(tmp_path / "vae").items())
