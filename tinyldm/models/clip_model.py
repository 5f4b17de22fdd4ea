"""CLIP as a whole: images and texts -> how well each image matches each text.

Both halves end in vectors of the same length P, the embeddings. Training pulls the embedding of an
image towards that of its text, and pushes it away from those of the other texts of the batch
(ops.contrastive). So a text can name a class that no label ever named: zero-shot classification.
Stable Diffusion uses the text half alone (clip.py); the image half is clip_vision.py.
Source: Radford et al. 2021, "Learning Transferable Visual Models", arXiv:2103.00020.

N images, M texts, T tokens of a text (77), P channels of an embedding.
"""
import math
from dataclasses import dataclass

from .. import ops
from ..backend import get_xp
from ..configs import Config, within
from ..errors import TinyldmError
from ..layers import NO_TAPE, Linear, Module, Parameter, check_filled, ends_early
from .clip import TRANSFORMERS, CLIPTextProjectionConfig, CLIPTextTransformer, end_tokens
from .clip_vision import CLIPVisionProjectionConfig, CLIPVisionTransformer

LARGEST_SCALE = 100         # of the logits: larger ones made training unstable, says the paper
# transformers' defaults of the text half; those of the image half are the config's own.
TEXT = {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048,
        "num_hidden_layers": 12, "num_attention_heads": 8}


@dataclass(frozen=True, kw_only=True)
class CLIPConfig(Config):
    """The public config.json of a CLIPModel: one config for each half. The projection_dim here
    counts, not those inside of them."""

    CHANGES = {"quantization_config": (None,)}
    UNUSED = TRANSFORMERS | {"initializer_factor", "logit_scale_init_value"}    # of new weights

    text_config: dict | None = None
    vision_config: dict | None = None
    # Older files have the same once more. Where they differ, transformers takes these.
    text_config_dict: dict | None = None
    vision_config_dict: dict | None = None
    projection_dim: int = within(1, 65536, 512)

    def __post_init__(self):
        for half in ("text", "vision"):
            try:
                getattr(self, half)
            except TinyldmError as error:
                raise TinyldmError(f"{half}_config: {error}") from None

    @property
    def text(self):
        given = self.text_config_dict or self.text_config or {}
        return CLIPTextProjectionConfig.read(TEXT | given | {"projection_dim": self.projection_dim})

    @property
    def vision(self):
        given = self.vision_config_dict or self.vision_config or {}
        return CLIPVisionProjectionConfig.read(given | {"projection_dim": self.projection_dim})

    @classmethod
    def unknown(cls, config):
        settings = cls.read(config)
        return [*super().unknown(config),
                *CLIPTextProjectionConfig.unknown(settings.text_config or {}),
                *CLIPVisionProjectionConfig.unknown(settings.vision_config or {})]


class CLIPModel(Module):
    """config: the dict of the public config.json; settings: the same as a CLIPConfig.

    forward: images (N,H,W,3), as the image processor gives them, and ids (M,T), as the tokenizer
    gives them -> logits (N,M), logits_per_image: exp(logit_scale) times the cosine of the angle
    between the embeddings. A softmax over the texts gives probabilities.
    backward: dlogits (N,M) -> dimages (N,H,W,3). For training the loss is ops.contrastive(logits);
    after each step call clamp_scale.
    Raises TinyldmError for a config that is not supported.
    """

    Settings = CLIPConfig
    settings = property(lambda self: self.Settings.read(self.config))

    def __init__(self, config):
        self.config = config
        settings = self.settings
        text, vision, P = settings.text, settings.vision, settings.projection_dim
        self.text_model = CLIPTextTransformer(text)
        self.vision_model = CLIPVisionTransformer(vision)
        self.visual_projection = Linear(vision.hidden_size, P, bias=False)
        self.text_projection = Linear(text.hidden_size, P, bias=False)
        self.logit_scale = Parameter()                  # its logarithm
        self.end = text.eos_token_id

    def forward(self, images, ids, tape=NO_TAPE):
        image_embeds = self.encode_image(images, tape)
        return self.match(image_embeds, self.encode_text(ids, tape), tape)

    @ends_early()
    def backward(self, dlogits, tape):
        dimage_embeds, dtext_embeds = self.match_backward(dlogits, tape)
        self.encode_text_backward(dtext_embeds, tape)
        return self.encode_image_backward(dimage_embeds, tape)

    def match(self, image_embeds, text_embeds, tape=NO_TAPE):
        """image_embeds (N,P), text_embeds (M,P), of any length -> logits (N,M)."""
        check_filled(self, self.logit_scale)
        u, image_cache = ops.unit(image_embeds)                          # (N,P)
        v, text_cache = ops.unit(text_embeds)                            # (M,P)
        logits, cache = ops.similarity(u, v, self.logit_scale.data)
        tape.save(self, (image_cache, text_cache, cache))
        return logits

    def match_backward(self, dlogits, tape):
        """dlogits (N,M) -> dimage_embeds (N,P), dtext_embeds (M,P)."""
        image_cache, text_cache, cache = tape.load(self)
        du, dv, dlogit_scale = ops.similarity_backward(dlogits, cache)
        self.logit_scale.add_grad(dlogit_scale)
        return ops.unit_backward(du, image_cache), ops.unit_backward(dv, text_cache)

    def encode_image(self, images, tape=NO_TAPE):
        """images (N,H,W,3) -> image_embeds (N,P), not normalised."""
        _, pooled = self.vision_model(images, tape)
        return self.visual_projection(pooled, tape)

    def encode_image_backward(self, dembeds, tape):
        """dembeds (N,P) -> dimages (N,H,W,3)."""
        dpooled = self.visual_projection.backward(dembeds, tape)
        return self.vision_model.backward(None, dpooled, tape)

    def encode_text(self, ids, tape=NO_TAPE):
        """ids (M,T) -> text_embeds (M,P), not normalised: the state of the end token, projected.

        What follows the end token does not count, because the transformer is causal. Which token
        ends a text: see CLIPTextModelWithProjection.
        """
        h = self.text_model(ids, tape)
        rows = end_tokens(ids, self.end)
        tape.save(self, (h, rows))
        return self.text_projection(h[rows], tape)

    def encode_text_backward(self, dembeds, tape):
        dpooled = self.text_projection.backward(dembeds, tape)
        h, rows = tape.load(self)
        dh = get_xp(h).zeros_like(h)
        dh[rows] = dpooled
        self.text_model.backward(dh, tape)

    def clamp_scale(self):
        """Keep exp(logit_scale) at LARGEST_SCALE or below, as the paper does after each step."""
        scale = self.logit_scale.data
        most = scale.clip(max=math.log(LARGEST_SCALE))
        self.logit_scale.data = get_xp(scale).asarray(most, scale.dtype)
