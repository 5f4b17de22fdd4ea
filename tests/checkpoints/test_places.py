"""What people call weights: paths, names and addresses, each read as the place that it means."""
import re
import shutil
from pathlib import Path

import pytest

import tinyldm
from tests.support.command import ROOT
from tinyldm.checkpoints import resolve, resolve_addon
from tinyldm.checkpoints.places import hub_place
from tinyldm.errors import TinyldmError

SD, FILE = "stable-diffusion-v1-5/stable-diffusion-v1-5", "v1-5-pruned-emaonly.safetensors"
PAGE = f"https://huggingface.co/{SD}"


# ---- the hub --------------------------------------------------------------------------------

@pytest.mark.parametrize("text, name, file", [
    (SD, SD, ""), (f"{SD}/{FILE}", SD, FILE), (f"{SD}@fp16", f"{SD}@fp16", ""),
    (f"{SD}@refs/pr/7/{FILE}", f"{SD}@refs/pr/7", FILE), (f"hf://{SD}/{FILE}", SD, FILE),
    (PAGE, SD, ""), (f"{PAGE}/", SD, ""), (f" {PAGE}\n", SD, ""), (f"{PAGE}/tree/main", SD, ""),
    (f"{PAGE}/blob/main/{FILE}", SD, FILE), (f"{PAGE}/resolve/main/{FILE}?download=true", SD, FILE),
    (f"{PAGE}/raw/main/{FILE}#L3", SD, FILE), (f"{PAGE}/tree/fp16", f"{SD}@fp16", ""),
    (f"{PAGE}/blob/refs%2Fpr%2F7/{FILE}", f"{SD}@refs/pr/7", FILE),
    (f"{PAGE}/resolve/c0ffee/old/v1%20%5Bpruned%5D.ckpt", f"{SD}@c0ffee", "old/v1 [pruned].ckpt"),
    (f"{PAGE}/blob/main/model_index.json", SD, "model_index.json"),
    (f"{PAGE}/discussions/3", SD, ""), (f"{PAGE}/tree/main/unet", SD, "unet"),
    (f"http://www.huggingface.co/{SD}", SD, ""), (f"huggingface.co/{SD}", SD, ""),
    (f"hf.co/{SD}", SD, ""), (f"https://hf-mirror.com/{SD}", SD, ""),
    (f"https://HuggingFace.co/{SD}", SD, ""),
    (f"https://huggingface.co/api/models/{SD}", SD, ""), (Path(PAGE), SD, "")])
def test_names_and_pages_of_the_hub(text, name, file):
    assert hub_place(text) == (name, file)


def test_the_hub_of_the_environment(monkeypatch):
    with pytest.raises(TinyldmError, match="not on the Hugging Face hub"):
        hub_place("http://127.0.0.1:9/a/b/blob/main/c.ckpt")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub_place("http://127.0.0.1:9/a/b/blob/main/c.ckpt") == ("a/b", "c.ckpt")


@pytest.mark.parametrize("text", ["nowhere", "a b/c", "../up", "/a/b", "owner/name/more", "a.ckpt",
                                  "owner/model.safetensors", "C:/models/a.ckpt", ""])
def test_paths_are_no_names_of_the_hub(text):
    assert hub_place(text) is None


@pytest.mark.parametrize("text", [
    "https://example.com/model.safetensors", "https://civitai.com/api/download/models/128713",
    "https://github.com/a/b", "ftp://example.com/a.ckpt", "s3://bucket/a.ckpt",
    Path("https://example.com/a.ckpt"), "https://huggingface.co.example.com/a/b"])
def test_other_addresses_are_answered_in_a_line(text):
    for function in (resolve, lambda name: resolve_addon(name, "x")):
        with pytest.raises(TinyldmError, match="is not on the Hugging Face hub.*: download it "
                           "yourself, and name the file"):
            function(text)


@pytest.mark.parametrize("page", ["", "owner", "spaces/owner/name", "datasets/owner/name",
                                  "collections/owner/name-123", "../../a"])
def test_other_pages_of_the_hub(page):
    with pytest.raises(TinyldmError, match="is not the page of a model on the Hugging Face hub"):
        resolve(f"https://huggingface.co/{page}")


@pytest.mark.parametrize("file", ["a.gguf", "unet/model.onnx", "config.json", "x.zip"])
def test_files_that_could_not_be_read_are_not_downloaded(file):
    for text in (f"{PAGE}/blob/main/{file}", f"{SD}/{file}"):
        with pytest.raises(TinyldmError, match=rf"{file} of {SD} is no file of weights in a "
                           r"format that tinyldm reads \(\.safetensors, "):
            resolve(text)


# ---- this machine ---------------------------------------------------------------------------

def put(folder, *files):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(name, pattern, function=resolve):
    with pytest.raises(TinyldmError) as error:
        function(name)
    assert re.search(pattern, str(error.value)), error.value
    assert "\n" not in str(error.value)


def test_a_name_without_its_extension(tmp_path):
    put(tmp_path, "models/v1.5.ckpt", "models/v1.5.safetensors", "models/old.pt", "here.ckpt")
    assert resolve("models/v1.5") == Path("models/v1.5.safetensors")
    assert resolve(tmp_path / "models" / "old") == tmp_path / "models" / "old.pt"
    assert resolve("here") == Path("here.ckpt")
    assert resolve_addon("models/v1.5", "x") == Path("models/v1.5.safetensors")
    (tmp_path / "here").mkdir()
    put(tmp_path, "here/model_index.json")
    assert resolve("here") == Path("here")              # the name as it is comes first


def test_a_name_that_is_nearly_right(tmp_path):
    put(tmp_path, "models/dreamshaper_8.safetensors")
    refused("models/dreamshaper_8.ckpt", "there is no file models/dreamshaper_8.ckpt: "
            r"did you mean models/dreamshaper_8.safetensors\?$")
    refused("models/qqq.ckpt", "check the path$")


def test_what_is_neither_a_folder_nor_a_file(tmp_path):
    with pytest.raises(TinyldmError, match="but /dev/null is a device or a pipe: name another"):
        tinyldm.load("/dev/null")
    with pytest.raises(TinyldmError, match=r"has no file of weights \(.*\): name another"):
        tinyldm.load().load_lora(tmp_path)


@pytest.mark.parametrize("name", [5, [], b"weights", object(), "", " "])
def test_what_is_no_path_and_no_name(name):
    for read in (tinyldm.load, tinyldm.load().load_lora):
        with pytest.raises(TinyldmError, match="a path, or a name .* must be a str or a path"):
            read(name)


def test_an_address_of_a_file_here(tmp_path):
    put(tmp_path, "my models/a.ckpt")
    assert resolve(f"file://{tmp_path}/my%20models/a.ckpt") == tmp_path / "my models/a.ckpt"


@pytest.mark.parametrize("refs, expected", [("abc", "abc"), ("def", "def"), (None, "def"),
                                            ("gone", "def"), ("../../x", "def")])
def test_a_folder_of_the_hubs_cache(refs, expected, tmp_path):
    folder = put(tmp_path / "models--a--b", "snapshots/abc/model_index.json",
                 "snapshots/def/model_index.json", "blobs/1")
    if refs:
        put(folder, "refs/main")
        (folder / "refs" / "main").write_text(refs + "\n")
    for name in (folder, folder / "snapshots"):
        assert resolve(name) == folder / "snapshots" / expected


def test_a_lora_in_the_hubs_cache(tmp_path):
    put(tmp_path / "models--a--b", "snapshots/abc/pytorch_lora_weights.safetensors",
        "snapshots/abc/other.safetensors")
    assert resolve_addon("models--a--b", "pytorch_lora_weights") == Path(
        "models--a--b/snapshots/abc/pytorch_lora_weights.safetensors")


def test_a_folder_of_single_files(tmp_path):
    put(tmp_path / "models", "b.safetensors", "a.ckpt", "sd15/c.ckpt", "notes.txt", "x/y/z.ckpt")
    refused("models", r"models is not a pipeline's folder \(model_index.json\), but holds single "
            "files, 3: a.ckpt, b.safetensors, sd15/c.ckpt: name one, such as models/a.ckpt")
    put(tmp_path / "some", "first/model_index.json", "second/model_index.json", "a.ckpt")
    refused("some", "holds folders of pipelines, 2: first, second: name one, such as some/first")
    shutil.copytree(ROOT / "weights" / "shapes" / "unet", tmp_path / "one")
    refused("one", "holds one component, UNet2DConditionModel, but no pipeline")


def test_a_folder_of_addons(tmp_path):
    put(tmp_path / "loras", "a.safetensors", "a.pt", "notes.txt")
    assert resolve_addon("loras", "x") == Path("loras/a.safetensors")
    put(tmp_path / "loras", "b.pt")
    refused("loras", "loras has several files of weights, 3: .*: name one, such as loras/a.safet",
            lambda name: resolve_addon(name, "x"))
    put(tmp_path / "none", "readme.md")
    refused("none", r"none has no file of weights \(.*\), only 1: readme.md: name another",
            lambda name: resolve_addon(name, "x"))


@pytest.mark.parametrize("name", ["a\0b", "\udcff", "x" * 5000, "~nobody-of-that-name/x",
                                  "https://\0/a/b", "a/" * 3000])
def test_hostile_names(name):
    refused(name, ".")
    try:
        resolve_addon(name, "x")                        # a path, which reading will refuse
    except TinyldmError:
        pass


def test_what_is_neither_a_file_nor_a_folder(tmp_path):
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "away.safetensors")
    for path, message in ((tmp_path / "link.safetensors", "is a link to something that is not th"),
                          ("/dev/null", "is a device or a pipe: name another"),
                          ("file:///no/x.ckpt", "there is no file file:///no/x.ckpt: check")):
        with pytest.raises(TinyldmError, match=message):
            resolve(path)
