"""The three networks of Stable Diffusion, one a file, attributes named as in the weight files.

clip.py  reads the prompt: token ids -> context
unet.py  predicts the noise in the latents, looking at the context
vae.py   turns images into latents and back
blocks.py  what the UNet and the VAE share
"""
from .clip import CLIPTextModel, CLIPTextModelWithProjection
from .unet import UNet2DConditionModel
from .vae import AutoencoderKL

__all__ = ["AutoencoderKL", "CLIPTextModel", "CLIPTextModelWithProjection",
           "UNet2DConditionModel"]
