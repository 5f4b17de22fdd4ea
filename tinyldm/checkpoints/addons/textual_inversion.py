"""Textual inversion, a new word for prompts: its vectors are added to the text encoder.

A textual inversion trains rows of the table that turns token ids into vectors, and nothing else.
The vectors (n,D) or (D,), one list per text encoder, are stored under many names:

    <the word>                                                      diffusers
    string_to_param.*, emb_params                                   web interfaces, kohya
    clip_l, clip_g; te1, te2; text_encoder, text_encoder_2; ...     for SDXL's two encoders
    bundle_emb.<the word>.<one of these>                            beside a LoRA

For SDXL, diffusers writes two files, learned_embeds and learned_embeds_2: the first one's name is
enough. Where the names of tensors say no word, the file's name is the word.

Source: Gal et al. 2022, "An Image is Worth One Word: Personalizing Text-to-Image Generation using
Textual Inversion", arXiv:2208.01618; diffusers 0.42 (loaders/textual_inversion.py);
AUTOMATIC1111/stable-diffusion-webui (modules/textual_inversion, extensions-builtin/Lora).
"""
import re
from pathlib import Path

from ...backend import get_xp
from ...errors import TinyldmError, shorten
from ..formats.reading import read_tensors
from ..formats.torch_file import NAMELESS
from ..single_file.kinds import layout_of, model_of_width

# What files call the text encoders -> the part of the pipeline.
ENCODERS = {name: part for part, names in {
    "text_encoder": "text_encoder text_encoder_1 text_encoders_0 te te1 clip_l",
    "text_encoder_2": "text_encoder_2 text_encoders_1 te2 clip_g"}.items()
    for name in names.split()}
NO_WORDS = {NAMELESS, "string_to_param", "*", *ENCODERS}
BUNDLE = re.compile(rf"bundle_emb\.(.+?)(?:\.(string_to_(?:param|token)\..+|{NAMELESS}|"
                    rf"(?:{'|'.join(ENCODERS)})(?:_out)?))?")


def add_word(encoders, path, word=None):
    """Add a textual inversion's word to the tokenizers, and its vectors to the text encoders.

    encoders: {"text_encoder": (Tokenizer, CLIPTextModel)}, with "text_encoder_2" for SDXL. path: a
    .safetensors file, or one that torch.save wrote. word: to use instead of the file's own word.
    Raises TinyldmError, before anything is changed, for a file that is not a textual inversion,
    for one of another model, and for a word that a vocabulary has already.
    """
    path = Path(path)
    stored = read_tensors(path)
    second = path.with_name(f"{path.stem}_2{path.suffix}")
    if len(encoders) == 2 and len(stored) == 1 and second.is_file():
        stored = {f"{name}.{encoder}": tensor for file, encoder in ((path, "te1"), (second, "te2"))
                  for name, tensor in read_tensors(file).items()}
    rows = rows_for(encoders, path, stored)
    learn(encoders, rows, word_of(stored, path.stem) if word is None else word)


def learn(encoders, rows, word):
    """Give the rows of rows_for a word. Raises TinyldmError if a vocabulary has it already."""
    names = {part: tokenizer.new_tokens(word, len(rows[part]))
             for part, (tokenizer, _) in encoders.items()}
    for part, (tokenizer, model) in encoders.items():
        extend(model, tokenizer.learn(names[part]), rows[part])


def extend(model, ids, rows):
    """Write the rows of new tokens into a text encoder's table; the table grows if necessary."""
    table = model.text_model.embeddings.token_embedding.weight
    xp, (V, D) = get_xp(table.data), table.shape
    data = xp.zeros((max(V, ids[-1] + 1), D), table.data.dtype)
    data[:V] = table.data
    data[ids[0]:ids[-1] + 1] = xp.asarray(rows)
    table.data, table.shape = data, data.shape
    model.config = model.config | {"vocab_size": len(data)}


# ---- reading and checking -------------------------------------------------------------------

def rows_for(encoders, path, stored):
    """{name: StoredTensor} of one word -> {part of the pipeline: its rows (n,D)}.

    Raises TinyldmError for what is not a textual inversion, and for one of another model.
    """
    rows = {}
    tables = {part: model.text_model.embeddings.token_embedding.weight
              for part, (_, model) in encoders.items()}
    widths = {part: table.shape[1] for part, table in tables.items()}
    for part, tensor in vectors_of(path, stored, widths).items():
        D, width = widths[part], tensor.shape[-1]
        if width != D:
            theirs, ours = (model_of_width("text encoder", size) for size in (width, D))
            raise TinyldmError(f"{path} was made for {theirs}, but this is {ours}: use a textual "
                               "inversion made for it")
        table, tokens = tables[part].data, len(encoders[part][0])
        if tokens > len(table):
            raise TinyldmError(f"the tokenizer knows {tokens} tokens, the text encoder "
                               f"only {len(table)}: use parts of one pipeline")
        rows[part] = tensor.read(table.dtype).reshape(-1, D)            # (n,D)
    return rows


def vectors_of(path, stored, widths):
    """{name: StoredTensor} -> {part of the pipeline: StoredTensor}, for the widths of its encoders.

    The vectors' own widths tell the encoders apart, whatever the names; names, if widths do not.
    """
    parts = {ENCODERS[piece]: tensor for name, tensor in stored.items()
             for piece in name.split(".") if piece in ENCODERS}
    own = [tensor.shape[-1] for tensor in stored.values() if len(tensor.shape) in (1, 2)]
    if len(stored) == 1:
        parts = dict(zip(["text_encoder"], stored.values()))
    elif sorted(own) == sorted(widths.values()) and len({*own}) == len(stored):
        parts = {part: tensor for part, width in widths.items() for tensor in stored.values()
                 if tensor.shape[-1] == width}
    if (len(parts) < len(stored) or not parts
            or any(len(tensor.shape) not in (1, 2) or 0 in tensor.shape
                   for tensor in parts.values())):
        found = [f"{name} {list(tensor.shape)}" for name, tensor in stored.items()]
        _, kind = layout_of(stored)
        kind = "" if kind in (None, "textual inversion") else f" but of the kind {kind}"
        raise TinyldmError(f"{path} is no textual inversion{kind}: expected one list of vectors "
                           f"under a word, {NAMELESS}, or clip_l and clip_g, found "
                           f"{shorten(found)}")
    if parts.keys() != widths.keys():
        raise TinyldmError(f"{path} has vectors for {len(parts)} text encoders, but this model "
                           f"has {len(widths)}: use a textual inversion made for it")
    return parts


def word_of(stored, default):
    """The word that the names of the tensors say, or the default."""
    words = {".".join(piece for piece in name.split(".") if piece not in NO_WORDS)
             for name in stored}
    return words.pop() or default if len(words) == 1 else default


def bundled(stored):
    """{name: StoredTensor} of a LoRA -> {word: {name: StoredTensor}} of the words beside it, rest.

    Only tables of input vectors count: OneTrainer's `_out` changes what the encoder puts out.
    """
    words, rest = {}, {}
    for name, tensor in stored.items():
        match = BUNDLE.fullmatch(name)
        kind = match and match[2] or NAMELESS
        if not match or kind.endswith("_out"):
            rest[name] = tensor
        elif not kind.startswith("string_to_token"):    # says only which token stood for the word
            words.setdefault(match[1], {})[kind] = tensor
    return words, rest
