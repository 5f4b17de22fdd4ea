"""The UNet: noisy latents, a timestep and the context -> the noise that is in the latents.

The sampler calls it at every step. The way down halves the map at each level. After a middle block
the way up doubles it again, and also reads the skips: the way down's outputs of the same size.
Source: Rombach et al. 2022, arXiv:2112.10752, section 3.3 and appendix E.2.1; Ho et al. 2020,
arXiv:2006.11239, appendix B; Ronneberger et al. 2015, arXiv:1505.04597.

Stable Diffusion 1.x with latents of 64×64 (on the right the skips, channels on size):

    conv_in                              320 on 64
    down_blocks.0  2 × (resnet, attention), halve   320 on 64,   320 on 64,   320 on 32
    down_blocks.1  2 × (resnet, attention), halve   640 on 32,   640 on 32,   640 on 16
    down_blocks.2  2 × (resnet, attention), halve  1280 on 16,  1280 on 16,  1280 on  8
    down_blocks.3  2 × resnet                      1280 on  8,  1280 on  8
    mid_block      resnet, attention, resnet       1280 on  8
    up_blocks.0…3  3 × (concat skip, resnet[, attention]), doubled between: the table upwards
"""
from collections import namedtuple
from dataclasses import dataclass
from operator import attrgetter
from types import SimpleNamespace

from .. import ops
from ..configs import Config, one_of, within
from ..errors import TinyldmError
from ..layers import (
    NO_TAPE,
    Conv2d,
    GroupNorm,
    GroupNormSiLU,
    LayerNorm,
    Linear,
    Module,
    checkpoint,
    checkpoint_backward,
    ends_early,
)
from .blocks import (
    CLASS_EMBEDDINGS,
    Attention,
    ClassEmbedding,
    Downsample2D,
    FeedForward,
    ResnetBlock2D,
    TimestepEmbedding,
    Upsample2D,
    check_condition,
    check_groups,
    for_contexts,
    sinusoidal,
)

DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}      # name -> has attention
# One resolution. has_attention: whether its down and up block have transformers; transformer: the
# keyword arguments of each of them, and of the middle block's, which always has one.
Level = namedtuple("Level", "width layers has_attention transformer")


@dataclass(frozen=True)
class UNetConfig(Config):
    """The public unet/config.json. Defaults are those of diffusers. Lists: one item per level."""

    CHANGES = dict.fromkeys((
        "encoder_hid_dim", "encoder_hid_dim_type", "time_embedding_dim", "cross_attention_norm",
        "timestep_post_act", "time_embedding_act_fn", "reverse_transformer_layers_per_block",
        "quantization_config"), (None,)) | {
        "act_fn": ("silu", "swish"), "center_input_sample": (False,), "downsample_padding": (1,),
        "mid_block_scale_factor": (1,), "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "resnet_time_scale_shift": ("default",), "time_embedding_type": ("positional",),
        "dual_cross_attention": (False,), "conv_in_kernel": (3,), "conv_out_kernel": (3,),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,), "resnet_out_scale_factor": (1,),
        "resnet_skip_time_act": (False,)}
    UNUSED = frozenset({
        "dropout",                                      # drawing has none, nor has training here
        "upcast_attention",                             # the softmax here is float32 at least
        "addition_embed_type_num_heads",                # for types of embedding refused below
        "mid_block_only_cross_attention"})              # for types of middle block refused above

    in_channels: int = within(1, 1024)
    out_channels: int = within(1, 1024)
    block_out_channels: list[int] = within(4, 65536)
    down_block_types: list[str] = one_of(*DOWN_BLOCKS)
    up_block_types: list[str] = one_of(*(name.replace("Down", "Up") for name in DOWN_BLOCKS))
    cross_attention_dim: int | list[int] = within(1, 65536)
    norm_num_groups: int = within(1, 65536)
    norm_eps: float = within(0, 1)
    layers_per_block: int | list[int] = within(1, 8, 2)
    # The number of heads, despite its name; newer files have the second key.
    attention_head_dim: int | list[int] = within(1, 65536, 8)
    num_attention_heads: int | list[int] | None = within(1, 65536, None)
    transformer_layers_per_block: int | list[int] = within(1, 24, 1)    # SDXL has more
    use_linear_projection: bool = False                 # True from Stable Diffusion 2 on
    only_cross_attention: bool | list[bool] = False     # both attentions of a block read it
    flip_sin_to_cos: bool = True                        # cosines first; Ho et al.: sines
    freq_shift: int = within(0, 1, 0)                   # Ho et al.: 1
    # Of latents; a number or [height, width].
    sample_size: int | list[int] | None = within(1, 1024, None, lengths=(2,))
    time_cond_proj_dim: int | None = within(4, 65536, None)     # Latent Consistency Models only
    addition_embed_type: str | None = one_of("text_time", default=None)     # SDXL only
    addition_time_embed_dim: int | None = within(4, 65536, None)
    class_embed_type: str | None = one_of(*CLASS_EMBEDDINGS, default=None)
    num_class_embeds: int | None = within(1, 10**6, None)       # rows, for class_embed_type null
    projection_class_embeddings_input_dim: int | None = within(1, 10**6, None)

    def __post_init__(self):
        widths, down, up = self.block_out_channels, self.down_block_types, self.up_block_types
        if not len(widths) == len(down) == len(up):
            raise TinyldmError("block_out_channels, down_block_types and up_block_types have "
                               f"{len(widths)}, {len(down)} and {len(up)} entries: "
                               "expected as many of each")
        if list(up) != [name.replace("Down", "Up") for name in reversed(down)]:
            raise TinyldmError(f"up_block_types {up} do not mirror down_block_types {down}")
        for key in ("cross_attention_dim", "layers_per_block", "attention_head_dim",
                    "num_attention_heads", "transformer_layers_per_block", "only_cross_attention"):
            value = getattr(self, key)
            if isinstance(value, (list, tuple)) and len(value) != len(widths):
                raise TinyldmError(f"{key} has {len(value)} entries, but block_out_channels "
                                   f"{len(widths)}: expected as many")
        check_groups(widths, self.norm_num_groups)
        *levels, last = self.levels                     # the middle block attends like the last
        for level in [*filter(attrgetter("has_attention"), levels), last]:
            if level.width % (num_heads := level.transformer["num_heads"]):
                raise TinyldmError("the number of heads (attention_head_dim or num_attention_heads)"
                                   f" must divide block_out_channels, but {num_heads} does not "
                                   f"divide {level.width}")
        if (self.class_embed_type in ("projection", "simple_projection")
                and self.projection_class_embeddings_input_dim is None):
            raise TinyldmError(f"class_embed_type {self.class_embed_type} needs "
                               "projection_class_embeddings_input_dim, the labels' width")
        sizes = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        if self.addition_embed_type and None in sizes:
            raise TinyldmError("addition_embed_type needs addition_time_embed_dim and "
                               f"projection_class_embeddings_input_dim, which are {sizes}")

    @property
    def levels(self):
        """[Level], the largest map first."""
        names = "num_heads", "num_layers", "context_channels", "only_cross_attention"
        columns = (self.block_out_channels, self.layers_per_block,
                   [DOWN_BLOCKS[name] for name in self.down_block_types],
                   self.num_attention_heads or self.attention_head_dim,
                   self.transformer_layers_per_block, self.cross_attention_dim,
                   self.only_cross_attention)
        columns = [column if isinstance(column, (list, tuple)) else [column] * len(columns[0])
                   for column in columns]
        linear = {"linear_projection": self.use_linear_projection}
        return [Level(width, layers, has_attention, dict(zip(names, row)) | linear)
                for width, layers, has_attention, *row in zip(*columns, strict=True)]


class UNetGradients(namedtuple("UNetGradients", "latents context")):
    """What the UNet's backward returns, whatever its config: dlatents, dcontext = gradients.

    Attributes for the conditions that only some models take, else None: timestep_cond, text_embeds,
    class_labels.
    """

    timestep_cond = text_embeds = class_labels = None


class UNet2DConditionModel(Module):
    """config: the dict of the public unet/config.json; settings: the same as a UNetConfig.

    forward: latents (B,H,W,4), timesteps (B,) in [0, 1000), context (B,M,D) -> model_output
    (B,H,W,4), the noise, or what else the model was trained to predict.
    backward: dy (B,H,W,4) -> UNetGradients: dlatents (B,H,W,4), dcontext (B,M,D). Both are None
    where it ended early, on a tape with only_trained.

    Without a tape, context may have nB rows for B latents, such as the two of guidance:
    (nB,M,D) -> (nB,H,W,4), all latents for the first n-th of the contexts, then again for the next.
    Up to the first cross-attention, every context has the same maps, which are computed once.

    Some models take more conditions, which change the time embedding. Latent Consistency Models:
    timestep_cond (B,256), a sinusoidal embedding of the guidance scale (Luo et al. 2023,
    arXiv:2310.04378, section 4.3). Stable Diffusion XL: text_embeds (B,P), one vector for the
    prompt, and time_ids (B,6), sizes and crop in pixels (Podell et al. 2023, arXiv:2307.01952,
    section 2.2). Models with classes: class_labels, as models.blocks.ClassEmbedding says for the
    class_embed_type, except that "timestep" takes (B,) numbers. The x4 upscaler's class is the
    noise level of its low-resolution picture.
    Raises TinyldmError for a config that is not supported.
    """

    Settings = UNetConfig
    settings = property(lambda self: self.Settings.read(self.config))

    def __init__(self, config):
        self.config = config
        settings = self.settings
        levels, widths = settings.levels, settings.block_out_channels
        groups, eps = settings.norm_num_groups, settings.norm_eps
        E = 4 * widths[0]
        self.conv_in = Conv2d(settings.in_channels, widths[0])
        self.time_embedding = TimestepEmbedding(widths[0], E, settings.time_cond_proj_dim)
        self.add_embedding = None
        if settings.addition_embed_type:
            C = settings.projection_class_embeddings_input_dim          # P + 6F
            self.add_embedding = TimestepEmbedding(C, E)
        projected = settings.projection_class_embeddings_input_dim
        self.class_embedding = ClassEmbedding(
            settings.class_embed_type, E, num_classes=settings.num_class_embeds,
            channels=widths[0] if settings.class_embed_type == "timestep" else projected)
        self.down_blocks, self.up_blocks = [], []

        skips, C = [widths[0]], widths[0]               # the channels of what forward will push
        for i, level in enumerate(levels):
            last = i == len(levels) - 1
            self.down_blocks.append(DownBlock2D(
                C, level.width, E, groups, eps, num_layers=level.layers, downsample=not last,
                transformer=level.transformer if level.has_attention else None))
            C = level.width
            skips += [C] * (level.layers + (not last))
        middle = levels[-1].transformer | {"only_cross_attention": False}
        self.mid_block = UNetMidBlock2D(C, E, groups, eps, transformer=middle)
        for i, level in enumerate(reversed(levels)):
            joined = [skips.pop() for _ in range(level.layers + 1)]
            last = i == len(levels) - 1
            self.up_blocks.append(UpBlock2D(
                C, level.width, joined, E, groups, eps, upsample=not last,
                transformer=level.transformer if level.has_attention else None))
            C = level.width

        self.conv_norm_out = GroupNormSiLU(C, groups, eps)
        self.conv_out = Conv2d(C, settings.out_channels)

    def forward(self, latents, timesteps, context, tape=NO_TAPE, *, timestep_cond=None,
                text_embeds=None, time_ids=None, class_labels=None):
        assert hasattr(latents, "astype"), (
            f"latents must be an array, not a {type(latents).__name__}: use .numpy() of a tensor")
        settings, dtype = self.settings, latents.dtype
        assert tape is NO_TAPE or len(context) == len(latents), (
            f"with a tape, each of the {len(latents)} latents needs one context, "
            f"not {len(context)}: backward does not add up their gradients")
        assert getattr(timesteps, "shape", None) == latents.shape[:1], (
            f"timesteps must be an array of shape {latents.shape[:1]}, one for each of the "
            f"latents, not {timesteps!r}")
        check_condition(self, "time_cond_proj_dim", self.time_embedding.cond_proj,
                        "timestep_cond", timestep_cond)
        for name, value in ("text_embeds", text_embeds), ("time_ids", time_ids):
            check_condition(self, "addition_embed_type", self.add_embedding, name, value)
        check_condition(self, "class_embed_type or num_class_embeds", self.class_embedding,
                        "class_labels", class_labels)
        t = sinusoidal(timesteps, settings.block_out_channels[0], settings, dtype)
        temb = self.time_embedding(t, tape, condition=timestep_cond)                # (B,E)
        if self.add_embedding:
            sizes = sinusoidal(time_ids, settings.addition_time_embed_dim, settings, dtype)
            added, cache = ops.concat(text_embeds, sizes.reshape(len(latents), -1))     # (B,P+6F)
            tape.save(self, cache)
            temb = temb + self.add_embedding(added, tape)
        if self.class_embedding:
            if settings.class_embed_type == "timestep":
                class_labels = sinusoidal(class_labels, settings.block_out_channels[0], settings,
                                          dtype)
            temb = temb + self.class_embedding(class_labels, tape)
        h = self.conv_in(latents, tape)
        skips = [h]
        for block in self.down_blocks:
            h = block(h, temb, context, skips, tape)
        h = self.mid_block(h, temb, context, tape)
        for block in self.up_blocks:
            h = block(h, temb, context, skips, tape)
        assert not skips, f"{len(skips)} skips were not used"
        h = self.conv_norm_out(h, tape)
        return self.conv_out(h, tape)

    @ends_early(UNetGradients(None, None))
    def backward(self, dy, tape):
        dh = self.conv_out.backward(dy, tape)
        dh = self.conv_norm_out.backward(dh, tape)
        grads = SimpleNamespace(skips=[], temb=0, context=0)    # of the blocks: a stack, two sums
        for block in reversed(self.up_blocks):
            dh = block.backward(dh, grads, tape)
        dh = self.mid_block.backward(dh, grads, tape)
        for block in reversed(self.down_blocks):
            dh = block.backward(dh, grads, tape)
        dh = dh + grads.skips.pop()                     # conv_in's output was the first skip: add
        assert not grads.skips, f"{len(grads.skips)} skip gradients were not used"
        result = UNetGradients(self.conv_in.backward(dh, tape), grads.context)
        if self.class_embedding:
            dlabels = self.class_embedding.backward(grads.temb, tape)
            # A timestep, like a row's number, has no gradient: only vectors do.
            result.class_labels = (
                None if self.settings.class_embed_type == "timestep" else dlabels)
        if self.add_embedding:
            dadded, _ = self.add_embedding.backward(grads.temb, tape)
            result.text_embeds, _ = ops.concat_backward(dadded, tape.load(self))
        _, result.timestep_cond = self.time_embedding.backward(grads.temb, tape)
        return result


class DownBlock2D(Module):
    """One level of the way down. Every output is pushed on the skips.

    transformer: keyword arguments of a Transformer2DModel after each residual block, or None.
    """

    def __init__(self, in_channels, out_channels, temb_channels, num_groups, eps, *, num_layers,
                 downsample, transformer=None):
        self.resnets = [ResnetBlock2D(out_channels if i else in_channels, out_channels, num_groups,
                                      eps, temb_channels) for i in range(num_layers)]
        self.attentions = _transformers(num_layers, out_channels, num_groups, transformer)
        self.downsamplers = [Downsample2D(out_channels, padding=(1, 1))] if downsample else []

    def forward(self, h, temb, context, skips, tape=NO_TAPE):
        for i, resnet in enumerate(self.resnets):
            h = checkpoint(resnet, tape, h, temb=temb)
            if self.attentions:
                h = checkpoint(self.attentions[i], tape, h, context)
            skips.append(h)
        for downsampler in self.downsamplers:
            h = downsampler(h, tape)
            skips.append(h)
        return h

    def backward(self, dh, grads, tape):
        for downsampler in self.downsamplers:
            dh = dh + grads.skips.pop()                 # used twice, below and on the way up: add
            dh = downsampler.backward(dh, tape)
        for i, resnet in reversed(list(enumerate(self.resnets))):
            dh = dh + grads.skips.pop()
            if self.attentions:
                dh, dcontext = checkpoint_backward(self.attentions[i], dh, tape)
                grads.context = grads.context + dcontext
            dh, dtemb = checkpoint_backward(resnet, dh, tape)
            grads.temb = grads.temb + dtemb
        return dh


class UpBlock2D(Module):
    """One level of the way up: each residual block reads h and the next skip, concatenated.

    skip_channels: a list, of the skips in the order in which they are read. transformer: as in
    DownBlock2D.
    """

    def __init__(self, in_channels, out_channels, skip_channels, temb_channels, num_groups, eps, *,
                 upsample, transformer=None):
        num_layers = len(skip_channels)
        state_channels = [in_channels] + [out_channels] * (num_layers - 1)
        self.resnets = [ResnetBlock2D(state + skip, out_channels, num_groups, eps, temb_channels)
                        for state, skip in zip(state_channels, skip_channels, strict=True)]
        self.attentions = _transformers(num_layers, out_channels, num_groups, transformer)
        self.upsamplers = [Upsample2D(out_channels)] if upsample else []

    def forward(self, h, temb, context, skips, tape=NO_TAPE):
        for i, resnet in enumerate(self.resnets):
            h, cache = ops.concat(h, for_contexts(skips.pop(), h))
            tape.save(self, cache)
            h = checkpoint(resnet, tape, h, temb=temb)
            if self.attentions:
                h = checkpoint(self.attentions[i], tape, h, context)
        for upsampler in self.upsamplers:               # to the size of the next skip
            h = upsampler(h, tape, size=skips[-1].shape[1:3])
        return h

    def backward(self, dh, grads, tape):
        for upsampler in self.upsamplers:
            dh = upsampler.backward(dh, tape)
        for i, resnet in reversed(list(enumerate(self.resnets))):
            if self.attentions:
                dh, dcontext = checkpoint_backward(self.attentions[i], dh, tape)
                grads.context = grads.context + dcontext
            dh, dtemb = checkpoint_backward(resnet, dh, tape)
            grads.temb = grads.temb + dtemb
            dh, dskip = ops.concat_backward(dh, tape.load(self))
            grads.skips.append(dskip)
        return dh


class UNetMidBlock2D(Module):
    """Residual block, transformer (its keyword arguments), residual block."""

    def __init__(self, channels, temb_channels, num_groups, eps, *, transformer):
        self.resnets = [ResnetBlock2D(channels, channels, num_groups, eps, temb_channels)
                        for _ in range(2)]
        self.attentions = _transformers(1, channels, num_groups, transformer)

    def forward(self, h, temb, context, tape=NO_TAPE):
        h = checkpoint(self.resnets[0], tape, h, temb=temb)
        h = checkpoint(self.attentions[0], tape, h, context)
        return checkpoint(self.resnets[1], tape, h, temb=temb)

    def backward(self, dh, grads, tape):
        dh, dtemb1 = checkpoint_backward(self.resnets[1], dh, tape)
        dh, dcontext = checkpoint_backward(self.attentions[0], dh, tape)
        dh, dtemb0 = checkpoint_backward(self.resnets[0], dh, tape)
        grads.temb = grads.temb + dtemb1 + dtemb0
        grads.context = grads.context + dcontext
        return dh


def _transformers(number, channels, num_groups, options):
    """So many Transformer2DModels with these keyword arguments; none for options None."""
    return [Transformer2DModel(channels, num_groups=num_groups, **options)
            for _ in range(number) if options is not None]


class Transformer2DModel(Module):
    """Transformer blocks with one token per position of the map; x is added to the output.

    context_channels: the width D of the context; None: as many as channels. only_cross_attention:
    of the blocks.
    """

    def __init__(self, channels, num_heads, context_channels=None, num_groups=32, num_layers=1,
                 linear_projection=False, only_cross_attention=False):
        C, D = channels, context_channels or channels
        self.norm = GroupNorm(C, num_groups, 1e-6)      # the residual blocks use norm_eps (1e-5)
        # The same on channels-last maps, but weight files have one or the other.
        self.proj_in, self.proj_out = (
            Linear(C, C) if linear_projection else Conv2d(C, C, 1) for _ in range(2))
        self.transformer_blocks = [BasicTransformerBlock(C, D, num_heads, only_cross_attention)
                                   for _ in range(num_layers)]

    def forward(self, x, context, tape=NO_TAPE):        # (B,H,W,C), (nB,M,D) -> (nB,H,W,C)
        h = self._blocks(x, context, tape)
        return for_contexts(x, h) + self.proj_out(h, tape)

    def again(self, x, context, tape=NO_TAPE):
        self.proj_out.again(self._blocks(x, context, tape), tape)

    def _blocks(self, x, context, tape=NO_TAPE):        # (B,H,W,C), (nB,M,D) -> (nB,H,W,C)
        B, H, W, C = x.shape
        h = self.norm(x, tape)
        h = self.proj_in(h, tape).reshape(B, -1, C)     # (B,N,C)
        for block in self.transformer_blocks:
            h = block(h, context, tape)
        return h.reshape(-1, H, W, C)

    def backward(self, dy, tape):                       # -> (B,H,W,C), (B,M,D)
        B, _, _, C = dy.shape
        dh = self.proj_out.backward(dy, tape).reshape(B, -1, C)
        dcontext = 0
        for block in reversed(self.transformer_blocks):
            dh, dcontext_block = block.backward(dh, tape)
            dcontext = dcontext + dcontext_block        # every block read the same context: add
        dh = self.proj_in.backward(dh.reshape(dy.shape), tape)
        return dy + self.norm.backward(dh, tape), dcontext      # x was used twice: add


class BasicTransformerBlock(Module):
    """Self-attention, cross-attention to the context, then a feed-forward layer for each token.

    Each works on the norm of x, and its output is added to x. only_cross_attention: the first one,
    too, attends to the context, which costs less than self-attention where the map is large.
    """

    def __init__(self, channels, context_channels, num_heads, only_cross_attention=False):
        self.only_cross_attention = only_cross_attention
        self.norm1 = LayerNorm(channels, 1e-5)
        self.attn1 = Attention(channels, context_channels if only_cross_attention else channels,
                               num_heads)
        self.norm2 = LayerNorm(channels, 1e-5)
        self.attn2 = Attention(channels, context_channels, num_heads)
        self.norm3 = LayerNorm(channels, 1e-5)
        self.ff = FeedForward(channels)

    def forward(self, x, context, tape=NO_TAPE):        # (B,N,C), (nB,M,D) -> (nB,N,C)
        if self.only_cross_attention:
            x = for_contexts(x, context)
        h = self.norm1(x, tape)
        x = x + self.attn1(h, context if self.only_cross_attention else h, tape)
        x = for_contexts(x, context)
        h = self.norm2(x, tape)
        x = x + self.attn2(h, context, tape)
        h = self.norm3(x, tape)
        return x + self.ff(h, tape)

    def backward(self, dy, tape):                       # -> (B,N,C), (B,M,D)
        dh = self.ff.backward(dy, tape)
        dx = dy + self.norm3.backward(dh, tape)         # each x was used twice: add
        dh, dcontext = self.attn2.backward(dx, tape)
        dx = dx + self.norm2.backward(dh, tape)
        dh, dother = self.attn1.backward(dx, tape)
        if self.only_cross_attention:
            dcontext = dcontext + dother                # both attentions read the context: add
        else:
            dh = dh + dother                            # h was its own context: add
        return dx + self.norm1.backward(dh, tape), dcontext
