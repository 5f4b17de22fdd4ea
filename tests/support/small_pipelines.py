"""Whole random pipelines, small, in folders as diffusers writes them: the fixtures of most tests.

The configs are data and the weights NumPy's, so neither side makes the files, and no torch is
needed. test_stable_diffusion.py shows that what diffusers itself writes of them is read as well.
"""
import re

import numpy as np
import safetensors.numpy

from tests.support.models import random_weights
from tests.support.words import write_settings, write_toy_vocabulary
from tinyldm.files import read_json, write_json
from tinyldm.models import (
    AutoencoderKL,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    DiTTransformer2DModel,
    UNet2DConditionModel,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
FILES = {UNet2DConditionModel: "diffusion_pytorch_model", AutoencoderKL: "diffusion_pytorch_model",
         DiTTransformer2DModel: "diffusion_pytorch_model", CLIPTextModel: "model",
         CLIPTextModelWithProjection: "model"}


# ---- parts ------------------------------------------------------------------------------------

def make_unet(widths, context, attention, **config):
    """-> class, config, weights. attention: one letter a level, from the finest: y or n."""
    down = [CROSS[0] if letter == "y" else "DownBlock2D" for letter in attention]
    up = [CROSS[1] if letter == "y" else "UpBlock2D" for letter in reversed(attention)]
    config = {"_class_name": "UNet2DConditionModel", "layers_per_block": 1, "norm_num_groups": 8,
              "norm_eps": 1e-5, "in_channels": 4, "out_channels": 4,
              "block_out_channels": widths, "cross_attention_dim": context,
              "down_block_types": down, "up_block_types": up,
              **config}
    return UNet2DConditionModel, config, random_weights(UNet2DConditionModel(config), 1)


def make_vae(widths, **config):
    config = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3,
              "latent_channels": 4, "norm_num_groups": 4, "layers_per_block": 1,
              "block_out_channels": widths,
              "down_block_types": ["DownEncoderBlock2D"] * len(widths),
              "up_block_types": ["UpDecoderBlock2D"] * len(widths), **config}
    tensors = random_weights(AutoencoderKL(config), 2)
    tensors["decoder.conv_out.weight"] *= np.float32(0.7)       # greys, not black and white
    return AutoencoderKL, config, tensors


def make_text_encoder(width, vocab_size, model=CLIPTextModel, **config):
    config = {"architectures": [model.__name__], "model_type": "clip_text_model",
              "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
              "vocab_size": vocab_size, "num_attention_heads": 4, "max_position_embeddings": 77,
              "hidden_act": "quick_gelu", "eos_token_id": 2, **config}
    return model, config, random_weights(model(config), 3)


def write_component(folder, part, half=False):
    model, config, tensors = part
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    if half:
        tensors = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    file = folder / f"{FILES[model]}{'.fp16' if half else ''}.safetensors"
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})


def write_words(folder, padding):
    """A tokenizer's published files -> the vocabulary's size."""
    folder.mkdir(parents=True)
    write_toy_vocabulary(folder)
    write_settings(folder, padding)
    return len(read_json(folder / "vocab.json"))


# ---- folders ----------------------------------------------------------------------------------

def save(folder, unet, vae, scheduler, width, padding="<|endoftext|>", half=False,
         pipeline="StableDiffusionPipeline", **text_config):
    """A pipeline's folder, with a text encoder as wide as the context. half: float16 weights."""
    words = write_words(folder / "tokenizer", padding)
    parts = {"unet": unet, "vae": vae,
             "text_encoder": make_text_encoder(width, words, **text_config)}
    return write(folder, parts, scheduler, half, _class_name=pipeline, safety_checker=[None, None],
                 feature_extractor=[None, None], requires_safety_checker=False)


def save_xl(folder, unet, vae, scheduler, widths, projection, half=False):
    """The same of Stable Diffusion XL, whose two text encoders have these widths."""
    words = [write_words(folder / name, padding)
             for name, padding in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!"))]
    end = read_json(folder / "tokenizer_2" / "vocab.json")["<|endoftext|>"]
    second = make_text_encoder(widths[1], words[1], CLIPTextModelWithProjection, hidden_act="gelu",
                               projection_dim=projection, eos_token_id=end)
    parts = {"unet": unet, "vae": vae, "text_encoder": make_text_encoder(widths[0], words[0]),
             "text_encoder_2": second}
    return write(folder, parts, scheduler, half, _class_name="StableDiffusionXLPipeline",
                 force_zeros_for_empty_prompt=True)


def write(folder, parts, scheduler, half, **index):
    for name, part in parts.items():
        write_component(folder / name, part, half)
    kind, config = scheduler
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": kind, **config})
    for name, (model, *_) in parts.items():
        index[name] = ["transformers" if "text" in name else "diffusers", model.__name__]
    for tokenizer in folder.glob("tokenizer*"):
        index[tokenizer.name] = ["transformers", "CLIPTokenizer"]
    index |= {"scheduler": ["diffusers", kind], "_diffusers_version": "0.36.0"}
    write_json(folder / "model_index.json", index)
    return folder


def with_old_vae_names(folder):
    """Rename the VAE's attention as files from before diffusers 0.17 have it."""
    file, = (folder / "vae").glob("*.safetensors")
    old = {}
    for name, tensor in safetensors.numpy.load_file(file).items():
        for new, word in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                          ("to_out.0", "proj_attn")]:
            name = re.sub(rf"(attentions\.0)\.{new}\.", rf"\1.{word}.", name)
        old[name] = tensor
    assert any("proj_attn" in name for name in old)
    safetensors.numpy.save_file(old, file, metadata={"format": "pt"})
    return folder


def change_json(path, **changes):
    write_json(path, read_json(path) | changes)


# ---- the configurations ---------------------------------------------------------------------

def scheduler(kind, **config):
    return f"{kind}Scheduler", SD | config


def sd1(folder):
    """Stable Diffusion 1: PNDM, one number of heads, convolutions around the transformers."""
    return save(folder, make_unet((16, 32, 32), 32, "yyn", attention_head_dim=4, sample_size=8),
                make_vae((8, 8, 16, 16), layers_per_block=1, sample_size=64),
                scheduler("PNDM", skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False), 32)


def sd2(folder):
    """Stable Diffusion 2: v prediction, DDIM, a list of heads, linear projections, "!" as padding.

    The scheduler's file is of the old kind that the public pipeline corrects when it loads.
    """
    save(folder, make_unet((16, 32), 24, "yy", attention_head_dim=(2, 4), layers_per_block=2,
                           use_linear_projection=True, sample_size=8),
         make_vae((8, 16, 16), layers_per_block=2, scaling_factor=0.7),
         scheduler("DDIM", prediction_type="v_prediction", set_alpha_to_one=False), 24,
         padding="!", hidden_act="gelu")
    change_json(folder / "scheduler" / "scheduler_config.json", steps_offset=0, clip_sample=True)
    return folder


def euler(folder):
    """Euler, old attention names in the VAE, a size that is not square."""
    return with_old_vae_names(save(
        folder, make_unet((16, 24), 16, "ny", attention_head_dim=3, sample_size=(6, 10)),
        make_vae((8, 8, 8, 16)),
        scheduler("EulerDiscrete", timestep_spacing="leading", steps_offset=1), 16))


def euler_ancestral(folder):
    """Euler ancestral, trailing, weights in float16, transformers at every level."""
    return save(folder, make_unet((16, 16), 32, "yy", attention_head_dim=2, sample_size=16),
                make_vae((8, 16)), scheduler("EulerAncestralDiscrete", timestep_spacing="trailing"),
                32, half=True)


def dpmpp(folder):
    """DPM-Solver++(2M) on Karras' sigmas, different numbers of layers a level."""
    return save(folder, make_unet((16, 24, 32), 20, "nyy", attention_head_dim=4, sample_size=8,
                                  layers_per_block=(1, 2, 1)),
                make_vae((8, 16, 16)), scheduler("DPMSolverMultistep", use_karras_sigmas=True), 20)


def ddpm(folder):
    """DDPM: fresh noise at every step."""
    return save(folder, make_unet((16, 32), 16, "yn", attention_head_dim=8, sample_size=8),
                make_vae((8, 16, 16)), scheduler("DDPM"), 16)


CONFIGURATIONS = [sd1, sd2, euler, euler_ancestral, dpmpp, ddpm]


def unet_xl(**config):
    """No attention at the first level, two transformers at the last, two encoders' context."""
    return make_unet((16, 24, 32), 16 + 24, "nyy", attention_head_dim=(2, 4, 4), layers_per_block=2,
                     transformer_layers_per_block=(1, 1, 2), use_linear_projection=True,
                     addition_embed_type="text_time", addition_time_embed_dim=8,
                     projection_class_embeddings_input_dim=20 + 6 * 8,
                     **{"sample_size": 8, **config})


def vae_xl():
    return make_vae((8, 16, 16), layers_per_block=2, scaling_factor=0.13025, force_upcast=True)


def sdxl(folder):
    """Stable Diffusion XL: Euler, leading, two text encoders, sizes."""
    return save_xl(folder, unet_xl(), vae_xl(), scheduler(
        "EulerDiscrete", timestep_spacing="leading", steps_offset=1), (16, 24), 20)


def sdxl_turbo(folder):
    """SDXL-Turbo: Euler ancestral, trailing."""
    return save_xl(folder, unet_xl(), vae_xl(), scheduler(
        "EulerAncestralDiscrete", timestep_spacing="trailing", steps_offset=1), (16, 24), 20)


def sd_turbo(folder):
    """SD-Turbo: Stable Diffusion 2 that predicts the noise; Euler, trailing."""
    return save(folder, make_unet((16, 32), 24, "yy", attention_head_dim=(2, 4), sample_size=8,
                                  use_linear_projection=True), make_vae((8, 16, 16)),
                scheduler("EulerDiscrete", timestep_spacing="trailing", steps_offset=1), 24,
                padding="!", hidden_act="gelu")


def lcm(folder):
    """A Latent Consistency Model, conditioned on the guidance; its scheduler clips."""
    return save(folder, make_unet((16, 32), 32, "yn", attention_head_dim=4, sample_size=8,
                                  time_cond_proj_dim=64), make_vae((8, 16, 16)),
                scheduler("LCM", clip_sample=True), 32,
                pipeline="LatentConsistencyModelPipeline")


def inpainting(folder):
    """Stable Diffusion 1 that paints into a picture: nine channels in."""
    return save(folder, make_unet((16, 32), 32, "yn", attention_head_dim=4, sample_size=8,
                                  in_channels=9), make_vae((8, 16, 16)),
                scheduler("DDIM", steps_offset=1, set_alpha_to_one=False, clip_sample=False), 32,
                pipeline="StableDiffusionInpaintPipeline")


NAMES = {"0": "tench, Tinca tinca", "1": "goldfish, Carassius auratus",
         "207": "golden retriever", "879": "umbrella", "134": "crane", "517": "crane"}


def dit(folder, half=False):
    """DiT: DDIM, a learned variance that it drops, names of classes. diffusers' null class is 1000.
    """
    config = {"_class_name": "DiTTransformer2DModel", "num_layers": 2, "num_attention_heads": 2,
              "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "patch_size": 2,
              "sample_size": 8, "num_embeds_ada_norm": 1000}
    transformer = DiTTransformer2DModel, config, random_weights(DiTTransformer2DModel(config), 4)
    return write(folder, {"transformer": transformer, "vae": make_vae((8, 16, 16))},
                 ("DDIMScheduler", {"beta_schedule": "linear", "clip_sample": False}), half,
                 _class_name="DiTPipeline", id2label=NAMES)


def toy(folder, half=False):
    """Like Stable Diffusion 1, with two levels."""
    return save(folder, make_unet((16, 32), 32, "yn", attention_head_dim=4, sample_size=8),
                make_vae((8, 16, 16), sample_size=32),
                scheduler("DDIM", steps_offset=1, clip_sample=False), 32, half=half)


def smallest(folder):
    """For the command line, which only needs what draws: 16x16 pixels."""
    return save(folder, make_unet((8, 8), 8, "yn", attention_head_dim=2, sample_size=4,
                                  norm_num_groups=4), make_vae((4, 8, 8)),
                scheduler("DDIM", steps_offset=1, clip_sample=False), 8)


def upscaler_unet(widths, width, attentions, **config):
    """Of all levels only the last one has attention of its own map."""
    crossed = [True] * (len(widths) - 1) + [False]
    return make_unet(widths, width, attentions, **{
        "attention_head_dim": 4, "sample_size": 8, "in_channels": 7, "num_class_embeds": 1000,
        "use_linear_projection": True, "only_cross_attention": crossed, **config})


def upscaler(folder, half=False, unet=None, vae=None, width=24):
    """The x4 upscaler: picture and latents side by side, levels of noise as classes, v, two
    schedulers. Its VAE has two halvings. unet, vae: others of its kind; width: of their context."""
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
    save(folder, unet or upscaler_unet((16, 16, 32), width, "nyy"),
         vae or make_vae((8, 16, 16), scaling_factor=0.08333),
         ("DDIMScheduler", betas | {"prediction_type": "v_prediction", "clip_sample": False,
                                    "set_alpha_to_one": False, "steps_offset": 1}), width,
         padding="!", half=half, pipeline="StableDiffusionUpscalePipeline", hidden_act="gelu")
    (folder / "low_res_scheduler").mkdir()
    write_json(folder / "low_res_scheduler" / "scheduler_config.json",
               {"_class_name": "DDPMScheduler", **betas, "clip_sample": True})
    index = read_json(folder / "model_index.json")
    index = {key: value for key, value in index.items() if key != "requires_safety_checker"}
    write_json(folder / "model_index.json", index | {
        "low_res_scheduler": ["diffusers", "DDPMScheduler"], "max_noise_level": 350})
    return folder


def cascade(folder, half=False, variance=True):
    """Two UNets of pixels, 6x6 to 16x16. DDPM with dynamic thresholding; with a variance that the
    models predict, or DDIM with static thresholding."""
    words = write_words(folder / "tokenizer", "<|endoftext|>")
    outputs = 6 if variance else 3
    parts = {"unet": make_unet((16, 24), 16, "ny", attention_head_dim=4, sample_size=6,
                               in_channels=3, out_channels=outputs),
             "super_res": make_unet((16, 16, 24), 16, "nny", attention_head_dim=4, sample_size=16,
                                    in_channels=6, out_channels=outputs,
                                    class_embed_type="timestep"),
             "text_encoder": make_text_encoder(16, words)}
    cosine = {"beta_schedule": "squaredcos_cap_v2"}
    sampling = ("DDPMScheduler", cosine | {
        "variance_type": "learned_range", "thresholding": True, "sample_max_value": 1.5,
        "dynamic_thresholding_ratio": 0.95}) if variance else ("DDIMScheduler", cosine | {
            "clip_sample": True, "prediction_type": "v_prediction"})
    write(folder, parts, sampling, half, _class_name="CascadePipeline")
    index = read_json(folder / "model_index.json")
    for part, (kind, config) in {"super_res_scheduler": sampling,
                                 "low_res_scheduler": ("DDPMScheduler", cosine)}.items():
        (folder / part).mkdir()
        write_json(folder / part / "scheduler_config.json", {"_class_name": kind, **config})
        index[part] = ["diffusers", kind]
    write_json(folder / "model_index.json", index)
    return folder
