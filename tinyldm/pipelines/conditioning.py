"""From prompts to the conditioning: the UNet's keyword arguments besides latents and timesteps.

    every UNet                  context        one vector per token, from the text encoder
    Stable Diffusion XL         context        of two text encoders, side by side
                                text_embeds    the whole prompt as one vector
                                time_ids       the size of the picture and the place of the crop
    Latent Consistency Models   timestep_cond  the guidance scale, as a sinusoidal embedding

stable_diffusion.py -> Conditioner -> text/, models/clip.py; the result goes to a Predictor.
"""
from functools import partial

import numpy as np

from .. import ops
from ..backend import get_xp, is_finite
from ..errors import TinyldmError, note
from ..models.clip import CLIPTextModelWithProjection
from ..text.prompt import apply_weights, note_foreign_syntax, split_into_chunks, to_arrays
from .finite import check_output
from .interpolation import as_list, ends, lerp, mixed


class Conditioner:
    """Reads prompts for one UNet.

    readers: [(tokenizer, text encoder)], one, or the two of Stable Diffusion XL. guidance_width: of
    the embedding of the guidance scale, for a UNet that imitates guidance, or None. zeros_if_empty:
    in Stable Diffusion XL, an empty negative prompt becomes zeros and not the encoders' output;
    some of its UNets were trained so (`force_zeros_for_empty_prompt` in model_index.json).
    """

    def __init__(self, readers, guidance_width, zeros_if_empty):
        self.readers, self.zeros_if_empty = readers, zeros_if_empty and len(readers) == 2
        self.guidance_width = guidance_width

    def __call__(self, prompt, negative_prompt, guidance_scale, width, height, clip_skip=None):
        """-> list of {name: array (prompts,...)}: the prompts'; with guidance, before it the
        negative prompts'.

        prompt, negative_prompt: one each, or lists of one length. width, height: of the picture, in
        pixels. clip_skip: see Request; all layers read the negative prompts, as in diffusers.
        Raises TinyldmError as split_into_chunks does, for any prompt, and as context does; and for
        a clip_skip that leaves no layer.
        """
        self._check_clip_skip(clip_skip)
        prompts, negative_prompts = as_list(prompt), as_list(negative_prompt)
        if self.guidance_width and any(negative_prompts):
            note("this model imitates guidance, so the negative prompt plays no part")
        guided = guidance_scale > 1 and not self.guidance_width
        texts = [end for text in (*prompts, *negative_prompts) for end in ends(text)]
        chunks = {text: self._split(text) for text in texts}            # checks all prompts
        used = [*prompts, *negative_prompts] if guided else prompts
        longest = max(len(own) for text in used for end in ends(text) for own in chunks[end])

        def read(texts, clip_skip=None):    # to one length: all predictions are made in one batch
            rows = {text: mixed(text, lambda end: self._encode(end, chunks[end], longest,
                                                               clip_skip), _lerp_all)
                    for text in dict.fromkeys(texts)}
            xp = get_xp(rows[texts[0]]["context"])
            return {name: xp.concatenate([rows[text][name] for text in texts])
                    for name in rows[texts[0]]}

        conditioning = [read(prompts, clip_skip)]
        if guided and self.zeros_if_empty and not any(negative_prompts):
            xp = get_xp(conditioning[0]["context"])
            conditioning.insert(0, {name: xp.zeros_like(x) for name, x in conditioning[0].items()})
        elif guided:
            conditioning.insert(0, read(negative_prompts))
        common = self._common(conditioning[0]["context"], guidance_scale, width, height)
        return [own | common for own in conditioning]

    def context(self, text):
        """Text -> context (1, 77 * chunks, D), the chunks of a long prompt side by side.

        Raises TinyldmError as split_into_chunks does, for a vocabulary larger than the encoder's,
        and for NaN.
        """
        chunks = self._split(text)
        return self._encode(text, chunks, max(map(len, chunks)))["context"]

    def _split(self, text):
        """The text's chunks for each tokenizer; they may differ, as their padding tokens do."""
        chunks = [split_into_chunks(text, tokenizer) for tokenizer, _ in self.readers]
        note_foreign_syntax(text)
        return chunks

    def _check_clip_skip(self, clip_skip):
        fewest = min(encoder.settings.num_hidden_layers for _, encoder in self.readers)
        # At least one layer is used; of two encoders the last one never is.
        most = max(fewest - len(self.readers), 0)
        if clip_skip is not None and clip_skip > most:
            raise TinyldmError(f"clip_skip must be from 0 to {most}, as the text encoder has "
                               f"{fewest} layers, not {clip_skip}")

    def _encode(self, text, chunks, length, clip_skip=None):
        """A text, its chunks for each reader, how many to fill up to -> {"context": (1,77n,D)}.

        Also "text_embeds" (1,P) if an encoder has a projection. A prompt has only one such vector:
        it is that of the first chunk, and the weights of words do not change it.
        """
        contexts, conditioning = [], {}
        for (tokenizer, encoder), own in zip(self.readers, chunks, strict=True):
            ids, weights = to_arrays(own + [[]] * (length - len(own)), tokenizer)
            vocabulary = encoder.settings.vocab_size
            if ids.max() >= vocabulary:
                raise TinyldmError(f"the tokenizer has a token {ids.max()}, but the text encoder "
                                   f"only {vocabulary} tokens: use parts of one pipeline")
            ids = encoder.xp.asarray(ids)
            if isinstance(encoder, CLIPTextModelWithProjection):
                features, text_embeds = encoder(ids)                    # (n,77,D), (n,P)
                conditioning["text_embeds"] = text_embeds[:1]
                if clip_skip:
                    features = encoder.text_model(ids, skip=clip_skip + 1)
            else:                                       # of two, both leave out the last layer
                features = encoder(ids, skip=(clip_skip or 0) + len(self.readers) - 1)  # (n,77,D)
                if clip_skip and len(self.readers) == 1:
                    features = encoder.text_model.final_layer_norm(features)
            message = f"the text encoder's output is NaN or infinite for {text!a:.80}"
            for output in (features, *conditioning.values()):
                check_output(output, message, encoder, partial(encoder, ids))
            contexts.append(apply_weights(features, weights).reshape(1, -1, features.shape[-1]))
            if not is_finite(contexts[-1]):
                raise TinyldmError(f"{message}: the weights in it are too far from 1")
        return {"context": get_xp(contexts[0]).concatenate(contexts, axis=-1), **conditioning}

    def _common(self, like, guidance_scale, width, height):
        """What does not come from the text, as arrays where `like` is; {} for most UNets.

        Source: Podell et al. 2023, arXiv:2307.01952, section 2.2: the size before and after
        training's cropping, and the crop's corner; Luo et al. 2023, arXiv:2310.04378, section 4.3,
        whose w is guidance_scale - 1.
        """
        xp, common = get_xp(like), {}
        if len(self.readers) == 2:
            common["time_ids"] = xp.asarray([[height, width, 0, 0, height, width]], np.float32)
        if self.guidance_width:
            # float64: at 7500 float32 sines keep only three digits.
            w = xp.asarray([1000 * (guidance_scale - 1)], np.float64)
            embedding, _ = ops.timestep_embedding(w, self.guidance_width, flip_sin_to_cos=False,
                                                  freq_shift=1)
            common["timestep_cond"] = embedding.astype(like.dtype)
        return common


def _lerp_all(first, second, weight):
    """Interpolate the arrays of two dicts with the same names."""
    return {name: lerp(first[name], second[name], weight) for name in first}
