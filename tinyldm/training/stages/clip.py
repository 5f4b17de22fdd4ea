"""python -m tinyldm.training clip: a CLIP from pictures with captions, new or from weights.

    --weights ─load→ ZeroShot, or a new one (model, tokenizer, image processor)
    pictures, captions ─Pairs→ gradients ─Trainer→ FOLDER/model ─read back→ checked
    held-out pictures ─Retrieval→ accuracy, the matrix of similarities

FOLDER/model is a CLIPModel as transformers reads it.
Source: Radford et al. 2021, arXiv:2103.00020; with one half frozen Zhai et al. 2022, "LiT:
Zero-Shot Transfer with Locked-image text Tuning", arXiv:2111.07991.
"""
import sys
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ...backend import array_library
from ...checkpoints.places import bundled
from ...cli.console import say
from ...cli.options import path
from ...errors import TinyldmError
from ...files import new_folder
from ...image_processor import ImageProcessor
from ...images import open_image
from ...layers import trainable_parameters
from ...models import CLIPModel
from ...pipelines.zero_shot import TEMPLATES, ZeroShot
from ...text.tokenizer import Tokenizer
from .. import memory
from ..data.classes import find_classes
from ..data.pictures import PictureFolder
from ..options import DTYPES, add_output, add_shared, trainer, whole
from .contrastive import Pairs, initialise_clip
from .retrieval import Retrieval

CREATION = 2 ** 32 - 1      # the key of the first numbers; the steps have smaller ones
MOST_HELD_OUT = 200         # by default
SHEET = 840                 # pixels of a matrix in the sheet of samples
HEAD = 32                   # channels of an attention head of a new model
# Options of new models, and their defaults.
NEW = {"resolution": 64, "patch": 8, "width": 96, "layers": 3}
RATES = {True: 1e-5, False: 1e-3}                       # with weights, and without
SETTINGS = ("weights", "tokenizer", "train", "held_out", *NEW)
EXACT = {"float32": 1e-5, "float16": 1e-2}              # of an embedding of length 1


def add_options(parser):
    add = parser.add_argument_group("pictures").add_argument
    add("--data", type=path, required=True, metavar="FOLDER", help="the pictures, with captions as "
        "dog.txt beside dog.png, metadata.jsonl, or kohya's folders such as 10_dog; python -m "
        "tinyldm.shapes pictures writes some")
    add("--held-out", type=whole(0, 100_000), metavar="N", help="pictures that are not trained on: "
        f"the accuracy is measured with them (a tenth, at most {MOST_HELD_OUT})")
    add("--classes", choices=("folders", "names"), help="measure the accuracy of classes, too: the "
        "first sub-folder, cat/1.png, or what stands before the first _ of a name, cat_1.png")
    add("--template", action="append", metavar="TEXT", help="what is said of a class, with {} in "
        f"place of its name; may be given several times ({TEMPLATES[0]!r})")
    add("--flip", action="store_true", help="mirror half of the pictures")
    add("--strict", action="store_true", help="stop where a picture cannot be read or has no "
        "caption")
    add = parser.add_argument_group("model").add_argument
    add("--weights", metavar="W", help="go on with a CLIP: a folder, or a name on the Hugging Face "
        f"hub; the learning rate is then {RATES[True]:g} (default: a new model)")
    add("--train", choices=("both", "image", "text"), default="both", help="the half to train, the "
        "other one is frozen; text alone is LiT (both)")
    add("--resolution", type=whole(8, 1024), metavar="N", help="side of a new model's pictures, in "
        f"pixels ({NEW['resolution']})")
    add("--patch", type=whole(1, 256), metavar="N", help=f"side of its patches ({NEW['patch']})")
    add("--width", type=whole(HEAD, 4096), metavar="N", help="channels of both of its halves and "
        f"of its embeddings, a multiple of {HEAD} ({NEW['width']})")
    add("--layers", type=whole(1, 64), metavar="N", help=f"of each half ({NEW['layers']})")
    add("--tokenizer", type=path, metavar="FOLDER", help="of a new model: that of a Stable "
        "Diffusion, for instance (the bundled model's, which has words for drawn shapes alone)")
    add("--save-as", choices=DTYPES, default="float32", help="numbers in the file (float32)")
    add_shared(parser, steps=1000, learning_rate=RATES[False], batch=64, warmup=50,
               schedule="cosine", betas=(0.9, 0.98), weight_decay=0.2, adam_eps=1e-6)
    parser.set_defaults(learning_rate=None)
    add_output(parser, Path("clip"), prompts=False, sample_every=200)


def run(options):
    """Train, write and check. Raises TinyldmError for whatever is wrong."""
    stage = Stage(options)
    stage.train()
    stage.loop.averaged(stage.finish)()


class Stage:
    """The CLIP, the pictures and the folder of one command.

    options: what add_options adds, parsed; of those in NEW, and of the learning rate and the
    pictures held out, None becomes what is used.
    Raises TinyldmError for whatever is wrong before the training.
    """

    def __init__(self, options):
        self.options, self.result = options, options.output / "model"
        if self.result.exists() and not options.resume:
            raise TinyldmError(f"{self.result} exists already: name another folder with --output, "
                               "or go on with its training by --resume")
        if options.batch < 2:
            raise TinyldmError("--batch must be 2 or more: the loss of a single pair is always 0, "
                               "because there is no other caption to tell it from")
        if options.held_out == 1:
            raise TinyldmError("--held-out must be 0, or 2 and more: a single picture always finds "
                               "its caption")
        if options.template and not options.classes:
            raise TinyldmError("--template is about classes: add --classes, or leave it out")
        if options.learning_rate is None:
            options.learning_rate = RATES[bool(options.weights)]
        self.clip = self._given() if options.weights else self._new()
        model, size = self.clip.model, self.clip.model.settings.vision.image_size
        for half, layers in (("text", (model.vision_model, model.visual_projection)),
                             ("image", (model.text_model, model.text_projection))):
            if options.train == half:
                for layer in layers:
                    layer.freeze()
        self.pictures = PictureFolder(options.data, size, center_crop=False, flip=options.flip,
                                      strict=options.strict, filter="bicubic")
        self.pictures.fit_captions(self.clip.tokenizer)
        self.clip.embed_images([open_image(self.pictures.items[0].path)])   # do its parts fit?
        model.move_to(array_library(options.device))
        self.pairs = Pairs(self.clip, self.pictures, options.seed, options.checkpoints)
        self.retrieval = self._retrieval()
        for line in [*self.pictures.report(), *self._check()]:
            say(line)

    def _given(self):
        """The CLIP of --weights, in float32."""
        options = self.options
        if given := [name for name in (*NEW, "tokenizer") if getattr(options, name) is not None]:
            raise TinyldmError(f"--{given[0]} is for a new model, and --weights have their own: "
                               "leave one of them out")
        return ZeroShot.load(options.weights)

    def _new(self):
        """A new CLIP, with the tokenizer of a folder or of a pipeline's folder."""
        options = self.options
        if options.train != "both":
            raise TinyldmError(f"--train {options.train} freezes the other half, which is made of "
                               "random numbers in a new model: give --weights, or train both")
        for name, default in NEW.items():
            if getattr(options, name) is None:
                setattr(options, name, default)
        R, D, p = options.resolution, options.width, options.patch
        if R % p:
            raise TinyldmError(f"--resolution must be a multiple of --patch, {p}, not {R}")
        if D % HEAD:
            raise TinyldmError(f"--width must be a multiple of {HEAD}, not {D}")
        folder = options.tokenizer or bundled()
        tokenizer = Tokenizer.from_folder(folder / "tokenizer" if (folder / "tokenizer").is_dir()
                                          else folder)
        half = {"hidden_size": D, "intermediate_size": 4 * D, "num_hidden_layers": options.layers,
                "num_attention_heads": D // HEAD}
        text = half | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.end,
                       "bos_token_id": tokenizer.start, "pad_token_id": tokenizer.padding,
                       "max_position_embeddings": tokenizer.model_max_length}
        model = CLIPModel({"projection_dim": D, "text_config": text,
                           "vision_config": half | {"image_size": R, "patch_size": p}})
        initialise_clip(model, np.random.default_rng([options.seed, CREATION]))
        processor = ImageProcessor({"size": {"shortest_edge": R},
                                    "crop_size": {"height": R, "width": R}})
        return ZeroShot(model, tokenizer, processor)

    def _retrieval(self):
        """Leave out what cannot be trained on, and hold out what measures the accuracy."""
        options, pictures = self.options, self.pictures
        templates = options.template or TEMPLATES
        classes = find_classes(pictures, options.classes) if options.classes else None
        pictures.leave_out([i for i, item in enumerate(pictures.items) if not item.caption])
        if options.held_out is None:
            tenth = min(MOST_HELD_OUT, len(np.unique(pictures.entries)) // 10)
            options.held_out = tenth if tenth > 1 else 0
        held = pictures.hold_out(options.held_out) if options.held_out else []
        held = held or np.unique(pictures.entries)[:MOST_HELD_OUT].tolist()
        items = [pictures.items[i] for i in held]
        if classes:
            names, labels = classes
            classes = [name.replace("_", " ") for name in names], [labels[i] for i in held]
            self.clip.classifier(classes[0], templates)     # are they templates?
        return Retrieval(self.clip, items, options.batch, classes, templates)

    def _check(self):
        """Raise TinyldmError for pictures that cannot be trained on -> lines on those that can."""
        options, pictures = self.options, self.pictures
        there = np.unique(pictures.entries)
        if len(there) < options.batch:
            raise TinyldmError(f"--batch {options.batch} needs as many pictures with captions, but "
                               f"{pictures.folder} has {len(there)} to train on: a picture twice "
                               "in a batch would be its own wrong answer")
        captions = {caption for i in there for caption in pictures.items[i].captions}
        if len(captions) == 1:
            raise TinyldmError(f"all pictures of {pictures.folder} have the caption "
                               f"{captions.pop()!r:.80}: give each one its own, by which it can be "
                               "told from the others")
        lines = [f"{options.held_out} pictures are held out: the accuracy is theirs"
                 if options.held_out else "no picture is held out: the accuracy is that of "
                 f"{len(self.retrieval.items)} pictures that are trained on"]
        if same := self.pairs.same_pairs(options.batch):
            lines.append(f"{len(captions)} different captions: a batch holds {same:.2g} pairs of "
                         "pictures with the same caption, on average, which count as wrong answers")
        return lines

    def train(self):
        """Train to the last step."""
        options, pairs, retrieval = self.options, self.pairs, self.retrieval
        self.loop = loop = trainer(
            options, trainable_parameters(self.clip.model), data=self.pictures.fingerprint,
            settings={f"--{name.replace('_', '-')}": str(getattr(options, name))
                      for name in SETTINGS})
        loop.models, loop.report.side = {"clip": self.clip.model}, SHEET
        say(self.memory())

        def batch_loss(rng):
            loop.about = pairs.describe(loop.batch, options.batch)
            return pairs.batch_loss(loop.batch, options.batch, loop.scale)

        def validate():
            loss, shares = retrieval.measure()
            loop.report.tell(loop.step, "accuracy", shares)
            tqdm.write(f"step {loop.step}: {retrieval.sentence(shares)}", file=sys.stderr)
            return {f"{retrieval.size} pairs": loss}

        loop.train(batch_loss, write=self.write, sample=lambda: [retrieval.matrix()],
                   validate=validate, constrain=pairs.clamp_scale)

    def memory(self):
        """A line on the memory that the training will take."""
        options, model = self.options, self.clip.model
        step, side = partial(self.pairs.step, options.batch), model.settings.vision.image_size
        parts = memory.division(options.batch, model.xp)
        found = {kept: memory.waiting(memory.places(step, side, kept), parts)
                 for kept in (False, True)}
        return memory.sentence(options, [model], trainable_parameters(model), found)

    # ---- the result -----------------------------------------------------------------------------

    def write(self):
        """Write the model with its tokenizer and its image processor."""
        with new_folder(self.result, marker="config.json") as folder:
            self.clip.save(folder, DTYPES[self.options.save_as])

    def finish(self):
        """Measure once more, read the folder back and compare, and tell how to use it."""
        options = self.options
        _, shares = self.retrieval.measure()
        say(self.retrieval.sentence(shares))
        again = ZeroShot.load(self.result)
        again.model.move_to(array_library(options.device))
        items = self.retrieval.items[:4]
        pictures = [open_image(item.path) for item in items]
        texts = [item.caption for item in items]
        error = max(float(abs(one - other).max()) for one, other in (
            (self.clip.embed_images(pictures), again.embed_images(pictures)),
            (self.clip.embed_texts(texts), again.embed_texts(texts))))
        if not error <= max(EXACT[options.save_as], EXACT[options.dtype]):
            raise TinyldmError(f"{self.result}, read back, has embeddings that are off by "
                               f"{error:.2g}: go on with --resume to write it anew")
        say(f"checked: {self.result}, read back, has the embeddings of the trained model, up to "
            f"{error:.1g}")
        say(f"use it: tinyldm.pipelines.zero_shot.ZeroShot.load({str(self.result)!r})")
