"""CLIP's text transformer: token ids -> one vector per token, the context that the UNet attends to.

Between the tokenizer and the UNet. The transformer is causal: token n sees tokens 0..n only, so the
end token and the padding after it see the whole prompt.
Source: Radford et al. 2021, "Learning Transferable Visual Models", arXiv:2103.00020, section 2.4.
"""
from dataclasses import dataclass

from .. import ops
from ..backend import add_up, get_xp
from ..layers import NO_TAPE, Activation, Embedding, LayerNorm, Linear, Module, Sequence
from .blocks import Config


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(Config):
    """The public text_encoder/config.json. Defaults are those of transformers."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 77                   # the prompt length CLIP was trained with
    hidden_act: str = "quick_gelu"                      # OpenAI's models; OpenCLIP's say "gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2                               # means the largest id, see below

    @staticmethod
    def allowed(config):
        return {"hidden_act": ("quick_gelu", "gelu")}


@dataclass(frozen=True, kw_only=True)
class CLIPTextProjectionConfig(CLIPTextConfig):
    projection_dim: int


class CLIPTextModel(Module):
    """config: the dict of the public text_encoder/config.json; settings: as a CLIPTextConfig.

    forward: ids (B,M) integers in [0, vocab_size), M <= max_position_embeddings -> context (B,M,D),
    the last hidden state after the final layer norm. With skip=1, as Stable Diffusion XL needs it:
    the state before the last layer, without the norm.
    Raises TinyldmError for a config that is not supported.
    """

    settings = property(lambda self: CLIPTextConfig.read(self.config))

    def __init__(self, config):
        self.config = config
        self.text_model = CLIPTextTransformer(self.settings)

    def forward(self, ids, tape=NO_TAPE, *, skip=0):
        return self.text_model(ids, tape, skip=skip)

    def backward(self, dcontext, tape):
        self.text_model.backward(dcontext, tape)


class CLIPTextModelWithProjection(Module):
    """Stable Diffusion XL's second text encoder: one vector per token, and one for the prompt.

    forward: ids (B,M) -> context (B,M,D), the hidden state before the last layer, and text_embeds
    (B,P): the state of the end token after the last layer and its norm, projected. The first end
    token counts. With eos_token_id 2, as in Stable Diffusion XL's config, it is the largest id
    instead. That is CLIP's end token, but a word added by textual inversion has a larger id, and
    then its state is taken. transformers does the same, so pictures stay equal.
    backward: dcontext (B,M,D), dtext_embeds (B,P).
    Raises TinyldmError for a config that is not supported.
    """

    settings = property(lambda self: CLIPTextProjectionConfig.read(self.config))

    def __init__(self, config):
        self.config = config
        settings = self.settings
        self.text_model = CLIPTextTransformer(settings)
        self.text_projection = Linear(settings.hidden_size, settings.projection_dim, bias=False)
        self.end = settings.eos_token_id

    def forward(self, ids, tape=NO_TAPE):
        context = self.text_model(ids, tape, skip=1)
        h = self.text_model.encoder.layers[-1](context, tape)
        h = self.text_model.final_layer_norm(h, tape)
        places = (ids if self.end == 2 else ids == self.end).argmax(axis=1)
        rows = get_xp(ids).arange(len(ids)), places
        tape.save(self, (h, rows))
        return context, self.text_projection(h[rows], tape)

    def backward(self, dcontext, dtext_embeds, tape):
        dpooled = self.text_projection.backward(dtext_embeds, tape)
        h, rows = tape.load(self)
        dh = get_xp(h).zeros_like(h)
        dh[rows] = dpooled
        dh = self.text_model.final_layer_norm.backward(dh, tape)
        dh = self.text_model.encoder.layers[-1].backward(dh, tape)
        self.text_model.backward(dcontext + dh, tape)   # context was used twice: add


class CLIPTextTransformer(Module):
    def __init__(self, config):
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids, tape=NO_TAPE, *, skip=0):    # (B,M) -> (B,M,D)
        layers = [*self.encoder.layers, self.final_layer_norm]
        if skip:
            layers = self.encoder.layers[:-skip]
        h = self.embeddings(ids, tape)
        for layer in layers:
            h = layer(h, tape)
        tape.save(self, layers)
        return h

    def backward(self, dh, tape):
        for layer in reversed(tape.load(self)):
            dh = layer.backward(dh, tape)
        self.embeddings.backward(dh, tape)


class CLIPTextEmbeddings(Module):
    """The embedding of the token plus that of its position."""

    def __init__(self, config):
        D = config.hidden_size
        self.token_embedding = Embedding(config.vocab_size, D)
        self.position_embedding = Embedding(config.max_position_embeddings, D)

    def forward(self, ids, tape=NO_TAPE):               # (B,M) -> (B,M,D)
        limit = self.position_embedding.weight.shape[0]
        assert ids.shape[1] <= limit, f"{ids.shape[1]} tokens for {limit} positions"
        h = self.token_embedding(ids, tape)
        positions = get_xp(ids).arange(ids.shape[1])
        return h + self.position_embedding(positions, tape)     # (B,M,D) + (M,D)

    def backward(self, dy, tape):
        self.position_embedding.backward(add_up(dy, axis=0), tape)      # undoes the broadcast
        self.token_embedding.backward(dy, tape)


class CLIPEncoder(Module):
    """Holds the layers: the names in weight files have this level."""

    def __init__(self, config):
        self.layers = [CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers)]


class CLIPEncoderLayer(Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config):
        D, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = LayerNorm(D, eps)
        self.self_attn = CLIPAttention(D, config.num_attention_heads)
        self.layer_norm2 = LayerNorm(D, eps)
        self.mlp = CLIPMLP(D, config.intermediate_size, config.hidden_act)

    def forward(self, x, tape=NO_TAPE):                 # (B,M,D) -> (B,M,D)
        h = self.layer_norm1(x, tape)
        x = x + self.self_attn(h, tape)
        h = self.layer_norm2(x, tape)
        return x + self.mlp(h, tape)

    def backward(self, dy, tape):
        dh = self.mlp.backward(dy, tape)
        dx = dy + self.layer_norm2.backward(dh, tape)   # x was used twice: add
        dh = self.self_attn.backward(dx, tape)
        return dx + self.layer_norm1.backward(dh, tape)


class CLIPAttention(Module):
    def __init__(self, channels, num_heads):
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (
            Linear(channels, channels) for _ in range(4))
        self.num_heads = num_heads

    def forward(self, x, tape=NO_TAPE):                 # (B,M,D) -> (B,M,D)
        q, k, v = self.q_proj(x, tape), self.k_proj(x, tape), self.v_proj(x, tape)
        y, cache = ops.attention(q, k, v, self.num_heads, causal=True)
        tape.save(self, cache)
        return self.out_proj(y, tape)

    def backward(self, dy, tape):
        dy = self.out_proj.backward(dy, tape)
        dq, dk, dv = ops.attention_backward(dy, tape.load(self))
        dx = self.v_proj.backward(dv, tape)
        dx = dx + self.k_proj.backward(dk, tape)        # x was used three times: add
        return dx + self.q_proj.backward(dq, tape)


class CLIPMLP(Sequence):
    def __init__(self, channels, hidden, activation):
        self.fc1 = Linear(channels, hidden)
        self.activation = Activation(activation)
        self.fc2 = Linear(hidden, channels)

    def layers(self):                                   # (B,M,D) -> (B,M,D)
        return [self.fc1, self.activation, self.fc2]
