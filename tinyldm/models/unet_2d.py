"""The UNet of DDPM: a noisy image and a timestep -> the noise that is in the image. No text.

It works on pixels, and is otherwise built as Stable Diffusion's UNet (unet.py): a way down, a
middle, a way up that reads the skips. In place of the transformers it has plain self-attention,
at some levels and in the middle.
Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239, appendix B;
options of Nichol & Dhariwal 2021, arXiv:2102.09672, and Dhariwal & Nichol 2021, arXiv:2105.05233.

CIFAR-10's model of the paper, images of 32×32 (on the right the skips, channels on size):

    conv_in                                       128 on 32
    down_blocks.0  2 × resnet, halve              128 on 32,  128 on 32,  128 on 16
    down_blocks.1  2 × (resnet, attention), halve 256 on 16,  256 on 16,  256 on  8
    down_blocks.2  2 × resnet, halve              256 on  8,  256 on  8,  256 on  4
    down_blocks.3  2 × resnet                     256 on  4,  256 on  4
    mid_block      resnet, attention, resnet      256 on  4
    up_blocks.0…3  3 × (concat skip, resnet[, attention]), doubled between: the table upwards
"""
from collections import namedtuple
from dataclasses import dataclass
from itertools import zip_longest
from types import SimpleNamespace

from .. import ops
from ..configs import Config, one_of, within
from ..errors import TinyldmError
from ..layers import (
    NO_TAPE,
    Conv2d,
    DownsampleAverage,
    GroupNormSiLU,
    Module,
    Upsample,
    checkpoint,
    checkpoint_backward,
    ends_early,
)
from .blocks import (
    ClassEmbedding,
    Downsample2D,
    ResnetBlock2D,
    SpatialAttention,
    TimestepEmbedding,
    Upsample2D,
    check_condition,
    check_groups,
    sinusoidal,
)

DOWN_BLOCKS = "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"
UP_BLOCKS = "UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"
# What backward returns: the gradients of forward's inputs, None for labels that are integers.
UNet2DGradients = namedtuple("UNet2DGradients", "latents class_labels")


@dataclass(frozen=True)
class UNet2DConfig(Config):
    """The public config.json. Defaults are those of diffusers. Lists: one item per level."""

    CHANGES = {"act_fn": ("silu", "swish"), "mid_block_scale_factor": (1,),
               "time_embedding_type": ("positional",), "quantization_config": (None,)}
    UNUSED = frozenset({
        "dropout",                                      # drawing has none, nor has training here
        "num_train_timesteps"})                         # for a type of time embedding refused above

    block_out_channels: list[int] = within(1, 65536, (224, 448, 672, 896))
    down_block_types: list[str] = one_of(*DOWN_BLOCKS,
                                         default=("DownBlock2D", *["AttnDownBlock2D"] * 3))
    up_block_types: list[str] = one_of(*UP_BLOCKS, default=(*["AttnUpBlock2D"] * 3, "UpBlock2D"))
    mid_block_type: str | None = one_of("UNetMidBlock2D", default="UNetMidBlock2D")
    add_attention: bool = True                          # in the middle
    in_channels: int = within(1, 1024, 3)
    out_channels: int = within(1, 1024, 3)              # twice as many with a learned variance
    layers_per_block: int = within(1, 8, 2)
    # The channels of a head; in SD's UNet the same key is the number of heads. None: one head.
    # A list, one item per level, is not in diffusers: openai's models have as many heads at each.
    attention_head_dim: int | list[int] | None = within(1, 65536, 8)
    norm_num_groups: int = within(1, 65536, 32)
    norm_eps: float = within(0, 1, 1e-5)
    # The middle's attention. None: norm_num_groups, but with scale_shift it has no norm at all.
    attn_norm_num_groups: int | None = within(1, 65536, None)
    resnet_time_scale_shift: str = one_of("default", "scale_shift", default="default")
    downsample_padding: int = within(0, 1, 1)           # 0: one column and row, right and below
    downsample_type: str = one_of("conv", "resnet", default="conv")     # only of Attn blocks
    upsample_type: str = one_of("conv", "resnet", default="conv")       # only of Attn blocks
    # Not in diffusers; False: resampling has no convolution (the original code's option).
    resamp_with_conv: bool = True
    center_input_sample: bool = False                   # [0, 1] -> [-1, 1] before conv_in
    flip_sin_to_cos: bool = True                        # cosines first; Ho et al.: sines
    freq_shift: int = within(0, 1, 0)                   # Ho et al.: 1
    time_embedding_dim: int | None = within(1, 65536, None)             # None: 4 * the first width
    class_embed_type: str | None = one_of("timestep", "identity", default=None)
    num_class_embeds: int | None = within(1, 10**6, None)
    sample_size: int | list[int] | None = within(1, 65536, None, lengths=(2,))      # in pixels

    def __post_init__(self):
        widths, down, up = self.block_out_channels, self.down_block_types, self.up_block_types
        if not len(widths) == len(down) == len(up):
            raise TinyldmError("block_out_channels, down_block_types and up_block_types have "
                               f"{len(widths)}, {len(down)} and {len(up)} entries: "
                               "expected as many of each")
        dims = self.attention_head_dim
        if isinstance(dims, (list, tuple)) and len(dims) != len(widths):
            raise TinyldmError(f"attention_head_dim has {len(dims)} entries, but block_out_channels"
                               f" {len(widths)}: expected as many")
        check_groups(widths, self.norm_num_groups)
        if self.has_middle_attention and widths[-1] % (self.middle_groups or 1):
            raise TinyldmError(f"attn_norm_num_groups must divide the last of block_out_channels, "
                               f"but {self.middle_groups} does not divide {widths[-1]}")
        for level, (width, names) in enumerate(zip(widths, zip(down, reversed(up)))):
            last = level == len(widths) - 1
            attends = any(name.startswith("Attn") for name in names)
            if (attends or last and self.has_middle_attention) and width % self.head_dim(level):
                raise TinyldmError("attention_head_dim, the channels of one head, must divide "
                                   f"block_out_channels, but {self.head_dim(level)} does not "
                                   f"divide {width}")

    @property
    def has_middle_attention(self):
        return bool(self.mid_block_type and self.add_attention)

    @property
    def middle_groups(self):
        """The groups of the norm in the middle's attention; None: it has no norm."""
        default = None if self.resnet_time_scale_shift == "scale_shift" else self.norm_num_groups
        return self.attn_norm_num_groups or default

    @property
    def temb_channels(self):
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    def head_dim(self, level):
        dims = self.attention_head_dim
        dim = dims[level] if isinstance(dims, (list, tuple)) else dims
        return dim or self.block_out_channels[level]


class UNet2DModel(Module):
    """config: the dict of the public config.json; settings: the same as a UNet2DConfig.

    forward: latents (B,H,W,C), timesteps (B,) in [0, 1000) -> model_output (B,H,W,O): the noise, or
    what else the model was trained to predict; for O = 2C behind it what the learned variance is
    made of. The latents of DDPM are the pixels themselves, in [-1, 1] plus noise. H and W are
    multiples of 2^(levels - 1).
    class_labels: for a model with classes, by its config (blocks.ClassEmbedding): (B,) integers,
    (B,) numbers for "timestep", or (B,E) for "identity".
    backward: dy (B,H,W,O) -> UNet2DGradients: dlatents (B,H,W,C), dclass_labels (B,E) or None.
    Raises TinyldmError for a config that is not supported.
    """

    Settings = UNet2DConfig
    settings = property(lambda self: self.Settings.read(self.config))

    def __init__(self, config):
        self.config = config
        settings = self.settings
        widths, E = settings.block_out_channels, settings.temb_channels
        groups, eps = settings.norm_num_groups, settings.norm_eps
        self.conv_in = Conv2d(settings.in_channels, widths[0])
        self.time_embedding = TimestepEmbedding(widths[0], E)
        self.class_embedding = ClassEmbedding(settings.class_embed_type, E, channels=widths[0],
                                              num_classes=settings.num_class_embeds)
        self.down_blocks, self.up_blocks = [], []
        skips, C = [widths[0]], widths[0]               # the channels of what forward will push
        for level, width in enumerate(widths):
            self.down_blocks.append(DownBlock(settings, level, C))
            C = width
            skips += [C] * len(self.down_blocks[-1].stages())
        self.mid_block = MidBlock(settings) if settings.mid_block_type else None
        for level in reversed(range(len(widths))):
            joined = [skips.pop() for _ in range(settings.layers_per_block + 1)]
            self.up_blocks.append(UpBlock(settings, level, C, joined))
            C = widths[level]
        self.conv_norm_out = GroupNormSiLU(C, groups, eps)
        self.conv_out = Conv2d(C, settings.out_channels)

    def forward(self, latents, timesteps, tape=NO_TAPE, *, class_labels=None):
        settings, dtype = self.settings, latents.dtype
        width, multiple = settings.block_out_channels[0], 2 ** (len(self.down_blocks) - 1)
        assert latents.shape[1] % multiple == latents.shape[2] % multiple == 0, (
            f"the height and width of latents must be multiples of {multiple}, not {latents.shape}")
        assert getattr(timesteps, "shape", None) == latents.shape[:1], (
            f"timesteps must be an array of shape {latents.shape[:1]}, one for each of the "
            f"latents, not {timesteps!r}")
        check_condition(self, "classes", self.class_embedding, "class_labels", class_labels)
        t = sinusoidal(timesteps, width, settings, dtype)
        temb = self.time_embedding(t, tape)             # (B,E)
        if self.class_embedding:
            if settings.class_embed_type == "timestep":
                class_labels = sinusoidal(class_labels, width, settings, dtype)
            temb = temb + self.class_embedding(class_labels, tape)
        h = self.conv_in(2 * latents - 1 if settings.center_input_sample else latents, tape)
        skips = [h]
        for block in self.down_blocks:
            h = block(h, temb, skips, tape)
        if self.mid_block:
            h = self.mid_block(h, temb, tape)
        for block in self.up_blocks:
            h = block(h, temb, skips, tape)
        assert not skips, f"{len(skips)} skips were not used"
        h = self.conv_norm_out(h, tape)
        return self.conv_out(h, tape)

    @ends_early(UNet2DGradients(None, None))
    def backward(self, dy, tape):
        dh = self.conv_out.backward(dy, tape)
        dh = self.conv_norm_out.backward(dh, tape)
        grads = SimpleNamespace(skips=[], temb=0)       # of the blocks: a stack, a sum
        for block in reversed(self.up_blocks):
            dh = block.backward(dh, grads, tape)
        if self.mid_block:
            dh = self.mid_block.backward(dh, grads, tape)
        for block in reversed(self.down_blocks):
            dh = block.backward(dh, grads, tape)
        dh = dh + grads.skips.pop()                     # conv_in's output was the first skip: add
        assert not grads.skips, f"{len(grads.skips)} skip gradients were not used"
        dlatents, dlabels = self.conv_in.backward(dh, tape), None
        if self.settings.center_input_sample:
            dlatents = 2 * dlatents
        if self.class_embedding:
            dlabels = self.class_embedding.backward(grads.temb, tape)
        self.time_embedding.backward(grads.temb, tape)
        return UNet2DGradients(dlatents, dlabels if self.settings.class_embed_type == "identity"
                               else None)


class DownBlock(Module):
    """One level of the way down. Each stage's output is pushed on the skips."""

    def __init__(self, settings, level, in_channels):
        width, name = settings.block_out_channels[level], settings.down_block_types[level]
        self.resnets = [_resnet(settings, width if i else in_channels, width)
                        for i in range(settings.layers_per_block)]
        self.attentions = _attentions(settings, level, name, len(self.resnets))
        self.downsamplers = []
        if level < len(settings.block_out_channels) - 1:
            before = settings.downsample_padding
            self.downsamplers.append(
                _resnet(settings, width, width, DownsampleAverage())
                if _is_resnet(name, settings.downsample_type) else
                Downsample2D(width, (before, 1)) if settings.resamp_with_conv else
                DownsampleAverage())

    def stages(self):
        """Lists of layers, one for each skip."""
        return _pairs(self) + [[downsampler] for downsampler in self.downsamplers]

    def forward(self, h, temb, skips, tape=NO_TAPE):
        for layers in self.stages():
            h = _forward(layers, h, temb, tape)
            skips.append(h)
        return h

    def backward(self, dh, grads, tape):
        for layers in reversed(self.stages()):
            dh = dh + grads.skips.pop()                 # used twice, below and on the way up: add
            dh = _backward(layers, dh, grads, tape)
        return dh


class UpBlock(Module):
    """One level of the way up: each residual block reads h and the next skip, concatenated.

    skip_channels: a list, of the skips in the order in which they are read.
    """

    def __init__(self, settings, level, in_channels, skip_channels):
        width = settings.block_out_channels[level]
        name = settings.up_block_types[::-1][level]     # they begin with the lowest level
        state_channels = [in_channels] + [width] * (len(skip_channels) - 1)
        self.resnets = [_resnet(settings, state + skip, width)
                        for state, skip in zip(state_channels, skip_channels, strict=True)]
        self.attentions = _attentions(settings, level, name, len(self.resnets))
        self.upsamplers = []
        if level:
            self.upsamplers.append(
                _resnet(settings, width, width, Upsample())
                if _is_resnet(name, settings.upsample_type) else
                Upsample2D(width) if settings.resamp_with_conv else Upsample())

    def forward(self, h, temb, skips, tape=NO_TAPE):
        for layers in _pairs(self):
            h, cache = ops.concat(h, skips.pop())
            tape.save(self, cache)
            h = _forward(layers, h, temb, tape)
        return _forward(self.upsamplers, h, temb, tape)

    def backward(self, dh, grads, tape):
        dh = _backward(self.upsamplers, dh, grads, tape)
        for layers in reversed(_pairs(self)):
            dh = _backward(layers, dh, grads, tape)
            dh, dskip = ops.concat_backward(dh, tape.load(self))
            grads.skips.append(dskip)
        return dh


class MidBlock(Module):
    """Residual block, self-attention (if any), residual block."""

    def __init__(self, settings):
        level = len(settings.block_out_channels) - 1
        width = settings.block_out_channels[level]
        self.resnets = [_resnet(settings, width, width) for _ in range(2)]
        self.attentions = [SpatialAttention(width, settings.middle_groups, settings.norm_eps,
                                            width // settings.head_dim(level))
                           for _ in range(settings.has_middle_attention)]

    def layers(self):
        first, last = self.resnets
        return [first, *self.attentions, last]

    def forward(self, h, temb, tape=NO_TAPE):
        return _forward(self.layers(), h, temb, tape)

    def backward(self, dh, grads, tape):
        return _backward(self.layers(), dh, grads, tape)


def _resnet(settings, in_channels, out_channels, resample=None):
    return ResnetBlock2D(in_channels, out_channels, settings.norm_num_groups, settings.norm_eps,
                         settings.temb_channels, resample=resample,
                         scale_shift=settings.resnet_time_scale_shift == "scale_shift")


def _attentions(settings, level, name, number):
    """One for each residual block of an Attn block; none for any other block."""
    width = settings.block_out_channels[level]
    return [SpatialAttention(width, settings.norm_num_groups, settings.norm_eps,
                             width // settings.head_dim(level))
            for _ in range(number) if name.startswith("Attn")]


def _is_resnet(name, kind):
    """Whether a block of this name resamples with a residual block. As in diffusers, the config's
    downsample_type and upsample_type count in Attn blocks only."""
    return name.startswith("Resnet") or name.startswith("Attn") and kind == "resnet"


def _pairs(block):
    """[[resnet, attention], ...] of a block, or [[resnet], ...] where it has no attentions."""
    return [list(filter(None, pair)) for pair in zip_longest(block.resnets, block.attentions)]


def _forward(layers, h, temb, tape):
    for layer in layers:
        if isinstance(layer, ResnetBlock2D):
            h = checkpoint(layer, tape, h, temb=temb)
        elif isinstance(layer, SpatialAttention):
            h = checkpoint(layer, tape, h)
        else:
            h = layer(h, tape)
    return h


def _backward(layers, dh, grads, tape):
    for layer in reversed(layers):
        if isinstance(layer, ResnetBlock2D):
            dh, dtemb = checkpoint_backward(layer, dh, tape)
            grads.temb = grads.temb + dtemb
        elif isinstance(layer, SpatialAttention):
            dh = checkpoint_backward(layer, dh, tape)
        else:
            dh = layer.backward(dh, tape)
    return dh
