"""From prompts to what the UNet is told besides latents and timesteps, as its keyword arguments.

    every UNet                  context        a vector a token, from the text encoder
    Stable Diffusion XL         context        of two text encoders, side by side
                                text_embeds    the prompt as one vector
                                time_ids       the size of the picture, and where it was cut out
    Latent Consistency Models   timestep_cond  the guidance that the UNet imitates, as waves

Where it stands: pipeline.py -> Conditioner -> prompt.py, tokenizer.py, models/clip.py -> Predictor.
"""
import numpy as np

from .. import ops
from ..backend import get_xp
from ..errors import TinyldmError, note
from ..models.clip import CLIPTextModelWithProjection
from ..text.prompt import apply_weights, split_into_chunks, to_arrays
from .finite import first_bad_layer, is_finite
from .interpolation import ends, lerp, mixed


class Conditioner:
    """What reads prompts for one UNet.

    readers: [(tokenizer, text encoder)], one, or the two of Stable Diffusion XL. unet_config: the
    dict of the UNet's config.json. zeros_if_empty: whether an empty negative prompt is told to
    Stable Diffusion XL as zeros, not as what the encoders make of it; that is how some of its
    UNets were trained, and `force_zeros_for_empty_prompt` in model_index.json.
    """

    def __init__(self, readers, unet_config, zeros_if_empty):
        self.readers, self.zeros_if_empty = readers, zeros_if_empty and len(readers) == 2
        self.imitated_waves = unet_config.get("time_cond_proj_dim")

    def __call__(self, prompt, negative_prompt, guidance_scale, width, height):
        """-> the conditions for a Predictor, arrays of one row each: the prompt's, and where
        guidance wants two predictions the negative prompt's before it.

        width, height: of the picture, in pixels.
        Raises TinyldmError as split_into_chunks does, for either prompt, and as context does.
        """
        if self.imitated_waves and negative_prompt:
            note("this model imitates guidance, and knows no negative prompt: it plays no part")
        guided = guidance_scale > 1 and not self.imitated_waves
        zeros = self.zeros_if_empty and not negative_prompt
        texts = [*ends(prompt), *ends(negative_prompt)]
        pieces = {text: self._split(text) for text in texts}
        if not guided:
            texts = ends(prompt)
        longest = max(len(own) for text in texts for own in pieces[text])

        def read(prompt):                               # a batch needs contexts of one length
            return mixed(prompt, lambda text: self._encode(text, pieces[text], longest), _lerp_all)

        conditions = [read(prompt)]
        if guided and zeros:
            xp = get_xp(conditions[0]["context"])
            conditions.insert(0, {name: xp.zeros_like(x) for name, x in conditions[0].items()})
        elif guided:
            conditions.insert(0, read(negative_prompt))
        more = self._besides(conditions[0]["context"], guidance_scale, width, height)
        return [told | more for told in conditions]

    def context(self, text):
        """Text -> context (1, 77 * pieces, D), the pieces of a long prompt side by side.

        Raises TinyldmError as split_into_chunks does, for another encoder's vocabulary, for NaN.
        """
        pieces = self._split(text)
        return self._encode(text, pieces, max(map(len, pieces)))["context"]

    def _split(self, text):
        """The pieces of a text for each reader: a tokenizer's padding, too, is a word to it."""
        return [split_into_chunks(text, tokenizer) for tokenizer, _ in self.readers]

    def _encode(self, text, pieces, length):
        """A text, its pieces for each reader, how many to make of them -> {"context": (1,77n,D)}.

        And "text_embeds" (1,P) where an encoder projects; of a long prompt that is the first
        piece's, and weights of words leave it alone: a prompt has one such vector, not one a piece.
        """
        contexts, told = [], {}
        for (tokenizer, encoder), own in zip(self.readers, pieces, strict=True):
            ids, weights = to_arrays(own + [[]] * (length - len(own)), tokenizer)
            known = encoder.config["vocab_size"]
            if ids.max() >= known:
                raise TinyldmError(f"the tokenizer knows token {ids.max()}, the text encoder only "
                                   f"{known} tokens: use parts of one pipeline")
            ids = encoder.xp.asarray(ids)
            if isinstance(encoder, CLIPTextModelWithProjection):
                features, text_embeds = encoder(ids)                    # (n,77,D), (n,P)
                told["text_embeds"] = text_embeds[:1]
            else:                                       # of two, both leave out the last layer
                features = encoder(ids, skip=len(self.readers) - 1)     # (n,77,D)
            context = apply_weights(features, weights).reshape(1, -1, features.shape[-1])
            clean = is_finite(features) and all(map(is_finite, told.values()))
            if not (clean and is_finite(context)):
                culprit = ("its weights are to blame, take some closer to 1" if clean
                           else first_bad_layer(
                               encoder, lambda encoder=encoder, ids=ids: encoder(ids)))
                raise TinyldmError(f"the text encoder answers NaN or infinity for {text!a:.80}: "
                                   f"{culprit}")
            contexts.append(context)
        return {"context": get_xp(contexts[0]).concatenate(contexts, axis=-1), **told}

    def _besides(self, like, guidance_scale, width, height):
        """What does not come from the text, arrays where `like` is: {} for most UNets.

        Source: Podell et al. 2023, arXiv:2307.01952, section 2.2: the size before and after
        training's cropping, and the crop's corner; Luo et al. 2023, arXiv:2310.04378, section 4.3,
        whose w is guidance_scale - 1.
        """
        xp, more = get_xp(like), {}
        if len(self.readers) == 2:
            more["time_ids"] = xp.asarray([[height, width, 0, 0, height, width]], np.float32)
        if self.imitated_waves:
            # In float32 the waves of 7500 have three good digits.
            w = xp.asarray([1000 * (guidance_scale - 1)], np.float64)
            waves, _ = ops.timestep_embedding(w, self.imitated_waves, flip_sin_to_cos=False,
                                              freq_shift=1)
            more["timestep_cond"] = waves.astype(like.dtype)
        return more


def _lerp_all(first, second, weight):
    """Two conditions of one shape -> one on the line between them."""
    return {name: lerp(first[name], second[name], weight) for name in first}
