"""What a word does: where its attention and its gradient lie, and the picture without it.

    boxes               [Box], the areas that the judge of the bundled model's pictures finds
    attention_share     (words,boxes), the share of a word's attention in each area: of the mean of
                        attention over steps, heads and layers, as attention_maps gives it
    gradient_share      (words,boxes), the same of embedding_gradient, the mean over its steps
    without             (words,H,W,3) uint8, the picture of the same seed without the word

The areas of the boxes cover the picture once, so the shares of a word sum to 1.
"""
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..errors import TinyldmError
from ..images import to_pil
from ..layers import forward_hooks
from ..shapes import judge
from .attention import mean_maps
from .drawing import progress


class Box(NamedTuple):
    """An area of the picture that words of the prompt describe."""

    what: str           # "the star", "the ground"
    words: list         # their indices in the record's words
    mask: Any           # (H,W) bool


def find_boxes(record):
    """The Boxes of a picture of the bundled model; [] for a prompt outside its language."""
    image = np.asarray(record.image)
    try:
        masks = judge.areas(image, record.prompt)
    except TinyldmError:
        return []
    claim = judge.read_caption(record.prompt)
    texts, boxes, start = [word.text for word in record.words], [], 0
    for (size, _, shape), mask in zip(claim.objects, masks):
        start = texts.index(size, start)
        boxes.append(Box(f"the {shape}", [start, start + 1, start + 2], mask))
        start += 3
    ground = ~np.logical_or.reduce(masks)
    return [*boxes, Box("the ground", [len(texts) - 2, len(texts) - 1], ground)]


def shares(maps, boxes):
    """Maps (words,h,w), not negative -> the share of each one's sum in each box (words,boxes)."""
    maps = maps / maps.sum(axis=(1, 2), keepdims=True)
    h, w = maps.shape[1:]
    inside = np.stack([area_of(box.mask, h, w) for box in boxes])        # (boxes,h,w)
    return np.einsum("whv,bhv->wb", maps, inside).astype(np.float32)


def area_of(mask, h, w):
    """A mask (H,W) -> (h,w), the share of each cell that lies in it."""
    H, W = mask.shape
    return mask.reshape(h, H // h, w, W // w).mean(axis=(1, 3), dtype=np.float32)


def record_shares(record):
    """Fill in attention_share and gradient_share."""
    if not record.boxes:
        return
    attention = {name: array for name, array in record.arrays.items() if "attention/" in name}
    of_tokens = {"attention_share": mean_maps(attention)}               # (h,w,M)
    if "embedding_gradient" in record.arrays:
        gradient = record["embedding_gradient"].mean(axis=0)            # (M,h,w)
        of_tokens["gradient_share"] = np.moveaxis(gradient, 0, -1)
    for name, maps in of_tokens.items():
        own = np.stack([maps[..., word.tokens].sum(axis=-1) for word in record.words])
        record.arrays[name] = shares(own, record.boxes)


# ---- pictures without a word ------------------------------------------------------------------

def pictures_without(pipe, request, ids, words):
    """Draw the request once without each word -> (words,H,W,3) uint8.

    The word's tokens are cut out behind the embeddings, which the positions are part of already:
    all other tokens keep their positions, and none of them reads the word. The last padding token
    is repeated in the end, as a shorter prompt has more padding. Everything else is as it was.
    """
    xp, n = pipe.unet.xp, len(words)
    contexts = xp.concatenate([context_without(pipe.text_encoder, ids, word) for word in words])

    def call(forward, **inputs):                        # the prompts' half comes last
        inputs["context"] = xp.concatenate([inputs["context"][:-n], contexts])
        return forward(**inputs)

    several = replace(request, prompt=[request.prompt] * n, seed=[request.seed] * n,
                      negative_prompt=[request.negative_prompt] * n)
    with forward_hooks({pipe.unet: call}):
        for state in progress("drawing without each word", pipe.states(several),
                              pipe.steps_made(several)):
            latents = state.latents
    return np.stack([np.asarray(image) for image in to_pil(pipe.decode(latents))])


def context_without(encoder, ids, word):
    """ids (1,M), a Word -> the context (1,M,D) that the encoder makes of the other tokens."""
    xp, M = encoder.xp, ids.shape[1]
    kept = xp.asarray([i for i in range(M) if i not in word.tokens])

    def cut(forward, *inputs, **options):
        return forward(*inputs, **options)[:, kept]

    with forward_hooks({encoder.text_model.embeddings: cut}):
        context = encoder(xp.asarray(ids))                              # (1,M-tokens,D)
    return xp.concatenate([context, context[:, -1:].repeat(len(word.tokens), axis=1)], axis=1)
