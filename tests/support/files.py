"""Small models as weight files, and what a loaded one must hold."""
import diffusers
import numpy as np
import torch
import transformers

from tests.support.models import CLIPS, UNETS, VAES, vae_config
from tests.support.reference import randomise
from tinyldm.layers import Conv2d, Linear, Module

UNET = UNETS["attention at the bottom"]


def in_file_layout(module):
    return {name: p.data.transpose(3, 2, 0, 1) if p.data.ndim == 4 else p.data
            for name, p in module.named_parameters()}


def assert_holds(module, tensors, dtype=np.float32):
    """Every parameter equals torch's tensor, contiguous, in our layout and dtype."""
    ours = in_file_layout(module)
    assert ours.keys() == tensors.keys()
    for name, parameter in module.named_parameters():
        assert parameter.data.shape == parameter.shape and parameter.data.dtype == dtype
        assert type(parameter.data) is np.ndarray
        assert parameter.data.flags.c_contiguous and parameter.data.flags.aligned
        theirs = tensors[name].detach().float().numpy().astype(dtype)
        assert np.array_equal(ours[name], theirs), name


def diffusers_unet():
    return randomise(diffusers.UNet2DConditionModel(**UNET), 1)


def diffusers_vae():
    return randomise(diffusers.AutoencoderKL(**vae_config(VAES["two levels"])), 2)


def transformers_clip():
    return randomise(transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**CLIPS["as SD 1"])), 3)


class Toy(Module):
    """A convolution that is not square in any two axes, and a linear layer."""

    def __init__(self):
        self.conv = Conv2d(5, 7)
        self.proj = Linear(6, 4)


def toy_tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv.weight": (7, 5, 3, 3), "conv.bias": (7,),
              "proj.weight": (4, 6), "proj.bias": (4,)}
    return {name: torch.randn(shape, generator=generator).to(dtype)
            for name, shape in shapes.items()}
