"""Small models as weight files, and what a loaded one must hold."""
import diffusers
import numpy as np
import torch
import transformers

from tests.support.reference import randomise
from tinyldm.layers import Conv2d, Linear, Module

UNET = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
        "norm_num_groups": 4, "block_out_channels": (8, 16), "cross_attention_dim": 12,
        "attention_head_dim": 2, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
VAE = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1,
       "latent_channels": 4, "down_block_types": ("DownEncoderBlock2D",) * 2,
       "up_block_types": ("UpDecoderBlock2D",) * 2}
CLIP = {"vocab_size": 50, "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 77, "bos_token_id": 48,
        "eos_token_id": 49}


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
    return randomise(diffusers.AutoencoderKL(**VAE), 2)


def transformers_clip():
    return randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)), 3)


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
