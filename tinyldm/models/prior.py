"""The prior of unCLIP: a text's CLIP embeddings -> the CLIP embedding of a picture that fits it.

The first half of DALL-E 2. It is itself a diffusion model, whose sample is one vector instead of a
map: a causal transformer reads the text, the timestep and the noisy image embedding, and predicts
the clean one. The second half, the decoder, is a UNet conditioned on it: pipelines/unclip.py.
Source: Ramesh et al. 2022, "Hierarchical Text-Conditional Image Generation with CLIP Latents",
arXiv:2204.06125, section 2.2; kakaobrain/karlo.

The tokens, in the paper's order, and how many there are in karlo, whose tokens have D = 2048
channels (B batch, M text tokens, C and P widths of the image and of the text embedding):

    context         77      one vector for each token of the text, from CLIP's text transformer
    text_embeds      1      the whole text, as CLIP compares it with pictures
    timestep         1      a sinusoidal embedding, then a perceptron
    latents          1      the noisy image embedding
    query            1      learned; here the output is read
"""
from collections import namedtuple
from dataclasses import dataclass

from .. import ops
from ..backend import add_up, get_xp, wide
from ..configs import Config, within
from ..errors import TinyldmError
from ..layers import (
    NO_TAPE,
    LayerNorm,
    Linear,
    Module,
    Parameter,
    check_filled,
    checkpoint,
    checkpoint_backward,
    ends_early,
)
from .blocks import Attention, EmbeddingMLP, FeedForward

EPS = 1e-5                  # of every norm
FURTHER = 4                 # tokens after those of the text
HIDDEN = -10000.0           # added to the score of what a token must not see
PriorGradients = namedtuple("PriorGradients", "latents text_embeds context")


@dataclass(frozen=True, kw_only=True)
class PriorConfig(Config):
    """The public prior/config.json. Defaults are those of diffusers, which are karlo's."""

    CHANGES = {
        # Of the same class in other systems, such as Shap-E.
        "additional_embeddings": (FURTHER,), "added_emb_type": ("prd",),
        "encoder_hid_proj_type": ("linear",), "norm_in_type": (None,),
        "embedding_proj_norm_type": (None,), "time_embed_act_fn": ("silu", "swish"),
        "quantization_config": (None,)}
    UNUSED = frozenset({"dropout"})                     # drawing has none, nor has training here

    num_attention_heads: int = within(1, 1024, 32)
    attention_head_dim: int = within(1, 4096, 64)       # channels of a head
    num_layers: int = within(1, 256, 20)
    embedding_dim: int = within(1, 65536, 768)          # C, and the width of the context
    num_embeddings: int = within(1, 65536, 77)          # M
    embedding_proj_dim: int | None = within(1, 65536, None)     # P; None: embedding_dim
    clip_embed_dim: int | None = within(1, 65536, None)         # of the output; None the same
    time_embed_dim: int | None = within(1, 10**6, None)         # None: D

    def __post_init__(self):
        if self.width % 2:
            raise TinyldmError("num_attention_heads times attention_head_dim must be even, for "
                               f"sines and cosines of the timestep, not {self.width}")
        if self.time_embed_dim not in (None, self.width):
            raise TinyldmError(f"time_embed_dim = {self.time_embed_dim} is not supported, only "
                               f"null or {self.width}, the heads times their channels")

    @property
    def width(self):
        """D, the channels of a token."""
        return self.num_attention_heads * self.attention_head_dim


class PriorTransformer(Module):
    """config: the dict of the public prior/config.json; settings: the same as a PriorConfig.

    forward: latents (B,C), the noisy image embedding, timesteps (B,) in [0, 1000), text_embeds
    (B,P), context (B,M,C) -> (B,C), the clean image embedding as the model predicts it.
    mask (B,M): True for a token of the text, False for the padding behind its end. With it no token
    sees the padding, nor those after itself; without it, as in the public class, each sees all.
    backward: dy (B,C) -> PriorGradients: dlatents (B,C), dtext_embeds (B,P), dcontext (B,M,C).

    The model works on embeddings with a mean of 0 and a standard deviation of 1 in each channel.
    post_process_latents gives them those of CLIP, clip_mean and clip_std.
    Raises TinyldmError for a config that is not supported.
    """

    Settings = PriorConfig
    settings = property(lambda self: self.Settings.read(self.config))

    def __init__(self, config):
        self.config = config
        settings = self.settings
        C, D = settings.embedding_dim, settings.width
        output = settings.clip_embed_dim or C
        self.time_embedding = EmbeddingMLP(D, D)
        self.proj_in = Linear(C, D)
        self.embedding_proj = Linear(settings.embedding_proj_dim or C, D)
        self.encoder_hidden_states_proj = Linear(C, D)
        self.positional_embedding = Parameter(1, settings.num_embeddings + FURTHER, D)
        self.prd_embedding = Parameter(1, 1, D)
        self.transformer_blocks = [PriorBlock(D, settings.num_attention_heads)
                                   for _ in range(settings.num_layers)]
        self.norm_out = LayerNorm(D, EPS)
        self.proj_to_clip_embeddings = Linear(D, output)
        self.clip_mean, self.clip_std = Parameter(1, output), Parameter(1, output)

    def forward(self, latents, timesteps, text_embeds, context, tape=NO_TAPE, *, mask=None):
        settings, dtype, B = self.settings, latents.dtype, len(latents)
        xp, M, D = get_xp(latents), settings.num_embeddings, settings.width
        assert context.shape[:2] == (B, M), (
            f"the context must be (B,M,C) = ({B},{M},C), not {context.shape}")
        assert getattr(timesteps, "shape", None) == (B,), (
            f"timesteps must be an array of shape {(B,)}, one for each embedding, "
            f"not {timesteps!r}")
        # In float32 at least: float16 is too coarse for angles of 981.
        t, _ = ops.timestep_embedding(timesteps.astype(wide(dtype)), D)
        for parameter in (self.positional_embedding, self.prd_embedding):
            check_filled(self, parameter)
        time = self.time_embedding(t.astype(dtype, copy=False), tape)               # (B,D)
        text = self.embedding_proj(text_embeds, tape)
        noisy = self.proj_in(latents, tape)
        query = self.prd_embedding.data.astype(dtype, copy=False).repeat(B, axis=0) # (B,1,D)
        h = self.encoder_hidden_states_proj(context, tape)                          # (B,M,D)
        h = xp.concatenate([h, text[:, None], time[:, None], noisy[:, None], query], axis=1)
        h += self.positional_embedding.data             # (B,M+4,D); in place: nothing else uses it
        tape.save(self, None)                           # the two embeddings need no cache
        scores = None if mask is None else hidden(mask, M + FURTHER, wide(dtype))
        for block in self.transformer_blocks:
            h = checkpoint(block, tape, h, mask=scores)
        h = self.norm_out(h[:, -1], tape)               # (B,D): only the query's output is read
        return self.proj_to_clip_embeddings(h, tape)

    @ends_early(PriorGradients(None, None, None))
    def backward(self, dy, tape):
        dlast = self.proj_to_clip_embeddings.backward(dy, tape)
        dlast = self.norm_out.backward(dlast, tape)                                 # (B,D)
        N = self.positional_embedding.shape[1]
        dh = get_xp(dlast).zeros((len(dlast), N, dlast.shape[1]), dlast.dtype)
        dh[:, -1] = dlast
        for block in reversed(self.transformer_blocks):
            dh = checkpoint_backward(block, dh, tape)
        tape.load(self)
        dpositions = add_up(dh, axis=0)[None]           # undoes the broadcast over the batch
        self.positional_embedding.add_grad(dpositions)
        self.prd_embedding.add_grad(dpositions[:, -1:])
        dcontext = self.encoder_hidden_states_proj.backward(dh[:, :-FURTHER], tape)
        dlatents = self.proj_in.backward(dh[:, -2], tape)
        dtext_embeds = self.embedding_proj.backward(dh[:, -4], tape)
        self.time_embedding.backward(dh[:, -3], tape)
        return PriorGradients(dlatents, dtext_embeds, dcontext)

    def post_process_latents(self, latents, tape=NO_TAPE):
        """Give sampled embeddings CLIP's mean and standard deviation: (B,C) -> (B,C)."""
        for parameter in (self.clip_mean, self.clip_std):
            check_filled(self, parameter)
        y, cache = ops.scale_shift(latents, self.clip_std.data, self.clip_mean.data)
        tape.save(self, cache)
        return y

    @ends_early()
    def post_process_latents_backward(self, dy, tape):
        """dy (B,C) -> dlatents (B,C)."""
        dlatents, dstd, dmean = ops.scale_shift_backward(dy, tape.load(self))
        self.clip_std.add_grad(dstd)
        self.clip_mean.add_grad(dmean)
        return dlatents


def hidden(mask, N, dtype):
    """What is added to the scores of attention: (B,M) of bool -> (B,N,N), N = M + 4.

    HIDDEN for each token of the padding, and once more for each token after the query's own.
    """
    xp, (B, M) = get_xp(mask), mask.shape
    scores = xp.zeros((B, N, N), dtype)
    scores[:, :, :M] = xp.where(mask[:, None].astype(bool), 0, HIDDEN)
    scores += xp.triu(xp.full((N, N), HIDDEN, dtype), 1)
    return scores


class PriorBlock(Module):
    """Self-attention, then a perceptron. Each works on the norm of x, and its output is added to x.

    Called BasicTransformerBlock in diffusers; without a cross-attention it has no norm2.
    """

    def __init__(self, channels, num_heads):
        self.norm1 = LayerNorm(channels, EPS)
        self.attn1 = Attention(channels, channels, num_heads, bias=True)
        self.norm3 = LayerNorm(channels, EPS)
        self.ff = FeedForward(channels, "gelu")

    def forward(self, x, tape=NO_TAPE, *, mask=None):   # (B,N,D) -> (B,N,D)
        h = self.norm1(x, tape)
        x = x + self.attn1(h, h, tape, mask=mask)
        h = self.norm3(x, tape)
        return x + self.ff(h, tape)

    def backward(self, dy, tape):
        dh = self.ff.backward(dy, tape)
        dx = dy + self.norm3.backward(dh, tape)         # each x was used twice: add
        dh, dcontext = self.attn1.backward(dx, tape)
        dh = dh + dcontext                              # h was its own context: add
        return dx + self.norm1.backward(dh, tape)


@dataclass(frozen=True, kw_only=True)
class ImageNormalizerConfig(Config):
    """The public image_normalizer/config.json."""

    CHANGES = {"quantization_config": (None,)}

    embedding_dim: int = within(1, 65536, 768)


class StableUnCLIPImageNormalizer(Module):
    """CLIP's image embeddings, channel by channel: their mean and standard deviation.

    Stable unCLIP adds noise to embeddings that are normalised so. They are counted over a data set,
    not trained, so there is no backward.
    """

    Settings = ImageNormalizerConfig
    settings = property(lambda self: self.Settings.read(self.config))

    def __init__(self, config):
        self.config = config
        self.mean, self.std = (Parameter(1, self.settings.embedding_dim) for _ in range(2))

    def scale(self, embeds):
        """CLIP's embeddings (B,C) -> a mean of 0 and a standard deviation of 1 in each channel."""
        return (embeds - self.mean.data) / self.std.data

    def unscale(self, embeds):
        """Undo scale: (B,C) -> (B,C)."""
        return embeds * self.std.data + self.mean.data
