"""One component of a pipeline: a folder of config.json and weights <-> one model, strictly.

Whatever is wrong in such a folder becomes a TinyldmError here. folders.py puts the components of a
pipeline together.
"""
import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .. import backend
from ..errors import TinyldmError, note, shorten
from ..files import as_path, read_json, write_json
from ..layers import OUR_AXES, Conv2d, Linear, check_fit, named_modules, to_file
from ..models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ..models.clip_model import CLIPModel
from ..models.clip_vision import CLIPVisionModel, CLIPVisionModelWithProjection
from ..models.dit import DiTTransformer2DModel
from ..models.prior import PriorTransformer, StableUnCLIPImageNormalizer
from ..models.unet import UNet2DConditionModel
from ..models.unet_2d import UNet2DModel
from ..models.vae import AutoencoderKL
from . import layout
from .formats.reading import read_tensors
from .formats.safetensors_file import read_metadata, write_safetensors
from .single_file import clip, ddpm
from .single_file.alone import one_component

MODELS = (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection,
          CLIPVisionModel, CLIPVisionModelWithProjection, CLIPModel, DiTTransformer2DModel,
          UNet2DModel, PriorTransformer, StableUnCLIPImageNormalizer)
# transformers' names of configs
MODEL_TYPES = {"CLIPTextModel": "clip_text_model", "CLIPTextModelWithProjection": "clip_text_model",
               "CLIPVisionModel": "clip_vision_model",
               "CLIPVisionModelWithProjection": "clip_vision_model", "CLIPModel": "clip"}
# What some files call a class: transformers writes a model_type, old files of DiT a wider class.
ALIASES = {"clip_text_model": "CLIPTextModel", "clip_vision_model": "CLIPVisionModel",
           "clip": "CLIPModel", "Transformer2DModel": "DiTTransformer2DModel"}
# The names that diffusers and transformers give, pickles last. The float16 variant of name.end is
# name.fp16.end; an index of shards is name.end.index.json, or name.end.index.fp16.json.
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors",
                "diffusion_pytorch_model.bin", "pytorch_model.bin")
LARGE = 1 << 20                     # a weight of at least so many numbers may stay float16


def read_config(folder):
    """folder/config.json -> (the model class it names, its dict).

    Raises TinyldmError for a class that is not supported, and for a value that Settings.read of the
    class refuses.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    if class_name(config) is None and ddpm.is_original(config):
        with config_errors(path, "network of the original DDPM that is supported"):
            config = ddpm.public_config(config)
    name = class_name(config)
    name = ALIASES.get(name, name) if isinstance(name, str) else name
    for model in MODELS:
        if model.__name__ == name:
            with config_errors(path, f"{name} that is supported"):
                model.Settings.read(config)
            return model, config
    raise TinyldmError(f"{path} names the model {name}, supported are "
                       f"{', '.join(model.__name__ for model in MODELS)}")


@contextmanager
def config_errors(path, described):
    """TinyldmErrors of a config then name its file, and what it should have described."""
    try:
        yield
    except TinyldmError as error:
        raise TinyldmError(f"{path} does not describe a {described} ({error})") from error


def note_unknown_keys(path, kind, config):
    """Say once which keys of a config, read as a `kind` of Config, are unknown and play no part."""
    if unknown := kind.unknown(config):
        note(f"{path} has keys that are unknown here and play no part ({shorten(unknown)}): if "
             "pictures look wrong, they may be the reason")


def class_name(config):
    """The class that a config.json names: diffusers writes it as _class_name, transformers as
    architectures or only a model_type."""
    name = config.get("_class_name") or config.get("architectures") or config.get("model_type")
    return name[0] if isinstance(name, list) and name else name


def find_weights(folder, dtype=None, names=None):
    """The weight files of a component folder: one, or the shards that an index lists.

    For dtype float16 the float16 variant is preferred, else the full one; pickles come last in
    both. names: the files that the folder will have, where only an index is there already.
    Raises TinyldmError if there are none, or if shards are missing.
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
        raise TinyldmError(f"{folder / index} must list files under weight_map, but does not: get "
                           "it again")
    shards = sorted(set(map(str, shards.values())))
    if missing := [shard for shard in shards if shard not in names]:
        raise TinyldmError(f"{folder / index} lists {len(shards)} files of weights, of which the "
                           f"folder lacks {shorten(missing)}: is the download complete?")
    return [folder / shard for shard in shards]


def load_weights(module, files, dtype=np.float32, low_memory=False):
    """Fill every parameter of `module` from weight files, one path or a list; see fill."""
    files = [files] if isinstance(files, (str, Path)) else files
    stored = ddpm.public_tensors(read_files(files))
    tensors = layout.fitted(stored, dict(module.named_parameters()))
    misfit = f"{', '.join(map(str, files))} does not fit the {type(module).__name__} of its config"
    fill(module, tensors, misfit, dtype, low_memory)


def read_files(files):
    """{name: StoredTensor} of several files (shards) together."""
    stored = {}
    for file in files:
        stored |= read_tensors(file)
    return stored


def fill(module, tensors, misfit, dtype=np.float32, low_memory=False):
    """Fill every parameter of `module` from {its name: StoredTensor}, strictly in both directions.

    If the file has a parameter's dtype and layout, the parameter is a view of the memory-mapped
    file. dtype: float16, 32 or 64. None means float32, except that large weights which are float16
    in the file stay float16. low_memory: convolutions, too, stay in the map, in the file's layout.
    Reading them at every use takes a fifth of the time of SD 1.5's UNet at 256x256 pixels, and
    little at 512x512.
    Raises TinyldmError before anything is filled, see check_fit; and for a weight not finite.
    """
    dtype = float_type(dtype)
    parameters = dict(module.named_parameters())
    matrices = {layer.weight for _, layer in named_modules(module)
                if isinstance(layer, (Linear, Conv2d))}     # their kernels accept float16
    check_fit(misfit, parameters, tensors)

    def read(name):
        axes = OUR_AXES if len(parameters[name].shape) == 4 else None
        stays = (parameters[name] in matrices and tensors[name].fits_float16
                 and math.prod(parameters[name].shape) >= LARGE)
        wanted = dtype or (np.float16 if stays else np.float32)
        parameters[name].data = tensors[name].read(wanted, axes, contiguous=not low_memory)

    backend.parallel(read, tensors)


def float_type(dtype):
    """A user's dtype -> np.dtype, or None. Raises TinyldmError unless it is float16, 32 or 64."""
    try:
        known = dtype is None or np.dtype(dtype) in (np.float16, np.float32, np.float64)
    except TypeError:                                   # not a dtype for NumPy
        known = False
    if not known:
        raise TinyldmError(f"dtype must be float16, float32 or float64, not {dtype!r}")
    return None if dtype is None else np.dtype(dtype)


def load_model(path, dtype=np.float32, low_memory=False, defaults=None):
    """The model in a component's folder, or in a file of one component: one of MODELS.

    path: a folder with config.json and weights; one of the weight files of such a folder; or a
    file without a config, such as a VAE published by itself, see single_file/alone.py.
    dtype, low_memory: see fill; dtype also selects the variant, see find_weights. defaults: the
    config of a VAE in a file, and what a VAE's folder leaves out of its config. None: as published
    with Stable Diffusion 1, or XL if the file's header names it. For CLIP's original file, see
    single_file/clip.py.
    Raises TinyldmError as build_model, find_weights and fill do.
    """
    if defaults is not None and not isinstance(defaults, dict):
        raise TinyldmError("defaults must be a dict of what a config holds, such as "
                           f"{{'scaling_factor': 0.18215}}, not {defaults!r:.80}")
    path = as_path("the folder or file of a model", path)
    path = clip.weights_of(path) or path
    if path.is_file() and not has_config(path):
        alone = one_component(read_tensors(path), path, defaults, _is_xl(path))
        with config_errors(path, f"{alone.model.__name__} that is supported"):
            module = alone.model(alone.config)
        misfit = f"{path} does not fit the {alone.model.__name__} that its shapes describe"
        tensors = layout.fitted(alone.tensors, dict(module.named_parameters()))
        fill(module, tensors, misfit, dtype, low_memory)
        return module
    if (path / "model_index.json").is_file() and not (path / "config.json").is_file():
        raise TinyldmError(f"{path} holds a whole pipeline: read it with tinyldm.load, or name one "
                           "of its folders, such as unet")
    folder, files = (path.parent, path) if path.is_file() else (path, None)
    module = build_model(folder, defaults)
    load_weights(module, files or find_weights(folder, dtype), dtype, low_memory)
    return module


def has_config(file):
    """Whether a weight file has the name of a component's own, beside a config.json; for one of the
    original DDPM, any name."""
    names = {name.partition(".")[0] for name in WEIGHT_FILES}
    config = file.with_name("config.json")
    return config.is_file() and (file.name.partition(".")[0] in names
                                 or ddpm.is_original(read_json(config)))


def _is_xl(file):
    """Whether a file's header says that it belongs to Stable Diffusion XL."""
    return "stable-diffusion-xl" in read_metadata(file).get("modelspec.architecture", "")


def build_model(folder, defaults=None):
    """The model that folder/config.json names, without weights: its parameters have only shapes.

    defaults: what holds where that config leaves something out.
    Raises TinyldmError as read_config does; and notes keys that are unknown.
    """
    model, config = read_config(folder)
    note_unknown_keys(Path(folder) / "config.json", model.Settings, config)
    return model((defaults or {}) | config)


def save_model(module, folder, dtype=np.float16):
    """Write a model as config.json and safetensors weights that diffusers and transformers load.

    Each file is written whole or not at all. dtype: of the weights in the file; None means the
    narrowest floating-point type that holds all of them exactly.
    Raises TinyldmError for a folder that cannot be written, and for weights that are not finite.
    """
    folder, name = Path(folder), type(module).__name__
    tensors = {key: to_file(backend.to_host(parameter.data))
               for key, parameter in module.named_parameters()}
    dtype = narrowest(tensors.values()) if dtype is None else np.dtype(dtype)
    for key, tensor in tensors.items():
        with np.errstate(over="ignore"):                # an overflow is reported below
            tensors[key] = np.asarray(tensor, dtype, order="C")
        if not np.isfinite(tensors[key]).all():
            raise TinyldmError(f"{key} is not finite in {dtype}, so nothing is written: use a "
                               "wider dtype, or correct the weight")
    if name in MODEL_TYPES:
        # transformers computes in this dtype, by default in the file's; diffusers in float32.
        identity = {"architectures": [name], "model_type": MODEL_TYPES[name], "dtype": "float32"}
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
    """The first of float16, 32 and 64 that holds every number of the arrays."""
    for dtype in (np.float16, np.float32):
        with np.errstate(over="ignore"):
            if all(np.can_cast(array.dtype, dtype) or (array.astype(dtype) == array).all()
                   for array in arrays):
                return np.dtype(dtype)
    return np.dtype(np.float64)
