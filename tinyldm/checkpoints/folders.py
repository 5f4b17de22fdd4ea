"""A whole pipeline, a folder in the public diffusers layout or one file: finding and reading it.

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/

A single file in the original layout has the weights of the three models alone (ldm.py, kinds.py).
Called by pipeline.py; the three models come from components.py.
"""
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import TinyldmError
from ..files import read_json
from ..layers import Module
from ..models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ..models.unet import UNet2DConditionModel
from ..models.vae import AutoencoderKL
from . import ldm
from .components import check_fit, fill, find_weights, load_model, read_config
from .kinds import recognise
from .layout import fitted
from .reading import read_tensors

COMPONENTS = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
SECOND = {"text_encoder_2": CLIPTextModelWithProjection}                # of Stable Diffusion XL
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline",
             "StableDiffusionInpaintPipeline", "LatentConsistencyModelPipeline",
             "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline",
             "StableDiffusionXLInpaintPipeline")
# What is downloaded of a hub folder: each component's weights once, in the first form it has.
VARIANTS = (".safetensors", ".fp16.safetensors")
SMALL_FILES = ["model_index.json", "scheduler/*.json", "tokenizer/*.json", "tokenizer/*.txt",
               "tokenizer_2/*.json", "tokenizer_2/*.txt", "unet/*.json", "vae/*.json",
               "text_encoder/*.json", "text_encoder_2/*.json"]
# Every Stable Diffusion reads prompts with CLIP's vocabulary, which single files do not have.
TOKENIZER = "openai/clip-vit-large-patch14"
TOKENIZER_FILES = ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
TOKENIZER_VARIABLE = "TINYLDM_TOKENIZER"


class PipelineParts(NamedTuple):
    """What load_pipeline_parts reads."""

    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: dict                                     # of scheduler_config.json
    tokenizer: Path                                     # the folder with its files
    padding: str | None                                 # the token, None for what the folder says
    index: dict                                         # of model_index.json, {} for a single file
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: Path | None = None
    padding_2: str | None = None


def load_pipeline_parts(path, dtype=np.float32, low_memory=False, ema=False):
    """Read the models (dtype, low_memory: see fill) of a pipeline, and its scheduler's config.

    path: a folder, or a single file. ema: of a file that holds the UNet's weights twice take those
    averaged over the training. In float16, a VAE whose config says `force_upcast` is in float32.
    Raises TinyldmError for another pipeline than PIPELINES, and for whatever is missing or wrong in
    a component; what costs nothing to check is checked before any weight.
    """
    if Path(path).is_file():
        return _load_file(Path(path), dtype, low_memory, ema)
    return _load_folder(Path(path), dtype, low_memory)


def _load_folder(folder, dtype, low_memory):
    index = folder / "model_index.json"
    content = read_json(index)
    name = content.get("_class_name")
    if name not in PIPELINES:
        raise TinyldmError(f"{index} names the pipeline {name}, supported are "
                           f"{', '.join(PIPELINES)}")
    if content.get("requires_aesthetics_score"):
        raise TinyldmError(f"{folder} holds the refiner of Stable Diffusion XL, which is not "
                           "supported: take the base model")
    components, tokenizers = COMPONENTS, ["tokenizer"]
    if "XL" in name:
        components, tokenizers = COMPONENTS | SECOND, ["tokenizer", "tokenizer_2"]
    for part in (*components, *tokenizers, "scheduler"):
        if not (folder / part).is_dir():
            raise TinyldmError(f"expected a folder {folder / part}, found none: "
                               f"is the download complete?")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    dtypes = {}
    for part, expected in components.items():
        model, config = read_config(folder / part)
        if model is not expected:
            raise TinyldmError(f"{folder / part / 'config.json'} must name a {expected.__name__}, "
                               f"not a {model.__name__}")
        find_weights(folder / part)
        dtypes[part] = _dtype(config, dtype)
    models = {part: load_model(folder / part, dtypes[part], low_memory) for part in components}
    return PipelineParts(**models, **{name: folder / name for name in tokenizers},
                         scheduler=scheduler, padding=None, index=content)


def _dtype(config, dtype):
    """float32 in the place of float16, which the numbers inside some VAEs are too large for."""
    return np.float32 if dtype == np.float16 and config.get("force_upcast") else dtype


class Models(Module):
    """The models of a single file, whose parameters are named `part.name`."""

    def __init__(self, kind):
        self.text_encoder = CLIPTextModel(kind.text_encoder)
        self.unet = UNet2DConditionModel(kind.unet)
        self.vae = AutoencoderKL(kind.vae)
        if kind.text_encoder_2:
            self.text_encoder_2 = CLIPTextModelWithProjection(kind.text_encoder_2)


def _load_file(path, dtype, low_memory, ema):
    stored = read_tensors(path)
    kind = recognise(stored, path)
    if ema:
        stored = ldm.with_averages(stored, path)
    tokenizer = _tokenizer_folder()
    found, tensors = ldm.parts(stored, kind.text_encoder["num_hidden_layers"])
    models = Models(kind)
    for part, model in vars(models).items():
        wanted = dict(model.named_parameters())
        for name, tensor in fitted(found.pop(part, {}), wanted).items():
            tensors[f"{part}.{name}" if name in wanted else tensor.name] = tensor
    tensors |= {tensor.name: tensor for other in found.values() for tensor in other.values()}
    misfit = f"{path} does not fit {kind.name}"
    check_fit(misfit, dict(models.named_parameters()), tensors)
    for part, model in vars(models).items():
        own = {name: tensors[f"{part}.{name}"] for name, _ in model.named_parameters()}
        fill(model, own, misfit, _dtype(model.config, dtype), low_memory)
    return PipelineParts(**vars(models), scheduler=kind.scheduler, tokenizer=tokenizer,
                         padding=kind.padding, index={}, padding_2=kind.padding_2,
                         tokenizer_2=tokenizer if kind.padding_2 else None)


def _tokenizer_folder():
    """A folder with CLIP's vocabulary: the one that TINYLDM_TOKENIZER names, or of the hub."""
    if folder := os.environ.get(TOKENIZER_VARIABLE):
        if not Path(folder).is_dir():
            raise TinyldmError(f"{TOKENIZER_VARIABLE} must name a folder with vocab.json and "
                               f"merges.txt, but there is no folder {folder}")
        return Path(folder)
    try:
        return _snapshot(TOKENIZER, TOKENIZER_FILES)
    except TinyldmError as error:
        raise TinyldmError(f"a single file has no tokenizer, and {error}; or let "
                           f"{TOKENIZER_VARIABLE} name a folder with CLIP's vocab.json and "
                           "merges.txt, such as the tokenizer folder of any Stable Diffusion"
                           ) from None


def resolve(weights=None):
    """The pipeline's folder, or its single file, that a user's word means.

    weights: None for the bundled model; a folder; a file; or a hub name `owner/name`, downloaded
    once.
    Raises TinyldmError for what is none of these, and for a failed download.
    """
    if weights is None:
        return _bundled()
    path = Path(weights).expanduser()
    if path.is_dir() or path.is_file():
        return path
    if path.suffix in (".safetensors", ".ckpt"):
        raise TinyldmError(f"expected a file of weights, but there is no file {path}")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(weights)):
        return _download(str(weights))
    raise TinyldmError(f"expected weights to be a folder, a file or a hub name (owner/name), but "
                       f"there is no folder {weights}")


def _bundled():
    package = Path(__file__).parents[1]
    for root in (package, package.parent):              # an installed wheel, the repository
        if (root / "weights" / "shapes" / "model_index.json").is_file():
            return root / "weights" / "shapes"
    raise TinyldmError(f"the bundled model is missing from {package.parent}: install tinyldm "
                       f"again, or name a folder of weights")


def _download(name):
    """The local copy of the hub's `name`: only the files that are read, weights in one form."""
    wanted = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
              "text_encoder": "model", "text_encoder_2": "model"}
    for variant in VARIANTS:
        files = [f"{part}/{stem}{variant}" for part, stem in wanted.items()]
        folder = _snapshot(name, SMALL_FILES + files)
        wanted = {part: stem for part, stem in wanted.items()
                  if not (folder / part / f"{stem}{variant}").is_file()
                  and (part in COMPONENTS or (folder / part).is_dir())}
        if not wanted:
            break
    return folder


def _snapshot(name, files):
    """The folder with the local copy of some files of the hub's `name`."""
    import huggingface_hub  # here: it takes long to import and is seldom needed

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except Exception as error:
        # The hub's errors and its network library's share no base, and run over many lines.
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise TinyldmError(f"{name} is no folder here and could not be downloaded from the "
                           f"Hugging Face hub ({reason}): check the name, the network, and "
                           f"for gated models `hf auth login`") from None
