"""The networks of Stable Diffusion, one per file; attributes have the names of the weight files.

clip.py    encodes the prompt: token ids -> context
unet.py    predicts the noise in the latents, given the context
vae.py     turns images into latents and back
blocks.py  what these share
"""
from .clip import CLIPTextModel, CLIPTextModelWithProjection
from .unet import UNet2DConditionModel
from .vae import AutoencoderKL
