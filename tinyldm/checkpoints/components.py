"""One component of a pipeline: a folder of config.json and weights <-> one model, strictly.

Stands between the files (reading.py, layout.py) and the models; folders.py puts
components together. Everything a user's folder can get wrong ends here in a TinyldmError.
"""
import math
from pathlib import Path

import numpy as np

from .. import backend
from ..errors import TinyldmError
from ..files import read_json, write_json
from ..layers import Conv2d, Linear, named_modules
from ..models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ..models.unet import UNet2DConditionModel
from ..models.vae import AutoencoderKL
from . import layout
from .formats.reading import read_tensors
from .formats.safetensors_file import write_safetensors

MODELS = (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection)
# As diffusers and transformers call them, what is no pickle first. The float16 variant of name.end
# is name.fp16.end; an index of shards is name.end.index.json, or name.end.index.fp16.json.
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors",
                "diffusion_pytorch_model.bin", "pytorch_model.bin")
LARGE = 1 << 20                                         # numbers in a weight that may stay float16
NAMES_SHOWN = 8                                         # of a list of keys in an error


def read_config(folder):
    """folder/config.json -> (the model class it names, its dict).

    diffusers writes the class as _class_name, transformers as architectures or only a model_type.
    Raises TinyldmError for a class that is not supported, naming it.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    name = class_name(config)
    name = "CLIPTextModel" if name == "clip_text_model" else name
    for model in MODELS:
        if model.__name__ == name:
            return model, config
    raise TinyldmError(f"{path} names the model {name}, supported are "
                       f"{', '.join(model.__name__ for model in MODELS)}")


def class_name(config):
    """What a config.json calls its model: diffusers' word or transformers'."""
    name = config.get("_class_name") or config.get("architectures") or config.get("model_type")
    return name[0] if isinstance(name, list) else name


def find_weights(folder, dtype=None, names=None):
    """The weight files of a component folder: one, or the shards that an index lists.

    For dtype float16 the variant in float16 comes first, else the one without a variant, which is
    the precise one; of each, pickles are the last choice. names: of the files that the folder
    will have, if it does not have them yet, but for an index.
    Raises TinyldmError where there is none, and for shards that are missing.
    """
    folder = Path(folder)
    names = {path.name for path in folder.glob("*")} if names is None else set(names)
    half = dtype is not None and np.dtype(dtype) == np.float16
    for variant in (".fp16", "") if half else ("", ".fp16"):
        for name in WEIGHT_FILES:
            stem, end = name.split(".")
            if f"{stem}{variant}.{end}" in names:
                return [folder / f"{stem}{variant}.{end}"]
            if f"{name}.index{variant}.json" in names:
                return _shards(folder, f"{name}.index{variant}.json", names)
    raise TinyldmError(f"expected weights in {folder} ({', '.join(WEIGHT_FILES)}, or with .fp16), "
                       f"found none (it holds {shorten(sorted(names))}): is the folder complete?")


def _shards(folder, index, names):
    shards = read_json(folder / index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise TinyldmError(f"{folder / index} must list files under weight_map, but does not")
    shards = sorted(set(map(str, shards.values())))
    if missing := [shard for shard in shards if shard not in names]:
        raise TinyldmError(f"{folder / index} lists {len(shards)} files of weights, of which the "
                           f"folder lacks {shorten(missing)}: is the download complete?")
    return [folder / shard for shard in shards]


def load_weights(module, files, dtype=np.float32, low_memory=False):
    """Fill every parameter of `module` from weight files, strictly in both directions.

    files: one path or a list. Options and errors: see fill.
    """
    files = [files] if isinstance(files, (str, Path)) else files
    tensors = layout.fitted(read_files(files), dict(module.named_parameters()))
    misfit = f"{', '.join(map(str, files))} does not fit the {type(module).__name__} of its config"
    fill(module, tensors, misfit, dtype, low_memory)


def read_files(files):
    """{name: StoredTensor} of all files together, as shards have them."""
    stored = {}
    for file in files:
        stored |= read_tensors(file)
    return stored


def fill(module, tensors, misfit, dtype=np.float32, low_memory=False):
    """Fill every parameter of `module` from {its name: StoredTensor}, strictly in both directions.

    One tensor is read at a time; where file and parameter agree in dtype and layout the parameter
    is a view of the memory-mapped file. dtype: float16, 32 or 64; None is float32, but for large
    weights that the file has in float16: they stay so. low_memory: convolutions too are left in
    the map, in the file's layout. Reading them at every use then takes a fifth of a call of
    SD 1.5's UNet at 256x256 pixels, little at 512x512.
    Raises TinyldmError, a sentence `misfit` with three lists (missing, unexpected, wrong shape),
    before anything is filled, or naming the first weight that is not finite.
    """
    dtype = float_type(dtype)
    parameters = dict(module.named_parameters())
    matrices = {layer.weight for _, layer in named_modules(module)
                if isinstance(layer, (Linear, Conv2d))}  # the layers whose kernels take float16
    check_fit(misfit, parameters, tensors)

    def read(name):
        axes = layout.OUR_AXES if len(parameters[name].shape) == 4 else None
        stays = (parameters[name] in matrices and tensors[name].format == "F16"
                 and math.prod(parameters[name].shape) >= LARGE)
        wanted = dtype or (np.float16 if stays else np.float32)
        parameters[name].data = tensors[name].read(wanted, axes, contiguous=not low_memory)

    backend.parallel(read, tensors)


def float_type(dtype):
    """None, or the np.dtype of a user's word. Raises TinyldmError for any but float16, 32, 64."""
    try:
        known = dtype is None or np.dtype(dtype) in (np.float16, np.float32, np.float64)
    except TypeError:                                   # NumPy does not know the word
        known = False
    if not known:
        raise TinyldmError(f"dtype must be float16, float32 or float64, not {dtype!r}")
    return None if dtype is None else np.dtype(dtype)


def misfits(parameters, tensors):
    """What keeps renamed tensors from filling parameters -> names missing, unexpected, wrong."""
    missing = [name for name in parameters if name not in tensors]
    unexpected = [name for name in tensors if name not in parameters]
    shapes = {name: (layout.file_shape(parameters[name]), tensors[name].shape)
              for name in parameters if name in tensors}
    wrong = [f"{name} (expected {ours}, found {theirs})"
             for name, (ours, theirs) in shapes.items() if ours != theirs]
    return missing, unexpected, wrong


def check_fit(misfit, parameters, tensors):
    """Raise TinyldmError, the sentence `misfit` and three lists, where tensors do not fit."""
    missing, unexpected, wrong = misfits(parameters, tensors)
    if missing or unexpected or wrong:
        raise TinyldmError(
            f"{misfit}\n"
            f"  missing: {shorten(missing)}\n"
            f"  unexpected: {shorten(unexpected)}\n"
            f"  wrong shape: {shorten(wrong)}")


def shorten(names):
    """Their number and the first few, or "none"."""
    if not names:
        return "none"
    rest = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{len(names)}: {', '.join(names[:NAMES_SHOWN])}{rest}"


def load_model(folder, dtype=np.float32, low_memory=False):
    """The model that folder/config.json names, with the folder's weights in `dtype`.

    dtype, low_memory: see fill; of a folder with two variants, find_weights chooses by dtype.

    Returns one of MODELS.
    Raises TinyldmError: see build_model, find_weights and load_weights.
    """
    module = build_model(folder)
    load_weights(module, find_weights(folder, dtype), dtype, low_memory)
    return module


def build_model(folder):
    """The model that folder/config.json names, its parameters no more than shapes.

    Raises TinyldmError: see read_config; and for a config that its class cannot follow.
    """
    model, config = read_config(folder)
    try:
        return model(config)
    except Exception as error:                          # a constructor only follows the config
        reason = error if isinstance(error, TinyldmError) else f"{type(error).__name__}: {error}"
        raise TinyldmError(f"{Path(folder) / 'config.json'} does not describe a {model.__name__} "
                           f"that is supported ({reason})") from error


def save_model(module, folder, dtype=np.float16):
    """Write a model as config.json and safetensors weights that diffusers and transformers load.

    Each file is whole or untouched. dtype: of the weights in the file; None for the narrowest
    floating-point type that holds all of them exactly.
    Raises TinyldmError for a folder that cannot be written, and for weights that are not finite.
    """
    folder, name = Path(folder), type(module).__name__
    tensors = {key: layout.to_file(backend.to_host(parameter.data))
               for key, parameter in module.named_parameters()}
    dtype = narrowest(tensors.values()) if dtype is None else np.dtype(dtype)
    for key, tensor in tensors.items():
        with np.errstate(over="ignore"):                # what overflows is reported below
            tensors[key] = np.ascontiguousarray(tensor, dtype)
        if not np.isfinite(tensors[key]).all():
            raise TinyldmError(f"{key} is not finite in {dtype}: nothing is written")
    if name.startswith("CLIPText"):
        # dtype: what transformers computes in; its default is the file's, diffusers' is float32.
        identity = {"architectures": [name], "model_type": "clip_text_model", "dtype": "float32"}
        weights = "model.safetensors"
    else:
        identity, weights = {"_class_name": name}, "diffusion_pytorch_model.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TinyldmError(f"cannot make the folder {folder} ({error}): choose another") from None
    write_safetensors(tensors, folder / weights)
    write_json(folder / "config.json", module.config | identity)


def narrowest(arrays):
    """The first of float16, 32 and 64 that holds every number of some arrays."""
    for dtype in (np.float16, np.float32):
        with np.errstate(over="ignore"):
            if all(np.can_cast(array.dtype, dtype) or (array.astype(dtype) == array).all()
                   for array in arrays):
                return np.dtype(dtype)
    return np.dtype(np.float64)
