"""What the x-ray's files share: the options of one picture, its prompt, its sizes, and the bar.

record.py, attention.py, words.py -> drawing.py -> pipelines/
"""
import math
import sys

import numpy as np

from ..errors import TinyldmError
from ..pipelines.request import own_names
from ..text.prompt import split_into_chunks, to_arrays

SMALL = 32 * 32                     # positions: of larger maps less is kept
FEW = 50_000_000                    # parameters: of larger networks less is computed


def one_picture(pipe, prompt, options):
    """The completed options of one picture, of any pipeline.

    Raises TinyldmError for what is no pipeline, for one of two networks, for several pictures, and
    as pipe.stream does.
    """
    if not hasattr(pipe, "Options"):
        raise TinyldmError("the x-ray expects a pipeline, as tinyldm.load gives it, not a "
                           f"{type(pipe).__name__}")
    if hasattr(pipe, "super_res"):
        raise TinyldmError(f"the x-ray is of one network, but {pipe.name} draws with two: use "
                           "another pipeline")
    known, options = pipe.Options.__dataclass_fields__, dict(options)
    for name, nothing in (("guidance_scale", None), ("negative_prompt", "")):
        if name not in known and options[name] == nothing:
            del options[name]                           # this system has none
    if "prompt" not in known:
        if prompt not in ("", None):
            options["label"] = prompt
    elif not isinstance(prompt, str):
        raise TinyldmError(f"the x-ray is of one prompt, a text, not of {prompt!r:.80}")
    else:
        options["prompt"] = prompt
    request = pipe.complete(pipe.Options(**own_names(options, pipe.Options)))
    if request.count != 1:
        raise TinyldmError(f"the x-ray is of one picture, not of {request.count}: leave out "
                           "num_images and lists of seeds")
    return request


def read_prompt(pipe, prompt):
    """-> token ids and weights (n,77) of a prompt in n chunks, by the first tokenizer."""
    tokenizer = next(iter(pipe.tokenizers.values()))
    return to_arrays(split_into_chunks(prompt, tokenizer), tokenizer)


def latents_size(pipe, request):
    """(h, w) of the latents of a picture."""
    width, height = pipe.picture_size(request)
    return height // pipe.scale_factor, width // pipe.scale_factor


def is_small(network, h, w):
    """Whether gradients of every cell, and a picture without each word, take seconds."""
    count = sum(math.prod(parameter.shape) for parameter in network.parameters())
    return h * w <= SMALL and count <= FEW


def as_map(values):
    """A block's output for one picture: (h,w,c) as it is, tokens (T,c) of a square as (h,w,c)."""
    side = round(len(values) ** 0.5)
    return values if values.ndim == 3 else values.reshape(side, side, -1)


def parts(count, size):
    """`size` positions in `count` equal parts -> (count,size) bool: which ones are in each."""
    return np.arange(size) * count // size == np.arange(count)[:, None]


def pooled(maps, h, w):
    """(...,H,W,c) -> (...,h,w,c) float32, the means over h x w parts. Sides that fit stay."""
    rows, columns = (parts(count, size) / parts(count, size).sum(axis=1, keepdims=True)
                     for count, size in ((h, maps.shape[-3]), (w, maps.shape[-2])))
    return np.einsum("hH,...HWc,wW->...hwc", rows, maps, columns, optimize=True).astype(np.float32)


def progress(what, items, total):
    """Pass on the items, and count them, in a terminal and in a notebook."""
    from tqdm.auto import tqdm  # here, so that a wrong argument is reported at once

    shown = "ipykernel" in sys.modules or sys.stderr.isatty()
    return tqdm(items, what, total, unit="step", leave=False, disable=not shown)
