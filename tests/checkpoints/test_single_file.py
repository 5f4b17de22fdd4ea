"""Single files in the original layout: names against real checkpoints, pictures against folders."""
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import tinyldm
from tests.support import single_files
from tests.support.drawing import Reference, assert_same_drawing, ours
from tests.support.extra import torch
from tests.support.keys import CONFIGS, MODELS, original_rows
from tests.support.single_files import as_file, assert_same_weights
from tests.support.small_pipelines import change_json
from tests.support.tolerance import assert_close
from tinyldm.checkpoints import folders, load_pipeline_parts
from tinyldm.checkpoints.formats.stored import StoredTensor, row_major
from tinyldm.checkpoints.layout import fitted
from tinyldm.checkpoints.single_file import kinds
from tinyldm.checkpoints.single_file.names import by_part
from tinyldm.errors import TinyldmError
from tinyldm.layers import file_shape

FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
FIRST_KEYS = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
KINDS = {"sd1": kinds.SD1, "sd2": kinds.SD2, "sdxl": kinds.SDXL, "x4": kinds.UPSCALER}


# ---- the names of real checkpoints ----------------------------------------------------------

def stored_tensors(kind):
    """Each tensor of a real checkpoint, one after another in a file that does not exist."""
    tensors, place = {}, 0
    for name, shape in {theirs: shape for _, theirs, shape, *_ in original_rows(kind)}.items():
        size = 4 * int(np.prod(shape))
        tensors[name] = StoredTensor(Path("file"), name, None, "F32", shape, row_major(shape, 4),
                                     place, place + size)
        place += size
    return tensors


def expected_place(tensor, operation):
    """Start and strides of a tensor after a row's operation."""
    if isinstance(operation, int):                      # a third of the rows
        first = operation * tensor.shape[0] // 3
        return tensor.start + first * tensor.strides[0], tensor.strides
    if operation == "T":
        return tensor.start, tensor.strides[::-1]
    return tensor.start, tensor.strides[:2] if operation == "squeeze" else tensor.strides


@pytest.mark.parametrize("kind, layers", [("sd1", 12), ("sd2", 23), ("sdxl", None), ("x4", 23)])
def test_every_name_of_the_real_checkpoint_maps_one_to_one(kind, layers):
    stored = stored_tensors(kind)
    found, rest = by_part(stored, layers, 3 if kind == "x4" else 4)
    assert not rest
    table = original_rows(kind)
    assert found.keys() == {part for part, *_ in table}
    for part in found:
        mine = [row for row in table if row[0] == part and row[-1] != "drop"]
        wanted = {public for _, _, _, public, _, _ in mine}
        tensors = fitted(found[part], wanted)
        assert tensors.keys() == wanted and len(mine) == len(wanted)
        for _, theirs, _, public, shape, operation in mine:
            tensor = tensors[public]
            assert tensor.name == theirs and tensor.shape == shape, public
            assert (tensor.start, tensor.strides) == expected_place(stored[theirs], operation)


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_checkpoint_has_every_parameter_of_the_models_and_nothing_else(kind):
    stored = stored_tensors(kind)
    known = KINDS[kind]
    found, rest = by_part(stored, known.text_encoder["num_hidden_layers"],
                          len(known.vae["block_out_channels"]))
    assert not rest
    assert found.keys() == {part for part in MODELS if getattr(known, part)}
    for part in found:
        parameters = dict(MODELS[part](getattr(known, part)).named_parameters())
        tensors = fitted(found[part], parameters)
        assert tensors.keys() == parameters.keys()
        for name, parameter in parameters.items():
            assert tensors[name].shape == file_shape(parameter), name


@pytest.mark.parametrize("channels", [4, 9, 8])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_a_real_checkpoint_is_recognised_by_its_names_and_shapes(kind, channels):
    stored = stored_tensors(kind)
    first = stored[FIRST_CONVOLUTION]
    stored[FIRST_CONVOLUTION] = first._replace(shape=(320, channels, 3, 3))
    stored.pop(kinds.LAST_NORM, None)                   # its numbers would be read
    known = {"sd1": (kinds.SD1, kinds.SD1_INPAINTING), "sdxl": (kinds.SDXL, kinds.SDXL_INPAINTING),
             "sd2": (kinds.SD2_BASE, kinds.SD2_INPAINTING)}[kind]
    if channels == 8:
        with pytest.raises(TinyldmError, match=f"a {KINDS[kind].name} of 8 .*only 4 and 9"):
            kinds.recognise(stored, "file")
    else:
        assert kinds.recognise(stored, "file") is known[channels == 9]


def test_the_upscaler_is_recognised():
    assert kinds.recognise(stored_tensors("x4"), "file") is kinds.UPSCALER


def test_the_refiner_of_stable_diffusion_xl_is_named():
    with pytest.raises(TinyldmError, match="the UNet of Stable Diffusion XL's refiner "):
        kinds.recognise(stored_tensors("sdxl_refiner"), "file")


@pytest.mark.parametrize("name, kind, other", [
    ("SD 1.5", kinds.SD1, {}),
    ("SD 2.1", kinds.SD2, {}),
    ("SD 2.1 base", kinds.SD2_BASE, {}),
    ("SD 1.5 inpainting", kinds.SD1_INPAINTING, {}),
    ("SD 2 inpainting", kinds.SD2_INPAINTING, {}),
    ("SDXL", kinds.SDXL, {}),
    ("SD x4 upscaler", kinds.UPSCALER, {}),
    # Its folder has a VAE made for float16; it is not known which VAE a single file has.
    ("SDXL inpainting", kinds.SDXL_INPAINTING,
     {"sample_size": 512, "force_upcast": False})])
def test_the_built_in_configs_are_the_published_ones(name, kind, other):
    for part, config in CONFIGS[name].items():
        for key, value in getattr(kind, part).items():
            expected = config.get(key, DEFAULTS.get(key))
            assert expected == (other.get(key, value) if part == "vae" else value), (part, key)


DEFAULTS = {"scaling_factor": 0.18215, "prediction_type": "epsilon"}   # if a file omits them


# ---- small files ----------------------------------------------------------------------------

@pytest.fixture(scope="module", params=["sd1", "sd2", "sd2_base", "sdxl"])
def folder(request, tmp_path_factory):
    return getattr(single_files, request.param)(tmp_path_factory.mktemp("kinds") / request.param)


@pytest.fixture(scope="module")
def sd1_folder(tmp_path_factory):
    return single_files.sd1(tmp_path_factory.mktemp("sd1"))


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_draws_what_its_folder_draws(folder, suffix, tmp_path, monkeypatch):
    file = as_file(folder, tmp_path / f"model{suffix}", monkeypatch)
    pipe, other = tinyldm.load(file), tinyldm.load(folder)
    assert_same_weights(pipe, other)
    for key in ("_class_name", "beta_start", "beta_end", "beta_schedule", "set_alpha_to_one"):
        assert pipe.scheduler[key] == other.scheduler.get(key, pipe.scheduler[key])
    assert (pipe.schedule.prediction_type == other.schedule.prediction_type
            == ("v_prediction" if folder.name == "sd2" else "epsilon"))
    assert pipe.schedule.steps_offset == other.schedule.steps_offset == 1
    assert pipe.size() == other.size() == (64, 64)
    for text in ("", "a red cat!"):
        assert np.array_equal(pipe.tokenizer(text), other.tokenizer(text))
    assert_same_drawing(ours(pipe), Reference(folder)(guidance_scale=7.5))


def timesteps(pipe, steps, guidance_scale=0, **options):
    return [state.timestep for state in pipe.stream(
        "a cat", num_inference_steps=steps, guidance_scale=guidance_scale, **options)]


def test_few_steps_without_guidance_are_those_of_turbo_models(folder, tmp_path, monkeypatch):
    """A Turbo's file does not say that its timesteps are spaced as "trailing"; its folder does."""
    pipe = tinyldm.load(as_file(folder, tmp_path / "turbo.safetensors", monkeypatch))
    own = {"sd1": "pndm", "sd2_base": "pndm", "sd2": "ddim", "sdxl": "euler"}[folder.name]
    for sampler in (None, "euler", "euler_ancestral", "ddim", "dpmpp_2m"):
        for steps, expected in [(1, [999]), (4, [999, 749, 499, 249]),
                                (8, [999, 874, 749, 624, 499, 374, 249, 124])]:
            with pytest.warns(UserWarning, match="Turbo, Lightning and Hyper") as said:
                assert timesteps(pipe, steps, sampler=sampler) == expected
            text = f"few steps ({steps}) without guidance suit Turbo, Lightning and Hyper models, "
            text += "so the timestep spacing is trailing"
            assert str(said[0].message).startswith(text) and said[0].filename == __file__
            replaced = "the sampler euler in place of pndm" in str(said[0].message)
            assert replaced == (sampler is None and own == "pndm")
    # with guidance, more steps, a spacing or a sampler of another kind nothing changes
    assert timesteps(pipe, 2, 1.5) == [501, 1] + [1] * (own == "pndm")
    assert timesteps(pipe, 9)[0] == 889
    assert timesteps(pipe, 2, sampler="ddim", timestep_spacing="leading") == [501, 1]
    assert timesteps(pipe, 2, sampler="euler", timestep_spacing="linspace") == [999, 0]
    assert timesteps(pipe, 2, sampler="lcm") == [999, 499]
    # saved as a folder it draws the same
    tinyldm.save(pipe, tmp_path / "saved")
    with pytest.warns(UserWarning, match="Turbo"):
        assert timesteps(tinyldm.load(tmp_path / "saved"), 2) == [999, 499]
    # the model's own folder says what it says
    with pytest.warns(UserWarning, match="if this is one, choose the timestep spacing trailing"):
        assert timesteps(tinyldm.load(folder), 1) == [1]


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_a_single_file_saved_as_a_folder(kind, tmp_path, monkeypatch):
    """The padding token is saved, although the folder of the vocabulary does not name it."""
    source = getattr(single_files, kind)(tmp_path / kind)
    file = as_file(source, tmp_path / "model.safetensors", monkeypatch)
    words = shutil.copytree(source / "tokenizer", tmp_path / "words",
                            ignore=lambda _, names: set(names) - {"vocab.json", "merges.txt"})
    monkeypatch.setenv(folders.TOKENIZER_VARIABLE, str(words))
    pipe = tinyldm.load(file)
    tinyldm.save(pipe, tmp_path / "saved")
    reference = Reference(tmp_path / "saved")
    assert_same_drawing(ours(pipe, seed=3), reference([3], guidance_scale=7.5))
    assert_same_drawing(ours(tinyldm.load(tmp_path / "saved"), seed=3),
                        Reference(source)([3], guidance_scale=7.5))


def test_a_single_file_for_inpainting(tmp_path, monkeypatch):
    folder = single_files.sd1_inpainting(tmp_path / "inpainting")
    file = as_file(folder, tmp_path / "model.safetensors", monkeypatch)
    pipe = tinyldm.load(file)
    assert_same_weights(pipe, tinyldm.load(folder))
    assert pipe.unet.config["in_channels"] == 9 and pipe.sampler() == "ddim"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_half_precision_keeps_a_vae_that_overflows_in_single(tmp_path, monkeypatch):
    """Stable Diffusion XL's VAE, from its folder and from its file: pictures are not black."""
    folder = single_files.sdxl(tmp_path / "sdxl")
    weights, = (folder / "vae").glob("*.safetensors")
    tensors = safetensors.numpy.load_file(weights)
    tensors["decoder.conv_in.weight"] *= 3e4            # the following norms undo that
    safetensors.numpy.save_file(tensors, weights, metadata={"format": "pt"})
    file = as_file(folder, tmp_path / "model.safetensors", monkeypatch)
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)
    for weights in (folder, file):
        half = tinyldm.load(weights, dtype="float16")
        assert half.unet.conv_in.weight.data.dtype == np.float16
        picture = half.decode(latents)
        assert picture.std() > 0.1
        assert_close(picture, tinyldm.load(weights).decode(latents), 1e-3)
    change_json(folder / "vae" / "config.json", force_upcast=False)
    with pytest.raises(TinyldmError, match="picture 0 is decoded to NaN or infinity: .*conv_in"):
        tinyldm.load(folder, dtype="float16").decode(latents)


def test_half_precision_and_memory_options(sd1_folder, tmp_path, monkeypatch):
    file = as_file(sd1_folder, tmp_path / "model.ckpt", monkeypatch)
    whole = safetensors.numpy.load_file(as_file(sd1_folder, tmp_path / "model.safetensors",
                                                monkeypatch))
    torch.save({name: torch.from_numpy(tensor.astype(np.float16) if tensor.dtype == np.float32
                                       else tensor)
                for name, tensor in whole.items()}, file)           # without "state_dict"
    parts = load_pipeline_parts(file, np.float16, low_memory=True)
    weight = dict(parts.models["unet"].named_parameters())["conv_out.weight"].data
    theirs = whole["model.diffusion_model.out.2.weight"].astype(np.float16).transpose(2, 3, 1, 0)
    assert weight.dtype == np.float16 and np.array_equal(weight, theirs)


def test_padding_of_stable_diffusion_2_whatever_the_tokenizer_says(tmp_path, monkeypatch):
    folder = single_files.sd2(tmp_path / "sd2")
    file = as_file(folder, tmp_path / "model.safetensors", monkeypatch)
    ids = tinyldm.load(file).tokenizer("a cat")
    special = folder / "tokenizer" / "special_tokens_map.json"
    special.write_text(special.read_text().replace('"!"', '"<|endoftext|>"'))
    assert np.array_equal(tinyldm.load(file).tokenizer("a cat"), ids)
    assert not np.array_equal(tinyldm.load(folder).tokenizer("a cat"), ids)


def test_leftovers_are_ignored_and_averages_are_taken_if_asked_for(
        sd1_folder, tmp_path, monkeypatch):
    file = as_file(sd1_folder, tmp_path / "model.safetensors", monkeypatch)
    with pytest.raises(TinyldmError, match=r"averaged weights .* of 0 of the UNet's 686 tensors"):
        tinyldm.load(file, ema=True)
    more = single_files.leftovers(single_files.original(sd1_folder))
    file = as_file(sd1_folder, tmp_path / "full.ckpt", monkeypatch, **more)
    folder = tinyldm.load(sd1_folder)
    assert_same_weights(tinyldm.load(file), folder)
    for parameter in folder.unet.parameters():
        parameter.data = parameter.data / 2
    assert_same_weights(tinyldm.load(file, ema=True), folder)


def test_other_prefixes(sd1_folder, tmp_path, monkeypatch):
    """Text encoders without text_model., the VAE as `vae.`, and Stable Diffusion 2's text encoder
    as in SD-Turbo's file."""
    file = as_file(sd1_folder, tmp_path / "model.safetensors", monkeypatch)
    tensors = safetensors.numpy.load_file(file)
    for word, other in [("transformer.text_model.", "transformer."),
                        ("first_stage_model.", "vae.")]:
        tensors = {name.replace(word, other): tensor for name, tensor in tensors.items()}
        safetensors.numpy.save_file(tensors, file)
        assert_same_weights(tinyldm.load(file), tinyldm.load(sd1_folder))
    folder = single_files.sd2_base(tmp_path / "sd2")
    file = as_file(folder, tmp_path / "model.safetensors", monkeypatch)
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({
        name.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): tensor
        for name, tensor in tensors.items()}, file)
    assert_same_weights(tinyldm.load(file), tinyldm.load(folder))


def test_three_lists(sd1_folder, tmp_path, monkeypatch):
    file = as_file(sd1_folder, tmp_path / "model.safetensors", monkeypatch)
    tensors = safetensors.numpy.load_file(file)
    tensors["model.diffusion_model.out.3.weight"] = np.zeros(1, np.float32)
    tensors["scribble"] = np.zeros(2, np.float32)
    tensors["conditioner.embedders.1.model.ln_final.bias"] = np.zeros(1)      # SD 1 lacks it
    tensors["first_stage_model.encoder.mid.attn_1.q.bias"] = np.zeros(3, np.float32)
    del tensors["cond_stage_model.transformer.text_model.final_layer_norm.bias"]
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(TinyldmError) as error:
        tinyldm.load(file)
    first, missing, unexpected, wrong = str(error.value).splitlines()
    assert first == f"{file} does not fit Stable Diffusion 1"
    assert missing == "  missing: 1: text_encoder.text_model.final_layer_norm.bias"
    assert unexpected == ("  unexpected: 3: scribble, model.diffusion_model.out.3.weight, "
                          "conditioner.embedders.1.model.ln_final.bias")
    assert wrong == ("  wrong shape: 1: vae.encoder.mid_block.attentions.0.to_q.bias "
                     "(expected (16,), found (3,))")


def test_two_names_of_one_weight(sd1_folder, tmp_path, monkeypatch):
    name = "first_stage_model.encoder.mid.attn_1.{}.bias"
    tensor = single_files.original(sd1_folder)[name.format("q")]
    file = as_file(sd1_folder, tmp_path / "model.safetensors", monkeypatch,
                   **{name.format("to_q"): tensor + 1})
    with pytest.raises(TinyldmError, match=r"unexpected: 1: first_stage_model.*_1\.(to_)?q\.bias"):
        tinyldm.load(file)


# ---- what is not supported ------------------------------------------------------------------

@pytest.mark.parametrize("names, expected", [
    (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3 .not"),
    (["double_blocks.0.img_attn.qkv.weight"], r"Flux \(not supported\) in the original layout"),
    (["model.diffusion_model.single_blocks.0.linear1.weight"], "Flux .not supported"),
    (["single_transformer_blocks.0.attn.to_q.weight"], "Flux .not supported"),
    (["transformer_blocks.0.attn.add_k_proj.weight"], "Stable Diffusion 3 .not supp.* diffusers"),
    (["encoder.down.0.block.0.conv1.weight"], "VAE in the original layout"),
    (["conditioner.embedders.1.model.logit_scale"], "text encoder in the original layout"),
    (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"],
     "LoRA in the kohya layout: .*; --lora adds it to one"),
    (["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "UNet in the diffusers layout"),
    (["layer.weight", "layer.bias"], r"unknown kind of model: found 2 tensors \(layer.\w+ \[3, 4\],"
                                     r" layer.\w+ \[3, 4\] ...\), known are Stable Diffusion"),
    ([], "found 0 tensors"),
])
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_other_models_are_named(names, expected, suffix, tmp_path):
    tensors = {name: np.zeros((3, 4), np.float32) for name in names}
    file = tmp_path / f"model.{suffix}"
    if suffix == "ckpt":
        torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, file)
    else:
        safetensors.numpy.save_file(tensors, file)
    with pytest.raises(TinyldmError, match=expected) as error:
        tinyldm.load(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("channels, width, expected", [
    (8, 768, "Stable Diffusion 1 of 8 input channels .made for editing"),
    (3, 1024, "Stable Diffusion 2 of 3 input channels: this is not supported, only 4 and 9"),
    (4, 512, r"width 512\), supported are 768 \(Stable Diffusion 1\), 1024 \(Stable Diffusion ")])
def test_other_shapes_are_named(channels, width, expected, tmp_path):
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({FIRST_CONVOLUTION: np.zeros((2, channels, 3, 3), np.float32),
                                 FIRST_KEYS: np.zeros((2, width), np.float32)}, file)
    with pytest.raises(TinyldmError, match=expected):
        tinyldm.load(file)


# ---- the tokenizer --------------------------------------------------------------------------

def test_the_tokenizer_is_downloaded_unless_a_folder_is_named(sd1_folder, tmp_path, monkeypatch):
    import huggingface_hub

    file = as_file(sd1_folder, tmp_path / "model.safetensors", monkeypatch)
    monkeypatch.setenv(folders.TOKENIZER_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(TinyldmError, match="TINYLDM_TOKENIZER must name a folder.*nowhere"):
        tinyldm.load(file)
    monkeypatch.delenv(folders.TOKENIZER_VARIABLE)
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(shutil.copytree(sd1_folder / "tokenizer", tmp_path / "downloaded"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_pipeline_parts(file).folders["tokenizer"] == tmp_path / "downloaded"
    (name, patterns), = asked
    assert name == "openai/clip-vit-large-patch14"
    assert set(patterns) == {"vocab.json", "merges.txt", "tokenizer_config.json",
                             "special_tokens_map.json"}


def test_offline_the_tokenizer_is_one_sentence(tmp_path):
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({FIRST_CONVOLUTION: np.zeros((2, 4, 3, 3), np.float32),
                                 FIRST_KEYS: np.zeros((2, 768), np.float32)}, file)
    run = subprocess.run([sys.executable, "-m", "tinyldm", "a cat", "--weights", str(file),
                          "--output", str(tmp_path / "out.png")], capture_output=True, text=True,
                         cwd=Path(__file__).parents[2],
                         env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    *_, line = run.stderr.splitlines()
    assert run.returncode == 2
    assert line.startswith("error: a single file has no tokenizer, and openai/clip-vit-large-patch")
    assert "TINYLDM_TOKENIZER" in line and "Traceback" not in run.stderr
