"""python -m tinyldm.training textual-inversion: learn a word for what some pictures show.

Only the word's vectors move, new rows after the text encoder's table. The text encoder and the UNet
are frozen, but the gradient goes through both.

    pictures + "a photo of a <word>" → loss → UNet → text encoder → rows → word.safetensors

Source: Gal et al. 2022, "An Image is Worth One Word: Personalizing Text-to-Image Generation using
Textual Inversion", arXiv:2208.01618; diffusers' examples/textual_inversion.
"""
import copy

from ... import ops
from ...backend import get_xp
from ...checkpoints import write_embedding
from ...errors import TinyldmError
from ...layers import NO_TAPE, Module, Parameter
from ..options import whole
from .stage import Stage
from .stage import add_options as add_common

SETTINGS = ("token", "initializer", "vectors", "learnable_property")

# What the pictures are said to show, {} is the word.
TEMPLATES = {
    "object": [
        "a photo of a {}", "a photo of the {}", "a photo of my {}", "a photo of one {}",
        "a close-up photo of a {}", "a close-up photo of the {}", "a bright photo of a {}",
        "a bright photo of the {}", "a dark photo of the {}", "a cropped photo of a {}",
        "a cropped photo of the {}", "a good photo of a {}", "a good photo of the {}",
        "a photo of a small {}", "a photo of a large {}", "a photo of a clean {}",
        "a picture of a {}", "a picture of the {}", "an image of a {}", "{}"],
    "style": [
        "a painting in the style of {}", "a small painting in the style of {}",
        "a large painting in the style of {}", "a bright painting in the style of {}",
        "a dark painting in the style of {}", "a detail of a painting in the style of {}",
        "a picture in the style of {}", "an image in the style of {}", "a drawing in {} style",
        "art in the style of {}"],
}


def add_options(parser):
    add = parser.add_argument_group("the word").add_argument
    add("--token", required=True, metavar="WORD", help="the new word, such as '<cat-toy>'")
    add("--initializer", required=True, metavar="WORD", help="a word of one token to begin with, "
        "such as toy")
    add("--vectors", type=whole(1, 75), default=1, metavar="N", help="how many vectors the word "
        "has (1)")
    add("--learnable-property", choices=TEMPLATES, default="object", help="what the word "
        "stands for, by which captions are made: an object or a style (object)")
    add_common(parser, steps=3000, learning_rate=5e-4, output="embedding")
    parser.set_defaults(clip=0.0, trigger=None)         # as in diffusers' script


def run(options):
    """Train, write and check. Raises TinyldmError for whatever is wrong."""
    word, captions = options.token, options.caption
    if captions is None:
        captions = [text.format(word) for text in TEMPLATES[options.learnable_property]]
    elif word not in captions:
        raise TinyldmError(f"--caption must hold the new word, {word}, not {captions!r:.80}")
    stage = Stage(options, captions)
    learned = Word(stage.pipe, word, options.initializer, options.vectors)

    def write():
        return write_embedding(stage.result, word, learned.rows(), options.layout,
                               stage.metadata(), base=stage.base, dtype=options.save_as)

    stage.train(learned.named(), write, SETTINGS)

    def read_back():
        learned.remove()
        untrained = stage.probe()
        stage.pipe.load_textual_inversion(stage.result, word)
        return untrained
    stage.check(read_back)
    stage.show_use("--embedding", stage.result)


class NewRows(Module):
    """A frozen Embedding, base_layer, and new rows (n,D) for the ids from `first` on."""

    weight = property(lambda self: self.base_layer.weight)

    def __init__(self, base_layer, first, rows):
        self.base_layer, self.first = base_layer, first
        self.rows = Parameter(*rows.shape)
        self.rows.data = rows

    def forward(self, ids, tape=NO_TAPE):               # (...) -> (...,D)
        new = ids >= self.first
        y = self.base_layer(get_xp(ids).where(new, 0, ids))
        y[new], cache = ops.embedding(ids[new] - self.first, self.rows.data)
        tape.save(self, (new, cache))
        return y

    def backward(self, dy, tape):
        new, cache = tape.load(self)
        self.rows.add_grad(ops.embedding_backward(dy[new], cache))


class Word:
    """A word that a pipeline learns: its rows are put into the text encoders.

    initializer: a word of one token, whose vector the rows begin with. vectors: their number n.
    Raises TinyldmError for another initializer, and for a word that a vocabulary has already.
    """

    def __init__(self, pipe, word, initializer, vectors):
        self.pipe, self.word = pipe, word
        self.tokenizers = {part: copy.deepcopy(own) for part, own in pipe.tokenizers.items()}
        self.layers = {}                                # {part: NewRows}
        names = {}
        for part, tokenizer in pipe.tokenizers.items():
            ids = tokenizer.ids(initializer)
            if len(ids) != 1:
                raise TinyldmError(f"--initializer must be a word of one token, but "
                                   f"{initializer!r:.80} has {len(ids)}: take a common word for "
                                   "what the pictures show")
            names[part] = tokenizer.new_tokens(word, vectors), ids[0]
        for part, (tokens, start) in names.items():
            model = getattr(pipe, part.replace("tokenizer", "text_encoder"))
            ids = pipe.tokenizers[part].learn(tokens)
            embeddings = model.text_model.embeddings
            table = embeddings.token_embedding
            xp, row = model.xp, table.weight.data[start]
            rows = NewRows(table, ids[0], xp.ascontiguousarray(
                xp.broadcast_to(row, (vectors, len(row)))))
            model.freeze()
            embeddings.token_embedding = rows
            model.config = model.config | {"vocab_size": max(ids[-1] + 1, table.weight.shape[0])}
            self.layers[part.replace("tokenizer", "text_encoder")] = rows

    def named(self):
        """[(name, Parameter)], of what is trained."""
        return [(f"{part}.rows", layer.rows) for part, layer in self.layers.items()]

    def rows(self):
        """{part of the pipeline: vectors (n,D)}."""
        return {part: layer.rows.data for part, layer in self.layers.items()}

    def remove(self):
        """Take the word out of the pipeline again."""
        for part, layer in self.layers.items():
            model = getattr(self.pipe, part)
            model.text_model.embeddings.token_embedding = layer.base_layer
            model.config = model.config | {"vocab_size": layer.weight.shape[0]}
        for part, tokenizer in self.tokenizers.items():
            setattr(self.pipe, part, tokenizer)
