"""The networks of Stable Diffusion, one per file; attributes have the names of the weight files.

clip.py        encodes the prompt: token ids -> context
clip_vision.py encodes a picture: the other half of CLIP
clip_model.py  both halves: how well a picture matches a text
unet.py        predicts the noise in the latents, given the context
unet_2d.py     predicts the noise in an image: DDPM in pixels
vae.py         turns images into latents and back
dit.py         predicts the noise, given a class: a transformer in the UNet's place
prior.py       predicts a picture's CLIP embedding from a text's: unCLIP's first half
inception.py   the network of the FID: a picture -> features, for metrics/
discriminator.py  tells pictures from their round trips: it trains beside a VAE
blocks.py      what these share
"""
from .clip import CLIPTextModel, CLIPTextModelWithProjection
from .clip_model import CLIPModel
from .clip_vision import CLIPVisionModel, CLIPVisionModelWithProjection
from .dit import DiTTransformer2DModel
from .inception import InceptionV3
from .prior import PriorTransformer, StableUnCLIPImageNormalizer
from .unet import UNet2DConditionModel
from .unet_2d import UNet2DModel
from .vae import AutoencoderKL
