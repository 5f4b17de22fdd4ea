"""What a single file says of itself: marks among its tensors, the metadata in its header."""
import shutil
import warnings

import numpy as np
import pytest

import tinyldm
from tests.support import single_files
from tests.support.drawing import Reference, assert_same_drawing, ours
from tests.support.single_files import as_file
from tests.support.small_pipelines import change_json
from tests.support.tolerance import assert_allclose
from tinyldm.checkpoints.single_file import kinds
from tinyldm.diffusion.schedule import PREDICTION_TYPES
from tinyldm.errors import TinyldmError

EMPTY = np.zeros(0, np.float32)
NOOB = {"v_pred": EMPTY, "ztsnr": EMPTY}
PREDICTION = "modelspec.prediction_type"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    return {kind: getattr(single_files, kind)(root / kind)
            for kind in ("sd1", "sd1_inpainting", "sd2", "sd2_base", "sdxl")}


@pytest.fixture
def loaded(folders, tmp_path, monkeypatch):
    """Load a kind as a file with more tensors and a header -> the pipeline, the notes."""
    def load(kind, metadata=None, name="model.safetensors", asked=None, **more):
        file = as_file(folders[kind], tmp_path / name, monkeypatch, metadata, **more)
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            pipe = tinyldm.load(file, prediction_type=asked)
        return pipe, [str(note.message).replace(f"{file} ", "") for note in notes]
    return load


def test_the_words_are_those_of_the_schedule():
    from tinyldm.checkpoints.single_file import statements
    assert set(statements.PREDICTIONS) == set(statements.WORDS.values()) == set(PREDICTION_TYPES)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("kind", ["sdxl", "sd1", "sd1_inpainting"])
def test_marks_of_v_prediction_and_zero_terminal_snr(kind, suffix, loaded):
    pipe, notes = loaded(kind, name=f"model.{suffix}", **NOOB)
    assert not notes and pipe.schedule.prediction_type == "v_prediction"
    assert pipe.schedule.alphas_cumprod[-1] == 0
    pipe, notes = loaded(kind, name=f"model.{suffix}", v_pred=EMPTY)
    assert not notes and pipe.schedule.prediction_type == "v_prediction"
    assert pipe.schedule.alphas_cumprod[-1] > 0.004
    assert pipe.unet.settings.in_channels == (9 if "inpainting" in kind else 4)


@pytest.mark.parametrize("kind", ["sdxl", "sd1"])
def test_such_a_file_draws_what_the_reference_draws(kind, folders, tmp_path, monkeypatch):
    """The reference has the settings that the models' authors give for diffusers.

    Both compute in float64: the first sigma is 4096, of which the first step leaves a hundredth, so
    float32 would lose two digits there.
    """
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    change_json(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction",
                rescale_betas_zero_snr=True, _class_name="EulerDiscreteScheduler")
    change_json(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    file = as_file(folder, tmp_path / "model.safetensors", monkeypatch, **NOOB)
    pipe, reference = tinyldm.load(file, dtype="float64"), Reference(folder)
    # A beta is 1 minus a float32 ratio near 1, whose last digit is 6e-8; both sides round thrice.
    assert_allclose(pipe.schedule.betas, reference.pipe.scheduler.betas.numpy(), 0, atol=4e-7)
    assert_same_drawing(ours(pipe, sampler="euler", guidance_scale=5.0),
                        reference(guidance_scale=5.0))


def test_the_scheduler_is_saved_with_the_pipeline(loaded, tmp_path):
    pipe, _ = loaded("sdxl", **NOOB)
    tinyldm.save(pipe, tmp_path / "saved")
    other = tinyldm.load(tmp_path / "saved")
    assert other.schedule.prediction_type == "v_prediction"
    assert np.array_equal(other.schedule.betas, pipe.schedule.betas)


@pytest.mark.parametrize("metadata, expected", [
    ({PREDICTION: "v"}, "v_prediction"), ({PREDICTION: "V_Prediction"}, "v_prediction"),
    ({PREDICTION: "velocity"}, "v_prediction"), ({PREDICTION: "epsilon"}, "epsilon"),
    ({PREDICTION: "sample"}, "sample"), ({"modelspec.predict_key": "v"}, "v_prediction"),
    ({"ss_v_parameterization": "True"}, "v_prediction"),
    ({"ss_v_parameterization": "false"}, "epsilon"),
    ({PREDICTION: ""}, "epsilon"), ({"format": "pt"}, "epsilon"),
    ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction")])
def test_the_header(metadata, expected, loaded):
    pipe, notes = loaded("sdxl", metadata)
    assert not notes and pipe.schedule.prediction_type == expected


@pytest.mark.parametrize("value, rescaled", [("True", True), ("false", False)])
def test_zero_terminal_snr_in_the_header(value, rescaled, loaded):
    pipe, _ = loaded("sdxl", {PREDICTION: "v", "ss_zero_terminal_snr": value})
    assert (pipe.schedule.alphas_cumprod[-1] == 0) == rescaled


@pytest.mark.parametrize("kind, metadata, asked, prediction, size", [
    ("sd2", {}, None, "v_prediction", kinds.SD2), ("sd2_base", {}, None, "epsilon", kinds.SD2_BASE),
    ("sd2_base", {PREDICTION: "v"}, None, "v_prediction", kinds.SD2),
    ("sd2", {"modelspec.architecture": "stable-diffusion-v2-512"}, None, "epsilon", kinds.SD2_BASE),
    ("sd2", {}, "epsilon", "epsilon", kinds.SD2_BASE),
    ("sd2_base", {}, "v_prediction", "v_prediction", kinds.SD2)])
def test_stable_diffusion_2_believes_the_file_before_its_weights(
        kind, metadata, asked, prediction, size, folders, tmp_path, monkeypatch):
    known = kinds.SD2.name, kinds.SD2_BASE.name
    file = as_file(folders[kind], tmp_path / "x.safetensors", monkeypatch, metadata)
    pipe = tinyldm.load(file, prediction_type=asked)
    assert pipe.schedule.prediction_type == prediction
    assert size.name in known and pipe.scheduler["_class_name"] == size.scheduler["_class_name"]


# ---- what the user says ---------------------------------------------------------------------

@pytest.mark.parametrize("asked", PREDICTION_TYPES)
def test_the_user_decides_where_the_file_says_nothing(asked, loaded):
    pipe, notes = loaded("sdxl", asked=asked)
    assert not notes and pipe.schedule.prediction_type == asked


def test_the_user_decides_against_the_file_and_is_told(loaded):
    pipe, (line,) = loaded("sdxl", asked="epsilon", **NOOB)
    assert line == ("says that the model predicts v_prediction (its tensor v_pred): epsilon is "
                    "used, as asked for")
    assert pipe.schedule.prediction_type == "epsilon" and pipe.schedule.alphas_cumprod[-1] > 0.004


def test_a_folder_believes_the_user_too(folders):
    with pytest.warns(UserWarning, match="says that the model predicts v_prediction: sample is us"):
        pipe = tinyldm.load(folders["sd2"], prediction_type="sample")
    assert pipe.schedule.prediction_type == "sample"
    assert tinyldm.load(folders["sdxl"],
                        prediction_type="v_prediction").schedule.prediction_type == "v_prediction"


@pytest.mark.parametrize("asked", ["v", "", 3, ["epsilon"]])
def test_a_prediction_type_that_is_none(asked, folders):
    with pytest.raises(TinyldmError, match="prediction_type must be epsilon, v_prediction, sample"):
        tinyldm.load(folders["sd1"], prediction_type=asked)


def test_the_command_line(folders, tmp_path, capsys, monkeypatch):
    from tinyldm.cli.draw import main
    file = as_file(folders["sd1"], tmp_path / "x.safetensors", monkeypatch, {PREDICTION: "epsilon"})
    arguments = ["cat", "--weights", str(file), "--output", str(tmp_path / "x.png"), "--steps", "2"]
    assert main([*arguments, "--prediction-type", "v_prediction"]) == 0
    assert "note: " in (error := capsys.readouterr().err) and "v_prediction is used" in error
    assert main([*arguments, "--prediction-type", "velocity"]) == 2
    assert "prediction_type must be epsilon" in capsys.readouterr().err
    with pytest.raises(TinyldmError, match="prediction_type must be"):     # before any download
        tinyldm.load("nobody/nothing", prediction_type="velocity")


# ---- files that are unclear -----------------------------------------------------------------

@pytest.mark.parametrize("metadata, more, name, prediction, expected", [
    ({PREDICTION: "epsilon"}, {"v_pred": EMPTY}, "x", "v_prediction", "contradicts itself.*v_pred"),
    ({PREDICTION: "v", "ss_v_parameterization": "False"}, {}, "x", "v_prediction", "contradicts"),
    ({PREDICTION: "flow\x1b[2J"}, {}, "x", "epsilon", "predicts 'flow.*' .*which is unknown"),
    ({}, {"ztsnr": EMPTY}, "x", "epsilon", "may predict v .its zero terminal SNR"),
    ({}, {}, "noobaiXL_vPred10Version", "epsilon", "may predict v .its name.*--prediction-type"),
    ({}, {}, "some-v-prediction", "epsilon", "may predict v")])
def test_a_note_where_a_file_is_unclear(metadata, more, name, prediction, expected, loaded):
    pipe, (line,) = loaded("sdxl", metadata, f"{name}.safetensors", **more)
    assert pipe.schedule.prediction_type == prediction
    with pytest.warns(UserWarning, match=expected):
        warnings.warn(line, stacklevel=1)
    assert "\x1b" not in line and "\n" not in line


@pytest.mark.parametrize("more, expected", [
    ({"edm_mean": np.zeros((1, 4, 1, 1), np.float32)}, "Playground 2.5, of other noise levels"),
    ({"model.diffusion_model.time_embed.cond_proj.weight": np.ones((64, 256), np.float32)},
     "Latent Consistency Model .supported only as a folder."),
    ({"edm_vpred.sigma_max": np.float32(80), **NOOB}, "CosXL, of other noise levels .not supp")])
def test_relatives_are_refused_by_name(more, expected, loaded):
    with pytest.raises(TinyldmError, match=expected):
        loaded("sdxl", **more)


def test_a_scale_that_the_training_measured(loaded):
    assert loaded("sd1")[0].vae.scaling_factor == 0.18215
    for scale in (np.float32(0.25), np.array([0.25], np.float32)):
        assert loaded("sd1", scale_factor=scale)[0].vae.scaling_factor == 0.25
    with pytest.raises(TinyldmError, match="safetensors: its scale_factor.* not -2: use another"):
        loaded("sd1", scale_factor=np.float32(-2))


def test_a_header_that_says_none_says_nothing(loaded):
    _, notes, *_ = loaded("sd1", metadata={"ss_v_parameterization": "None"})
    assert not notes
