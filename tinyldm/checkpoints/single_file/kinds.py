"""What a file of weights is, told by its names and shapes, and the configs of whole models.

A single file has the weights and no config. What the published folders' config.json files say of
the same models stands here. Source: on the Hugging Face hub stable-diffusion-v1-5,
stable-diffusion-2-1, stable-diffusion-2-1-base, stable-diffusion-xl-base-1.0, and those made for
inpainting: stable-diffusion-inpainting, stable-diffusion-2-inpainting,
stable-diffusion-xl-1.0-inpainting-0.1.
"""
from typing import NamedTuple

import numpy as np

from ...errors import TinyldmError

UNET = "model.diffusion_model."
FIRST_CONVOLUTION = f"{UNET}input_blocks.0.0.weight"
# Their second axis is the width of the context. SDXL has no attention at its first level.
FIRST_KEYS = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
FIRST_KEYS_XL = f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
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
    text_encoder_2: dict | None = None                  # and of SDXL's second
    padding_2: str | None = None


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
SDXL = Kind("Stable Diffusion XL", SD2.unet | {
                "sample_size": 128, "block_out_channels": [320, 640, 1280],
                "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
                "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
                "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10],
                "cross_attention_dim": 2048, "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
            SD1_VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
            SD1_TEXT, SCHEDULER | {"_class_name": "EulerDiscreteScheduler",
                                   "timestep_spacing": "leading", "prediction_type": "epsilon"},
            "<|endoftext|>",
            SD1_TEXT | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                        "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280},
            "!")
# Noisy latents, a mask, and the latents of the picture with a hole.
INPAINTING = {"in_channels": 9}
SD1_INPAINTING = SD1._replace(
    name="Stable Diffusion 1 for inpainting", unet=SD1_UNET | INPAINTING,
    vae=SD1_VAE | {"sample_size": 256}, scheduler=SCHEDULER | {"_class_name": "DDIMScheduler"})
SD2_INPAINTING = SD2_BASE._replace(
    name="Stable Diffusion 2 for inpainting", unet=SD2_BASE.unet | INPAINTING, vae=SD1_VAE)
SDXL_INPAINTING = SDXL._replace(
    name="Stable Diffusion XL for inpainting", unet=SDXL.unet | INPAINTING)
KNOWN = "Stable Diffusion 1, 2 and XL in the original layout (model.diffusion_model.*)"


def recognise(stored, path):
    """The Kind of a single file with these {name: StoredTensor}.

    Raises TinyldmError for another model, named where it is known, else with what was found.
    """
    layout, what = layout_of(stored)
    if what not in (SINGLE_FILE, None):
        raise TinyldmError(f"{path} holds another kind of weights, {what} in the {layout} layout: "
                           f"as a single file only {KNOWN} are supported{HINTS.get(what, '')}")
    first, keys = stored.get(FIRST_CONVOLUTION), stored.get(FIRST_KEYS, stored.get(FIRST_KEYS_XL))
    if first is None or keys is None or len(first.shape) != 4 or len(keys.shape) != 2:
        raise _unknown(stored, path)
    kinds = {kind.unet["cross_attention_dim"]: (kind, inpainting) for kind, inpainting in
             ((SD1, SD1_INPAINTING), (SD2, SD2_INPAINTING), (SDXL, SDXL_INPAINTING))}
    width = keys.shape[1]
    if width not in kinds:
        raise TinyldmError(f"{path} holds the UNet of {context_width(width)}, supported are "
                           f"{', '.join(f'{w} ({kind.name})' for w, (kind, _) in kinds.items())}")
    channels = {kind.unet["in_channels"]: kind for kind in kinds[width]}
    kind = channels.get(first.shape[1])
    if kind is None:
        made = f" (made {MADE_FOR[first.shape[1]]})" if first.shape[1] in MADE_FOR else ""
        raise TinyldmError(f"{path} holds a {kinds[width][0].name} of {first.shape[1]} input "
                           f"channels{made}: this is not supported, only "
                           f"{' and '.join(map(str, channels))}")
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
    kind = ", ".join(filter(None, ["an unknown kind of model", family(stored)]))
    return TinyldmError(f"{path} holds {kind}: found {len(stored)} tensors "
                        f"({', '.join(found)} ...), known are {KNOWN}")


# ---- any file of weights --------------------------------------------------------------------

SINGLE_FILE = "single file"                             # all the models of a pipeline
HINTS = {"LoRA": "; --lora adds it to one", "textual inversion": "; --embedding adds it to one"}
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
FAMILIES = {768: SD1.name, 1024: SD2.name, 2048: SDXL.name,
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
