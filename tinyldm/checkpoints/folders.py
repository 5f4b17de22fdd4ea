"""A whole pipeline's folder in the public diffusers layout: finding it, and reading its parts.

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/

Called by pipeline.py; the three models come from components.py.
"""
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import TinyldmError
from ..files import read_json
from ..models.clip import CLIPTextModel
from ..models.unet import UNet2DConditionModel
from ..models.vae import AutoencoderKL
from .components import find_weights, load_model, read_config

PIPELINE = "StableDiffusionPipeline"
COMPONENTS = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
# What is downloaded of a hub folder: each component's weights once, in the first form it has.
VARIANTS = (".safetensors", ".fp16.safetensors")
SMALL_FILES = ["model_index.json", "scheduler/*.json", "tokenizer/*.json", "tokenizer/*.txt",
               "unet/*.json", "vae/*.json", "text_encoder/*.json"]


class PipelineParts(NamedTuple):
    """What load_pipeline_parts reads."""

    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: dict                                     # of scheduler_config.json
    tokenizer: Path                                     # the folder with its files


def load_pipeline_parts(folder, dtype=np.float32, low_memory=False):
    """Read a pipeline folder's models (options: see load_weights) and the scheduler's config.

    Raises TinyldmError for another pipeline than StableDiffusionPipeline, and for whatever is
    missing or wrong in a component; what costs nothing to check is checked before any weight.
    """
    folder = Path(folder)
    index = folder / "model_index.json"
    name = read_json(index).get("_class_name")
    if name != PIPELINE:
        raise TinyldmError(f"{index} names the pipeline {name}, supported is {PIPELINE}")
    for part in (*COMPONENTS, "tokenizer", "scheduler"):
        if not (folder / part).is_dir():
            raise TinyldmError(f"expected a folder {folder / part}, found none: "
                               f"is the download complete?")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    for part, expected in COMPONENTS.items():
        model, _ = read_config(folder / part)
        if model is not expected:
            raise TinyldmError(f"{folder / part / 'config.json'} must name a {expected.__name__}, "
                               f"not a {model.__name__}")
        find_weights(folder / part)
    models = {part: load_model(folder / part, dtype, low_memory) for part in COMPONENTS}
    return PipelineParts(**models, scheduler=scheduler, tokenizer=folder / "tokenizer")


def resolve(weights=None):
    """The pipeline folder that a user's word means.

    weights: None for the bundled model; a folder; or a hub name `owner/name`, downloaded once.
    Raises TinyldmError for a single file, for what is neither, and for a failed download.
    """
    if weights is None:
        return _bundled()
    path = Path(weights).expanduser()
    if path.is_dir():
        return path
    if path.is_file() or path.suffix in (".safetensors", ".ckpt"):
        raise TinyldmError(f"expected a folder in the diffusers layout, {path} is a single file: "
                           f"these are not supported yet")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(weights)):
        return _download(str(weights))
    raise TinyldmError(f"expected weights to be a folder or a hub name (owner/name), but there is "
                       f"no folder {weights}")


def _bundled():
    package = Path(__file__).parents[1]
    for root in (package, package.parent):              # an installed wheel, the repository
        if (root / "weights" / "shapes" / "model_index.json").is_file():
            return root / "weights" / "shapes"
    raise TinyldmError(f"the bundled model is missing from {package.parent}: install tinyldm "
                       f"again, or name a folder of weights")


def _download(name):
    """The local copy of the hub's `name`: only the files that are read, weights in one form."""
    import huggingface_hub  # here: it takes long to import and is seldom needed

    wanted = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
              "text_encoder": "model"}
    for variant in VARIANTS:
        files = [f"{part}/{stem}{variant}" for part, stem in wanted.items()]
        try:
            folder = Path(huggingface_hub.snapshot_download(
                name, allow_patterns=SMALL_FILES + files))
        except Exception as error:
            # The hub's errors and its network library's share no base, and run over many lines.
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            raise TinyldmError(f"{name} is no folder here and could not be downloaded from the "
                               f"Hugging Face hub ({reason}): check the name, the network, and "
                               f"for gated models `hf auth login`") from None
        wanted = {part: stem for part, stem in wanted.items()
                  if not (folder / part / f"{stem}{variant}").is_file()}
        if not wanted:
            break
    return folder
