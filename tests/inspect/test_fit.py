"""python -m tinyldm.inspect of files of weights: what they say of themselves, and what fits."""
import shutil

import numpy as np
import pytest
import safetensors.numpy

from tests.support import single_files
from tests.support.single_files import as_file, component
from tinyldm.inspect.__main__ import main

FIRST_STAGE = "first_stage_model."
EMPTY, FEW = np.zeros(0, np.float32), np.ones(3, np.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    return {kind: getattr(single_files, kind)(root / kind) for kind in ("sd1", "sd2", "sdxl")}


@pytest.fixture
def said(folders, tmp_path, monkeypatch, capsys):
    """What the command prints for a kind as a file -> its lines down to the table."""
    def run(kind, metadata=None, name="model", **more):
        file = as_file(folders[kind], tmp_path / f"{name}.safetensors", monkeypatch, metadata,
                       **more)
        assert main([str(file)]) == 0
        lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        return lines[4:lines.index("module tensors parameters")]
    return run


def test_a_plain_file(said):
    assert said("sd1") == [
        "the model predicts: epsilon (the file does not say it)", "missing: none",
        "unexpected: none", "wrong shape: none", "left out, as it is no weight: 1: "
        "cond_stage_model.transformer.text_model.embeddings.position_ids"]
    assert said("sd2")[0] == "the model predicts: v_prediction (the file does not say it)"


def test_what_a_file_says_of_itself(said):
    lines = said("sdxl", {
        "modelspec.title": "A \x1b[2JTurbo", "modelspec.resolution": "1024x1024",
        "modelspec.architecture": "stable-diffusion-xl-v1-base", "modelspec.prediction_type": "v",
        "modelspec.encoder_layer": "2"}, "my-lightning_8steps", v_pred=EMPTY, ztsnr=EMPTY)
    assert lines[:7] == [
        "title: A ?[2JTurbo", "architecture: stable-diffusion-xl-v1-base", "resolution: 1024x1024",
        "encoder layer: 2", "the model predicts: v_prediction (its tensor v_pred), v_prediction "
        "(modelspec.prediction_type in its header)", "schedule: zero terminal SNR",
        "few steps: its name or title says lightning, turbo"]
    assert lines[-1].endswith("conditioner.embedders.1.model.logit_scale, v_pred, ztsnr")


def test_what_a_file_lacks_and_has_too_much(said):
    lines = said("sd1", drop=FIRST_STAGE, **{"new.weight": FEW, "model_ema.decay": FEW[0],
                                             "cond_stage_model.logit_scale": FEW[0]})
    assert lines[1:-1] == [
        "averaged weights: --ema takes those of the UNet", "lacks: VAE, which --vae names",
        "missing: none", "unexpected: 1: new.weight", "wrong shape: none"]
    assert set(lines[-1].removeprefix("left out, as it is no weight: 3: ").split(", ")) == {
        "cond_stage_model.logit_scale", "model_ema.decay",
        "cond_stage_model.transformer.text_model.embeddings.position_ids"}
    assert "lacks: text encoder" in said("sd1", drop="cond_stage_model")


def test_a_vae_alone(folders, tmp_path, said, capsys):
    said("sd1")                                         # the built-in configs are small now
    file = tmp_path / "vae.safetensors"
    safetensors.numpy.save_file(component(folders["sd1"] / "vae") | {"loss.logvar": FEW}, file)
    assert main([str(file)]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[4:9] == [
        "one component: AutoencoderKL (--vae puts it into a pipeline)", "missing: none",
        "unexpected: none", "wrong shape: none",
        "left out, as it is no weight: 1: loss.logvar"]


def test_other_noise_levels(said):
    lines = said("sdxl", edm_mean=FEW)
    assert lines == []                                  # its kind is in the line above them


def test_a_folders_leftovers(folders, tmp_path, capsys):
    folder = shutil.copytree(folders["sd1"] / "vae", tmp_path / "vae")
    file, = folder.glob("*.safetensors")
    safetensors.numpy.save_file(component(folder) | {"ema.decay": FEW, "x": FEW}, file)
    assert main([str(folder)]) == 0
    assert [line.strip() for line in capsys.readouterr().out.splitlines()[-4:]] == [
        "missing: none", "unexpected: 1: x", "wrong shape: none",
        "left out, as it is no weight: 1: ema.decay"]
