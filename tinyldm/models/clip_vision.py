"""CLIP's vision transformer: an image -> one vector per patch, and one for the whole image.

It is the half of CLIP that Stable Diffusion does not need. Image embeddings come from here: for
zero-shot classification and CLIP scores (clip_model.py), and for decoders that start from a
picture's embedding (unCLIP). The layers are those of the text transformer, without its causal mask.
Source: Radford et al. 2021, arXiv:2103.00020, section 2.4; Dosovitskiy et al. 2020, "An Image is
Worth 16x16 Words", arXiv:2010.11929, section 3.1.

ViT-L/14: images of 224x224, 16x16 patches of 14x14 pixels, so 257 tokens of 1024 channels, 24
layers. B batch, T tokens, D channels of a token, P channels of an embedding, p side of a patch.
"""
from dataclasses import dataclass

from ..backend import add_up, get_xp
from ..configs import Config, one_of, within
from ..errors import TinyldmError
from ..layers import (
    NO_TAPE,
    Conv2d,
    Embedding,
    LayerNorm,
    Linear,
    Module,
    Parameter,
    check_filled,
    checkpoint,
    checkpoint_backward,
    ends_early,
)
from .clip import TRANSFORMERS, CLIPEncoder, check_heads


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig(Config):
    """The public image_encoder/config.json. Defaults are those of transformers: ViT-B/32."""

    CHANGES = {"quantization_config": (None,)}
    UNUSED = TRANSFORMERS | {
        "initializer_range", "initializer_factor",      # of new weights
        "attention_dropout", "dropout",                 # drawing has none, nor has training here
        "projection_dim"}                               # for models with a projection

    hidden_size: int = within(1, 65536, 768)
    intermediate_size: int = within(1, 10**6, 3072)
    num_hidden_layers: int = within(1, 256, 12)
    num_attention_heads: int = within(1, 65536, 12)
    num_channels: int = within(1, 1024, 3)
    image_size: int = within(1, 8192, 224)              # height and width of the images
    patch_size: int = within(1, 8192, 32)
    hidden_act: str = one_of("quick_gelu", "gelu", default="quick_gelu")    # OpenCLIP's is "gelu"
    layer_norm_eps: float = within(0, 1, 1e-5)

    def __post_init__(self):
        check_heads(self)
        if self.patch_size > self.image_size:
            raise TinyldmError(f"patch_size must be at most image_size, {self.image_size}, "
                               f"not {self.patch_size}")


@dataclass(frozen=True, kw_only=True)
class CLIPVisionProjectionConfig(CLIPVisionConfig):
    projection_dim: int = within(1, 65536, 512)


class CLIPVisionModel(Module):
    """config: the dict of the public image_encoder/config.json; settings: as a CLIPVisionConfig.

    forward: images (B,H,W,3), as the image processor gives them, H = W = image_size -> hidden
    (B,T,D), the last hidden state, first the class token, then the patches row by row; and pooled
    (B,D), the class token after the last norm. No norm follows on hidden. With skip=1 hidden is the
    state before the last layer, and so on; with skip=num_hidden_layers, that before the first.
    backward: dhidden (B,T,D), or None for zeros, and dpooled (B,D) -> dimages (B,H,W,3).
    Raises TinyldmError for a config that is not supported.
    """

    Settings = CLIPVisionConfig
    settings = property(lambda self: self.Settings.read(self.config))

    def __init__(self, config):
        self.config = config
        self.vision_model = CLIPVisionTransformer(self.settings)

    def forward(self, images, tape=NO_TAPE, *, skip=0):
        return self.vision_model(images, tape, skip=skip)

    @ends_early()
    def backward(self, dhidden, dpooled, tape):
        return self.vision_model.backward(dhidden, dpooled, tape)


class CLIPVisionModelWithProjection(Module):
    """As CLIPVisionModel, but the second output is image_embeds (B,P): pooled, projected.

    It is not normalised. backward: dhidden (B,T,D) or None, and dimage_embeds (B,P) -> dimages.
    """

    Settings = CLIPVisionProjectionConfig
    settings = property(lambda self: self.Settings.read(self.config))

    def __init__(self, config):
        self.config = config
        settings = self.settings
        self.vision_model = CLIPVisionTransformer(settings)
        self.visual_projection = Linear(settings.hidden_size, settings.projection_dim, bias=False)

    def forward(self, images, tape=NO_TAPE, *, skip=0):
        hidden, pooled = self.vision_model(images, tape, skip=skip)
        return hidden, self.visual_projection(pooled, tape)

    @ends_early()
    def backward(self, dhidden, dimage_embeds, tape):
        dpooled = self.visual_projection.backward(dimage_embeds, tape)
        return self.vision_model.backward(dhidden, dpooled, tape)


class CLIPVisionTransformer(Module):
    def __init__(self, config):
        self.embeddings = CLIPVisionEmbeddings(config)
        # Misspelt in the public files, so here as well.
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = CLIPEncoder(config, causal=False)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, images, tape=NO_TAPE, *, skip=0):     # -> (B,T,D), (B,D)
        before, after = self._cut(skip)
        h = self.embeddings(images, tape)
        h = self.pre_layrnorm(h, tape)
        for layer in before:
            h = checkpoint(layer, tape, h)
        hidden = h
        for layer in after:
            h = checkpoint(layer, tape, h)
        tape.save(self, (h, skip))
        return hidden, self.post_layernorm(h[:, 0], tape)

    def backward(self, dhidden, dpooled, tape):
        dpooled = self.post_layernorm.backward(dpooled, tape)
        h, skip = tape.load(self)
        before, after = self._cut(skip)
        dh = get_xp(h).zeros_like(h)
        dh[:, 0] = dpooled                              # only the class token was used
        for layer in reversed(after):
            dh = checkpoint_backward(layer, dh, tape)
        if dhidden is not None:
            dh = dh + dhidden                           # an output, and the next layer's input: add
        for layer in reversed(before):
            dh = checkpoint_backward(layer, dh, tape)
        dh = self.pre_layrnorm.backward(dh, tape)
        return self.embeddings.backward(dh, tape)

    def _cut(self, skip):
        """The layers before the state to give out, and the last `skip` ones after it."""
        layers = self.encoder.layers
        assert 0 <= skip <= len(layers), f"skip = {skip}, but there are {len(layers)} layers"
        return layers[:len(layers) - skip], layers[len(layers) - skip:]


class CLIPVisionEmbeddings(Module):
    """Each patch of p x p pixels becomes a token; the class token, which is learned, comes first.
    To each token the embedding of its position is added."""

    def __init__(self, config):
        D, p = config.hidden_size, config.patch_size
        self.class_embedding = Parameter(D)
        self.patch_embedding = Conv2d(config.num_channels, D, p, stride=p, padding=(0, 0),
                                      bias=False)
        self.position_embedding = Embedding(1 + (config.image_size // p) ** 2, D)
        self.size = config.image_size

    def forward(self, images, tape=NO_TAPE):            # (B,H,W,C) -> (B,T,D)
        assert images.shape[1:3] == (self.size, self.size), (
            f"images must be {self.size} high and wide, not {images.shape[1:3]}: the image "
            "processor makes them so")
        check_filled(self, self.class_embedding)
        h, xp = self.patch_embedding(images, tape), get_xp(images)      # (B,G,G,D)
        B, G, _, D = h.shape
        token = self.class_embedding.data.astype(h.dtype, copy=False)
        h = xp.concatenate([xp.broadcast_to(token, (B, 1, D)), h.reshape(B, G * G, D)], axis=1)
        tape.save(self, G)
        return h + self.position_embedding(xp.arange(1 + G * G), tape)  # (B,T,D) + (T,D)

    def backward(self, dy, tape):
        self.position_embedding.backward(add_up(dy, axis=0), tape)      # undoes the broadcast
        G = tape.load(self)
        self.class_embedding.add_grad(add_up(dy[:, 0], axis=0))
        return self.patch_embedding.backward(dy[:, 1:].reshape(len(dy), G, G, -1), tape)
