"""A textual inversion, a new word for prompts: vectors in a file, read and put into a text encoder.

The word is trained as rows of the table that turns token ids into vectors; nothing else changes.
Three kinds of files hold them, (n,D) or (D,): one tensor named after its word, as diffusers writes
it; `string_to_param` of the web interfaces, which torch_file.py reads as that, and `emb_params`,
whose word is the file's name; and `clip_l` and `clip_g` for the two text encoders of SDXL.

Called by pipeline.py on a loaded pipeline; the tokenizer learns the word at the same time.
Source: Gal et al. 2022, "An Image is Worth One Word: Personalizing Text-to-Image Generation using
Textual Inversion", arXiv:2208.01618; diffusers 0.42 (loaders/textual_inversion.py).
"""
from pathlib import Path

from ...backend import get_xp
from ...errors import TinyldmError
from ..components import shorten
from ..formats.reading import read_tensors
from ..formats.torch_file import NAMELESS
from ..single_file.kinds import FAMILIES

PAIR = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}


def add_word(encoders, path, word=None):
    """Teach a textual inversion's word to tokenizers and text encoders.

    encoders: {"text_encoder": (Tokenizer, CLIPTextModel)}, with "text_encoder_2" for SDXL. path: a
    .safetensors file, or one that torch.save wrote. word: in place of the file's own.
    Raises TinyldmError, before anything is changed, for a file that is no textual inversion or one
    of another model, and for a word that is in a vocabulary already.
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
            raise TinyldmError(f"{path} was made for {encoder_width(width)}, but this is "
                               f"{encoder_width(D)}: use a textual inversion made for it")
        if len(tokenizer) > len(table.data):
            raise TinyldmError(f"the tokenizer knows {len(tokenizer)} tokens, the text encoder "
                               f"only {len(table.data)}: use parts of one pipeline")
        rows = tensor.read(table.data.dtype).reshape(-1, D)             # (n,D)
        new[part] = rows, tokenizer.new_tokens(word, len(rows))
    for part, (tokenizer, model) in encoders.items():
        rows, names = new[part]
        extend(model, tokenizer.learn(names), rows)


def extend(model, ids, rows):
    """Give new tokens their rows in a text encoder's table, which grows if it has to."""
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


def encoder_width(width):
    return f"{FAMILIES.get(width, 'a model')} (text encoder of width {width})"
