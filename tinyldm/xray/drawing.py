"""What the x-ray's files share: the options of one picture, and the bar.

record.py, attention.py, words.py -> drawing.py -> pipelines/
"""
import sys

from ..errors import TinyldmError
from ..pipelines.request import own_names
from ..text.prompt import split_into_chunks, to_arrays


def one_picture(pipe, prompt, options):
    """The completed options of one picture, of any pipeline. Raises TinyldmError."""
    if not hasattr(pipe, "Options"):
        raise TinyldmError("tinyldm.xray expects a pipeline, as tinyldm.load gives it, not a "
                           f"{type(pipe).__name__}")
    known = {name for name in pipe.Options.__dataclass_fields__}
    for name, value in (("guidance_scale", None), ("negative_prompt", "")):
        if name not in known and options[name] == value:
            del options[name]                           # this system has none
    subject = "prompt" if "prompt" in known else "label"
    if subject == "prompt" or prompt not in ("", None):
        options[subject] = prompt
    request = pipe.complete(pipe.Options(**own_names(options, pipe.Options)))
    if request.count != 1:
        raise TinyldmError(f"the x-ray is of one picture, not of {request.count}: give one prompt "
                           "and one seed")
    return request


def read_prompt(pipe, prompt):
    """-> the ids (n,77), the Words and the texts of the tokens, of the first tokenizer."""
    tokenizer = next(iter(pipe.tokenizers.values()))
    ids, _ = to_arrays(split_into_chunks(prompt, tokenizer), tokenizer)
    return ids, tokenizer.words(ids), tokenizer.texts(ids)


def latents_size(pipe, request):
    """(h, w) of the latents of a picture."""
    width, height = pipe.picture_size(request)
    return height // pipe.scale_factor, width // pipe.scale_factor


def progress(what, items, total):
    """Pass on the items, and count them, in a terminal and in a notebook."""
    from tqdm.auto import tqdm  # here, so that a wrong argument is reported at once

    shown = "ipykernel" in sys.modules or sys.stderr.isatty()
    return tqdm(items, what, total, unit="step", leave=False, disable=not shown)
