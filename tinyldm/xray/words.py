"""What a word does: where its attention and its gradient lie, and the picture without it.

    Record.boxes        [Box], the areas that the judge of the bundled model's pictures finds
    attention_share     (words,boxes), the share of a word's attention that lies in each area: of
                        the mean over steps, heads and layers that attention_maps gives
    gradient_share      (words,boxes), the same of embedding_gradient, the mean over its steps
    without             (words,H,W,3) uint8, the picture of the same seed without each word

The boxes cover the picture once, so the shares of a word sum to 1; a word that acts everywhere
alike has the areas themselves as its shares.
"""
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..errors import TinyldmError
from ..images import to_pil
from ..layers import forward_hooks
from ..pipelines.stable_diffusion import StableDiffusion
from ..shapes import judge
from .attention import mean_maps
from .drawing import pooled, progress, read_prompt


class Box(NamedTuple):
    """An area of the picture that words of the prompt describe."""

    what: str           # "the star", "the ground"
    words: list         # their indices in the record's words
    mask: Any           # (H,W) bool


def find_boxes(record, pipe):
    """The Boxes of a picture of the bundled model; [] for another, and outside its language."""
    if not pipe.language:
        return []
    try:
        masks = judge.areas(np.asarray(record.image), record.prompt)
    except TinyldmError:
        return []
    texts, boxes, start = [word.text for word in record.words], [], 0
    for (size, _, shape), mask in zip(judge.read_caption(record.prompt).objects, masks):
        start = texts.index(size, start)
        boxes.append(Box(f"the {shape}", [start, start + 1, start + 2], mask))
        start += 3
    ground = ~np.logical_or.reduce(masks)
    return [*boxes, Box("the ground", [len(texts) - 2, len(texts) - 1], ground)]


def record_shares(record):
    """Fill in attention_share and gradient_share, where there are boxes and maps."""
    attention = {name: array for name, array in record.arrays.items() if "attention/" in name}
    if not record.boxes or not attention:
        return
    of_tokens = {"attention_share": mean_maps(attention)}               # (h,w,M)
    if "embedding_gradient" in record.arrays:
        gradient = record["embedding_gradient"].mean(axis=0)            # (M,h,w)
        of_tokens["gradient_share"] = np.moveaxis(gradient, 0, -1)
    for name, maps in of_tokens.items():
        own = np.stack([maps[..., word.tokens].sum(axis=-1) for word in record.words])
        record.arrays[name] = shares(own, record.boxes)


def shares(maps, boxes):
    """Maps (words,h,w), not negative -> the share of each one's sum in each box (words,boxes)."""
    inside = np.stack([box.mask for box in boxes], axis=-1)
    inside = pooled(inside, *maps.shape[1:])                            # (h,w,boxes)
    total = maps.sum(axis=(1, 2))[:, None]
    return (np.einsum("nhw,hwb->nb", maps, inside) / total).astype(np.float32)


# ---- pictures without a word ------------------------------------------------------------------

def record_without(record, pipe, request):
    """Fill in `without`, or add a line to left_out."""
    if "embedding_gradient" not in record.arrays:       # a line says why
        return
    if not isinstance(pipe, StableDiffusion) or request.image is not None:
        record.left_out.append("the pictures without a word: they are drawn for Stable Diffusion "
                               "from noise alone")
        return
    record.arrays["without"] = pictures_without(pipe, request, record.words)


def pictures_without(pipe, request, words):
    """Draw a request once without each word, all in one batch -> (words,H,W,3) uint8."""
    n, xp, (ids, _) = len(words), pipe.unet.xp, read_prompt(pipe, request.prompt)
    contexts = xp.concatenate([context_without(pipe.text_encoder, ids, word) for word in words])

    def call(forward, **inputs):                        # the prompts' half comes last
        inputs["context"] = xp.concatenate([inputs["context"][:-n], contexts])
        return forward(**inputs)

    several = replace(request, prompt=[request.prompt] * n, seed=request.seeds() * n,
                      negative_prompt=request.negative_prompts * n)
    with forward_hooks({pipe.unet: call}):
        for state in progress("drawing without each word", pipe.states(several),
                              pipe.steps_made(several)):
            latents = state.latents
    return np.stack([np.asarray(image) for image in to_pil(pipe.decode(latents))])


def context_without(encoder, ids, word):
    """Token ids (1,M), a Word -> the context (1,M,D) that the encoder makes of all other tokens.

    The word's tokens are cut out behind the embeddings, where positions have been added: the others
    keep their positions, and none of them reads the word. The last padding token is repeated in the
    end, as a shorter prompt has more of it.
    """
    xp, M = encoder.xp, ids.shape[1]
    kept = xp.asarray([i for i in range(M) if i not in word.tokens])

    def cut(forward, *inputs, **options):
        return forward(*inputs, **options)[:, kept]

    with forward_hooks({encoder.text_model.embeddings: cut}):
        context = encoder(xp.asarray(ids))                              # (1,kept,D)
    return xp.concatenate([context, context[:, -1:].repeat(len(word.tokens), axis=1)], axis=1)
