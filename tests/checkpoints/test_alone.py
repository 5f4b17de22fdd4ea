"""Files of one component: a VAE of its own, and what load_model reads without a config."""
import shutil
import warnings

import numpy as np
import pytest
import safetensors.numpy

import tinyldm
from tests.support import single_files
from tests.support.drawing import Reference, assert_same_drawing, ours
from tests.support.extra import torch
from tests.support.single_files import as_file, assert_same_weights, component, original
from tests.support.small_pipelines import change_json
from tinyldm.checkpoints import folders as loading
from tinyldm.checkpoints.single_file import kinds
from tinyldm.cli.draw import main
from tinyldm.errors import TinyldmError

FIRST_STAGE, UNET = "first_stage_model.", "model.diffusion_model."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    return {kind: getattr(single_files, kind)(root / kind) for kind in ("sd1", "sd2", "sdxl")}


@pytest.fixture
def shrunk(folders, tmp_path, monkeypatch):
    """The built-in configs are small -> {name: array} of a kind's single file."""
    def of(kind):
        as_file(folders[kind], tmp_path / "unused.safetensors", monkeypatch)
        return original(folders[kind])
    return of


def write(path, tensors, metadata=None):
    tensors = {name: np.require(tensor, requirements="C") for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(tensors, path, metadata)
    else:
        torch.save({"state_dict": {name: torch.from_numpy(tensor)
                                   for name, tensor in tensors.items()}}, path)
    return path


def part(tensors, prefix, new=""):
    return {new + name.removeprefix(prefix): tensor for name, tensor in tensors.items()
            if name.startswith(prefix)}


def vae_file(path, folder, layout, scale=1):
    """Write the VAE of a folder, times a scale, under the names of a layout."""
    if layout == "diffusers":
        tensors = component(folder / "vae")
    else:
        tensors = part(original(folder), FIRST_STAGE, {"bare": "", "prefixed": FIRST_STAGE,
                                                       "packed": "vae."}[layout])
    tensors = {name: tensor * np.float32(scale) for name, tensor in tensors.items()}
    return write(path, tensors | {"loss.logvar": np.zeros((), np.float32)})


def assert_holds(module, other):
    theirs = dict(other.named_parameters())
    for name, parameter in module.named_parameters():
        assert np.array_equal(parameter.data, theirs[name].data), name


# ---- another VAE ----------------------------------------------------------------------------

LAYOUTS = [("bare", "safetensors"), ("prefixed", "ckpt"), ("packed", "safetensors"),
           ("diffusers", "safetensors")]


@pytest.mark.parametrize("layout, suffix", LAYOUTS)
def test_a_checkpoint_without_a_vae_draws_with_one(layout, suffix, folders, tmp_path, monkeypatch):
    file = as_file(folders["sd1"], tmp_path / "novae.safetensors", monkeypatch, drop=FIRST_STAGE)
    with pytest.raises(TinyldmError) as error:
        tinyldm.load(file)
    assert str(error.value) == (
        f"{file} (Stable Diffusion 1) holds no VAE: name one with --vae (from Python vae=), a "
        "file, a folder or a name on the hub")
    vae = vae_file(tmp_path / f"vae.{suffix}", folders["sd1"], layout)
    pipe = tinyldm.load(file, vae=vae)
    assert_same_weights(pipe, tinyldm.load(folders["sd1"]))
    assert pipe.vae.scaling_factor == 0.18215


def test_it_draws_what_the_reference_draws(folders, tmp_path, monkeypatch):
    file = as_file(folders["sd1"], tmp_path / "novae.safetensors", monkeypatch, drop=FIRST_STAGE)
    vae = vae_file(tmp_path / "vae.safetensors", folders["sd1"], "bare")
    assert_same_drawing(ours(tinyldm.load(file, vae=vae)),
                        Reference(folders["sd1"])(guidance_scale=7.5))


@pytest.mark.parametrize("layout, suffix", LAYOUTS)
def test_a_vae_takes_the_place_of_a_folders_own(layout, suffix, folders, tmp_path, shrunk):
    """Also where the folder has none. A file has the config of the VAE that it replaces."""
    folder = shutil.copytree(folders["sd2"], tmp_path / "sd2")
    change_json(folder / "vae" / "config.json", scaling_factor=0.7)
    vae = vae_file(tmp_path / f"vae.{suffix}", folder, layout, scale=0.5)
    pipe, own = tinyldm.load(folder, vae=vae), tinyldm.load(folder)
    assert pipe.vae.scaling_factor == 0.7
    assert np.array_equal(pipe.vae.decoder.conv_in.weight.data,
                          own.vae.decoder.conv_in.weight.data / 2)
    assert_holds(pipe.unet, own.unet)
    shutil.rmtree(folder / "vae")
    with pytest.raises(TinyldmError, match="expected a folder .*vae, found none.*--vae"):
        tinyldm.load(folder)
    shrunk("sd2")
    assert tinyldm.load(folder, vae=vae).vae.scaling_factor == 0.18215


def test_the_vae_of_a_whole_single_file(folders, tmp_path, monkeypatch):
    tensors = original(folders["sd1"])
    halves = {name: tensor / 2 for name, tensor in tensors.items() if name.startswith(FIRST_STAGE)}
    file = as_file(folders["sd1"], tmp_path / "x.safetensors", monkeypatch, scribble=np.ones(1),
                   **halves)
    pipe, own = tinyldm.load(folders["sd1"], vae=file), tinyldm.load(folders["sd1"])
    assert np.array_equal(pipe.vae.decoder.conv_in.weight.data,
                          own.vae.decoder.conv_in.weight.data / 2)


def test_scaling_factors(folders, tmp_path, monkeypatch):
    """The kind says it for a file, a folder's config for a folder; two that differ are named."""
    file = as_file(folders["sdxl"], tmp_path / "novae.safetensors", monkeypatch, drop=FIRST_STAGE)
    vae = vae_file(tmp_path / "vae.safetensors", folders["sdxl"], "bare")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tinyldm.load(file, vae=vae).vae.scaling_factor == 0.13025
        folder = shutil.copytree(folders["sdxl"] / "vae", tmp_path / "vae")
        assert tinyldm.load(file, vae=folder).vae.scaling_factor == 0.13025
        assert tinyldm.load(file, vae=folders["sdxl"]).vae.scaling_factor == 0.13025
        config = tinyldm.load(file, vae=folder).vae.config
        config.pop("scaling_factor")
        (folder / "config.json").unlink()
        from tinyldm.files import write_json
        write_json(folder / "config.json", config)
        assert tinyldm.load(file, vae=folder).vae.scaling_factor == 0.13025
    change_json(folder / "config.json", scaling_factor=0.18215)
    with pytest.warns(UserWarning, match="scaling_factor is 0.18215, the model's own VAE has"):
        assert tinyldm.load(file, vae=folder).vae.scaling_factor == 0.18215
    saved = tinyldm.load(file, vae=vae)
    tinyldm.save(saved, tmp_path / "saved")
    assert tinyldm.load(tmp_path / "saved").vae.scaling_factor == 0.13025


def test_another_vae_is_read_before_the_unet(folders, tmp_path, monkeypatch):
    """It is small, so whatever is wrong with it is said soon."""
    file = as_file(folders["sd1"], tmp_path / "x.safetensors", monkeypatch)
    bad = write(tmp_path / "vae.safetensors", {"encoder.down.0.x": np.ones(2)})
    monkeypatch.setattr(loading, "fill", None)
    for weights in (file, folders["sd1"]):
        with pytest.raises(TinyldmError, match="does not fit the AutoencoderKL"):
            tinyldm.load(weights, vae=bad)


def test_a_vaes_weight_file_has_the_config_beside_it(folders, tmp_path):
    folder = shutil.copytree(folders["sd1"] / "vae", tmp_path / "vae")
    file, = folder.glob("*.safetensors")
    change_json(folder / "config.json", scaling_factor=0.5)
    with pytest.warns(UserWarning, match="its scaling_factor is 0.5"):
        assert tinyldm.load(folders["sd1"], vae=file).vae.scaling_factor == 0.5


def test_a_checkpoints_own_vae_that_does_not_fit_is_not_looked_at(folders, tmp_path, monkeypatch):
    file = as_file(folders["sd1"], tmp_path / "x.safetensors", monkeypatch,
                   **{f"{FIRST_STAGE}decoder.new": np.ones(3, np.float32)})
    with pytest.raises(TinyldmError, match="unexpected: 1: first_stage_model.decoder.new"):
        tinyldm.load(file)
    assert_same_weights(tinyldm.load(file, vae=folders["sd1"] / "vae"),
                        tinyldm.load(folders["sd1"]))


def test_from_the_command_line(folders, tmp_path, monkeypatch, capsys):
    file = as_file(folders["sd1"], tmp_path / "novae.safetensors", monkeypatch, drop=FIRST_STAGE)
    vae = vae_file(tmp_path / "vae.safetensors", folders["sd1"], "bare")
    arguments = ["cat", "--weights", str(file), "--steps", "2", "--output", str(tmp_path / "x.png")]
    assert main(arguments) == 2
    assert "holds no VAE: name one with --vae" in capsys.readouterr().err
    assert main([*arguments, "--vae", str(vae)]) == 0
    assert main([*arguments, "--vae", str(tmp_path / "nowhere.safetensors")]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert main([*arguments, "--vae", ""]) == 2


@pytest.mark.parametrize("name, expected", [
    ("sd1/unet", "holds a UNet2DConditionModel, not a VAE"),
    ("clip.safetensors", "holds a CLIPTextModel, not a VAE"),
    ("unet.safetensors", "holds a UNet2DConditionModel, not a VAE"),
    ("sd1/tokenizer", "expected a file .*config.json")])
def test_what_is_no_vae(name, expected, folders, tmp_path, monkeypatch):
    shutil.copytree(folders["sd1"], tmp_path / "sd1")
    as_file(folders["sd1"], tmp_path / "unused.safetensors", monkeypatch)
    write(tmp_path / "unet.safetensors", part(original(folders["sd1"]), UNET))
    write(tmp_path / "clip.safetensors", component(folders["sd1"] / "text_encoder"))
    with pytest.raises(TinyldmError, match=expected):
        tinyldm.load(folders["sd1"], vae=tmp_path / name)


def test_a_missing_or_misshapen_weight_of_a_vae_stays_an_error(folders, tmp_path, shrunk):
    tensors = part(shrunk("sd1"), FIRST_STAGE)
    tensors.pop("decoder.conv_out.bias")
    tensors["decoder.conv_in.bias"] = np.ones(3, np.float32)
    tensors["decoder.fresh.weight"] = np.ones(3, np.float32)
    file = write(tmp_path / "vae.safetensors", tensors)
    for load in (lambda: tinyldm.load_model(file), lambda: tinyldm.load(folders["sd1"], vae=file)):
        with pytest.raises(TinyldmError) as error:
            load()
        assert "does not fit the AutoencoderKL" in str(error.value)
        assert "missing: 1: decoder.conv_out.bias" in str(error.value)
        assert "unexpected: 1: decoder.fresh.weight" in str(error.value)
        assert "wrong shape: 1: decoder.conv_in.bias" in str(error.value)


# ---- load_model -----------------------------------------------------------------------------

@pytest.mark.parametrize("start", ["module.", "_orig_mod.", "model."])
def test_words_before_the_names_of_a_vae(start, folders, tmp_path, shrunk):
    file = write(tmp_path / "vae.safetensors", part(shrunk("sd1"), FIRST_STAGE, start))
    assert_holds(tinyldm.load_model(file), tinyldm.load(folders["sd1"]).vae)


@pytest.mark.parametrize("layout, suffix", LAYOUTS)
def test_load_model_reads_a_vae(layout, suffix, folders, tmp_path, shrunk):
    shrunk("sd1")
    file = vae_file(tmp_path / f"vae.{suffix}", folders["sd1"], layout)
    vae = tinyldm.load_model(file)
    assert_holds(vae, tinyldm.load(folders["sd1"]).vae)
    assert vae.scaling_factor == 0.18215


def test_a_vaes_header_names_stable_diffusion_xl(folders, tmp_path, shrunk):
    file = write(tmp_path / "vae.safetensors", part(shrunk("sdxl"), FIRST_STAGE),
                 {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"})
    assert tinyldm.load_model(file).scaling_factor == 0.13025


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("start", ["", "diffusion_model.", UNET, "model.model.diffusion_model.",
                                   "model.", "_orig_mod.", "module.diffusion_model.",
                                   "diffusers"])
def test_load_model_reads_a_unet(start, kind, folders, tmp_path, shrunk):
    tensors = part(shrunk(kind), UNET, start)
    if start == "diffusers":
        tensors = component(folders[kind] / "unet")
    unet = tinyldm.load_model(write(tmp_path / "unet.safetensors", tensors))
    assert_holds(unet, tinyldm.load_model(folders[kind] / "unet"))


@pytest.mark.parametrize("kind, prefix, folder", [
    ("sd1", "cond_stage_model.transformer.", "text_encoder"),
    ("sd2", "cond_stage_model.model.", "text_encoder"),
    ("sdxl", "conditioner.embedders.0.transformer.", "text_encoder"),
    ("sdxl", "conditioner.embedders.1.model.", "text_encoder_2")])
def test_load_model_reads_a_text_encoder(kind, prefix, folder, folders, tmp_path, shrunk,
                                         monkeypatch):
    """As in the whole file, without the words before the names, and with the public names."""
    tensors, expected = shrunk(kind), tinyldm.load_model(folders[kind] / folder)
    if kind == "sdxl":                                  # here SD 2's is as wide as XL's second
        monkeypatch.setattr(kinds, "SD2", kinds.SD2._replace(text_encoder=kinds.SD2.text_encoder
                                                             | {"hidden_size": 1024}))
    public = component(folders[kind] / folder)
    for names in (part(tensors, prefix, prefix), part(tensors, prefix), public,
                  {f"clip_l.transformer.{name}": public[name] for name in public if "text_proj" not
                   in name} if folder == "text_encoder" else public):
        model = tinyldm.load_model(write(tmp_path / "text.safetensors", names))
        assert type(model) is type(expected)
        assert_holds(model, expected)


def test_a_weight_file_of_a_component_has_the_config_beside_it(folders):
    file, = (folders["sd2"] / "unet").glob("*.safetensors")
    assert_holds(tinyldm.load_model(file), tinyldm.load_model(folders["sd2"] / "unet"))


def test_whole_pipelines_are_not_one_model(folders, tmp_path, monkeypatch):
    file = as_file(folders["sdxl"], tmp_path / "x.safetensors", monkeypatch)
    with pytest.raises(TinyldmError, match="holds text encoder and second text encoder and VAE and "
                       "UNet of a pipeline: read it with tinyldm.load"):
        tinyldm.load_model(file)
    with pytest.raises(TinyldmError, match="holds a whole pipeline: read it with tinyldm.load"):
        tinyldm.load_model(folders["sdxl"])


@pytest.mark.parametrize("names, expected", [
    (["layer.weight"], "an unknown kind of model .1 tensors: layer.weight"),
    (["double_blocks.0.img_attn.qkv.weight"], "holds Flux .not supported. in the original"),
    (["lora_unet_x.lora_up.weight"], "holds LoRA in the kohya layout"),
    (["input_blocks.1.0.x"], "holds a part of a UNet"),
    (["text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.x"],
     "the text encoder of a model .text of width 5")])
def test_load_model_names_what_it_cannot_read(names, expected, tmp_path):
    file = write(tmp_path / "x.safetensors", {name: np.ones((2, 5)) for name in names})
    with pytest.raises(TinyldmError, match=expected) as error:
        tinyldm.load_model(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("defaults", [5, "sd", [("scaling_factor", 1)]])
def test_defaults_that_are_no_config(defaults, tmp_path):
    with pytest.raises(TinyldmError, match="defaults must be a dict of what a config holds, .*not"):
        tinyldm.load_model(tmp_path / "x.safetensors", defaults=defaults)


# ---- checkpoints that lack something else ---------------------------------------------------

@pytest.mark.parametrize("kind, drop, expected", [
    ("sd1", "cond_stage_model", "holds only the UNet and VAE of Stable Diffusion 1, no text enc"),
    ("sdxl", "conditioner.embedders.1", "no second text encoder: get the whole checkpoint")])
def test_checkpoints_without_a_text_encoder(kind, drop, expected, folders, tmp_path, monkeypatch):
    file = as_file(folders[kind], tmp_path / "x.safetensors", monkeypatch, drop=drop)
    with pytest.raises(TinyldmError, match=expected) as error:
        tinyldm.load(file, vae=folders[kind] / "vae" if kind == "sdxl" else None)
    assert "\n" not in str(error.value)


def test_a_unet_alone_is_no_pipeline(tmp_path, shrunk):
    file = write(tmp_path / "x.safetensors", part(shrunk("sd1"), UNET, UNET))
    with pytest.raises(TinyldmError, match="only the UNet of Stable Diffusion 1, no text encoder "
                       "and no VAE.*load_model reads the UNet alone"):
        tinyldm.load(file)


def test_the_labels_are_those_of_all_components():
    from tinyldm.checkpoints.single_file.alone import LABELS
    assert LABELS.keys() == loading.COMPONENTS.keys()
