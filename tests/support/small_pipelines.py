"""Whole random pipelines, small, made and saved by diffusers: fixtures of the pipeline's tests."""
import json
import re
import shutil
from pathlib import Path

import diffusers
import safetensors.torch
import torch
import transformers

from tests.support.reference import randomise
from tests.support.words import VOCABULARY, write_settings, write_toy_vocabulary

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")


def make_unet(widths, context, attention, **config):
    """attention: one letter a level, from the finest: y or n."""
    down = tuple(CROSS[0] if letter == "y" else "DownBlock2D" for letter in attention)
    up = tuple(CROSS[1] if letter == "y" else "UpBlock2D" for letter in reversed(attention))
    config = {"layers_per_block": 1, "norm_num_groups": 8, "in_channels": 4, **config}
    return randomise(diffusers.UNet2DConditionModel(
        out_channels=4, block_out_channels=widths, cross_attention_dim=context,
        down_block_types=down, up_block_types=up, **config), 1)


def make_vae(widths, **config):
    vae = randomise(diffusers.AutoencoderKL(
        block_out_channels=widths, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths), **config), 2)
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 0.7              # greys, not black and white
    return vae


def make_text_encoder(width, vocab_size, model=transformers.CLIPTextModel, **config):
    return randomise(model(transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, vocab_size=vocab_size,
        num_attention_heads=4, max_position_embeddings=77, **config)), 3)


def make_words(folder, padding, toy):
    """A tokenizer's published files. toy: a few words even where CLIP's vocabulary is at hand."""
    folder.mkdir(parents=True)
    if toy or not VOCABULARY.exists():
        write_toy_vocabulary(folder)
    else:
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(VOCABULARY / name, folder / name)
    write_settings(folder, padding)
    return transformers.CLIPTokenizer.from_pretrained(folder)


def save(folder, unet, vae, scheduler, width, padding="<|endoftext|>", toy=False, half=False,
         pipeline=diffusers.StableDiffusionPipeline, **text_config):
    """A pipeline's folder as diffusers writes it, with a text encoder as wide as the context.

    half: weights in float16.
    """
    tokenizer = make_words(folder / "words", padding, toy)
    text_encoder = make_text_encoder(width, len(tokenizer), **text_config)
    return write(folder, pipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False), half)


def save_xl(folder, unet, vae, scheduler, widths, projection, toy=False, half=False,
            pipeline=diffusers.StableDiffusionXLPipeline, **options):
    """The same of Stable Diffusion XL, whose two text encoders have these widths."""
    words = [make_words(folder / f"words{end}", padding, toy)
             for end, padding in (("", "<|endoftext|>"), ("_2", "!"))]
    end = words[1].eos_token_id
    encoders = [make_text_encoder(widths[0], len(words[0])),
                make_text_encoder(widths[1], len(words[1]),
                                  transformers.CLIPTextModelWithProjection, hidden_act="gelu",
                                  projection_dim=projection, eos_token_id=end)]
    return write(folder, pipeline(
        vae=vae, text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=words[0],
        tokenizer_2=words[1], unet=unet, scheduler=scheduler, add_watermarker=False, **options),
        half)


def write(folder, pipeline, half):
    if half:
        pipeline.to(torch.float16)
    pipeline.save_pretrained(folder, variant="fp16" if half else None)
    for words in folder.glob("words*"):                 # as published; newer writers leave them out
        for file in words.iterdir():
            shutil.copy(file, folder / words.name.replace("words", "tokenizer") / file.name)
        shutil.rmtree(words)
    return folder


def with_old_vae_names(folder):
    """Rename the VAE's attention as files from before diffusers 0.17 have it."""
    file, = (folder / "vae").glob("*.safetensors")
    old = {}
    for name, tensor in safetensors.torch.load_file(file).items():
        for new, word in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                          ("to_out.0", "proj_attn")]:
            name = re.sub(rf"(attentions\.0)\.{new}\.", rf"\1.{word}.", name)
        old[name] = tensor
    assert any("proj_attn" in name for name in old)
    safetensors.torch.save_file(old, file, metadata={"format": "pt"})
    return folder


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(Path(path).read_text()) | changes))


# ---- the configurations ---------------------------------------------------------------------

def sd1(folder):
    """Stable Diffusion 1: PNDM, one number of heads, convolutions around the transformers."""
    return save(folder, make_unet((16, 32, 32), 32, "yyn", attention_head_dim=4, sample_size=8),
                make_vae((8, 8, 16, 16), layers_per_block=1, sample_size=64),
                diffusers.PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1,
                                        set_alpha_to_one=False), 32)


def sd2(folder):
    """Stable Diffusion 2: v prediction, DDIM, a list of heads, linear projections, "!" as padding.

    The scheduler's file is of the old kind that the public pipeline corrects when it loads.
    """
    save(folder, make_unet((16, 32), 24, "yy", attention_head_dim=(2, 4), layers_per_block=2,
                           use_linear_projection=True, sample_size=8),
         make_vae((8, 16, 16), layers_per_block=2, scaling_factor=0.7),
         diffusers.DDIMScheduler(**SD, prediction_type="v_prediction", set_alpha_to_one=False), 24,
         padding="!", hidden_act="gelu")
    change_json(folder / "scheduler" / "scheduler_config.json", steps_offset=0, clip_sample=True)
    return folder


def euler(folder):
    """Euler, old attention names in the VAE, a size that is not square."""
    scheduler = diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1)
    return with_old_vae_names(save(
        folder, make_unet((16, 24), 16, "ny", attention_head_dim=3, sample_size=(6, 10)),
        make_vae((8, 8, 8, 16)), scheduler, 16))


def euler_ancestral(folder):
    """Euler ancestral, trailing, weights in float16, transformers at every level."""
    return save(folder, make_unet((16, 16), 32, "yy", attention_head_dim=2, sample_size=16),
                make_vae((8, 16)), diffusers.EulerAncestralDiscreteScheduler(
                    **SD, timestep_spacing="trailing"), 32, half=True)


def dpmpp(folder):
    """DPM-Solver++(2M) on Karras' sigmas, different numbers of layers a level."""
    return save(folder, make_unet((16, 24, 32), 20, "nyy", attention_head_dim=4, sample_size=8,
                                  layers_per_block=(1, 2, 1)),
                make_vae((8, 16, 16)), diffusers.DPMSolverMultistepScheduler(
                    **SD, use_karras_sigmas=True), 20)


def ddpm(folder):
    """DDPM: fresh noise at every step."""
    return save(folder, make_unet((16, 32), 16, "yn", attention_head_dim=8, sample_size=8),
                make_vae((8, 16, 16)), diffusers.DDPMScheduler(**SD), 16)


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
    return save_xl(folder, unet_xl(), vae_xl(), diffusers.EulerDiscreteScheduler(
        **SD, timestep_spacing="leading", steps_offset=1), (16, 24), 20)


def sdxl_turbo(folder):
    """SDXL-Turbo: Euler ancestral, trailing."""
    return save_xl(folder, unet_xl(), vae_xl(), diffusers.EulerAncestralDiscreteScheduler(
        **SD, timestep_spacing="trailing", steps_offset=1), (16, 24), 20)


def sd_turbo(folder):
    """SD-Turbo: Stable Diffusion 2 that predicts the noise; Euler, trailing."""
    return save(folder, make_unet((16, 32), 24, "yy", attention_head_dim=(2, 4), sample_size=8,
                                  use_linear_projection=True), make_vae((8, 16, 16)),
                diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="trailing",
                                                 steps_offset=1), 24, padding="!",
                hidden_act="gelu")


def lcm(folder):
    """A Latent Consistency Model that is told the guidance, with clipping in its scheduler."""
    return save(folder, make_unet((16, 32), 32, "yn", attention_head_dim=4, sample_size=8,
                                  time_cond_proj_dim=64), make_vae((8, 16, 16)),
                diffusers.LCMScheduler(**SD, clip_sample=True), 32,
                pipeline=diffusers.LatentConsistencyModelPipeline)


def inpainting(folder):
    """Stable Diffusion 1 that paints into a picture: nine channels in."""
    return save(folder, make_unet((16, 32), 32, "yn", attention_head_dim=4, sample_size=8,
                                  in_channels=9), make_vae((8, 16, 16)),
                diffusers.DDIMScheduler(**SD, steps_offset=1, set_alpha_to_one=False,
                                        clip_sample=False), 32,
                pipeline=diffusers.StableDiffusionInpaintPipeline)



def toy(folder, half=False):
    """Like Stable Diffusion 1, of a toy vocabulary, which is read in a moment."""
    return save(folder, make_unet((16, 32), 32, "yn", attention_head_dim=4, sample_size=8),
                make_vae((8, 16, 16), sample_size=32),
                diffusers.DDIMScheduler(**SD, steps_offset=1, clip_sample=False), 32, toy=True,
                half=half)


def smallest(folder):
    """For the command line, which only needs what draws: 16x16 pixels, a toy vocabulary."""
    return save(folder, make_unet((8, 8), 8, "yn", attention_head_dim=2, sample_size=4,
                                  norm_num_groups=4), make_vae((4, 8, 8)),
                diffusers.DDIMScheduler(**SD, steps_offset=1, clip_sample=False), 8, toy=True)
