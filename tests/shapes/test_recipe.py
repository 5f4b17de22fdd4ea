"""Training: the optimiser against torch's, both losses' gradients, resuming, and export."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.support.extra import diffusers
from tests.support.models import SMALL_TEXT, SMALL_UNET, SMALL_VAE
from tests.support.tolerance import assert_allclose
from tinyldm import load_model
from tinyldm.errors import TinyldmError
from tinyldm.shapes import autoencoder as vae_stage
from tinyldm.shapes import denoiser as unet_stage
from tinyldm.shapes import evaluation, export
from tinyldm.shapes.comparison import table
from tinyldm.training.report import read_log

SHORT_TRAINING = """
import sys
from pathlib import Path
from tests.support.models import SMALL_TEXT, SMALL_UNET, SMALL_VAE
from tinyldm.shapes import autoencoder, denoiser
autoencoder.VAE, autoencoder.BATCH = SMALL_VAE, 8
denoiser.UNET, denoiser.TEXT_ENCODER, denoiser.POOL = SMALL_UNET, SMALL_TEXT, 64
autoencoder.train_vae(Path(sys.argv[1]), 2)
denoiser.train_unet(Path(sys.argv[1]), 2, batch=8)
"""


def test_a_training_gives_the_same_weights_with_any_number_of_threads(tmp_path):
    for threads in ("1", "3"):
        subprocess.run([sys.executable, "-c", SHORT_TRAINING, tmp_path / threads], check=True,
                       capture_output=True, env=os.environ | {"OMP_NUM_THREADS": threads})
    for stage in ("vae", "unet"):
        with (np.load(tmp_path / "1" / f"{stage}.npz") as one,
              np.load(tmp_path / "3" / f"{stage}.npz") as three):
            for name in ("data", "m", "v", "ema", "history"):
                np.testing.assert_array_equal(one[name], three[name])


@pytest.mark.parametrize("stage", ["unet", "decoder", "export"])
def test_command_line_says_what_is_missing(stage, tmp_path):
    command = [sys.executable, "-m", "tinyldm.shapes", stage, "--run", tmp_path / "none"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and "tinyldm.shapes vae" in done.stderr


def assert_killed_export_leaves_the_old_folder(run, output, monkeypatch):
    """In the middle, the new VAE lay beside the old UNet under the real name."""
    def contents():
        return {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    before = contents()
    for name in ("write_json", "plot_losses"):          # all models are written by then
        def interrupted(*arguments, **options):
            raise KeyboardInterrupt
        with monkeypatch.context() as patch:
            patch.setattr(export, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                export.export(run, output)
        assert contents() == before
        assert {path.name for path in output.parent.iterdir()} == {run.name, output.name}


@pytest.mark.parametrize("arguments, message", [
    (["unet", "--batch", "0"], "--batch: expected a whole number from 1 to 10000, not '0'"),
    (["unet", "--batch", "1000000000"], "--batch: expected a whole number from 1 to 10000"),
    (["evaluate", "--prompts", "0"], "--prompts: expected a whole number from 1"),
    (["evaluate", "--prompts", "-3"], "--prompts: expected .*'-3'"),
    (["vae", "--steps", "-1"], "--steps: expected a whole number from 1"),
    (["decoder", "--steps", "nan"], "--steps: expected a whole number from 1"),
    (["vae", "--run", "file/run"], "cannot write file/run"),
    (["evaluate", "--output", "file"], "cannot write file .File exists"),
])
def test_what_makes_no_training_is_said_at_once(arguments, message, tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "tinyldm.shapes", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()},
                          capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(message, done.stderr.splitlines()[-1]), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("record", [
    {}, {"vae": {"steps": 1, "loss": []}}, {"vae": 1, "unet": 1},
    {"vae": {"steps": 1, "loss": []}, "unet": {"steps": "1", "loss": []}},
    {"vae": {"steps": 1, "loss": []}, "unet": {"steps": 1, "loss": [1, 2]}},
    {"vae": {"steps": 1, "loss": []}, "unet": {"steps": 1, "loss": [[1, "x"]]}},
    {"vae": {"steps": 1, "loss": []}, "unet": {"steps": 1, "loss": []}, "x": {"steps": 1,
                                                                             "loss": []}},
])
def test_a_record_that_restore_cannot_use(record, tmp_path):
    (tmp_path / "training.json").write_text(json.dumps(record))
    with pytest.raises(TinyldmError, match="does not tell the steps and losses of stage"):
        export.restore(tmp_path, tmp_path / "run")


@pytest.mark.parametrize("changes", [{"ids": np.ones((3, 77), int)}, {"mean": np.ones(4)},
                                     {"scaling_factor": np.nan}, {"std": np.ones((2, 16, 16, 4))}])
def test_a_pool_that_is_none(changes, tmp_path):
    pictures = np.ones((4, 16, 16, 4))
    np.savez(tmp_path / "pool.npz", **{
        "mean": pictures, "std": pictures, "ids": np.ones((4, 77), int),
        "no_caption": np.ones(77, int), "scaling_factor": 1.0} | changes)
    with pytest.raises(TinyldmError, match="pool.npz is no whole state of this training"):
        unet_stage.make_pool(tmp_path)


@pytest.mark.parametrize("stage", ["vae", "decoder", "unet"])
def test_no_stage_saves_what_is_not_finite(stage, tmp_path, monkeypatch):
    """The first update of each makes its weights infinite; loss and gradient are finite."""
    for module, name, value in ((vae_stage, "VAE", SMALL_VAE), (vae_stage, "BATCH", 4),
                                (unet_stage, "UNET", SMALL_UNET), (unet_stage, "POOL", 64),
                                (unet_stage, "TEXT_ENCODER", SMALL_TEXT)):
        monkeypatch.setattr(module, name, value)
    train = {"vae": vae_stage.train_vae, "decoder": vae_stage.train_decoder,
             "unet": unet_stage.train_unet}
    options = {"batch": 4} if stage == "unet" else {}
    if stage != "vae":
        vae_stage.train_vae(tmp_path, 1)
    train[stage](tmp_path, 1, **options)
    before = (tmp_path / f"{stage}.npz").read_bytes()
    with (np.errstate(all="ignore"),
          pytest.raises(TinyldmError, match=f"NaN or infinite.*{stage}.npz keeps the last good")):
        train[stage](tmp_path, 2, learning_rate=1e300, **options)
    assert (tmp_path / f"{stage}.npz").read_bytes() == before


def test_from_training_to_a_folder(tmp_path, monkeypatch):
    """All stages, small and short: diffusers and tinyldm load the averaged weights they leave."""
    pytest.importorskip("matplotlib")                   # for the curve of the loss
    for stage, name, value in ((vae_stage, "VAE", SMALL_VAE), (vae_stage, "BATCH", 4),
                               (unet_stage, "UNET", SMALL_UNET), (unet_stage, "POOL", 64),
                               (unet_stage, "TEXT_ENCODER", SMALL_TEXT)):
        monkeypatch.setattr(stage, name, value)
    run, output = tmp_path / "run", tmp_path / "weights"
    with pytest.raises(TinyldmError, match="tinyldm.shapes vae"):
        export.export(run, output)
    looks = {"validate_every": 2, "sample_every": 2}
    vae_stage.train_vae(run, 2, **looks)
    unet_stage.train_unet(run, 2, batch=4, **looks)
    for stage, side in (("vae", 128), ("unet", 64)):    # the product's files
        lines = read_log(run / stage)
        assert [line["step"] for line in lines] == [0, 1, 2, 2]
        assert ("expected" in lines[1]) == (stage == "unet")
        assert Image.open(run / stage / "samples" / "0000002-3.png").size == (side, 64)
        assert {"loss.png", "samples.png"} <= {file.name for file in (run / stage).iterdir()}
    before = (run / "vae.npz").read_bytes()
    vae_stage.train_decoder(run, 3)
    assert (run / "vae.npz").read_bytes() == before
    output.mkdir()
    (output / "README.md").write_text("mine")
    with pytest.raises(TinyldmError, match="weights exists already"):
        export.export(run, output)                      # a folder of something else
    (output / "model_index.json").write_text("{}")
    export.export(run, output)
    assert (output / "README.md").read_text() == "mine"
    assert_killed_export_leaves_the_old_folder(run, output, monkeypatch)

    reference = diffusers.StableDiffusionPipeline.from_pretrained(output)
    factor = reference.vae.config.scaling_factor
    with np.load(run / "pool.npz") as pool:
        latents = factor * (pool["mean"] + pool["std"] * np.random.default_rng(0).standard_normal(
            pool["mean"].shape))
        assert latents.std() == pytest.approx(1, abs=0.02)
        assert pool["ids"].shape == (64, 77)
    text_encoder, unet, vae = (load_model(output / p) for p in ("text_encoder", "unet", "vae"))
    exported = {"unet": unet_stage.named_parameters(text_encoder, unet),
                "decoder": vae_stage.decoder_parameters(vae)}
    for stage, named in exported.items():
        flat = np.concatenate([p.data.reshape(-1) for _, p in named])
        with np.load(run / f"{stage}.npz") as state:
            assert_allclose(flat, state["ema"], rtol=1e-3, atol=1e-6)
    assert (output / "loss.png").stat().st_size > 1000

    evaluation.evaluate(output, 3, tmp_path / "report", round_trip=True)
    report = json.loads((tmp_path / "report" / "accuracy.json").read_text())
    assert report["prompts"] == 3 and 0 <= report["all"] <= 1

    again = tmp_path / "again"
    export.restore(output, again)
    with np.load(again / "unet.npz") as state, np.load(run / "unet.npz") as trained:
        assert_allclose(state["data"], trained["ema"], rtol=1e-3, atol=1e-6)
        assert state["begun"] == trained["steps"] == 2 and state["steps"] == 0
    vae_stage.train_vae(again, 3)                       # one step more
    with np.load(again / "decoder.npz") as state:
        assert state["begun"] == 3
    with pytest.raises(TinyldmError, match="holds a training already"):
        export.restore(output, again)


def test_without_matplotlib_a_note_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for plot, name in (export.plot_losses, "loss.png"), (table.plot_sizes, "sizes.png"):
        with pytest.warns(UserWarning, match=rf"{name} is left out: .* 'tinyldm\[curves\]'"):
            plot({}, tmp_path / name)
        assert not (tmp_path / name).exists()
