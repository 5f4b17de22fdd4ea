"""The UNet: noisy latents, a timestep and the context -> the noise that is in the latents.

The heart of the flow: the sampler calls it once a step. Down through levels of half the size, a
middle, and up again, each level of the way up reading what the way down left behind (the skips).
Source: Rombach et al. 2022, arXiv:2112.10752, section 3.3 and appendix E.2.1; Ho et al. 2020,
arXiv:2006.11239, appendix B; Ronneberger et al. 2015, arXiv:1505.04597.

For Stable Diffusion 1.x at 64×64 latents (rows: what the skips hold, C channels on H×H):

    conv_in                              320 on 64
    down_blocks.0  2 × (resnet, attention), halve   320 on 64,   320 on 64,   320 on 32
    down_blocks.1  2 × (resnet, attention), halve   640 on 32,   640 on 32,   640 on 16
    down_blocks.2  2 × (resnet, attention), halve  1280 on 16,  1280 on 16,  1280 on  8
    down_blocks.3  2 × resnet                      1280 on  8,  1280 on  8
    mid_block      resnet, attention, resnet       1280 on  8
    up_blocks.0…3  3 × (skip joined, resnet[, attention]), doubled between: the same table, upwards
"""
from .. import ops
from ..backend import wide
from ..errors import TinyldmError
from ..layers import (
    NO_TAPE,
    Activation,
    Conv2d,
    GroupNorm,
    GroupNormSiLU,
    LayerNorm,
    Linear,
    Module,
)
from .blocks import Attention, Downsample2D, ResnetBlock2D, Upsample2D, require

DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}      # name -> has attention
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}


class UNet2DConditionModel(Module):
    """config: the dict of the public unet/config.json.

    forward: latents (B,H,W,4), timesteps (B,) in [0, 1000), context (B,M,D) -> noise_pred
    (B,H,W,4).
    backward: dy (B,H,W,4) -> dlatents (B,H,W,4), dcontext (B,M,D).

    What else some models are told changes the time embedding: Latent Consistency Models the
    guidance they imitate, timestep_cond (B,256), its waves (Luo et al. 2023, arXiv:2310.04378,
    section 4.3); Stable Diffusion XL the prompt as one vector, text_embeds (B,P), and sizes and
    crop in pixels, time_ids (B,6) (Podell et al. 2023, arXiv:2307.01952, section 2.2). Its backward
    gives dtext_embeds (B,P) as well.
    Raises TinyldmError for a config it does not build.
    """

    def __init__(self, config):
        self.config = config
        levels = _levels(config)
        widths = config["block_out_channels"]
        groups, eps = config["norm_num_groups"], config["norm_eps"]
        E = 4 * widths[0]
        self.conv_in = Conv2d(config["in_channels"], widths[0])
        self.time_embedding = TimestepEmbedding(widths[0], E, config.get("time_cond_proj_dim"))
        self.add_embedding = None
        if config.get("addition_embed_type"):
            self.add_embedding = TimestepEmbedding(
                config["projection_class_embeddings_input_dim"], E)
        self.down_blocks, self.up_blocks = [], []

        skips, C = [widths[0]], widths[0]               # the channels of what forward will push
        for i, level in enumerate(levels):
            last = i == len(levels) - 1
            self.down_blocks.append(DownBlock2D(level, C, E, groups, eps, downsample=not last))
            C = level.width
            skips += [C] * (level.layers + (not last))
        self.mid_block = UNetMidBlock2D(levels[-1], E, groups, eps)
        for i, level in enumerate(reversed(levels)):
            joined = [skips.pop() for _ in range(level.layers + 1)]
            last = i == len(levels) - 1
            self.up_blocks.append(UpBlock2D(level, C, joined, E, groups, eps, upsample=not last))
            C = level.width

        self.conv_norm_out = GroupNormSiLU(C, groups, eps)
        self.conv_out = Conv2d(C, config["out_channels"])

    def forward(self, latents, timesteps, context, tape=NO_TAPE, timestep_cond=None,
                text_embeds=None, time_ids=None):
        waves = self._waves(timesteps, self.config["block_out_channels"][0], latents.dtype)
        temb = self.time_embedding(waves, tape, timestep_cond)                      # (B,E)
        if self.add_embedding is not None:
            waves = self._waves(time_ids.reshape(-1), self.config["addition_time_embed_dim"],
                                latents.dtype).reshape(len(latents), -1)
            told, cache = ops.concat(text_embeds, waves)
            tape.save(self, cache)
            temb = temb + self.add_embedding(told, tape)
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

    def backward(self, dy, tape):
        dh = self.conv_out.backward(dy, tape)
        dh = self.conv_norm_out.backward(dh, tape)
        grads = Gradients()
        for block in reversed(self.up_blocks):
            dh = block.backward(dh, grads, tape)
        dh = self.mid_block.backward(dh, grads, tape)
        for block in reversed(self.down_blocks):
            dh = block.backward(dh, grads, tape)
        dh = dh + grads.skips.pop()                     # conv_in's output was the first skip: add
        assert not grads.skips, f"{len(grads.skips)} skip gradients were not used"
        dlatents = self.conv_in.backward(dh, tape)
        dtext_embeds = []
        if self.add_embedding is not None:              # temb was a sum: to both
            dtold = self.add_embedding.backward(grads.temb, tape)
            dtext_embeds = ops.concat_backward(dtold, tape.load(self))[:1]
        self.time_embedding.backward(grads.temb, tape)
        return dlatents, grads.context, *dtext_embeds

    def _waves(self, timesteps, dim, dtype):
        """(n,) -> (n,dim). Not in float16, in which 981 times a frequency has no digits left."""
        waves, _ = ops.timestep_embedding(
            timesteps.astype(wide(dtype)), dim, self.config.get("flip_sin_to_cos", True),
            self.config.get("freq_shift", 0))
        return waves.astype(dtype, copy=False)


class Gradients:
    """What gathers while backward walks the blocks: of skips a stack, of temb and context a sum."""

    def __init__(self):
        self.skips, self.temb, self.context = [], 0, 0


class Level:
    """One resolution of the UNet, as the config describes it."""

    def __init__(self, width, layers, attention, num_heads, transformer_layers, context_width,
                 linear_projection):
        self.width, self.layers, self.attention = width, layers, attention
        self.num_heads, self.transformer_layers = num_heads, transformer_layers
        self.context_width, self.linear_projection = context_width, linear_projection


def _per_level(value, levels):
    return list(value) if isinstance(value, (list, tuple)) else [value] * levels


def _levels(config):
    """The config's parallel lists as one list of levels, refusing what is not built."""
    require(config, act_fn=("silu",), center_input_sample=(False,), downsample_padding=(1,),
            mid_block_scale_factor=(1,), mid_block_type=("UNetMidBlock2DCrossAttn",),
            resnet_time_scale_shift=("default",), time_embedding_type=("positional",),
            dual_cross_attention=(False,), only_cross_attention=(False,),
            class_embed_type=(None,), num_class_embeds=(None,),
            addition_embed_type=(None, "text_time"), encoder_hid_dim=(None,),
            encoder_hid_dim_type=(None,),
            time_embedding_dim=(None,), conv_in_kernel=(3,), conv_out_kernel=(3,),
            attention_type=("default",), dropout=(0, 0.0), cross_attention_norm=(None,),
            class_embeddings_concat=(False,),
            timestep_post_act=(None,), time_embedding_act_fn=(None,),
            resnet_out_scale_factor=(1.0,), resnet_skip_time_act=(False,))
    widths = config["block_out_channels"]
    down, up = config["down_block_types"], config["up_block_types"]
    for names, known in ((down, DOWN_BLOCKS), (up, UP_BLOCKS)):
        for name in names:
            if name not in known:
                raise TinyldmError(f"UNet block {name!r} is not supported, only {', '.join(known)}")
    if not len(widths) == len(down) == len(up):
        raise TinyldmError("block_out_channels, down_block_types and up_block_types have "
                           f"{len(widths)}, {len(down)} and {len(up)} entries: "
                           "expected as many of each")
    if [DOWN_BLOCKS[name] for name in down] != [UP_BLOCKS[name] for name in reversed(up)]:
        raise TinyldmError(f"up_block_types {up} do not mirror down_block_types {down}")
    # Stable Diffusion 1.x calls the number of heads "attention_head_dim"; the name stayed.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    columns = zip(widths, _per_level(config.get("layers_per_block", 2), len(widths)),
                  (DOWN_BLOCKS[name] for name in down), _per_level(heads, len(widths)),
                  _per_level(config.get("transformer_layers_per_block", 1), len(widths)),
                  _per_level(config["cross_attention_dim"], len(widths)))
    return [Level(*column, config.get("use_linear_projection", False)) for column in columns]


class TimestepEmbedding(Module):
    """The timestep's waves through a small perceptron: (B,C), condition (B,F) or None -> (B,E)."""

    def __init__(self, channels, temb_channels, cond_channels=None):
        self.cond_proj = Linear(cond_channels, channels, bias=False) if cond_channels else None
        self.linear_1 = Linear(channels, temb_channels)
        self.act = Activation("silu")
        self.linear_2 = Linear(temb_channels, temb_channels)

    def forward(self, waves, tape=NO_TAPE, condition=None):
        if self.cond_proj is not None:
            waves = waves + self.cond_proj(condition, tape)
        h = self.linear_1(waves, tape)
        h = self.act(h, tape)
        return self.linear_2(h, tape)

    def backward(self, dtemb, tape):
        dh = self.linear_2.backward(dtemb, tape)
        dh = self.act.backward(dh, tape)
        dwaves = self.linear_1.backward(dh, tape)
        if self.cond_proj is not None:
            self.cond_proj.backward(dwaves, tape)
        return dwaves


class DownBlock2D(Module):
    """One level of the way down, with attention or without. Every output is pushed on the skips."""

    def __init__(self, level, in_channels, temb_channels, groups, eps, downsample):
        self.resnets = [ResnetBlock2D(in_channels if i == 0 else level.width, level.width,
                                      groups, eps, temb_channels)
                        for i in range(level.layers)]
        self.attentions = [Transformer2DModel(level, groups)
                           for _ in range(level.layers * level.attention)]
        self.downsamplers = [Downsample2D(level.width, padding=(1, 1))] if downsample else []

    def forward(self, h, temb, context, skips, tape=NO_TAPE):
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, temb, tape)
            if self.attentions:
                h = self.attentions[i](h, context, tape)
            skips.append(h)
        for downsampler in self.downsamplers:
            h = downsampler(h, tape)
            skips.append(h)
        return h

    def backward(self, dh, grads, tape):
        for downsampler in self.downsamplers:
            dh = dh + grads.skips.pop()                 # went on down, and to the way up: add
            dh = downsampler.backward(dh, tape)
        for i, resnet in reversed(list(enumerate(self.resnets))):
            dh = dh + grads.skips.pop()
            if self.attentions:
                dh, dcontext = self.attentions[i].backward(dh, tape)
                grads.context = grads.context + dcontext
            dh, dtemb = resnet.backward(dh, tape)
            grads.temb = grads.temb + dtemb
        return dh


class UpBlock2D(Module):
    """One level of the way up: each residual block reads the state with the next skip behind it."""

    def __init__(self, level, in_channels, skip_channels, temb_channels, groups, eps, upsample):
        state_channels = [in_channels] + [level.width] * level.layers
        self.resnets = [ResnetBlock2D(state + skip, level.width, groups, eps, temb_channels)
                        for state, skip in zip(state_channels, skip_channels, strict=True)]
        self.attentions = [Transformer2DModel(level, groups)
                           for _ in range((level.layers + 1) * level.attention)]
        self.upsamplers = [Upsample2D(level.width)] if upsample else []

    def forward(self, h, temb, context, skips, tape=NO_TAPE):
        for i, resnet in enumerate(self.resnets):
            h, cache = ops.concat(h, skips.pop())
            tape.save(self, cache)
            h = resnet(h, temb, tape)
            if self.attentions:
                h = self.attentions[i](h, context, tape)
        for upsampler in self.upsamplers:               # to the size of the skip it will meet
            h = upsampler(h, skips[-1].shape[1:3], tape)
        return h

    def backward(self, dh, grads, tape):
        for upsampler in self.upsamplers:
            dh = upsampler.backward(dh, tape)
        for i, resnet in reversed(list(enumerate(self.resnets))):
            if self.attentions:
                dh, dcontext = self.attentions[i].backward(dh, tape)
                grads.context = grads.context + dcontext
            dh, dtemb = resnet.backward(dh, tape)
            grads.temb = grads.temb + dtemb
            dh, dskip = ops.concat_backward(dh, tape.load(self))
            grads.skips.append(dskip)
        return dh


class UNetMidBlock2D(Module):
    def __init__(self, level, temb_channels, groups, eps):
        self.resnets = [ResnetBlock2D(level.width, level.width, groups, eps, temb_channels)
                        for _ in range(2)]
        self.attentions = [Transformer2DModel(level, groups)]

    def forward(self, h, temb, context, tape=NO_TAPE):
        h = self.resnets[0](h, temb, tape)
        h = self.attentions[0](h, context, tape)
        return self.resnets[1](h, temb, tape)

    def backward(self, dh, grads, tape):
        dh, dtemb1 = self.resnets[1].backward(dh, tape)
        dh, dcontext = self.attentions[0].backward(dh, tape)
        dh, dtemb0 = self.resnets[0].backward(dh, tape)
        grads.temb = grads.temb + dtemb1 + dtemb0
        grads.context = grads.context + dcontext
        return dh


class Transformer2DModel(Module):
    """Every position of the map as a token through transformer blocks, added back to the map."""

    def __init__(self, level, groups):
        C = level.width
        self.norm = GroupNorm(C, groups, 1e-6)          # norm_eps (1e-5) in the residual blocks
        # On channels-last maps a 1×1 convolution and a linear layer are the same; both are in use.
        self.proj_in, self.proj_out = (
            Linear(C, C) if level.linear_projection else Conv2d(C, C, 1) for _ in range(2))
        self.transformer_blocks = [BasicTransformerBlock(C, level.context_width, level.num_heads)
                                   for _ in range(level.transformer_layers)]

    def forward(self, x, context, tape=NO_TAPE):        # (B,H,W,C), (B,M,D) -> (B,H,W,C)
        B, _, _, C = x.shape
        h = self.norm(x, tape)
        h = self.proj_in(h, tape).reshape(B, -1, C)     # (B,N,C)
        for block in self.transformer_blocks:
            h = block(h, context, tape)
        return x + self.proj_out(h.reshape(x.shape), tape)

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
    """Positions look at each other, then at the prompt, then each thinks for itself.

    x is carried through all three.
    """

    def __init__(self, channels, context_channels, num_heads):
        self.norm1 = LayerNorm(channels, 1e-5)
        self.attn1 = Attention(channels, channels, num_heads)
        self.norm2 = LayerNorm(channels, 1e-5)
        self.attn2 = Attention(channels, context_channels, num_heads)
        self.norm3 = LayerNorm(channels, 1e-5)
        self.ff = FeedForward(channels)

    def forward(self, x, context, tape=NO_TAPE):        # (B,N,C), (B,M,D) -> (B,N,C)
        h = self.norm1(x, tape)
        x = x + self.attn1(h, h, tape)
        h = self.norm2(x, tape)
        x = x + self.attn2(h, context, tape)
        h = self.norm3(x, tape)
        return x + self.ff(h, tape)

    def backward(self, dy, tape):                       # -> (B,N,C), (B,M,D)
        dh = self.ff.backward(dy, tape)
        dx = dy + self.norm3.backward(dh, tape)         # each x was used twice: add
        dh, dcontext = self.attn2.backward(dx, tape)
        dx = dx + self.norm2.backward(dh, tape)
        dh, dh_context = self.attn1.backward(dx, tape)
        dh = dh + dh_context                            # h was its own context: add
        return dx + self.norm1.backward(dh, tape), dcontext


class FeedForward(Module):
    """A gated perceptron of inner width 4C."""

    def __init__(self, channels):
        # Between the two the files count a dropout, which is not built.
        self.net = [GEGLU(channels, 4 * channels), None, Linear(4 * channels, channels)]

    def forward(self, x, tape=NO_TAPE):                 # (B,N,C) -> (B,N,C)
        h = self.net[0](x, tape)                        # (B,N,4C)
        return self.net[2](h, tape)

    def backward(self, dy, tape):
        dh = self.net[2].backward(dy, tape)
        return self.net[0].backward(dh, tape)


class GEGLU(Module):
    def __init__(self, channels, hidden):
        self.proj = Linear(channels, 2 * hidden)
        self.act = Activation("geglu")

    def forward(self, x, tape=NO_TAPE):                 # (B,N,C) -> (B,N,4C)
        h = self.proj(x, tape)
        return self.act(h, tape)

    def backward(self, dy, tape):
        dh = self.act.backward(dy, tape)
        return self.proj.backward(dh, tape)
