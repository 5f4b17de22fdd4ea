"""What people call weights -> the local path of a folder or of a file.

    None                            the bundled model
    a folder, a file                a file also without its extension
    models--owner--name             a folder of the hub's cache, of which the newest download counts
    owner/name                      on the Hugging Face hub; what comes from there is kept
    owner/name/file.safetensors     a single file there
    owner/name@revision             the same of a branch, a tag or a commit; also before /file
    https://huggingface.co/...      the page of any of these, or a link to a file
"""
import difflib
import os
import re
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from ..errors import TinyldmError, shorten
from ..files import read_json
from . import hub
from .addons.adapter_settings import FILE as SETTINGS
from .components import class_name
from .folders import PIPELINES, read_index
from .formats.reading import read_tensors
from .single_file.dit import is_dit
from .single_file.kinds import recognise
from .single_file.openai import is_openai

ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")              # of files of weights
NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"
HUB_NAME = re.compile(rf"({NAME})(?:@(refs/\w+/[\w.-]+|[^/@]+))?(?:/(.+\.[a-zA-Z]\w*))?")
HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co", "hf-mirror.com"}
# A path collapses two slashes into one.
URL = re.compile(r"(?:(https?|ftp|s3|gs|hf|file):/+)?(.*)", re.DOTALL)
OTHER_PAGES = {"spaces", "datasets", "collections", "papers", "docs", "blog", "learn"}
FILE_PAGES = {"blob", "resolve", "raw", "tree", "commit", "commits", "blame"}


class Place(NamedTuple):
    """A place on the hub."""

    name: str                                           # owner/name or owner/name@revision
    file: str                                           # "" for all of the repository


def resolve(weights=None, dtype=None):
    """What a user calls the weights of a pipeline -> the path of its folder, or of a single file.

    dtype: which variant of the weights to download, see find_weights.
    Raises TinyldmError for a name that leads to nothing, for a folder of something else, and for a
    failed download.
    """
    if weights is None:
        return bundled()
    path = local_path(weights)
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        return pipeline_folder(path)
    place = hub_place(weights)
    if place is None:
        raise TinyldmError(nothing_here(path, weights))
    if place.file in ("", hub.INDEX):
        folder = hub.download_file(place.name, hub.INDEX).parent
        index = read_index(folder)
        return hub.download_parts(place.name, folder, index, PIPELINES[index["_class_name"]], dtype)
    return hub.download_file(place.name, place.file)


def kind_of(weights=None):
    """What a user calls the weights of a pipeline -> the public class of that pipeline.

    Of the hub's it downloads model_index.json alone. The names and shapes in a single file tell its
    class. What has no model_index.json, and what cannot be read, is taken for Stable Diffusion:
    `resolve` and reading it say what is wrong with it.
    Raises TinyldmError as resolve does.
    """
    path = bundled() if weights is None else local_path(weights)
    if not os.path.exists(path) and (place := hub_place(weights)):
        path = Path()
        if place.file in ("", hub.INDEX):
            path = hub.download_file(place.name, hub.INDEX).parent
    if not os.path.exists(path):
        resolve(weights)                                # which says what is missing
    folder = snapshot(path)
    if os.path.isdir(path) and os.path.isfile(folder / hub.INDEX):
        return read_index(folder)["_class_name"]
    with suppress(TinyldmError):
        names = read_tensors(path) if os.path.isfile(path) else {}
        if is_dit(names):
            return "DiTPipeline"
        if is_openai(names):
            return "DDPMPipeline"
        return recognise(names, path, "epsilon").pipeline   # whatever it predicts
    return "StableDiffusionPipeline"


def resolve_vae(vae, dtype=None):
    """What a user calls a VAE -> the path of its file, its folder, or a pipeline's folder.

    dtype: see find_weights. Raises TinyldmError as resolve does; reading the path checks the rest.
    """
    path = local_path(vae)
    if os.path.isdir(path):
        return snapshot(path)
    place = None if os.path.isfile(path) else hub_place(vae)
    if place is None:
        return resolve(vae, dtype)
    if not place.file:
        return hub.download_vae(place.name, dtype)
    return hub.download_file(place.name, place.file)


def resolve_model(model, dtype=None):
    """What a user calls a model -> its folder, or its file; of a repository that is one model all
    files that are read here, its tokenizer's too.

    dtype: see find_weights. Raises TinyldmError for a failed download; reading checks the rest.
    """
    path = local_path(model)
    if os.path.isdir(path):
        return snapshot(path)
    place = None if os.path.isfile(path) else hub_place(model)
    if place is None:
        return path
    if not place.file:
        return hub.download_model(place.name, dtype)
    return hub.download_file(place.name, place.file)


def resolve_addon(addon, usual):
    """What a user calls a LoRA or a textual inversion -> the path of its file.

    usual: the name that diffusers gives such a file, without extension. Of a folder or a repository
    it is taken, else the only file of weights.
    Raises TinyldmError for a repository or a folder with none or several of them, and for a failed
    download. What looks like a path is returned as it is: reading it gives the error.
    """
    path = local_path(addon)
    if os.path.isdir(path):
        folder = snapshot(path)
        return folder / choose(files_near(folder), usual, folder)
    place = None if os.path.isfile(path) else hub_place(addon)
    if place is None:
        return path
    if not place.file:
        files = hub.list_files(place.name, [usual + ending for ending in ENDINGS])
        place = place._replace(file=choose(files, usual, place.name))
    file = PurePosixPath(place.file)
    return hub.download_file(place.name, place.file, [
        str(file.with_name(name)) for name in (SETTINGS, f"{file.stem}_2{file.suffix}")])


def choose(files, usual, where):
    """The one file of weights among names relative to a repository or a folder."""
    found = sorted((file for file in files if file.endswith(ENDINGS)),
                   key=lambda file: (file.count("/"), ENDINGS.index(PurePosixPath(file).suffix)))
    for few in ([file for file in found if PurePosixPath(file).stem == usual and "/" not in file],
                [file for file in found if "/" not in file], found):
        if len({PurePosixPath(file).with_suffix("") for file in few}) == 1:
            return few[0]                               # one, or the same in several formats
    if not found:
        has = f", only {shorten(sorted(files))}" if files else ""
        raise TinyldmError(f"{where} has no file of weights ({', '.join(ENDINGS)}){has}: name "
                           "another")
    raise TinyldmError(f"{where} has several files of weights, {shorten(found)}: name one, such as "
                       f"{where}/{found[0]}")


# ---- on this machine ------------------------------------------------------------------------

def local_path(name):
    """A user's text or path -> Path: ~ and file:// are replaced, a missing extension is added."""
    if not isinstance(name, (str, os.PathLike)) or not str(name).strip():
        raise TinyldmError("a path, or a name on the Hugging Face hub, must be a str or a "
                           f"pathlib.Path that is not empty, not {name!r:.80}: give one")
    text = str(name)
    if (match := URL.fullmatch(text)) and match[1] == "file":
        text = unquote(f"/{match[2]}")
    path = Path(os.path.expanduser(text))
    if not os.path.exists(path) and os.path.isdir(path.parent):
        for ending in ENDINGS:
            if os.path.isfile(f"{path}{ending}"):
                return Path(f"{path}{ending}")
    return path


def pipeline_folder(path):
    """The folder itself, or the newest snapshot in a folder of the hub's cache.

    Raises TinyldmError for a folder that holds single files, or one component, but no pipeline.
    """
    folder = snapshot(path)
    if os.path.isfile(folder / hub.INDEX) or os.path.isfile(folder / "unet" / "config.json"):
        return folder                                   # without an index it is not complete
    if os.path.isfile(folder / "config.json"):
        name = class_name(read_json(folder / "config.json"))
        raise TinyldmError(f"{folder} holds one component, {name}, but no pipeline "
                           f"({hub.INDEX}): name the folder of a pipeline, or read it with "
                           "tinyldm.load_model")
    pipelines = sorted(index.parent for index in folder.glob(f"*/{hub.INDEX}"))
    files = sorted(file for file in files_near(folder) if file.endswith(hub.CHECKPOINTS))
    for what, found in (("folders of pipelines", [pipeline.name for pipeline in pipelines]),
                        ("single files", files)):
        if found:
            raise TinyldmError(f"{folder} is not a pipeline's folder ({hub.INDEX}), but holds "
                               f"{what}, {shorten(found)}: name one, such as {folder / found[0]}")
    return folder


def files_near(folder):
    """The names of files in a folder and in the folders in it, but no deeper: it may be large."""
    return [path.relative_to(folder).as_posix() for pattern in ("*", "*/*")
            for path in folder.glob(pattern) if path.is_file()]


def snapshot(path):
    """In a folder of the hub's cache the newest snapshot, else the folder itself.

    Source: https://huggingface.co/docs/huggingface_hub, "Understand caching": refs/main holds the
    name of a folder in snapshots.
    """
    if path.name == "snapshots":
        path = path.parent
    try:
        commit = (path / "refs" / "main").read_text(encoding="utf-8").strip()
        if commit and os.path.isdir(path / "snapshots" / commit):
            return path / "snapshots" / commit
    except (OSError, ValueError):
        pass
    found = [folder for folder in path.glob("snapshots/*") if folder.is_dir()]
    return max(found, key=lambda folder: folder.stat().st_mtime, default=path)


def nothing_here(path, name):
    """The message for a name that is no path here and no name on the hub."""
    expected = ("expected weights to be a folder, a file, or a name or page of the Hugging Face "
                "hub (owner/name), but")
    if os.path.lexists(path):
        there = ("a device or a pipe" if os.path.exists(path) else
                 "a link to something that is not there")
        return f"{expected} {name} is {there}: name another"
    what = "file" if path.suffix in ENDINGS else "folder"
    try:
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), 1)
    except (OSError, ValueError):
        near = []
    advice = f"did you mean {path.parent / near[0]}?" if near else "check the path"
    return f"{expected} there is no {what} {name}: {advice}"


def bundled():
    """The folder of the bundled model."""
    package = Path(__file__).parents[1]
    for root in (package, package.parent):              # an installed wheel, the repository
        if os.path.isfile(root / "weights" / "shapes" / hub.INDEX):
            return root / "weights" / "shapes"
    raise TinyldmError(f"the bundled model is missing from {package.parent}: install tinyldm "
                       f"again, or name a folder of weights")


# ---- on the hub -----------------------------------------------------------------------------

def hub_place(name):
    """A user's text -> Place on the hub; None if it is no name or address of one.

    Raises TinyldmError for the address of anything else.
    """
    text = str(name).strip()
    scheme, rest = URL.fullmatch(text).groups()
    host, _, page = rest.partition("/")
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
    if host.lower() in {*HOSTS, endpoint} - {""} and scheme != "hf":
        return hub_page(page, text)
    if scheme == "file":
        return None
    if scheme not in (None, "hf"):
        raise TinyldmError(f"{text} is not on the Hugging Face hub, and tinyldm downloads from "
                           "there alone: download it yourself, and name the file")
    match = HUB_NAME.fullmatch(rest)
    if not match or scheme is None and is_a_missing_file(text):
        return None
    return checked(Place(f"{match[1]}@{match[2]}" if match[2] else match[1], match[3] or ""))


def is_a_missing_file(text):
    """Whether a name like owner/name is rather a path: it ends as one, or its folder is here."""
    return text.count("/") == 1 and text.endswith(ENDINGS) or (
        text.count("/") > 1 and os.path.isdir(os.path.dirname(text)))


def hub_page(page, address):
    """The path in an address on the hub -> Place."""
    parts = [unquote(part) for part in re.split("[?#]", page)[0].split("/") if part]
    parts = parts[1:] if parts[:1] == ["api"] else parts
    parts = parts[1:] if parts[:1] == ["models"] else parts
    name = "/".join(parts[:2])
    if len(parts) < 2 or parts[0] in OTHER_PAGES or not re.fullmatch(NAME, name):
        raise TinyldmError(f"{address} is not the page of a model on the Hugging Face hub: name "
                           "one, such as https://huggingface.co/owner/name")
    file = ""
    if len(parts) > 3 and parts[2] in FILE_PAGES:
        name = name if parts[3] == "main" else f"{name}@{parts[3]}"
        file = "/".join(parts[4:])
    return checked(Place(name, file))


def checked(place):
    """Raise TinyldmError for a file in a format that is not read, before it is downloaded."""
    ending = PurePosixPath(place.file).suffix
    if ending and place.file != hub.INDEX and ending not in ENDINGS:
        raise TinyldmError(f"{place.file} of {place.name} is no file of weights in a format that "
                           f"tinyldm reads ({', '.join(ENDINGS)}): name another")
    return place
