"""Do a pipeline's parts fit together? Their configs say so, before anything is computed."""
import numpy as np

from ..errors import TinyldmError


def check_parts(readers, unet, vae, class_embed_type=None):
    """Raise TinyldmError for parts that do not fit: [(tokenizer, text encoder)], UNet and VAE.

    class_embed_type: what the pipeline gives the UNet as class_labels; None: nothing.
    """
    check_colours(vae)
    C = vae.settings.latent_channels
    check_unet(readers, unet, (C, 2 * C + 1), (C,), f"the VAE's latent_channels is {C}",
               class_embed_type)


def check_unet(readers, unet, in_channels, out_channels, reason, class_embed_type=None,
               name="the UNet"):
    """Raise TinyldmError for a UNet that does not fit: [(tokenizer, text encoder)] and UNet.

    in_channels, out_channels: those that fit, with the reason. class_embed_type: what the pipeline
    gives the UNet as class_labels; "a table": a row's number; None: nothing. name: of the UNet, for
    the messages.
    """
    texts, unet = [encoder.settings for _, encoder in readers], unet.settings
    D = sum(text.hidden_size for text in texts)
    for key, fitting, why in [
            ("in_channels", in_channels, reason), ("out_channels", out_channels, reason),
            ("cross_attention_dim", (D,), f"the text encoder's hidden_size is {D}")]:
        value = getattr(unet, key)                      # may be a list, one item per level
        if not np.isin(value, fitting).all():
            _misfit(f"{name}'s {key} is {value}, but {why}")
    classes = unet.class_embed_type or unet.num_class_embeds and "a table"
    if classes != class_embed_type:
        _misfit(f"{name}'s class embedding is {classes}, but this pipeline's is "
                f"{class_embed_type}")
    kind = unet.addition_embed_type
    if (kind is None) != (len(texts) == 1):
        _misfit(f"the UNet's addition_embed_type is {kind}, but there is "
                f"{'a' if len(texts) == 2 else 'no'} second text encoder")
    if len(texts) == 2:
        width = texts[1].projection_dim + 6 * unet.addition_time_embed_dim
        expected = unet.projection_class_embeddings_input_dim
        if expected != width:
            _misfit(f"the UNet's projection_class_embeddings_input_dim is {expected}, but six "
                    f"sizes and the second text encoder's projection make {width}")
    for (tokenizer, _), text in zip(readers, texts):
        every = max(tokenizer.start, tokenizer.end, tokenizer.padding)      # in every prompt
        if every >= text.vocab_size:
            _misfit(f"the tokenizer's special token {every} is beyond the text encoder's "
                    f"vocab_size, {text.vocab_size}")
        length, limit = tokenizer.model_max_length, text.max_position_embeddings
        if length > limit:
            _misfit(f"the tokenizer's model_max_length is {length}, but the text encoder has only "
                    f"{limit} positions")


def check_transformer(transformer, vae):
    """Raise TinyldmError for a DiT's transformer and a VAE that do not fit."""
    check_colours(vae)
    settings, C = transformer.settings, vae.settings.latent_channels
    if settings.in_channels != C:
        _misfit(f"the transformer's in_channels is {settings.in_channels}, but the VAE's "
                f"latent_channels is {C}")
    if settings.out_channels not in (None, C, 2 * C):
        _misfit(f"the transformer's out_channels is {settings.out_channels}, but the VAE's "
                f"latent_channels is {C}, and twice as many hold a learned variance")


def check_colours(vae):
    """Raise TinyldmError for a VAE of pictures other than red, green and blue."""
    colours = vae.settings.in_channels, vae.settings.out_channels
    if colours != (3, 3):
        raise TinyldmError(f"the VAE's in_channels and out_channels are {colours}, but a picture "
                           "has 3 colours: use another VAE")


def _misfit(message):
    raise TinyldmError(f"{message}: use parts of one pipeline")
