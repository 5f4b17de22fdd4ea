"""Textual inversion, a new word for prompts: its vectors are added to the text encoder.

A textual inversion trains rows of the table that turns token ids into vectors, and nothing else.
The vectors (n,D) or (D,) are stored in one of four ways: one tensor named after its word (by
diffusers); `string_to_param` (by web interfaces; torch_file.py turns it into the first way);
`emb_params`, where the file's name is the word; `clip_l` and `clip_g`, for SDXL's two encoders.

Source: Gal et al. 2022, "An Image is Worth One Word: Personalizing Text-to-Image Generation using
Textual Inversion", arXiv:2208.01618; diffusers 0.42 (loaders/textual_inversion.py).
"""
from pathlib import Path

from ...backend import get_xp
from ...errors import TinyldmError
from ..components import shorten
from ..formats.reading import read_tensors
from ..formats.torch_file import NAMELESS
from ..single_file.kinds import model_of_width

PAIR = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}


def add_word(encoders, path, word=None):
    """Add a textual inversion's word to the tokenizers, and its vectors to the text encoders.

    encoders: {"text_encoder": (Tokenizer, CLIPTextModel)}, with "text_encoder_2" for SDXL. path: a
    .safetensors file, or one that torch.save wrote. word: to use instead of the file's own word.
    Raises TinyldmError, before anything is changed, for a file that is not a textual inversion,
    for one of another model, and for a word that a vocabulary has already.
    """
    path = Path(path)
    own, vectors = read_word(path)
    word = own if word is None else word
    if vectors.keys() != encoders.keys():
        raise TinyldmError(f"{path} has vectors for {len(vectors)} text encoders, but this model "
                           f"has {len(encoders)}: use a textual inversion made for it")
    new = {}
    for part, (tokenizer, model) in encoders.items():
        table, tensor = model.text_model.embeddings.token_embedding.weight, vectors[part]
        D, width = table.shape[1], tensor.shape[-1]
        if width != D:
            theirs, ours = (model_of_width("text encoder", size) for size in (width, D))
            raise TinyldmError(f"{path} was made for {theirs}, but this is {ours}: use a textual "
                               "inversion made for it")
        if len(tokenizer) > len(table.data):
            raise TinyldmError(f"the tokenizer knows {len(tokenizer)} tokens, the text encoder "
                               f"only {len(table.data)}: use parts of one pipeline")
        rows = tensor.read(table.data.dtype).reshape(-1, D)             # (n,D)
        new[part] = rows, tokenizer.new_tokens(word, len(rows))
    for part, (tokenizer, model) in encoders.items():
        rows, names = new[part]
        extend(model, tokenizer.learn(names), rows)


def extend(model, ids, rows):
    """Write the rows of new tokens into a text encoder's table; the table grows if necessary."""
    table = model.text_model.embeddings.token_embedding.weight
    xp, (V, D) = get_xp(table.data), table.shape
    data = xp.zeros((max(V, ids[-1] + 1), D), table.data.dtype)
    data[:V] = table.data
    data[ids[0]:ids[-1] + 1] = xp.asarray(rows)
    table.data, table.shape = data, data.shape
    model.config = model.config | {"vocab_size": len(data)}


def read_word(path):
    """A file -> its word, {part of the pipeline: StoredTensor (n,D) or (D,)}."""
    stored = read_tensors(path)
    if stored.keys() == PAIR.keys():
        word, vectors = path.stem, {PAIR[name]: tensor for name, tensor in stored.items()}
    elif len(stored) == 1:
        (word, tensor), = stored.items()
        word, vectors = path.stem if word == NAMELESS else word, {"text_encoder": tensor}
    else:
        word, vectors = "", {}
    lists = [tensor for tensor in vectors.values()
             if len(tensor.shape) in (1, 2) and 0 not in tensor.shape]
    if not lists or len(lists) < len(vectors):
        found = [f"{name} {list(tensor.shape)}" for name, tensor in stored.items()]
        raise TinyldmError(f"{path} is no textual inversion: expected one list of vectors under a "
                           f"word, {NAMELESS}, or clip_l and clip_g, found {shorten(found)}")
    return word, vectors
