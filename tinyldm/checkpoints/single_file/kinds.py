"""Which model a file of weights holds, found by names and shapes; and the models' configs.

A single file has weights but no configs. The configs here are those of the same models' published
folders. Source: on the Hugging Face hub stable-diffusion-v1-5, stable-diffusion-2-1,
stable-diffusion-2-1-base, stable-diffusion-xl-base-1.0, stable-diffusion-x4-upscaler, and for
inpainting stable-diffusion-inpainting, stable-diffusion-2-inpainting,
stable-diffusion-xl-1.0-inpainting-0.1.
"""
from typing import NamedTuple

import numpy as np

from ...errors import TinyldmError

LAST_NORM = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
LARGEST_STD = 0.09          # of this bias, in a model that predicts noise

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
    """A model's name, its configs, and the padding token of its tokenizer."""

    name: str
    unet: dict
    vae: dict
    text_encoder: dict
    scheduler: dict
    padding: str
    text_encoder_2: dict | None = None                  # SDXL's second text encoder
    padding_2: str | None = None
    pipeline: str = "StableDiffusionPipeline"           # the public class, a key of PIPELINES
    low_res_scheduler: dict | None = None               # the upscaler's


SD1 = Kind("Stable Diffusion 1", SD1_UNET, SD1_VAE, SD1_TEXT,
           SCHEDULER | {"_class_name": "PNDMScheduler"}, "<|endoftext|>")
# 768 pixels, v prediction. The last of OpenCLIP's 24 layers is not used.
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
# 4 channels of noisy latents, 1 of the mask, 4 of the masked picture's latents.
INPAINTING = {"in_channels": 9}
SD1_INPAINTING = SD1._replace(
    name="Stable Diffusion 1 for inpainting", unet=SD1_UNET | INPAINTING,
    vae=SD1_VAE | {"sample_size": 256}, scheduler=SCHEDULER | {"_class_name": "DDIMScheduler"})
SD2_INPAINTING = SD2_BASE._replace(
    name="Stable Diffusion 2 for inpainting", unet=SD2_BASE.unet | INPAINTING, vae=SD1_VAE)
SDXL_INPAINTING = SDXL._replace(
    name="Stable Diffusion XL for inpainting", unet=SDXL.unet | INPAINTING)
# x4-upscaler-ema.ckpt, Stability-AI/stablediffusion's x4-upscaling.yaml.
BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
UPSCALER = SD2._replace(
    name="the x4 upscaler", unet=SD2.unet | {
        "in_channels": 7, "sample_size": 128, "block_out_channels": [256, 512, 512, 1024],
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"], "attention_head_dim": 8,
        "only_cross_attention": [True, True, True, False], "num_class_embeds": 1000},
    vae=SD1_VAE | {
        "sample_size": 256, "block_out_channels": [128, 256, 512], "scaling_factor": 0.08333,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3},
    scheduler=SD2.scheduler | BETAS, pipeline="StableDiffusionUpscalePipeline",
    low_res_scheduler=BETAS | {"_class_name": "DDPMScheduler", "clip_sample": True})
KNOWN = ("Stable Diffusion 1, 2 and XL and the x4 upscaler in the original layout "
         "(model.diffusion_model.*)")


def recognise(stored, path, prediction_type=None):
    """The Kind of a single file, from its {name: StoredTensor}.

    prediction_type: if known; it tells a Stable Diffusion 2 from its base.
    Raises TinyldmError for any other model: with its name if known, else with what was found.
    """
    layout, content = layout_of(stored)
    if content not in (SINGLE_FILE, None):
        raise TinyldmError(f"{path} holds another kind of weights, {content} in the {layout} "
                           f"layout: supported single files are {KNOWN}{HINTS.get(content, '')}")
    kind = None if content is None else kind_of_unet(stored, path, prediction_type)
    if kind is None:
        raise _unknown(stored, path)
    return kind


def _unknown(stored, path):
    found = [f"{name} {list(tensor.shape)}" for name, tensor in list(stored.items())[:4]]
    kind = ", ".join(filter(None, ["an unknown kind of model", family(stored)]))
    return TinyldmError(f"{path} holds {kind}: found {len(stored)} tensors "
                        f"({', '.join(found)} ...), known are {KNOWN}")


def kind_of_unet(stored, path, prediction_type=None):
    """The Kind that a UNet in either layout belongs to; None if no tensor shows it.

    Raises TinyldmError for the UNet of a model that is not supported.
    """
    width, channels = unet_shape(stored)
    if width is None or channels is None:
        return None
    kinds = {kind.unet["cross_attention_dim"]: (kind, *others) for kind, *others in (
        (SD1, SD1_INPAINTING), (SD2, SD2_INPAINTING, UPSCALER), (SDXL, SDXL_INPAINTING))}
    if width not in kinds:
        known = [f"{size} ({kind.name})" for size, (kind, *_) in kinds.items()]
        raise TinyldmError(f"{path} holds the UNet of {model_of_width('context', width)}, "
                           f"supported are {', '.join(known)}")
    for kind in kinds[width]:
        if kind.unet["in_channels"] == channels:
            is_v = prediction_type == "v_prediction" if prediction_type else _predicts_v(stored)
            return SD2_BASE if kind is SD2 and not is_v else kind
    purpose = f" (made {MADE_FOR[channels]})" if channels in MADE_FOR else ""
    raise TinyldmError(f"{path} holds a {kinds[width][0].name} of {channels} input channels"
                       f"{purpose}: this is not supported, only 4 and 9 (for inpainting), and 7 "
                       f"for {UPSCALER.name}")


def model_of_width(what, width):
    """The words of an error for the model whose context or text encoder has a width."""
    return f"{FAMILIES.get(width, 'a model')} ({what} of width {width})"


def _predicts_v(stored):
    """Whether a Stable Diffusion 2 predicts v. Nothing in the file says so.

    ComfyUI, too, decides by the standard deviation of this bias; its authors are not sure why that
    works. Source: ComfyUI, comfy/supported_models.py, SD20.
    """
    own = LAST_NORM.removeprefix("model.diffusion_model.")
    norm = next((tensor for name, tensor in stored.items() if name.endswith(own)), None)
    return norm is not None and norm.read(np.float32).std() > LARGEST_STD


# ---- any file of weights --------------------------------------------------------------------

SINGLE_FILE = "single file"                             # all the models of a pipeline
HINTS = {"LoRA": "; --lora adds it to one", "textual inversion": "; --embedding adds it to one",
         "VAE": "; --vae (from Python vae=) puts it into one",
         "UNet": "; load_model reads it", "text encoder": "; load_model reads it"}
# A part of some key -> the layout, and what the file holds. The first line that matches decides.
LAYOUTS = (
    (".dora_scale", "LyCORIS", "DoRA (not supported)"),
    (".lora_magnitude_vector", "peft", "DoRA (not supported)"),
    (".oft_", "LyCORIS or peft", "OFT or BOFT (not supported)"),
    (".hada_w1", "LyCORIS, LoHa", "LoRA"),
    (".lokr_w", "LyCORIS, LoKr", "LoRA"),
    ("lora_unet_", "kohya", "LoRA"),
    ("lora_te", "kohya", "LoRA"),
    (".lora_A.", "peft", "LoRA"),
    (".lora.down.", "diffusers", "LoRA"),
    ("_lora.down.", "diffusers, oldest", "LoRA"),
    (".lora_linear_layer.", "diffusers", "LoRA"),
    ("y_embedder.embedding_table.", "original", "DiT"),
    ("temb.dense.", "original", "DDPM"),
    (".class_embedder.embedding_table.", "diffusers", "DiT"),
    ("joint_blocks.", "original", "Stable Diffusion 3 (not supported)"),
    ("double_blocks.", "original", "Flux (not supported)"),
    ("single_blocks.", "original", "Flux (not supported)"),
    ("single_transformer_blocks.", "diffusers", "Flux (not supported)"),
    (".attn.add_k_proj.", "diffusers", "Stable Diffusion 3 (not supported)"),
    ("controlnet_", "diffusers", "ControlNet (not supported)"),
    ("control_model.", "original", "ControlNet (not supported)"),
    ("time_embed.cond_proj.", "original",
     "Latent Consistency Model (supported only as a folder)"),
    ("noise_augmentor.", "original", "Stable unCLIP (supported only as a folder)"),
    ("edm_mean", "original", "Playground 2.5, of other noise levels (not supported)"),
    ("edm_vpred.", "original", "CosXL, of other noise levels (not supported)"),
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
    ("transformer.resblocks.", "original", "text encoder"),
    ("emb_params", "web interface", "textual inversion"),
    ("string_to_param", "web interface", "textual inversion"),
    ("clip_g", "web interface", "textual inversion"),
)
# By the width of the UNet's context, and by the number of its input channels.
FAMILIES = {768: SD1.name, 1024: SD2.name, 2048: SDXL.name,
            1280: "Stable Diffusion XL's refiner"}
MADE_FOR = {7: "for enlarging", 8: "for editing", 9: "for inpainting"}


def layout_of(names):
    """The keys of a file -> (layout, what it holds), see LAYOUTS; (None, None) if unknown."""
    for mark, layout, content in LAYOUTS:
        if any(mark in name for name in names):
            return layout, content
    return None, None


def family(tensors):
    """The Stable Diffusion to which a UNet in either layout belongs; "" if there is no UNet."""
    width, channels = unet_shape(tensors)
    if width is None:
        return ""
    return " ".join(filter(None, [
        FAMILIES.get(width, f"with a context of width {width}"), MADE_FOR.get(channels),
        "guided as LCM" if "time_embedding.cond_proj.weight" in tensors else None]))


def unet_shape(tensors):
    """The context's width and the number of input channels of a UNet in either layout.

    Each is None if no tensor shows it.
    """
    widths = (tensor.shape[-1] for name, tensor in tensors.items()
              if name.endswith("attn2.to_k.weight") and tensor.shape)
    channels = (tensor.shape[1] for name, tensor in tensors.items() if len(tensor.shape) == 4
                and (name == "conv_in.weight" or name.endswith("input_blocks.0.0.weight")))
    return next(widths, None), next(channels, None)
