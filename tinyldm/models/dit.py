"""DiT: a transformer in the UNet's place. Noisy latents, a timestep, a class -> the noise in them.

The sampler calls it at every step. It cuts the latents into patches, one token each, and all blocks
keep that number of tokens: there are no levels and no skips. Class and timestep become one vector,
the condition. Every block turns it into numbers that shift and scale the tokens before attention
and perceptron, and gate what these add (adaLN-Zero).
Source: Peebles & Xie 2022, "Scalable Diffusion Models with Transformers", arXiv:2212.09748,
section 3.2, figure 3; facebookresearch/DiT, models.py.

DiT-XL/2 with latents of 32x32 (256x256 pixels): 16x16 patches of 2x2, so 256 tokens of 1152
channels, 28 blocks. B batch, T tokens, D = heads x width of a head, p side of a patch.
"""
from dataclasses import dataclass

import numpy as np

from .. import ops
from ..backend import get_xp, wide
from ..configs import Config, one_of, within
from ..errors import TinyldmError
from ..layers import (
    NO_TAPE,
    Activation,
    Conv2d,
    Embedding,
    Linear,
    Module,
    checkpoint,
    checkpoint_backward,
    ends_early,
)
from .blocks import Attention, FeedForward, TimestepEmbedding

FREQUENCIES = 256           # numbers of the sinusoidal embedding of a timestep
EPS = 1e-6                  # of all norms except a block's second, which has norm_eps

# Layers, heads, channels per head. The sizes S, B, L and XL of the paper's table 1.
SIZES = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}


@dataclass(frozen=True, kw_only=True)
class DiTConfig(Config):
    """The public transformer/config.json. Defaults are those of diffusers."""

    CHANGES = {
        "norm_elementwise_affine": (False,), "quantization_config": (None,),
        # Of Transformer2DModel, the class that older files name.
        "cross_attention_dim": (None,), "num_vector_embeds": (None,), "caption_channels": (None,),
        "only_cross_attention": (False,), "double_self_attention": (False,),
        "attention_type": ("default",), "interpolation_scale": (None, 1),
        "use_additional_conditions": (None, False)}
    UNUSED = frozenset({
        "dropout",                                      # drawing has none, nor has training here
        "upcast_attention",                             # the softmax here is float32 at least
        "norm_num_groups", "use_linear_projection"})    # DiT has no group norm, no such projection

    num_layers: int = within(1, 256, 28)
    num_attention_heads: int = within(1, 1024, 16)
    attention_head_dim: int = within(1, 4096, 72)       # channels of a head
    in_channels: int = within(1, 1024, 4)
    out_channels: int | None = within(1, 2048, None)    # twice in_channels with a learned variance
    patch_size: int = within(1, 64, 2)
    sample_size: int = within(1, 1024, 32)              # height and width of the latents
    num_embeds_ada_norm: int = within(1, 10**6, 1000)   # classes; one more stands for "no class"
    attention_bias: bool = True
    activation_fn: str = one_of("gelu-approximate", default="gelu-approximate")
    norm_type: str = one_of("ada_norm_zero", default="ada_norm_zero")
    norm_eps: float = within(0, 1, 1e-5)                # the original's is 1e-6
    # What is subtracted from 128 in the timestep's frequencies. diffusers has 1, the original 0.
    freq_shift: int = within(0, 1, 1)

    def __post_init__(self):
        if self.sample_size % self.patch_size:
            raise TinyldmError(f"patch_size must divide sample_size, {self.sample_size}, but "
                               f"{self.patch_size} does not")
        if self.width % 4:
            raise TinyldmError("num_attention_heads times attention_head_dim must be a multiple of "
                               f"4, for the sines and cosines of two positions, not {self.width}")

    @property
    def width(self):
        """D, the channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def learns_variance(self):
        """Whether the output holds a variance behind the noise."""
        return self.out_channels == 2 * self.in_channels


def config_of(size, patch_size, sample_size=32, **changes):
    """The config of DiT-S, B, L or XL for ImageNet's classes, with patches of 2, 4 or 8."""
    layers, heads, width = SIZES[size]
    return {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": width,
            "in_channels": 4, "out_channels": 8, "patch_size": patch_size,
            "sample_size": sample_size, "num_embeds_ada_norm": 1000, "attention_bias": True,
            "activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False, **changes}


class DiTTransformer2DModel(Module):
    """config: the dict of the public transformer/config.json; settings: the same as a DiTConfig.

    forward: latents (B,H,W,C), H = W = sample_size, timesteps (B,) in [0, 1000), class_labels (B,)
    integers in [0, num_embeds_ada_norm], the last of which means "no class" -> model_output
    (B,H,W,O): the noise, and for O = 2C behind it what the learned variance is made of.
    dropped: where True, the label is replaced by "no class", as in training for classifier-free
    guidance; a mask (B,), or (num_layers + 1, B) with a row for each block and one for the output,
    as diffusers draws it.
    backward: dy (B,H,W,O) -> dlatents (B,H,W,C).
    Raises TinyldmError for a config that is not supported.
    """

    Settings = DiTConfig
    settings = property(lambda self: self.Settings.read(self.config))

    def __init__(self, config):
        self.config = config
        settings = self.settings
        D, p = settings.width, settings.patch_size
        channels = settings.out_channels or settings.in_channels
        self.pos_embed = PatchEmbed(settings.in_channels, D, p)
        self.transformer_blocks = [DiTBlock(settings) for _ in range(settings.num_layers)]
        self.act = Activation("silu")
        self.proj_out_1 = Linear(D, 2 * D)
        self.proj_out_2 = Linear(D, p * p * channels)

    def forward(self, latents, timesteps, class_labels, tape=NO_TAPE, *, dropped=None):
        settings, dtype, xp = self.settings, latents.dtype, get_xp(latents)
        B, *size = latents.shape[:3]
        assert size == [settings.sample_size] * 2, (
            f"the latents must be {settings.sample_size} high and wide, not {size}")
        for name, array in ("timesteps", timesteps), ("class_labels", class_labels):
            assert getattr(array, "shape", None) == (B,), (
                f"{name} must be an array of shape {(B,)}, one for each of the latents, "
                f"not {array!r}")
        if dropped is not None:
            class_labels = xp.where(dropped, settings.num_embeds_ada_norm, class_labels)
        *block_labels, last_labels = xp.broadcast_to(class_labels, (settings.num_layers + 1, B))
        # In float32 at least: float16 is too coarse for angles of 981.
        t, _ = ops.timestep_embedding(timesteps.astype(wide(dtype)), FREQUENCIES,
                                      freq_shift=settings.freq_shift)
        t = t.astype(dtype, copy=False)                 # (B,256)
        h = self.pos_embed(latents, tape)               # (B,T,D)
        for block, own_labels in zip(self.transformer_blocks, block_labels):
            h = checkpoint(block, tape, h, t, own_labels)
        c = self.transformer_blocks[0].norm1.emb(t, last_labels, tape)  # (B,D), as diffusers
        shift, scale = _split(self.proj_out_1(self.act(c, tape), tape), 2)
        h, cache = ops.ada_layer_norm(h, shift, scale, EPS)
        tape.save(self, cache)
        h = self.proj_out_2(h, tape)                    # (B,T,p*p*O)
        y, cache = ops.unpatchify(h, settings.patch_size)
        tape.save(self, cache)
        return y

    @ends_early()
    def backward(self, dy, tape):
        dh = ops.unpatchify_backward(dy, tape.load(self))
        dh = self.proj_out_2.backward(dh, tape)
        dh, *dm = ops.ada_layer_norm_backward(dh, tape.load(self))
        dc = self.proj_out_1.backward(_join(dm), tape)
        self.transformer_blocks[0].norm1.emb.backward(self.act.backward(dc, tape), tape)
        for block in reversed(self.transformer_blocks):
            dh = checkpoint_backward(block, dh, tape)
        return self.pos_embed.backward(dh, tape)


def positions(xp, G, D):
    """The fixed table (G*G,D) that tells tokens their places in a G x G square. xp: numpy or cupy.

    A sinusoidal embedding of the column in the first half of the channels, of the row in the
    second. Computed in float64 and rounded to float32, as in the public files.
    """
    e, _ = ops.timestep_embedding(xp.arange(G, dtype=np.float64), D // 2, flip_sin_to_cos=False)
    columns, rows = e[None].repeat(G, axis=0), e[:, None].repeat(G, axis=1)         # (G,G,D/2)
    return xp.concatenate([columns, rows], axis=-1).astype(np.float32).reshape(G * G, D)


class PatchEmbed(Module):
    """Each patch of p x p pixels becomes a token, to which its position is added."""

    def __init__(self, channels, width, patch_size):
        self.proj = Conv2d(channels, width, patch_size, stride=patch_size, padding=(0, 0))

    def forward(self, x, tape=NO_TAPE):                 # (B,H,W,C) -> (B,T,D)
        h = self.proj(x, tape)                          # (B,G,G,D)
        B, G, _, D = h.shape
        tape.save(self, G)
        h = h.reshape(B, G * G, D)
        h += positions(get_xp(h), G, D).astype(h.dtype)     # in place: nothing else uses it
        return h

    def backward(self, dy, tape):
        G = tape.load(self)
        return self.proj.backward(dy.reshape(len(dy), G, G, -1), tape)


class DiTBlock(Module):
    """Self-attention, then a perceptron. Each works on the modulated norm of x, and adds its gated
    output to x. Called BasicTransformerBlock in diffusers."""

    def __init__(self, settings):
        D = settings.width
        self.norm1 = AdaLayerNormZero(D, settings.num_embeds_ada_norm)
        self.attn1 = Attention(D, D, settings.num_attention_heads, settings.attention_bias)
        self.ff = FeedForward(D, "gelu_tanh")
        self.eps = settings.norm_eps

    def forward(self, x, t, labels, tape=NO_TAPE):      # (B,T,D), (B,256), (B,) -> (B,T,D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(t, labels, tape)
        h = self._run(ops.ada_layer_norm, tape, x, shift_msa, scale_msa, EPS)
        h = self.attn1(h, h, tape)
        x = self._run(ops.add_gated, tape, x, h, gate_msa)
        h = self._run(ops.ada_layer_norm, tape, x, shift_mlp, scale_mlp, self.eps)
        h = self.ff(h, tape)
        return self._run(ops.add_gated, tape, x, h, gate_mlp)

    def backward(self, dy, tape):                       # (B,T,D) -> (B,T,D)
        dx, dh, dgate_mlp = ops.add_gated_backward(dy, tape.load(self))
        dh = self.ff.backward(dh, tape)
        dh, dshift_mlp, dscale_mlp = ops.ada_layer_norm_backward(dh, tape.load(self))
        dx = dx + dh                                    # x was used twice: add
        dx, dh, dgate_msa = ops.add_gated_backward(dx, tape.load(self))
        dh, dcontext = self.attn1.backward(dh, tape)
        dh = dh + dcontext                              # h was its own context: add
        dh, dshift_msa, dscale_msa = ops.ada_layer_norm_backward(dh, tape.load(self))
        self.norm1.backward((dshift_msa, dscale_msa, dgate_msa, dshift_mlp, dscale_mlp, dgate_mlp),
                            tape)
        return dx + dh

    def _run(self, op, tape, *inputs):
        y, cache = op(*inputs)
        tape.save(self, cache)
        return y


class AdaLayerNormZero(Module):
    """Timestep and label -> the six vectors (B,D) of a block: shift, scale and gate of its
    attention, then those of its perceptron."""

    def __init__(self, width, num_classes):
        self.emb = CombinedTimestepLabelEmbeddings(width, num_classes)
        self.silu = Activation("silu")
        self.linear = Linear(width, 6 * width)

    def forward(self, t, labels, tape=NO_TAPE):         # (B,256), (B,) -> six (B,D)
        c = self.emb(t, labels, tape)
        c = self.silu(c, tape)
        return _split(self.linear(c, tape), 6)

    def backward(self, dm, tape):
        dc = self.linear.backward(_join(dm), tape)
        dc = self.silu.backward(dc, tape)
        self.emb.backward(dc, tape)


class CombinedTimestepLabelEmbeddings(Module):
    """The condition: a perceptron on the timestep's sinusoidal embedding, plus a row of a table."""

    def __init__(self, width, num_classes):
        self.timestep_embedder = TimestepEmbedding(FREQUENCIES, width)
        self.class_embedder = LabelEmbedding(width, num_classes)

    def forward(self, t, labels, tape=NO_TAPE):         # (B,256), (B,) -> (B,D)
        c = self.timestep_embedder(t, tape)
        return c + self.class_embedder.embedding_table(labels, tape)

    def backward(self, dc, tape):
        self.class_embedder.embedding_table.backward(dc, tape)
        self.timestep_embedder.backward(dc, tape)


class LabelEmbedding(Module):
    """Holds the table, whose last row stands for "no class": the names in files have this level."""

    def __init__(self, width, num_classes):
        self.embedding_table = Embedding(num_classes + 1, width)


def _split(m, count):                                   # (B, count*D) -> count views (B,D)
    D = m.shape[1] // count
    return [m[:, i * D:(i + 1) * D] for i in range(count)]


def _join(dm):
    return get_xp(dm[0]).concatenate(dm, axis=1)
