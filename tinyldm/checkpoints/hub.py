"""Download weights from the Hugging Face hub, and only the files that are needed.

    owner/name                      model_index.json, then the files of the pipeline's parts: of
                                    each part one set of weights
    owner/name/file.safetensors     that file
    owner/name@revision             the same of a branch, a tag or a commit

The library huggingface_hub downloads: it shows progress bars, keeps complete files in its cache,
resumes after a broken connection, and without a network uses the files in the cache.
Source: https://huggingface.co/docs/huggingface_hub, "Download files from the Hub".
"""
import glob
from pathlib import Path

from ..errors import TinyldmError, shorten
from .components import find_weights

INDEX = "model_index.json"
SETTINGS = {"config.json", "scheduler_config.json", "vocab.json", "merges.txt", "tokenizer.json",
            "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
            "preprocessor_config.json", "processor_config.json"}
CHECKPOINTS = (".safetensors", ".ckpt")


def download_file(name, file, beside=()):
    """The local path of one file of the repository `name`.

    beside: files that are downloaded, too, if the repository has them.
    Raises TinyldmError if there is none; the message lists the single files to choose from, of the
    folder `file` if it is one.
    """
    folder = fetch(name, [file, *beside])
    if (folder / file).is_file():
        return folder / file
    found = [other for other in _ask(name) or files_in(folder) if other.endswith(CHECKPOINTS)]
    found = [other for other in found if other.startswith(f"{file}/")] or found
    found.sort(key=lambda file: (file.count("/"), file))
    hint = f"name one as {name}/{found[0]}" if found else "choose another"
    raise TinyldmError(f"{name} on the Hugging Face hub has no {file}; of single files "
                       f"({', '.join(CHECKPOINTS)}) it has {shorten(found)}: {hint}")


def list_files(name, usual):
    """The names of all files of a repository; without a network, of those in the cache.

    usual: files that are downloaded on the way if the repository has them.
    Raises TinyldmError as fetch does.
    """
    folder = fetch(name, usual)
    return _ask(name) or files_in(folder)


def download_parts(name, folder, index, parts, dtype=None):
    """The local folder with all files of the pipeline `name` that are read here.

    folder: where its model_index.json is already. index: the dict in that file. parts: those that
    are read, of which the index may leave out some. dtype: selects the variant of the weights, see
    find_weights.
    Raises TinyldmError for a failed download, and for a part without weights in a known format.
    """
    listed = _ask(name)
    own = {part: set() for part in parts if index.get(part) not in (None, [None, None])}
    beside = set()                                      # of parts without a folder of their own
    for file in listed or files_in(folder):
        part, slash, inner = file.partition("/")
        if part in own and slash:
            own[part].add(inner)
        elif not slash:
            beside.add(file)
    rooted = bool({"config.json", "scheduler_config.json"} & beside)
    found = {f"{part}/": files for part, files in own.items() if files or not rooted}
    found |= {"": beside} if len(found) < len(own) else {}
    if indexes := _paths(found, lambda file: ".index." in file):
        folder = fetch(name, indexes)                   # they list the files of the weights
    try:
        if empty := [part.rstrip("/") for part, files in found.items() if not files]:
            raise TinyldmError(f"it has nothing of {', '.join(empty)}")
        weights = [f"{part}{path.name}" for part, files in found.items() if "config.json" in files
                   for path in find_weights(folder / part, dtype, files)]
    except TinyldmError as error:
        where = "" if listed else " cannot be reached, and the cache has only part of it"
        raise TinyldmError(f"{name} on the Hugging Face hub{where}: {error}") from None
    settings = _paths(found, SETTINGS.__contains__)
    return fetch(name, [INDEX, *settings, *indexes, *weights])


def download_vae(name, dtype=None):
    """The local folder of the VAE in the repository `name`: the whole of it, or a pipeline's part.

    dtype: see find_weights. Raises TinyldmError for a failed download, and if there is no VAE.
    """
    configs = ["vae/config.json", "config.json"]
    listed = _ask(name) or files_in(fetch(name, configs))
    config = next((config for config in configs if config in listed), None)
    if config is None:
        raise TinyldmError(f"{name} on the Hugging Face hub has neither a vae folder nor a "
                           f"config.json: name a file of it, as {name}/FILE")
    part = config.removesuffix("config.json")           # vae/, or none
    inside = {file.removeprefix(part) for file in listed if file.startswith(part)}
    weights = find_weights(Path(part), dtype, inside)
    return fetch(name, [config, *(path.as_posix() for path in weights)]) / part


def download_model(name, dtype=None):
    """The local folder of the repository `name`, which is one model, with the files beside it.

    dtype: see find_weights. Raises TinyldmError for a failed download, and if it has no weights.
    """
    listed = _ask(name) or files_in(fetch(name, SETTINGS))
    files = {file for file in listed if "/" not in file}
    indexes = [file for file in files if ".index." in file]
    folder = fetch(name, ["config.json", *indexes])     # an index lists the files of the weights
    try:
        weights = [path.name for path in find_weights(folder, dtype, files)]
    except TinyldmError as error:
        raise TinyldmError(f"{name} on the Hugging Face hub: {error}") from None
    return fetch(name, [*SETTINGS & files, *indexes, *weights])


def _paths(parts, wanted):
    return [f"{part}{file}" for part, files in parts.items() for file in files if wanted(file)]


def _ask(name):
    """The names of all files of a repository; [] if the hub cannot be reached."""
    import huggingface_hub

    repository, at = _repository(name)
    try:
        info = huggingface_hub.HfApi().model_info(repository, **at)
        return [file.rfilename for file in info.siblings]
    except Exception:                                   # fetch reports the reason, if it matters
        return []


def files_in(folder):
    """The names of all files in a folder and its folders, relative to it."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


# ---- transport ------------------------------------------------------------------------------

def fetch(name, files):
    """The local folder with those of the files that the repository `name` has.

    Raises TinyldmError, one sentence, if one of them cannot be downloaded completely.
    """
    import huggingface_hub  # here, because it is slow to import and seldom needed

    repository, at = _repository(name)
    patterns = [glob.escape(file) for file in files]    # the library takes patterns, not names
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns, **at))
    except Exception as error:                          # the library's and the network's errors
        raise TinyldmError(f"{name} is not here and could not be downloaded from the Hugging Face "
                           f"hub: {_reason(name, error)}") from None


def _repository(name):
    """owner/name or owner/name@revision -> owner/name, the library's argument for the revision."""
    repository, _, revision = name.partition("@")
    return repository, {"revision": revision} if revision else {}


def _reason(name, error):
    """Why a download failed, and what to do next."""
    from huggingface_hub import utils as errors  # `huggingface_hub.errors` is new in 0.25

    unanswered = isinstance(error, errors.LocalEntryNotFoundError)
    if unanswered and error.__cause__:                  # the reason for looking in the cache
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if isinstance(error, errors.GatedRepoError):
        return ("it is given only to those who agreed to its terms: do so on "
                f"https://huggingface.co/{name}, then run `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no branch, tag or commit {name.partition('@')[2]}: check the name"
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return ("there is none of that name, or it is private: check the name, or run "
                "`hf auth login`")
    if status in (401, 403):
        return (f"access was denied ({status}): run `hf auth login` with a token that may read "
                f"{name}")
    if type(error).__name__ == "OfflineModeIsEnabled":      # which old versions keep elsewhere
        return "HF_HUB_OFFLINE is set, and not all of it is in the cache: unset it"
    if unanswered:
        return f"no answer ({said}), and not all of it is in the cache: check the network"
    return (f"the download broke off ({said}): run the same again, complete files are not "
            "downloaded twice")
