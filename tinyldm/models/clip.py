"""CLIP's text transformer: token ids -> one vector a token, the context the UNet looks at.

Between the tokenizer and the UNet. A causal transformer: token n has seen tokens 0..n only, so the
end token and the padding behind it have seen the whole prompt.
Source: Radford et al. 2021, "Learning Transferable Visual Models", arXiv:2103.00020, section 2.4.
"""
from .. import ops
from ..backend import add_up, get_xp
from ..layers import NO_TAPE, Activation, Embedding, LayerNorm, Linear, Module
from .blocks import require


class CLIPTextModel(Module):
    """config: the dict of the public text_encoder/config.json. Names as published: `text_model.…`.

    forward: ids (B,M) integers in [0, vocab_size), M <= max_position_embeddings -> context (B,M,D),
    the last hidden state after the final layer norm; or, as Stable Diffusion XL wants it, the one
    that `skip` layers less give, without the norm.
    Raises TinyldmError for a config it does not build.
    """

    def __init__(self, config):
        require(config, hidden_act=("quick_gelu", "gelu"))
        self.config = config
        self.text_model = CLIPTextTransformer(config)

    def forward(self, ids, tape=NO_TAPE, skip=0):
        return self.text_model(ids, tape, skip)

    def backward(self, dcontext, tape):
        self.text_model.backward(dcontext, tape)


class CLIPTextModelWithProjection(Module):
    """Stable Diffusion XL's second encoder: the tokens' vectors, and one of the whole prompt.

    forward: ids (B,M), each with an end token -> context (B,M,D), the hidden state before the last
    layer, and text_embeds (B,P): the state of the first end token, which alone has seen the whole
    prompt, after the last layer and its norm, projected.
    backward: dcontext (B,M,D), dtext_embeds (B,P).
    Raises TinyldmError for a config it does not build.
    """

    def __init__(self, config):
        require(config, hidden_act=("quick_gelu", "gelu"))
        self.config = config
        self.text_model = CLIPTextTransformer(config)
        self.text_projection = Linear(config["hidden_size"], config["projection_dim"], bias=False)

    def forward(self, ids, tape=NO_TAPE):
        context = self.text_model(ids, tape, skip=1)
        h = self.text_model.encoder.layers[-1](context, tape)
        h = self.text_model.final_layer_norm(h, tape)
        end = self.config.get("eos_token_id", 2)
        # Old configs say 2 and mean the largest number, which CLIP's end token has.
        places = (ids if end == 2 else ids == end).argmax(axis=1)
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
        self.text_model.backward(dcontext + dh, tape)   # context went out, and on: add


class CLIPTextTransformer(Module):
    def __init__(self, config):
        D, eps = config["hidden_size"], config.get("layer_norm_eps", 1e-5)
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = LayerNorm(D, eps)

    def forward(self, ids, tape=NO_TAPE, skip=0):       # (B,M) -> (B,M,D)
        h = self.embeddings(ids, tape)
        h = self.encoder(h, tape, skip)
        if skip == 0:
            h = self.final_layer_norm(h, tape)
        tape.save(self, skip)
        return h

    def backward(self, dh, tape):
        skip = tape.load(self)
        if skip == 0:
            dh = self.final_layer_norm.backward(dh, tape)
        dh = self.encoder.backward(dh, tape)
        self.embeddings.backward(dh, tape)


class CLIPTextEmbeddings(Module):
    """What the token is, plus where it stands."""

    def __init__(self, config):
        D = config["hidden_size"]
        self.token_embedding = Embedding(config["vocab_size"], D)
        self.position_embedding = Embedding(config.get("max_position_embeddings", 77), D)

    def forward(self, ids, tape=NO_TAPE):               # (B,M) -> (B,M,D)
        limit = self.position_embedding.weight.shape[0]
        assert ids.shape[1] <= limit, f"{ids.shape[1]} tokens, but positions end at {limit}"
        h = self.token_embedding(ids, tape)
        positions = get_xp(ids).arange(ids.shape[1])
        return h + self.position_embedding(positions, tape)     # (B,M,D) + (M,D)

    def backward(self, dy, tape):
        # The same positions served the whole batch: sum.
        self.position_embedding.backward(add_up(dy, axis=0), tape)
        self.token_embedding.backward(dy, tape)


class CLIPEncoder(Module):
    def __init__(self, config):
        self.layers = [CLIPEncoderLayer(config) for _ in range(config["num_hidden_layers"])]

    def forward(self, h, tape=NO_TAPE, skip=0):         # (B,M,D) -> (B,M,D)
        layers = self.layers[:len(self.layers) - skip]
        for layer in layers:
            h = layer(h, tape)
        tape.save(self, layers)
        return h

    def backward(self, dh, tape):
        for layer in reversed(tape.load(self)):
            dh = layer.backward(dh, tape)
        return dh


class CLIPEncoderLayer(Module):
    """Attention, then a two-layer perceptron, each behind a norm; x is carried around both."""

    def __init__(self, config):
        D, eps = config["hidden_size"], config.get("layer_norm_eps", 1e-5)
        self.layer_norm1 = LayerNorm(D, eps)
        self.self_attn = CLIPAttention(D, config["num_attention_heads"])
        self.layer_norm2 = LayerNorm(D, eps)
        self.mlp = CLIPMLP(D, config["intermediate_size"], config.get("hidden_act", "quick_gelu"))

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


class CLIPMLP(Module):
    def __init__(self, channels, hidden, activation):
        self.fc1 = Linear(channels, hidden)
        self.activation = Activation(activation)
        self.fc2 = Linear(hidden, channels)

    def forward(self, x, tape=NO_TAPE):                 # (B,M,D) -> (B,M,D)
        h = self.fc1(x, tape)
        h = self.activation(h, tape)
        return self.fc2(h, tape)

    def backward(self, dy, tape):
        dh = self.fc2.backward(dy, tape)
        dh = self.activation.backward(dh, tape)
        return self.fc1.backward(dh, tape)
