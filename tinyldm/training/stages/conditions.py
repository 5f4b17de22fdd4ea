"""Captions -> the UNet's conditions, and the backward of the text encoders.

    ids = texts.ids(captions)               [(B,77)], one array per text encoder
    conditions = texts(ids, tape)           {"context": (B,77,D), ...}, what the UNet is given
    texts.backward(gradients, tape)         of the UNet's backward

fine_tuning.py uses it. For drawing there is pipelines/conditioning.py, which also knows weights of
words and prompts of several chunks; captions have neither.
"""
import numpy as np

from ... import ops
from ...backend import get_xp
from ...layers import NO_TAPE, Module

KEPT = 256                  # captions whose conditions are kept


class Texts(Module):
    """A pipeline's tokenizers and text encoders: one of each, or the two of Stable Diffusion XL."""

    def __init__(self, pipe):
        self.tokenizers = [*pipe.tokenizers.values()]
        self.encoders = [model for part, model in pipe.models.items() if "text_encoder" in part]
        self.kept = {}

    def ids(self, captions):
        """B captions -> [ids (B,77)]. A caption that is too long loses its last tokens."""
        return [np.concatenate([tokenizer(caption) for caption in captions])
                for tokenizer in self.tokenizers]

    def forward(self, ids, tape=NO_TAPE):
        """[ids (B,77)] -> {"context": (B,77,D)}; of two encoders also "text_embeds" (B,P)."""
        ids = [model.xp.asarray(own) for own, model in zip(ids, self.encoders, strict=True)]
        if len(ids) == 1:
            return {"context": self.encoders[0](ids[0], tape)}
        first = self.encoders[0](ids[0], tape, skip=1)
        second, text_embeds = self.encoders[1](ids[1], tape)
        context, cache = ops.concat(first, second)
        tape.save(self, cache)
        return {"context": context, "text_embeds": text_embeds}

    def backward(self, gradients, tape):
        """gradients: UNetGradients."""
        if len(self.encoders) == 1:
            self.encoders[0].backward(gradients.context, tape)
            return
        first, second = ops.concat_backward(gradients.context, tape.load(self))
        self.encoders[1].backward(second, gradients.text_embeds, tape)
        self.encoders[0].backward(first, tape)

    def frozen(self, captions):
        """B captions -> the conditions, where no text encoder is trained: each is read once."""
        for caption in dict.fromkeys(captions):
            if caption not in self.kept:
                if len(self.kept) >= KEPT:
                    self.kept.clear()
                self.kept[caption] = self(self.ids([caption]))
        rows = [self.kept.get(caption) or self(self.ids([caption])) for caption in captions]
        return {name: get_xp(array).concatenate([row[name] for row in rows])
                for name, array in rows[0].items()}
