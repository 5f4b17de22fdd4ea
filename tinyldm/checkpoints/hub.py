"""Weights from the Hugging Face hub: which files of a repository are needed, and getting them.

    a pipeline, owner/name          model_index.json, then the parts it names that are read here,
                                    each part's weights once
    owner/name/file.safetensors     that file

huggingface_hub does the transport: it shows the bars, keeps every whole file in its cache, goes on
where a connection broke, and without network takes what the cache has. Called by folders.py.
Source: https://huggingface.co/docs/huggingface_hub, "Download files from the Hub".
"""
import glob
from pathlib import Path

from ..errors import TinyldmError
from .components import find_weights, shorten

INDEX = "model_index.json"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
SETTINGS = {"config.json", "scheduler_config.json", "vocab.json", "merges.txt", "tokenizer.json",
            "tokenizer_config.json", "special_tokens_map.json"}
CHECKPOINTS = (".safetensors", ".ckpt")


def download_index(name):
    """The folder with the model_index.json of the pipeline `name`.

    Raises TinyldmError for a repository without one, listing the single files to name instead.
    """
    folder = fetch(name, [INDEX])
    if not (folder / INDEX).is_file():
        raise _not_there(name, INDEX, folder)
    return folder


def download_file(name, file):
    """The path of a single file of the repository `name`. Raises TinyldmError where it has none."""
    folder = fetch(name, [file])
    if not (folder / file).is_file():
        raise _not_there(name, file, folder)
    return folder / file


def download_parts(name, folder, index, dtype=None):
    """The folder with all that is read of the pipeline `name`.

    folder: of download_index; index: the dict in its model_index.json. dtype: chooses between
    variants of weights, see find_weights.
    Raises TinyldmError for a failed download, and for a part without weights in a known form.
    """
    listed = _ask(name)
    parts = {part: set() for part in PARTS if index.get(part) not in (None, [None, None])}
    for file in listed or _present(folder):
        part, _, inner = file.partition("/")
        if part in parts:
            parts[part].add(inner)
    if indexes := _paths(parts, lambda file: ".index." in file):
        folder = fetch(name, indexes)                   # they say which files are the weights
    try:
        if empty := [part for part, files in parts.items() if not files]:
            raise TinyldmError(f"it has nothing of {', '.join(empty)}")
        weights = [f"{part}/{path.name}" for part, files in parts.items() if "config.json" in files
                   for path in find_weights(folder / part, dtype, files)]
    except TinyldmError as error:
        where = "" if listed else " cannot be reached, and the cache has only part of it"
        raise TinyldmError(f"{name} on the Hugging Face hub{where}: {error}") from None
    settings = _paths(parts, SETTINGS.__contains__)
    return fetch(name, [INDEX, *settings, *indexes, *weights])


def _paths(parts, wanted):
    return [f"{part}/{file}" for part, files in parts.items() for file in files if wanted(file)]


def _ask(name):
    """The names of all files of a repository; none where the hub does not answer."""
    import huggingface_hub

    try:
        return [file.rfilename for file in huggingface_hub.HfApi().model_info(name).siblings]
    except Exception:                                   # fetch says what is wrong, if it matters
        return []


def _present(folder):
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _not_there(name, file, folder):
    """The TinyldmError about a file that a repository lacks, with the single files it has."""
    found = [file for file in _ask(name) or _present(folder) if file.endswith(CHECKPOINTS)]
    found.sort(key=lambda file: (file.count("/"), file))
    hint = f"name one as {name}/{found[0]}" if found else "choose another"
    return TinyldmError(f"{name} on the Hugging Face hub has no {file}; of single files "
                        f"({', '.join(CHECKPOINTS)}) it has {shorten(found)}: {hint}")


# ---- transport ------------------------------------------------------------------------------

def fetch(name, files):
    """The folder with the local copy of those files of the hub's `name` that it has.

    Raises TinyldmError, one sentence, for whatever keeps one of them from being here whole.
    """
    import huggingface_hub  # here: it takes long to import and is seldom needed

    patterns = [glob.escape(file) for file in files]    # to the library names are patterns
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:                          # its and the network's share no base
        raise TinyldmError(f"{name} is not here and could not be downloaded from the Hugging Face "
                           f"hub: {_reason(name, error)}") from None


def _reason(name, error):
    """Why a download failed, and what to do."""
    from huggingface_hub import errors

    unanswered = isinstance(error, errors.LocalEntryNotFoundError)
    if unanswered and error.__cause__:                  # why it looked for a local entry
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if isinstance(error, errors.GatedRepoError):
        return ("it is given only to those who agreed to its terms: do so on "
                f"https://huggingface.co/{name}, then run `hf auth login`")
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return ("there is none of that name, or it is private: check the name, or run "
                "`hf auth login`")
    if status in (401, 403):
        return (f"access was denied ({status}): run `hf auth login` with a token that may read "
                f"{name}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and not all of it is in the cache: unset it"
    if unanswered:
        return f"no answer ({said}), and not all of it is in the cache: check the network"
    return (f"the download broke off ({said}): run the same again, files that came whole are not "
            "fetched twice")
