"""Weights from the hub: the installed huggingface_hub downloads from a server on this machine.

The server's log tells which files were downloaded; they are compared with the folder it serves.
"""
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import constants, file_download

import tinyldm
from tests.support.extra import diffusers
from tests.support.hub_server import serving
from tests.support.small_clip import pictures, write_clip
from tests.support.small_pipelines import change_json, smallest
from tinyldm import checkpoints
from tinyldm.checkpoints import hub as downloads
from tinyldm.checkpoints import load_model, resolve, resolve_addon
from tinyldm.checkpoints.components import find_weights
from tinyldm.checkpoints.folders import PIPELINES
from tinyldm.errors import TinyldmError
from tinyldm.files import read_json, write_json
from tinyldm.pipelines.zero_shot import ZeroShot

ROOT = Path(__file__).parents[2]
UNET = "unet/diffusion_pytorch_model.safetensors"
WEIGHTS = [UNET, "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"]
# Other files in a published folder, which are never read.
CLUTTER = ["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors",
           "unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_flax_model.msgpack",
           "unet/model.onnx", "unet/openvino_model.xml", "text_encoder/pytorch_model.bin",
           "text_encoder/model.fp16.safetensors", "text_encoder/flax_model.msgpack",
           "safety_checker/config.json", "safety_checker/model.safetensors",
           "feature_extractor/preprocessor_config.json", "vae_decoder/model.onnx", "README.md",
           "text_encoder_2/config.json", "text_encoder_2/model.safetensors",
           "v1-5-pruned.ckpt", "v1-5-pruned.safetensors"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small pipeline together with the other files of a published repository."""
    folder = smallest(tmp_path_factory.mktemp("published"))
    put(folder, *CLUTTER)
    words, end = read_json(folder / "tokenizer" / "vocab.json"), "<|endoftext|>"
    write_json(folder / "tokenizer" / "added_tokens.json", {end: words[end]})
    change_json(folder / "model_index.json", text_encoder_2=[None, None],
                safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    return folder


def put(folder, *files):
    """Write files with arbitrary content."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(file)


@pytest.fixture
def hub(weights, tmp_path, monkeypatch):
    """The server that this process uses as the hub, and an empty cache."""
    with serving({"owner/small": weights}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        for module in (constants, file_download):       # before 1.0 each has a copy of its own
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", raising=False,
                                value=server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


@pytest.fixture
def offline(monkeypatch):
    """A function that makes the hub unreachable."""
    def leave(way):
        if way == "HF_HUB_OFFLINE":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        else:                                           # a port where nobody listens
            monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return leave


def picture(pipe):
    image, = pipe("a red cat", num_inference_steps=2, seed=3)
    return np.asarray(image)


def assert_same_weights(model, other):
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert np.array_equal(parameter.data, theirs[name].data), name


# ---- a pipeline -----------------------------------------------------------------------------

@pytest.mark.parametrize("way", ["HF_HUB_OFFLINE", "no network"])
def test_a_pipeline_is_its_folder_and_is_fetched_once(hub, weights, offline, way):
    pipe, local = tinyldm.load("owner/small"), tinyldm.load(weights)
    assert np.array_equal(picture(pipe), picture(local))
    tokenizer = [f"tokenizer/{file.name}" for file in (weights / "tokenizer").iterdir()]
    assert "tokenizer/added_tokens.json" in tokenizer   # of older folders: learned words
    assert hub.fetched() == sorted([
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
        "unet/config.json", "vae/config.json", *tokenizer, *WEIGHTS])
    again = tinyldm.load("owner/small")
    assert hub.asked and hub.fetched() == []            # it only asks for changes
    offline(way)
    cached = tinyldm.load("owner/small")
    assert hub.asked == []
    for other in (again, cached):
        assert_same_weights(other.unet, local.unet)


def test_another_commit_fetches_only_what_changed(hub, weights, tmp_path, monkeypatch):
    hub.repositories["owner/small"] = shutil.copytree(weights, tmp_path / "next")
    tinyldm.load("owner/small")
    hub.fetched()
    change_json(tmp_path / "next" / "model_index.json", _num_inference_steps=7)
    hub.commit = "badcafe0" * 5
    assert tinyldm.load("owner/small").num_inference_steps == 7
    assert hub.fetched() == ["model_index.json"]


def test_a_pipeline_that_is_not_supported_is_refused_before_its_weights(hub, weights, tmp_path):
    folder = shutil.copytree(weights, tmp_path / "flux")
    change_json(folder / "model_index.json", _class_name="FluxPipeline")
    hub.repositories["owner/flux"] = folder
    with pytest.raises(TinyldmError, match="names the pipeline FluxPipeline, supported are Stable"):
        tinyldm.load("owner/flux")
    assert hub.fetched() == ["model_index.json"]


def test_parts_are_those_that_the_index_names(hub, tmp_path):
    """Two text encoders, as Stable Diffusion XL has them."""
    files = ["model_index.json", "unet/config.json", UNET, "scheduler/scheduler_config.json",
             *(f"{part}{end}/{file}" for end in ("", "_2") for part, file in [
                 ("text_encoder", "config.json"), ("text_encoder", "model.safetensors"),
                 ("tokenizer", "vocab.json")])]
    put(tmp_path / "xl", *files, "vae/config.json", "vae/diffusion_pytorch_model.safetensors")
    hub.repositories["owner/xl"] = tmp_path / "xl"
    index = {file.split("/")[0]: ["library", "Class"] for file in files} | {"vae": [None, None]}
    folder = downloads.download_file("owner/xl", downloads.INDEX).parent
    downloads.download_parts("owner/xl", folder, index, PIPELINES["StableDiffusionXLPipeline"])
    assert hub.fetched() == sorted(files)


def test_a_part_that_is_missing_is_named(hub, weights, tmp_path):
    folder = shutil.copytree(weights, tmp_path / "part")
    hub.repositories["owner/part"] = folder
    for file in (folder / "vae").iterdir():
        file.rename(file.with_suffix(".onnx"))
    put(folder, "vae/config.json", "vae/flax_model.msgpack")
    with pytest.raises(TinyldmError, match="owner/part on the .* hub: expected weights in .*vae .*"
                       "it holds .*flax_model.msgpack"):
        tinyldm.load("owner/part")
    shutil.rmtree(folder / "vae")
    with pytest.raises(TinyldmError, match="owner/part on the .* hub: it has nothing of vae"):
        tinyldm.load("owner/part")
    assert not set(hub.fetched()) & set(WEIGHTS)


# ---- which of several files -----------------------------------------------------------------

STEM = "diffusion_pytorch_model"


@pytest.mark.parametrize("files, precise, half", [
    (["safetensors"], "safetensors", "safetensors"),
    (["safetensors", "fp16.safetensors", "bin", "fp16.bin", "non_ema.safetensors"],
     "safetensors", "fp16.safetensors"),
    (["fp16.safetensors", "fp16.bin", "non_ema.bin"], "fp16.safetensors", "fp16.safetensors"),
    (["bin", "fp16.bin"], "bin", "fp16.bin"), (["fp16.bin"], "fp16.bin", "fp16.bin"),
    (["bin", "fp16.safetensors"], "bin", "fp16.safetensors"),
    (["bin", "safetensors"], "safetensors", "safetensors")])
def test_one_file_is_chosen_on_the_hub_as_in_a_folder(files, precise, half, hub, tmp_path):
    put(tmp_path / "published", "unet/config.json", *(f"unet/{STEM}.{file}" for file in files))
    (tmp_path / "published" / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}')
    hub.repositories["owner/unet"] = tmp_path / "published"
    fetched = set()
    for dtype, expected in [(None, precise), ("float32", precise), ("float16", half)]:
        for folder in (tmp_path / "published", resolve("owner/unet", dtype)):
            found, = find_weights(folder / "unet", dtype)
            assert found.name == f"{STEM}.{expected}" and found.is_file()
        expected = {f"unet/{STEM}.{expected}"} | {"model_index.json", "unet/config.json"}
        assert set(hub.fetched()) == expected - fetched
        fetched |= expected


@pytest.mark.parametrize("device, dtype, expected", [
    ("cpu", None, None), ("cpu", "float16", np.float16), ("cuda", None, np.float16),
    ("cuda", "float32", np.float32)])
def test_the_device_decides_where_no_dtype_is_given(device, dtype, expected, monkeypatch):
    class Stop(Exception):
        pass

    def asked(weights, dtype):
        raise Stop(dtype)

    monkeypatch.setattr("tinyldm.checkpoints.resolve", asked)
    monkeypatch.setattr("tinyldm.pipelines.loading.array_library",
                        lambda device: {"cpu": np}.get(device))
    with pytest.raises(Stop) as stop:
        tinyldm.load("owner/small", device, dtype)
    assert stop.value.args == (expected,)


def test_float16_files_are_the_ones_read(hub, weights, tmp_path):
    """The float16 files hold other numbers, so the numbers show which files were loaded."""
    folder = Path(shutil.copytree(weights, tmp_path / "both"))
    stored = safetensors.numpy.load_file(folder / UNET)
    other = {name: (tensor + 1).astype(np.float16) for name, tensor in stored.items()}
    safetensors.numpy.save_file(other, folder / "unet" / f"{STEM}.fp16.safetensors")
    shutil.copy(folder / "text_encoder/model.safetensors",
                folder / "text_encoder/model.fp16.safetensors")
    hub.repositories["owner/both"] = folder
    for place in (folder, "owner/both"):
        for dtype, added in [("float32", 0), ("float16", 1)]:
            bias = tinyldm.load(place, dtype=dtype).unet.conv_in.bias.data
            expected = (stored["conv_in.bias"] + added).astype(dtype)
            assert bias.dtype == dtype and np.array_equal(bias, expected)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False])
def test_shards(variant, safe, hub, weights, tmp_path):
    """Named as by diffusers, with an index; other files of weights are not downloaded."""
    folder = Path(shutil.copytree(weights, tmp_path / "shards"))
    unet = diffusers.UNet2DConditionModel.from_pretrained(weights / "unet")
    for file in (folder / "unet").iterdir():
        file.unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="20KB", variant=variant,
                         safe_serialization=safe)
    needed = [path.relative_to(folder).as_posix() for path in (folder / "unet").iterdir()]
    assert len(needed) > 3
    put(folder, f"unet/{STEM}.non_ema.safetensors")
    hub.repositories["owner/shards"] = folder
    downloaded = load_model(resolve("owner/shards") / "unet")
    assert {file for file in hub.fetched() if file.startswith("unet/")} == set(needed)
    assert_same_weights(downloaded, load_model(weights / "unet"))
    shard = sorted(file for file in needed if "-00002-of-" in file)[0]
    (folder / shard).unlink()
    with pytest.raises(TinyldmError, match=rf"lists \d+ files .* lacks 1: {Path(shard).name}: is"):
        load_model(folder / "unet")
    with pytest.raises(TinyldmError, match=f"owner/shards on the .* lacks 1: {Path(shard).name}"):
        resolve("owner/shards")


# ---- single files ---------------------------------------------------------------------------

def test_a_single_file(hub, tmp_path, offline):
    files = ["model.safetensors", "old/v1 [pruned].ckpt", "README.md"]
    put(tmp_path / "one", *files)
    hub.repositories["owner/one.0"] = tmp_path / "one"
    path = resolve("owner/one.0/old/v1 [pruned].ckpt")
    assert path.read_text() == "old/v1 [pruned].ckpt" and path.name == "v1 [pruned].ckpt"
    assert hub.fetched() == ["old/v1 [pruned].ckpt"]
    with pytest.raises(TinyldmError) as error:
        resolve("owner/one.0")
    assert str(error.value) == (
        "owner/one.0 on the Hugging Face hub has no model_index.json; of single files "
        "(.safetensors, .ckpt) it has 2: model.safetensors, old/v1 [pruned].ckpt: name one as "
        "owner/one.0/model.safetensors")
    with pytest.raises(TinyldmError, match="has no other.ckpt; .* it has 2: model.safetensors"):
        resolve("owner/one.0/other.ckpt")
    assert hub.fetched() == []
    offline("HF_HUB_OFFLINE")
    assert resolve("owner/one.0/old/v1 [pruned].ckpt") == path


def test_a_repository_of_something_else(hub, tmp_path):
    put(tmp_path / "other", "config.json", "pytorch_model.bin")
    hub.repositories["owner/other"] = tmp_path / "other"
    with pytest.raises(TinyldmError, match="no model_index.json; .* it has none: choose another"):
        resolve("owner/other")


def test_a_file_missing_in_a_folder_that_is_here_is_not_asked_for(hub, tmp_path, monkeypatch):
    (tmp_path / "my" / "models").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TinyldmError, match="there is no file my/models/a.safetensors"):
        resolve("my/models/a.safetensors")
    assert hub.asked == []


# ---- addresses, revisions, add-ons ----------------------------------------------------------

@pytest.mark.parametrize("page", ["", "/tree/main", "/blob/main/model_index.json"])
def test_the_page_of_a_pipeline(page, hub, weights):
    folder = resolve(f"https://huggingface.co/owner/small{page}")
    assert (folder / UNET).read_bytes() == (weights / UNET).read_bytes()
    assert set(WEIGHTS) < set(hub.fetched())


@pytest.mark.parametrize("page", ["blob/main/a%20b.ckpt", "resolve/main/a%20b.ckpt?download=true"])
def test_the_page_of_a_file(page, hub, tmp_path):
    put(tmp_path / "one", "a b.ckpt", "c.ckpt")
    hub.repositories["owner/one"] = tmp_path / "one"
    path = resolve(f"https://huggingface.co/owner/one/{page}")
    assert path.read_text() == "a b.ckpt" and hub.fetched() == ["a b.ckpt"]


@pytest.mark.parametrize("text", ["owner/small@fp16", "https://huggingface.co/owner/small/tree/fp16",
                                  "https://huggingface.co/owner/small/blob/fp16/v1-5-pruned.ckpt",
                                  "owner/small@fp16/v1-5-pruned.ckpt"])
def test_a_revision(text, hub):
    path = resolve(text)
    assert path.name == ("v1-5-pruned.ckpt" if "ckpt" in text else hub.commit)
    asked = [path.partition("/revision/")[2] for _, path, _ in hub.asked if "/revision/" in path]
    assert set(asked) == {"fp16"}


def test_a_revision_that_does_not_exist(hub):
    hub.refused["owner/small"] = (404, "RevisionNotFound")
    with pytest.raises(TinyldmError, match="could not be downloaded .*: it has no branch, tag or "
                       "commit fp16: check the name"):
        resolve("owner/small@fp16")


@pytest.mark.parametrize("files, expected", [
    (["learned_embeds.bin", "concept_images/1.jpeg", "token_identifier.txt"], "learned_embeds.bin"),
    (["learned_embeds.bin", "learned_embeds.safetensors"], "learned_embeds.safetensors"),
    (["learned_embeds.bin", "other.bin", "steps/learned_embeds-500.bin"], "learned_embeds.bin"),
    (["word.pt", "README.md"], "word.pt"), (["style.pt", "style.safetensors"], "style.safetensors"),
    (["deep/word.pt"], "deep/word.pt"), (["a.pt", "optimizer/b.bin"], "a.pt")])
def test_an_addon_by_the_name_of_its_repository(files, expected, hub, tmp_path, offline):
    put(tmp_path / "toy", *files)
    hub.repositories["owner/toy"] = tmp_path / "toy"
    for name in ("owner/toy", "https://huggingface.co/owner/toy"):
        assert resolve_addon(name, "learned_embeds").read_text() == expected
    assert expected in hub.fetched()
    offline("HF_HUB_OFFLINE")
    assert resolve_addon("owner/toy", "learned_embeds").read_text() == expected
    assert resolve_addon(f"owner/toy/{expected}", "learned_embeds").read_text() == expected


@pytest.mark.parametrize("file, beside", [
    ("adapter_model.safetensors", "adapter_config.json"),
    ("unet/adapter_model.safetensors", "unet/adapter_config.json"),
    ("learned_embeds.safetensors", "learned_embeds_2.safetensors")])
def test_what_belongs_beside_an_addon_comes_with_it(file, beside, hub, tmp_path):
    put(tmp_path / "toy", file, beside, "README.md", "other_config.json")
    hub.repositories["owner/toy"] = tmp_path / "toy"
    path = resolve_addon(f"owner/toy/{file}", "learned_embeds")
    assert path.read_text() == file and (path.parent / Path(beside).name).read_text() == beside
    assert hub.fetched() == sorted([file, beside])


def test_a_pipeline_loads_addons_from_the_hub(hub, weights, tmp_path):
    """The bytes that the hub sends change the model as the local file does."""
    folder = tmp_path / "toy"
    folder.mkdir()
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    pipe, local = tinyldm.load(weights), tinyldm.load(weights)
    O, C = pipe.unet.mid_block.attentions[0].proj_in.weight.shape[-1], 2
    word = {"<toy>": np.ones((1, pipe.text_encoder.config["hidden_size"]), np.float32)}
    safetensors.numpy.save_file(word, folder / "learned_embeds.safetensors")
    safetensors.numpy.save_file({f"{layer}.lora_down.weight": np.ones((C, O), np.float32),
                                 f"{layer}.lora_up.weight": np.ones((O, C), np.float32)},
                                folder / "pytorch_lora_weights.safetensors")
    hub.repositories["owner/toy"] = folder
    local.load_lora(folder / "pytorch_lora_weights.safetensors", 0.5)
    local.load_textual_inversion(folder / "learned_embeds.safetensors")
    assert not np.array_equal(picture(pipe), picture(local))
    pipe.load_lora("owner/toy", 0.5)
    pipe.load_textual_inversion("https://huggingface.co/owner/toy")
    assert_same_weights(pipe.unet, local.unet)
    assert np.array_equal(pipe.encode_prompt("a <toy>"), local.encode_prompt("a <toy>"))
    assert np.array_equal(picture(pipe), picture(local))


def test_a_repository_of_several_addons(hub, tmp_path):
    put(tmp_path / "many", "b.safetensors", "a.safetensors", "c.pt", "sdxl/d.safetensors")
    hub.repositories["owner/many"] = tmp_path / "many"
    with pytest.raises(TinyldmError) as error:
        resolve_addon("owner/many", "pytorch_lora_weights")
    assert str(error.value) == (
        "owner/many has several files of weights, 4: a.safetensors, b.safetensors, c.pt, "
        "sdxl/d.safetensors: name one, such as owner/many/a.safetensors")
    assert hub.fetched() == []
    path = resolve_addon("owner/many/sdxl/d.safetensors", "pytorch_lora_weights")
    assert path.read_text() == "sdxl/d.safetensors"
    put(tmp_path / "none", "README.md")
    hub.repositories["owner/none"] = tmp_path / "none"
    with pytest.raises(TinyldmError, match="owner/none has no file of weights .* only 1: README"):
        resolve_addon("owner/none", "pytorch_lora_weights")
    with pytest.raises(TinyldmError, match="owner/gone is not here .* there is none of that name"):
        resolve_addon("owner/gone", "pytorch_lora_weights")


# ---- what goes wrong ------------------------------------------------------------------------

@pytest.mark.parametrize("status, code, expected", [
    (401, "RepoNotFound", "there is none of that name, or it is private: check the name, or run `hf"
     " auth login`$"), (404, "RepoNotFound", "there is none of that name"),
    (401, "GatedRepo", "only to those who agreed to its terms: .*https://huggingface.co/owner/small"
     ", then run `hf auth login`$"), (403, "GatedRepo", "agreed to its terms"),
    (403, None, r"access was denied \(403\): run `hf auth login` with a token that may read owner"),
    (500, None, r"no answer \(.*500 Internal Server Error.*\), and not all of it is in the cache"),
])
@pytest.mark.parametrize("word", ["owner/small", "owner/small/v1-5-pruned.ckpt"])
def test_refusals(status, code, expected, word, hub):
    hub.refused["owner/small"] = (status, code)
    with pytest.raises(TinyldmError) as error:
        tinyldm.load(word)
    assert str(error.value).startswith("owner/small is not here and could not be downloaded from "
                                       "the Hugging Face hub: ")
    assert re.search(expected, str(error.value)) and "\n" not in str(error.value)


def test_the_libraries_of_older_days():
    """The oldest huggingface_hub that is allowed, 0.25, has the classes of errors in utils."""
    source = Path(downloads.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r"from huggingface_hub import (\w+)", source)) == {"utils"}


def test_a_name_that_the_hub_would_not_give(hub):
    with pytest.raises(TinyldmError, match="owner/a--b is not here .*there is none of that name"):
        tinyldm.load("owner/a--b")


@pytest.mark.parametrize("way, said", [
    ("HF_HUB_OFFLINE", "HF_HUB_OFFLINE is set, and not all of it is in the cache: unset it"),
    ("no network", r"no answer \(ConnectError: .*\), and not all of it is in the cache: check")])
def test_offline_with_half_a_cache(way, said, hub, offline):
    hub.cut[UNET] = [0] * 99                            # the connection breaks every time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_download.time, "sleep", lambda seconds: None)
        with pytest.raises(TinyldmError, match=r"the download broke off \(\w+: .*\): run the same"):
            tinyldm.load("owner/small")
    offline(way)
    with pytest.raises(TinyldmError, match=said):
        tinyldm.load("owner/other")
    with pytest.raises(TinyldmError, match="owner/small on the .* hub cannot be reached, and the "
                       "cache has only part of it: expected weights in .*unet"):
        tinyldm.load("owner/small")


def test_what_broke_off_goes_on_where_it_broke(hub, weights, monkeypatch):
    """Within one call, with a Range; the library keeps no part of a file for later calls."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)         # at most this much is lost
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    size = (weights / UNET).stat().st_size
    hub.cut[UNET] = [size // 2]
    pipe = tinyldm.load("owner/small")
    asked = [range for method, path, range in hub.asked if method == "GET" and path.endswith(UNET)]
    assert asked[0] is None and len(asked) == 2
    start = int(re.fullmatch(r"bytes=(\d+)-", asked[1])[1])
    assert size // 2 - 1000 <= start <= size // 2
    assert_same_weights(pipe.unet, load_model(weights / "unet"))


def test_after_a_download_that_broke_off_only_the_rest_is_fetched(hub, weights, monkeypatch):
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    hub.cut[UNET] = [100] * 6                           # as many times as the library tries
    with pytest.raises(TinyldmError, match="the download broke off"):
        tinyldm.load("owner/small")
    first = hub.fetched()
    tinyldm.load("owner/small")
    assert UNET in (second := hub.fetched()) and "unet/config.json" in first
    assert not set(first) & set(second) - {UNET}
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"},
                                         {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_the_command_without_network(environment, tmp_path):
    process = subprocess.run([sys.executable, "-m", "tinyldm", "a cat", "--weights", "owner/name"],
                             capture_output=True, text=True, cwd=tmp_path,
                             env=os.environ | environment | {
                                 "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)})
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert process.stderr.splitlines()[-1].startswith(
        "error: owner/name is not here and could not be downloaded from the Hugging Face hub: ")


# ---- progress -------------------------------------------------------------------------------

@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of Unix")
def test_progress_is_shown_in_a_terminal(weights, tmp_path):
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with serving({"owner/small": weights}) as server:
        process = subprocess.Popen(
            [sys.executable, "-m", "tinyldm", "a cat", "--weights", "owner/small", "--steps", "1"],
            cwd=tmp_path, stderr=theirs, stdout=subprocess.PIPE, env=os.environ | {
                "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"),
                "PYTHONPATH": str(ROOT)})
        os.close(theirs)
        said = b""
        try:
            while piece := os.read(ours, 10000):
                said += piece
        except OSError:                                 # Linux: the other side closed
            pass
        assert process.communicate()[0] == b"out.png\n", said
    assert re.search(rb"Fetching \d\d files: 100%", said), said


def test_what_these_tests_replace_is_there():
    """If the library moved its classes, these tests would talk to the real hub."""
    assert huggingface_hub.hf_hub_url("a/b", "c").startswith(constants.ENDPOINT)


# ---- a VAE ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name, file", [("owner/small", "vae/config.json"),
                                        ("owner/vae", "config.json"),
                                        ("owner/vae/other.safetensors", "other.safetensors")])
def test_a_vae_from_the_hub(name, file, weights, hub, offline, tmp_path):
    """The VAE of a pipeline, a repository of its own, or a file; and again from the cache."""
    folder = shutil.copytree(weights / "vae", tmp_path / "vae")
    put(folder, "README.md", "diffusion_pytorch_model.bin")
    shutil.copy(folder / "diffusion_pytorch_model.safetensors", folder / "other.safetensors")
    hub.repositories["owner/vae"] = folder
    own = tinyldm.load(weights).vae
    for way in (None, "HF_HUB_OFFLINE"):
        if way:
            offline(way)
        found = checkpoints.resolve_vae(name)
        vae = tinyldm.load(weights, vae=name).vae
        assert all(np.array_equal(ours.data, theirs.data)
                   for ours, theirs in zip(vae.parameters(), own.parameters()))
        assert (found / "config.json").is_file() or found.name == "other.safetensors"
        if not way:
            part = "vae/" if file.startswith("vae/") else ""
            expected = {file, f"{part}diffusion_pytorch_model.safetensors"}
            assert set(hub.fetched()) == ({file} if name.endswith("ensors") else expected)


def test_a_repository_without_a_vae(hub, tmp_path):
    put(tmp_path / "other", "README.md", "model.safetensors")
    hub.repositories["owner/other"] = tmp_path / "other"
    with pytest.raises(TinyldmError, match="owner/other .* neither a vae folder nor a config.json"):
        tinyldm.load(vae="owner/other")


# ---- a CLIP, which is one model with its tokenizer and its image processor -----------------------

def test_a_clip_is_its_folder(hub, tmp_path, offline):
    folder = write_clip(tmp_path / "clip")
    put(folder, "README.md", "tf_model.h5", "flax_model.msgpack", "pytorch_model.bin")
    hub.repositories["owner/clip"] = folder
    shares = ZeroShot.load("owner/clip")(pictures(), ["cat", "dog"])
    np.testing.assert_array_equal(shares, ZeroShot.load(folder)(pictures(), ["cat", "dog"]))
    assert hub.fetched() == ["config.json", "merges.txt", "model.safetensors",
                             "preprocessor_config.json", "special_tokens_map.json",
                             "tokenizer_config.json", "vocab.json"]
    offline("no network")
    np.testing.assert_array_equal(shares, ZeroShot.load("owner/clip")(pictures(), ["cat", "dog"]))


def test_a_repository_without_weights_is_no_clip(hub, tmp_path):
    put(tmp_path / "empty", "config.json", "README.md")
    hub.repositories["owner/empty"] = tmp_path / "empty"
    with pytest.raises(TinyldmError, match="owner/empty on the Hugging Face hub: expected weights"):
        ZeroShot.load("owner/empty")
    with pytest.raises(TinyldmError, match="owner/nothing is not here and could not be downloaded"):
        ZeroShot.load("owner/nothing")
