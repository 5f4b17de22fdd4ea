"""tinyldm.load: weights of any kind -> the pipeline that draws with them."""
import importlib
import os
from typing import Any, overload

import numpy as np

from ..backend import array_library, keep_freed_memory
from .stable_diffusion import StableDiffusion

Place = str | os.PathLike[str]      # what weights are named by
# The public pipeline classes whose parts checkpoints/folders.py reads -> the class here.
HOMES = {
    "StableDiffusionPipeline": "stable_diffusion.StableDiffusion",
    "StableDiffusionImg2ImgPipeline": "stable_diffusion.StableDiffusion",
    "StableDiffusionInpaintPipeline": "stable_diffusion.StableDiffusion",
    "LatentConsistencyModelPipeline": "stable_diffusion.StableDiffusion",
    "StableDiffusionXLPipeline": "stable_diffusion.StableDiffusion",
    "StableDiffusionXLImg2ImgPipeline": "stable_diffusion.StableDiffusion",
    "StableDiffusionXLInpaintPipeline": "stable_diffusion.StableDiffusion",
    "DDPMPipeline": "ddpm.DDPM",
    "DDIMPipeline": "ddpm.DDPM",
    "PNDMPipeline": "ddpm.DDPM",
    "GuidedDDPMPipeline": "guided_ddpm.GuidedDDPM",
    "CascadePipeline": "cascade.Cascade",
    "StableDiffusionUpscalePipeline": "upscale.Upscaler",
    "StableUnCLIPPipeline": "unclip.UnCLIP",
    "StableUnCLIPImg2ImgPipeline": "unclip.UnCLIP",
    "DiTPipeline": "dit.DiT",
}


@overload
def load(weights: None = None, device: str = "cpu", dtype: Any = None, low_memory: bool = False,
         ema: bool = False, *, vae: Place | None = None, prediction_type: str | None = None
         ) -> StableDiffusion: ...


@overload
def load(weights: Place, device: str = "cpu", dtype: Any = None, low_memory: bool = False,
         ema: bool = False, *, vae: Place | None = None, prediction_type: str | None = None
         ) -> Any: ...


def load(weights: Place | None = None, device: str = "cpu", dtype: Any = None,
         low_memory: bool = False, ema: bool = False, *, vae: Place | None = None,
         prediction_type: str | None = None) -> Any:
    """Read a pipeline's weights -> the pipeline of its kind, such as StableDiffusion or DDPM.

    weights: None for the bundled model; a folder in the diffusers layout; a single file in the
        original layout (.safetensors, .ckpt); or a name on the Hugging Face hub, which is
        downloaded once: owner/name, or owner/name/file for a single file there. A single file's
        tokenizer is downloaded too, unless TINYLDM_TOKENIZER names a folder with one.
    device: "cpu" or "cuda".
    dtype: of weights and computation. float16 uses the weights' fp16 variant where there is one.
        Default: float16 on the GPU, float32 on the CPU; there, large weights that a file has in
        float16 stay so and are widened when used: half the memory, the same numbers. For training
        give float32.
    low_memory: use less memory and more time. Pictures larger than those the VAE was trained on
        are decoded in tiles, which changes them a little (see AutoencoderKL.decode_tiled). On the
        CPU freed memory goes back to the system, and weights whose dtype is the file's stay in its
        memory map.
    ema: if a single file has two sets of the UNet's weights, use the averaged one.
    vae: another VAE than the weights' own, or the one that a single file lacks: a file in either
        layout, a folder, or a name on the hub, as for weights. Its scaling factor is that of its
        own config, or else of the model that it is used in.
    prediction_type: "epsilon", "v_prediction" or "sample", what the UNet predicts, in a cascade
        both UNets, where the weights do not say it or are wrong.
    Raises TinyldmError for anything missing, damaged or not supported, and for a missing GPU.
    """
    # Imported here, so that `import tinyldm` need not wait for the libraries behind them.
    from ..checkpoints import (
        check_prediction_type,
        float_type,
        load_pipeline_parts,
        resolve,
        resolve_vae,
    )

    check_prediction_type(prediction_type)
    if not low_memory:
        keep_freed_memory()
    xp = array_library(device)
    dtype = float_type(np.float16 if dtype is None and xp is not np else dtype)
    parts = load_pipeline_parts(resolve(weights, dtype), dtype, low_memory and xp is np, ema,
                                None if vae is None else resolve_vae(vae, dtype),
                                prediction_type)
    pipe = pipeline_class(parts.kind).from_parts(parts, low_memory)
    pipe.to_device(device)
    return pipe


def pipeline_class(kind):
    """A public pipeline class's name, a key of HOMES -> the class here."""
    module, name = HOMES[kind].split(".")
    return getattr(importlib.import_module(f".{module}", __package__), name)
