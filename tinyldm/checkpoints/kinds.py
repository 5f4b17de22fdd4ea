"""Which model a single file holds, told by its names and shapes, and that model's configs.

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
# The width of the context that a UNet looks at.
FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL",
            1280: "Stable Diffusion XL's refiner"}
KNOWN = "Stable Diffusion 1 and 2 in the original layout (model.diffusion_model.*)"

# What a part of a name gives away, the most telling first.
OTHERS = {
    "joint_blocks.": "a Stable Diffusion 3 model", "double_blocks.": "a Flux model",
    "single_blocks.": "a Flux model", "single_transformer_blocks.": "a Flux model",
    "conditioner.embedders.1.": "a Stable Diffusion XL model",
    "label_emb.": "a UNet that is told more than a prompt, such as the refiner of Stable Diffusion "
                  "XL",
    "lora_": "a LoRA, which changes a model (--lora adds it)",
    "down_blocks.0.": "one part of a model in the diffusers layout, whose whole folder is read",
}


def recognise(stored, path):
    """The Kind of a single file with these {name: StoredTensor}.

    Raises TinyldmError for another model, named where it is known, else with what was found.
    """
    for word, other in OTHERS.items():
        if any(word in name for name in stored):
            raise TinyldmError(f"{path} holds {other}: as a single file this is not supported, "
                               f"only {KNOWN}")
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
        word = {8: " (made for editing pictures)", 9: " (made for inpainting)"}.get(channels, "")
        raise TinyldmError(f"{path} holds a {kind.name} of {channels} input channels{word}: "
                           f"this is not supported, only {kind.unet['in_channels']}")
    return SD2_BASE if kind is SD2 and not _predicts_v(stored) else kind


def context_width(width):
    """What an error says of a model whose context is that wide."""
    return f"{FAMILIES.get(width, 'a model')} (context of width {width})"


def _predicts_v(stored):
    """Whether a Stable Diffusion 2 was trained to predict v, which nothing in the file states.

    Told by the deviation of one bias, as ComfyUI does, whose authors are not sure of it either.
    Source: ComfyUI, comfy/supported_models.py, SD20.
    """
    return LAST_NORM in stored and stored[LAST_NORM].read(np.float32).std() > V_DEVIATION


def _unknown(stored, path):
    found = [f"{name} {list(tensor.shape)}" for name, tensor in list(stored.items())[:4]]
    return TinyldmError(f"{path} holds an unknown kind of model: found {len(stored)} tensors "
                        f"({', '.join(found)} ...), known are {KNOWN}")
