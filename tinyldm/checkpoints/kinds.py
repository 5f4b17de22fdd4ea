"""What a file of weights is, told by its names and shapes, and the configs of whole models.

A single file has the weights and no config. What the published folders' config.json files say of
the same models stands here. Source: stable-diffusion-v1-5, stable-diffusion-2-1 and
stable-diffusion-2-1-base on the Hugging Face hub.
"""
from typing import NamedTuple

import numpy as np

from ..errors import TinyldmError

UNET = "model.diffusion_model."
FIRST_CONVOLUTION = f"{UNET}input_blocks.0.0.weight"
# Its second axis is the width of the context. SDXL has no attention at its first level.
FIRST_KEYS = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
LAST_NORM = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
V_DEVIATION = 0.09          # of the last norm's bias: above it, the model predicts v

SD1_UNET = {
    "in_channels": 4, "out_channels": 4, "sample_size": 64, "act_fn": "silu",
    "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "attention_head_dim": 8, "cross_attention_dim": 768,
    "norm_num_groups": 32, "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0,
}
SD1_VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 512, "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "scaling_factor": 0.18215,
}
SD1_TEXT = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}
SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "clip_sample": False, "trained_betas": None,
}


class Kind(NamedTuple):
    """A model's name, its configs, and the token that its prompts are padded with."""

    name: str
    unet: dict
    vae: dict
    text_encoder: dict
    scheduler: dict
    padding: str


SD1 = Kind("Stable Diffusion 1", SD1_UNET, SD1_VAE, SD1_TEXT,
           SCHEDULER | {"_class_name": "PNDMScheduler"}, "<|endoftext|>")
# 768 pixels, v prediction. Of OpenCLIP's 24 layers the last is not used.
SD2 = Kind("Stable Diffusion 2",
           SD1_UNET | {"sample_size": 96, "attention_head_dim": [5, 10, 20, 20],
                       "cross_attention_dim": 1024, "use_linear_projection": True},
           SD1_VAE | {"sample_size": 768},
           SD1_TEXT | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
                       "num_attention_heads": 16, "hidden_act": "gelu"},
           SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, "!")
SD2_BASE = SD2._replace(                                # 512 pixels
    name="Stable Diffusion 2 base", unet=SD2.unet | {"sample_size": 64},
    scheduler=SCHEDULER | {"_class_name": "PNDMScheduler", "prediction_type": "epsilon"})
KNOWN = "Stable Diffusion 1 and 2 in the original layout (model.diffusion_model.*)"


def recognise(stored, path):
    """The Kind of a single file with these {name: StoredTensor}.

    Raises TinyldmError for another model, named where it is known, else with what was found.
    """
    layout, what = layout_of(stored)
    if what not in (SINGLE_FILE, None):
        raise TinyldmError(f"{path} holds another kind of weights, {what} in the {layout} layout: "
                           f"as a single file only {KNOWN} are supported")
    first, keys = stored.get(FIRST_CONVOLUTION), stored.get(FIRST_KEYS)
    if first is None or keys is None or len(first.shape) != 4 or len(keys.shape) != 2:
        raise _unknown(stored, path)
    channels, width = first.shape[1], keys.shape[1]
    kinds = {kind.unet["cross_attention_dim"]: kind for kind in (SD1, SD2)}
    if width not in kinds:
        raise TinyldmError(f"{path} holds a UNet for a context of width {width}, known are "
                           f"{' and '.join(f'{w} ({kind.name})' for w, kind in kinds.items())}")
    kind = kinds[width]
    if channels != kind.unet["in_channels"]:
        raise TinyldmError(f"{path} holds a {kind.name} of {channels} input channels"
                           f"{f' (made {MADE_FOR[channels]})' if channels in MADE_FOR else ''}: "
                           f"this is not supported, only {kind.unet['in_channels']}")
    return SD2_BASE if kind is SD2 and not _predicts_v(stored) else kind


def _predicts_v(stored):
    """Whether a Stable Diffusion 2 was trained to predict v, which nothing in the file states.

    Told by the deviation of one bias, as ComfyUI does, whose authors are not sure of it either.
    Source: ComfyUI, comfy/supported_models.py, SD20.
    """
    return LAST_NORM in stored and stored[LAST_NORM].read(np.float32).std() > V_DEVIATION


def _unknown(stored, path):
    found = [f"{name} {list(tensor.shape)}" for name, tensor in list(stored.items())[:4]]
    kind = ", ".join(filter(None, ["an unknown kind of model", family(stored)]))
    return TinyldmError(f"{path} holds {kind}: found {len(stored)} tensors "
                        f"({', '.join(found)} ...), known are {KNOWN}")


# ---- any file of weights --------------------------------------------------------------------

SINGLE_FILE = "single file"                             # all the models of a pipeline
# What some key contains -> the layout, and what the file holds. The first line that fits decides.
LAYOUTS = (
    ("lora_unet_", "kohya", "LoRA"),
    ("lora_te", "kohya", "LoRA"),
    (".lora_A.", "peft", "LoRA"),
    (".lora.down.", "diffusers", "LoRA"),
    ("joint_blocks.", "original", "Stable Diffusion 3 (not supported)"),
    ("double_blocks.", "original", "Flux (not supported)"),
    ("single_blocks.", "original", "Flux (not supported)"),
    ("single_transformer_blocks.", "diffusers", "Flux (not supported)"),
    (".attn.add_k_proj.", "diffusers", "Stable Diffusion 3 (not supported)"),
    ("controlnet_", "diffusers", "ControlNet (not supported)"),
    ("model.diffusion_model.", "original", SINGLE_FILE),
    ("first_stage_model.", "original", "VAE"),
    ("cond_stage_model.", "original", "text encoder"),
    ("conditioner.embedders.", "original", "text encoder"),
    ("input_blocks.", "original", "UNet"),
    ("encoder.down.", "original", "VAE"),
    ("encoder.down_blocks.", "diffusers", "VAE"),
    ("down_blocks.", "diffusers", "UNet"),
    ("vision_model.", "transformers", "image encoder"),
    ("encoder.layers.", "transformers", "text encoder"),
    ("emb_params", "web interface", "textual inversion"),
)
# The width of the context that a UNet attends to, and the channels it takes.
FAMILIES = {768: SD1.name, 1024: SD2.name, 2048: "Stable Diffusion XL",
            1280: "Stable Diffusion XL's refiner"}
MADE_FOR = {8: "for editing", 9: "for inpainting"}


def layout_of(names):
    """What the keys of a file say of it -> (layout, kind): see LAYOUTS; both None if nothing."""
    for mark, layout, kind in LAYOUTS:
        if any(mark in name for name in names):
            return layout, kind
    return None, None


def family(tensors):
    """Which Stable Diffusion a UNet in either layout is of, by its shapes; "" without a UNet."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    widths = [shape[-1] for name, shape in shapes.items()
              if name.endswith("attn2.to_k.weight") and shape]
    if not widths:
        return ""
    channels = [shape[1] for name, shape in shapes.items() if len(shape) == 4
                and (name == "conv_in.weight" or name.endswith("input_blocks.0.0.weight"))]
    return " ".join(filter(None, [
        FAMILIES.get(widths[0], f"with a context of width {widths[0]}"),
        MADE_FOR.get(next(iter(channels), None)),
        "guided as LCM" if "time_embedding.cond_proj.weight" in shapes else None]))
