"""CLIP's text transformer: token ids -> one vector per token, the context that the UNet attends to.

Between the tokenizer and the UNet. The transformer is causal: token n sees tokens 0..n only, so the
end token and the padding after it see the whole prompt.
Source: Radford et al. 2021, "Learning Transferable Visual Models", arXiv:2103.00020, section 2.4.
"""
from dataclasses import dataclass

from .. import ops
from ..backend import add_up, get_xp
from ..configs import Config, one_of, within
from ..errors import TinyldmError
from ..layers import (
    NO_TAPE,
    Activation,
    Embedding,
    LayerNorm,
    Linear,
    Module,
    Sequence,
    checkpoint,
    checkpoint_backward,
    ends_early,
)

# Keys that transformers writes into every config: the training of a model, the texts that a
# language model writes, the form of an output. A picture needs none of them.
TRANSFORMERS = frozenset("""
    architectures model_type transformers_version dtype torch_dtype torchscript return_dict
    output_hidden_states output_attentions use_bfloat16 use_cache use_return_dict
    tie_word_embeddings pruned_heads cross_attention_hidden_size chunk_size_feed_forward
    tf_legacy_loss problem_type id2label label2id num_labels finetuning_task
    task_specific_params tokenizer_class prefix is_encoder_decoder is_decoder
    add_cross_attention tie_encoder_decoder decoder_start_token_id sep_token_id bad_words_ids
    suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id max_length
    min_length do_sample early_stopping num_beams num_beam_groups num_return_sequences
    temperature top_k top_p typical_p length_penalty repetition_penalty diversity_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size exponential_decay_length_penalty
    remove_invalid_values return_dict_in_generate output_scores name_or_path
    """.split())


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(Config):
    """The public text_encoder/config.json. Defaults are those of transformers."""

    CHANGES = {"quantization_config": (None,)}
    UNUSED = TRANSFORMERS | {
        "initializer_range", "initializer_factor",      # of new weights
        "attention_dropout", "dropout",                 # drawing has none, nor has training here
        "bos_token_id", "pad_token_id",                 # the tokenizer's files decide
        "eos_token_id", "projection_dim"}               # for models with a projection, see below

    vocab_size: int = within(1, 10**7)
    hidden_size: int = within(1, 65536)
    intermediate_size: int = within(1, 10**6)
    num_hidden_layers: int = within(1, 256)
    num_attention_heads: int = within(1, 65536)
    max_position_embeddings: int = within(1, 65536, 77)     # the length CLIP was trained with
    hidden_act: str = one_of("quick_gelu", "gelu", default="quick_gelu")    # OpenCLIP's is "gelu"
    layer_norm_eps: float = within(0, 1, 1e-5)

    def __post_init__(self):
        check_heads(self)


def check_heads(settings):
    if settings.hidden_size % settings.num_attention_heads:
        raise TinyldmError(f"num_attention_heads must divide hidden_size, {settings.hidden_size}, "
                           f"but {settings.num_attention_heads} does not")


@dataclass(frozen=True, kw_only=True)
class CLIPTextProjectionConfig(CLIPTextConfig):
    projection_dim: int = within(1, 65536)
    eos_token_id: int = within(0, 10**7, 2)             # 2 means the largest id, see below

    def __post_init__(self):
        super().__post_init__()
        if self.eos_token_id >= self.vocab_size:
            raise TinyldmError(f"eos_token_id must be below vocab_size, {self.vocab_size}, "
                               f"not {self.eos_token_id}")


class CLIPTextModel(Module):
    """config: the dict of the public text_encoder/config.json; settings: as a CLIPTextConfig.

    forward: ids (B,M) integers in [0, vocab_size), M <= max_position_embeddings -> context (B,M,D),
    the last hidden state after the final layer norm. With skip=1, as Stable Diffusion XL needs it:
    the state before the last layer, without the norm.
    Raises TinyldmError for a config that is not supported.
    """

    Settings = CLIPTextConfig
    settings = property(lambda self: self.Settings.read(self.config))

    def __init__(self, config):
        self.config = config
        self.text_model = CLIPTextTransformer(self.settings)

    def forward(self, ids, tape=NO_TAPE, *, skip=0):
        return self.text_model(ids, tape, skip=skip)

    @ends_early()
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

    Settings = CLIPTextProjectionConfig
    settings = property(lambda self: self.Settings.read(self.config))

    def __init__(self, config):
        self.config = config
        settings = self.settings
        self.text_model = CLIPTextTransformer(settings)
        self.text_projection = Linear(settings.hidden_size, settings.projection_dim, bias=False)
        self.end = settings.eos_token_id

    def forward(self, ids, tape=NO_TAPE):
        context = self.text_model(ids, tape, skip=1)
        h = checkpoint(self.text_model.encoder.layers[-1], tape, context)
        h = self.text_model.final_layer_norm(h, tape)
        rows = end_tokens(ids, self.end)
        tape.save(self, (h, rows))
        return context, self.text_projection(h[rows], tape)

    @ends_early()
    def backward(self, dcontext, dtext_embeds, tape):
        dpooled = self.text_projection.backward(dtext_embeds, tape)
        h, rows = tape.load(self)
        dh = get_xp(h).zeros_like(h)
        dh[rows] = dpooled
        dh = self.text_model.final_layer_norm.backward(dh, tape)
        dh = checkpoint_backward(self.text_model.encoder.layers[-1], dh, tape)
        self.text_model.backward(dcontext + dh, tape)   # context was used twice: add


def end_tokens(ids, end):
    """The place of each text's end token, see above: states (B,M,D)[end_tokens] is (B,D)."""
    return get_xp(ids).arange(len(ids)), (ids if end == 2 else ids == end).argmax(axis=1)


class CLIPTextTransformer(Module):
    def __init__(self, config):
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config, causal=True)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids, tape=NO_TAPE, *, skip=0):    # (B,M) -> (B,M,D)
        layers = [*self.encoder.layers, self.final_layer_norm]
        if skip:
            layers = self.encoder.layers[:-skip]
        h = self.embeddings(ids, tape)
        for layer in layers:
            h = checkpoint(layer, tape, h)
        tape.save(self, layers)
        return h

    def backward(self, dh, tape):
        for layer in reversed(tape.load(self)):
            dh = checkpoint_backward(layer, dh, tape)
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


# ---- the layers that both of CLIP's transformers have, of texts here, of images in clip_vision.py

class CLIPEncoder(Module):
    """Holds the layers: the names in weight files have this level."""

    def __init__(self, config, causal):
        self.layers = [CLIPEncoderLayer(config, causal) for _ in range(config.num_hidden_layers)]


class CLIPEncoderLayer(Module):
    """x + attention(norm(x)), then x + MLP(norm(x)). causal: token n sees tokens 0..n only."""

    def __init__(self, config, causal):
        D, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = LayerNorm(D, eps)
        self.self_attn = CLIPAttention(D, config.num_attention_heads, causal)
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
    def __init__(self, channels, num_heads, causal):
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (
            Linear(channels, channels) for _ in range(4))
        self.num_heads, self.causal = num_heads, causal

    def forward(self, x, tape=NO_TAPE):                 # (B,M,D) -> (B,M,D)
        q, k, v = self.q_proj(x, tape), self.k_proj(x, tape), self.v_proj(x, tape)
        y, cache = ops.attention(q, k, v, self.num_heads, causal=self.causal)
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
