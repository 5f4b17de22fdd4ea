"""Names in weight files that say nothing about a model are left out; all others stay an error."""
import shutil
import warnings

import numpy as np
import pytest
import safetensors.numpy

import tinyldm
from tests.support import single_files
from tests.support.extra import diffusers, torch
from tests.support.keys import CONFIGS, DIGESTS, MODELS, original_rows, published_shapes
from tests.support.reference import reference_names
from tests.support.single_files import as_file, assert_same_weights, component, original
from tinyldm.checkpoints.layout import fitted, is_leftover
from tinyldm.errors import TinyldmError

IDS, SCALE = np.arange(77)[None], np.array(4.6, np.float32)
UNET = "model.diffusion_model."
FEW = np.ones(3, np.float32)
# names of no weight, as found in public files or written by trainers
LEFTOVERS = [
    "cond_stage_model.transformer.embeddings.position_ids",
    "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids",
    "cond_stage_model.logit_scale", "conditioner.embedders.0.logit_scale",
    "conditioner.embedders.1.model.attn_mask", "betas", "alphas_cumprod", "model.alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "posterior_mean_coef2", "lvlb_weights", "denoiser.sigmas",
    "denoiser.log_sigmas", "logvar", "first_stage_model.loss.logvar",
    "first_stage_model.loss.discriminator.main.0.weight",
    "first_stage_model.loss.perceptual_loss.net.slice1.0.weight", "loss.lin0.model.1.weight",
    "discriminator.main.0.weight", "lpips.net.0.weight", "model_ema.decay", "model_ema.num_updates",
    "model_ema.diffusion_modelinput_blocks00weight", "ema.input_blocks.0.0.weight",
    "ema_model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model_ema.out.2.bias",
    "first_stage_model.model_ema.decoderconv_inweight", "unet_ema.conv_in.weight",
    "optimizer.state.0.exp_avg", "optimizer_states", "lr_scheduler.last_epoch",
    "loss_fn.lin0.weight", "embedding_manager.string_to_param_dict.*",
    "grad_scaler.scale", "safety_checker.concept_embeds", "safety_model.weight", "v_pred", "ztsnr"]
# names that may be weights
WEIGHTS = ["model.diffusion_model.out.3.weight", "scribble", "first_stage_model.decoder.new.bias",
           "cond_stage_model.transformer.text_model.encoder.layers.0.adapter.weight",
           "conditioner.embedders.1.model.ln_final.bias", "model.schemas.weight", "cinema.weight",
           "glossy.weight", "model.diffusion_model.input_blocks.1.1.lossless.weight"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    return {kind: getattr(single_files, kind)(root / kind) for kind in ("sd1", "sd2", "sdxl")}


def test_no_weight_of_a_published_model_is_a_leftover():
    """Except the constants and the training's scale that these files hold, too."""
    names = {name for model in CONFIGS for part in MODELS if part in CONFIGS[model]
             for name in published_shapes(model, part)}
    for table in set(DIGESTS) - set(CONFIGS):
        names |= {row[1] for row in original_rows(table)}
    left = {name.rpartition(".")[2] for name in names if is_leftover(name)}
    assert len(names) > 5000 and left <= {"position_ids", "logit_scale", "betas", "logvar"} | {
        name for name in left if "alphas" in name or "posterior" in name or name == "sigmas"}


@pytest.mark.parametrize("name", LEFTOVERS)
def test_leftovers(name):
    assert is_leftover(name)


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_may_be_a_weight(name, folders, tmp_path, monkeypatch):
    assert not is_leftover(name)
    file = as_file(folders["sd1"], tmp_path / "x.safetensors", monkeypatch, **{name: FEW})
    with pytest.raises(TinyldmError, match=f"missing: none\n  unexpected: 1: {name}\n"):
        tinyldm.load(file)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("kind, more", [
    ("sdxl", {"conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids": IDS}),
    ("sdxl", {"conditioner.embedders.0.logit_scale": SCALE,
              "conditioner.embedders.0.text_projection": np.eye(24, dtype=np.float32)}),
    ("sdxl", {"conditioner.embedders.0.transformer.text_projection.weight": FEW}),
    ("sdxl", {"conditioner.embedders.1.logit_scale": SCALE, "conditioner.embedders.0.transformer."
              "vision_model.encoder.layers.0.mlp.fc1.weight": FEW}),
    ("sd1", {"cond_stage_model.logit_scale": SCALE, "cond_stage_model.text_projection": FEW}),
    ("sd1", {"cond_stage_model.transformer.text_projection.weight": FEW,
             "cond_stage_model.transformer.visual_projection.weight": FEW}),
    ("sd2", {"cond_stage_model.model.visual.conv1.weight": FEW, "cond_stage_model.model.attn_mask":
             np.zeros((77, 77), np.float32)}),
    ("sd1", dict.fromkeys(LEFTOVERS[:-2], FEW)),
    ("sd1", {"global_step": np.int64(7), "iteration": np.int64(7), "some_mark": FEW[:0],
             "version": FEW[:1]})])
def test_a_file_with_leftovers_is_the_same_model(kind, more, suffix, folders, tmp_path,
                                                 monkeypatch):
    file = as_file(folders[kind], tmp_path / f"x.{suffix}", monkeypatch, **more)
    assert_same_weights(tinyldm.load(file), tinyldm.load(folders[kind]))


@pytest.mark.parametrize("prefix", ["pipeline.", "ldm.", "a.b-c.model."])
def test_any_words_before_all_names(prefix, folders, tmp_path, monkeypatch):
    file = as_file(folders["sd1"], tmp_path / "x.safetensors", monkeypatch)
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({prefix + name: tensors[name] for name in tensors}, file)
    assert_same_weights(tinyldm.load(file), tinyldm.load(folders["sd1"]))


def test_the_reference_reads_the_same_from_such_a_file(folders, tmp_path, monkeypatch):
    more = {name: np.ones((3, 3), np.float32) for name in LEFTOVERS if "position" not in name}
    file = as_file(folders["sd1"], tmp_path / "x.safetensors", monkeypatch, **more)
    reference = diffusers.StableDiffusionPipeline.from_single_file(
        file, config=str(folders["sd1"]), safety_checker=None, local_files_only=True)
    with warnings.catch_warnings():                     # of diffusers
        warnings.simplefilter("ignore")
        pipe = tinyldm.load(file)
    for part in ("unet", "vae", "text_encoder"):
        ours = dict(getattr(pipe, part).named_parameters())
        for name, tensor in reference_names(getattr(reference, part)):
            array = ours[name].data
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
            assert np.array_equal(array, tensor.detach().numpy()), name


def test_missing_and_misshapen_weights_stay_errors(folders, tmp_path, monkeypatch):
    """A projection that the encoder does use is no leftover."""
    name = "conditioner.embedders.1.model.text_projection"
    file = as_file(folders["sdxl"], tmp_path / "x.safetensors", monkeypatch, drop=name)
    with pytest.raises(TinyldmError, match="missing: 1: text_encoder_2.text_projection.weight"):
        tinyldm.load(file)
    file = as_file(folders["sdxl"], tmp_path / "x.safetensors", monkeypatch, **{name: FEW[:, None]})
    with pytest.raises(TinyldmError, match="wrong shape: 1: text_encoder_2.text_projection.weight"):
        tinyldm.load(file)
    second = {name: np.eye(32, 20, dtype=np.float32),
              "conditioner.embedders.1.model.text_projection.weight": FEW}
    file = as_file(folders["sdxl"], tmp_path / "x.safetensors", monkeypatch, **second)
    with pytest.raises(TinyldmError, match="unexpected: 1: conditioner.embedders.1.*projection"):
        tinyldm.load(file)


# ---- words before the names -----------------------------------------------------------------

@pytest.mark.parametrize("start", ["model.", "module.", "state_dict.", "_orig_mod.",
                                   "module._orig_mod.", "model.model."])
@pytest.mark.parametrize("only", ["", UNET])
def test_words_before_the_names(start, only, folders, tmp_path, monkeypatch):
    file = as_file(folders["sd1"], tmp_path / "x.safetensors", monkeypatch)
    tensors = {(start if name.startswith(only) else "") + name: tensor
               for name, tensor in safetensors.numpy.load_file(file).items()}
    safetensors.numpy.save_file(tensors, file)
    assert_same_weights(tinyldm.load(file), tinyldm.load(folders["sd1"]))
    tensors[UNET + "out.2.bias"] = np.ones(4, np.float32)   # the same weight under both names
    if only:
        safetensors.numpy.save_file(tensors, file)
        with pytest.raises(TinyldmError, match="unexpected: 1: .*out.2.bias"):
            tinyldm.load(file)


def test_names_of_a_compiled_unet_in_a_file(folders, tmp_path, monkeypatch):
    file = as_file(folders["sd1"], tmp_path / "x.safetensors", monkeypatch)
    tensors = {name.replace(UNET, UNET + "_orig_mod."): tensor
               for name, tensor in safetensors.numpy.load_file(file).items()}
    safetensors.numpy.save_file(tensors, file)
    assert_same_weights(tinyldm.load(file), tinyldm.load(folders["sd1"]))


# ---- averages -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [
    lambda inner: f"model_ema.diffusion_model{inner.replace('.', '')}",
    lambda inner: f"model_ema.diffusion_model.{inner}", lambda inner: f"ema.{inner}",
    lambda inner: f"ema.model.diffusion_model.{inner}", lambda inner: f"ema_model.{inner}",
    lambda inner: f"model.diffusion_model.ema_model.{inner}",
    lambda inner: f"model.diffusion_model_ema.{inner}",
    lambda inner: f"model.diffusion_model.{inner}_ema", lambda inner: f"unet_ema.{inner}"])
def test_averages_under_any_name(name, folders, tmp_path, monkeypatch):
    unet = {inner.removeprefix(UNET): tensor for inner, tensor in original(folders["sd1"]).items()
            if inner.startswith(UNET)}
    averages = {name(inner): tensor / 2 for inner, tensor in unet.items()}
    file = as_file(folders["sd1"], tmp_path / "x.safetensors", monkeypatch, **averages)
    folder = tinyldm.load(folders["sd1"])
    assert_same_weights(tinyldm.load(file), folder)
    for parameter in folder.unet.parameters():
        parameter.data = parameter.data / 2
    assert_same_weights(tinyldm.load(file, ema=True), folder)


# ---- folders --------------------------------------------------------------------------------

@pytest.mark.parametrize("part, more", [
    ("text_encoder", {"text_model.embeddings.position_ids": IDS, "logit_scale": SCALE,
                      "text_projection.weight": FEW, "visual_projection.weight": FEW,
                      "vision_model.post_layernorm.bias": FEW}),
    ("vae", {"loss.discriminator.main.0.bias": FEW, "loss.logvar": FEW, "ema.decay": SCALE}),
    ("unet", {"ema_model.conv_in.weight": FEW, "optimizer.state.0.step": SCALE, "betas": FEW})])
def test_folders(part, more, folders, tmp_path):
    folder = shutil.copytree(folders["sd1"], tmp_path / "sd1")
    file, = (folder / part).glob("*.safetensors")
    tensors = component(folder / part)
    wanted = dict(tinyldm.load_model(folder / part).named_parameters())
    safetensors.numpy.save_file(tensors | more, file, {"format": "pt"})
    assert_same_weights(tinyldm.load(folder), tinyldm.load(folders["sd1"]))
    safetensors.numpy.save_file(tensors | more | {"new.weight": FEW}, file, {"format": "pt"})
    with pytest.raises(TinyldmError, match="missing: none\n  unexpected: 1: new.weight"):
        tinyldm.load(folder)
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}
    safetensors.numpy.save_file(wrapped, file, {"format": "pt"})
    assert_same_weights(tinyldm.load(folder), tinyldm.load(folders["sd1"]))
    assert fitted({"a": FEW}, wanted).keys() == {"a"}


def test_a_projection_is_unexpected_where_no_text_is_read(folders, tmp_path):
    folder = shutil.copytree(folders["sd1"] / "unet", tmp_path / "unet")
    file, = folder.glob("*.safetensors")
    safetensors.numpy.save_file(component(folder) | {"text_projection.weight": FEW}, file)
    with pytest.raises(TinyldmError, match="unexpected: 1: text_projection.weight"):
        tinyldm.load_model(folder)


def test_other_objects_in_a_checkpoint(folders, tmp_path, monkeypatch):
    """What Lightning and other trainers store beside the state dict."""
    file = as_file(folders["sd1"], tmp_path / "x.ckpt", monkeypatch)
    content = torch.load(file)
    content["state_dict"] |= {"note": "text", "list": [torch.ones(2)], "none": None, "step": 3}
    torch.save(content | {"optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
                          "callbacks": {"a": 1}, "loops": {}, "epoch": 3,
                          "state_dict_ema": {"x": torch.ones(2)},
                          "hyper_parameters": {"lr": 1e-4}}, file)
    assert_same_weights(tinyldm.load(file), tinyldm.load(folders["sd1"]))
