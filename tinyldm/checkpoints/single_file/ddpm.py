"""The original DDPM code's own description and names of its network, in diffusers' terms.

The description is a config with `ch` and `ch_mult` in place of a class's name:

    {"ch": 128, "out_ch": 3, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 2, "attn_resolutions": [16],
     "resamp_with_conv": true, "in_channels": 3, "resolution": 32}

Its weights are named as in the original VAE, down.0.block.0.conv1 and so on; there, too, attention
is made of 1x1 convolutions, and `up` counts the levels from the picture.
Source: hojonathanho/diffusion (models/unet.py), and its PyTorch version, pesser/pytorch_diffusion
(model.py), also in ermongroup/ddim (models/diffusion.py).
"""
import re
from dataclasses import dataclass, fields

from ...configs import Config, within
from ...errors import TinyldmError
from ..layout import WRAPPER
from .names import VAE_ATTENTION, renamed

TIME = "temb.dense.0.weight"                            # only such files have it
NAMES = {"temb.dense.0": "time_embedding.linear_1", "temb.dense.1": "time_embedding.linear_2",
         "norm_out": "conv_norm_out"}
LEVEL = re.compile(r"(down|up)\.(\d{1,2})\.(block|attn)\.(\d{1,2})\.(.+)")
RESAMPLE = re.compile(r"(down|up)\.(\d{1,2})\.(?:down|up)sample\.(.+)")
MIDDLE = re.compile(r"mid\.(block|attn)_([12])\.(.+)")
RESNET = {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"}


@dataclass(frozen=True)
class OriginalConfig(Config):
    """The arguments of the original code's Model."""

    CHANGES = {"use_timestep": (True,), "use_linear_attn": (False,), "attn_type": ("vanilla",)}
    UNUSED = frozenset({
        "dropout",                                      # drawing has none, nor has training here
        "type", "var_type", "ema", "ema_rate"})         # of the sampling and the training

    ch: int = within(1, 65536)
    ch_mult: list[int] = within(1, 64)
    num_res_blocks: int = within(1, 8)
    resolution: int = within(1, 65536)
    attn_resolutions: list[int] = within(1, 65536, (), lengths=range(9))
    resamp_with_conv: bool = True
    in_channels: int = within(1, 1024, 3)
    out_ch: int = within(1, 1024, 3)

    def __post_init__(self):
        if self.ch_mult[0] != 1:                        # conv_in would be as wide as no level
            raise TinyldmError(f"ch_mult must begin with 1, not {self.ch_mult[0]}")
        if self.resolution % (multiple := 2 ** (len(self.ch_mult) - 1)):
            raise TinyldmError(f"resolution must be a multiple of {multiple}, for ch_mult has "
                               f"{len(self.ch_mult)} entries, not {self.resolution}")


def is_original(config):
    """Whether a config describes a network of the original code, and not its VAE."""
    return {"ch", "ch_mult"} <= config.keys() and "z_channels" not in config


def public_config(config):
    """The original description -> the config of a UNet2DModel. Unknown keys stay as they are.

    Raises TinyldmError for a value that is not supported.
    """
    own = OriginalConfig.read(config)
    attends = [own.resolution >> level in own.attn_resolutions for level in range(len(own.ch_mult))]
    kinds = ["Attn" * attend for attend in attends]
    known = {item.name for item in fields(OriginalConfig)} | OriginalConfig.CHANGES.keys()
    return {key: value for key, value in config.items()
            if key not in known | OriginalConfig.UNUSED} | {
        "_class_name": "UNet2DModel", "sample_size": own.resolution,
        "in_channels": own.in_channels, "out_channels": own.out_ch,
        "block_out_channels": [own.ch * factor for factor in own.ch_mult],
        "layers_per_block": own.num_res_blocks,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "attention_head_dim": None, "norm_num_groups": 32, "norm_eps": 1e-6,
        "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1,
    } | ({} if own.resamp_with_conv else {"resamp_with_conv": False})   # diffusers lacks the key


def is_ddpm(names):
    """Whether the names of a file's tensors are those of the original code."""
    return any(WRAPPER.sub(r"\1", name) == TIME for name in names)


def public_tensors(stored):
    """{name in the file: StoredTensor} -> {public name: StoredTensor}, for the original's names.

    A file with other names stays as it is, and so do names that are unknown.
    """
    if not is_ddpm(stored):
        return stored
    bare = {WRAPPER.sub(r"\1", name): tensor for name, tensor in stored.items()}
    ups = [int(match[2]) for match in map(LEVEL.fullmatch, bare) if match and match[1] == "up"]
    tensors = {}
    for name, tensor in bare.items():
        if (public := public_name(name, max(ups, default=0))) in tensors:
            public = name                               # twice the same weight: reported as unknown
        if ".attentions." in public and tensor.shape[2:] == (1, 1):     # a 1x1 convolution
            tensor = tensor._replace(shape=tensor.shape[:2], strides=tensor.strides[:2])
        tensors[public] = tensor
    return tensors


def public_name(name, last):
    """An original name -> the public one. last: the number of the smallest level."""
    stem, _, kind = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    if match := MIDDLE.fullmatch(name):
        what, number, inner = match[1], int(match[2]), match[3]
        return f"mid_block.{_layer(what, number - 1, inner)}"
    if match := LEVEL.fullmatch(name):
        way, level, what, number, inner = match[1], int(match[2]), *match.group(3, 4, 5)
        level = level if way == "down" else last - level
        return f"{way}_blocks.{level}.{_layer(what, number, inner)}"
    if match := RESAMPLE.fullmatch(name):
        way, level, inner = match[1], int(match[2]), match[3]
        level = level if way == "down" else last - level
        return f"{way}_blocks.{level}.{way}samplers.0.{inner}"
    return name


def _layer(what, number, inner):
    if what == "attn":
        return f"attentions.{number}.{renamed(inner, VAE_ATTENTION)}"
    return f"resnets.{number}.{renamed(inner, RESNET)}"
