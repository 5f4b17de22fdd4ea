"""python -m tinyldm.metrics COMMAND: distances between folders of pictures.

    fid REAL DRAWN                  Fréchet distance, also of .npz files of statistics
    kid REAL DRAWN                  kernel distance: mean and standard deviation over the subsets
    precision-recall REAL DRAWN     how many drawn ones look real; how many real ones are matched
    cmmd REAL DRAWN                 kernel distance of CLIP embeddings
    clip-score DRAWN                how well pictures match texts, by a CLIP
    inception-score DRAWN           from the logits of one set alone
    stats PICTURES OUT.npz          mean and covariance, for fid here and in pytorch-fid

One line of numbers goes to standard output, and progress to standard error. Anything wrong ends in
one line, `error: ...`, and exit status 2.
"""
import sys
from pathlib import Path

import numpy as np

from ..backend import array_library, keep_freed_memory
from ..cli.console import notes, say
from ..cli.options import Formatter, Parser
from ..errors import TinyldmError, note
from . import features
from .fid import frechet_distance, read_statistics, statistics, write_statistics

SLOW = 1000                 # numbers of features from which the distance takes seconds
OPTIONS_OF = dict.fromkeys(("inception", "resize", "dims"), "inception") | {"clip": "clip"}
DESCRIPTION = """How like real pictures drawn ones are. REAL and DRAWN are folders, or .npz files.

--features inception, the default, needs the public weights (--inception FILE, or the variable
TINYLDM_INCEPTION). --features clip needs a CLIP (--clip FOLDER). --features vae needs nothing else:
the bundled model's VAE, whose numbers compare only among themselves.
"""


def run(arguments=None):
    """Print what a command measures. Raises TinyldmError for whatever is wrong."""
    args = parse(arguments)
    try:
        with notes():
            args.function(args)
    except MemoryError:
        raise TinyldmError("not enough memory: use a smaller --batch, or fewer pictures") from None


def parse(arguments):
    parser = Parser("python -m tinyldm.metrics", description=DESCRIPTION, formatter_class=Formatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name, function, places, text, kind="inception", **defaults):
        sub = commands.add_parser(name, description=text, help=text, formatter_class=Formatter)
        for place in places:
            sub.add_argument(place.lower(), metavar=place, type=Path)
        if len(defaults) == 0:
            sub.add_argument("--features", default=kind, choices=("inception", "clip", "vae"),
                             help=f"what pictures are compared by ({kind})")
        options(sub.add_argument)
        sub.set_defaults(function=function, dims=None, **defaults)
        return sub.add_argument

    both = "REAL", "DRAWN"
    add = command("fid", fid, both, "Fréchet distance of two folders, or of files of statistics")
    dims(add)
    add = command("kid", kid, both, "kernel distance: mean and standard deviation of the subsets")
    dims(add)
    add("--subsets", type=int, default=100, metavar="N", help="how many random subsets (100)")
    add("--subset-size", type=int, default=1000, metavar="N", help="pictures of each (1000)")
    add("--seed", type=int, default=2020, metavar="K", help="of the random choice (2020)")
    add = command("precision-recall", precision_recall, both,
                  "precision: the share of DRAWN near any REAL; recall: of REAL near any DRAWN")
    dims(add)
    add("--neighbours", type=int, default=3, metavar="K", help="near: as the K-th neighbour is (3)")
    command("cmmd", cmmd, both, "kernel distance of CLIP embeddings", kind="clip")
    add = command("inception-score", inception_score, ("DRAWN",), "how clear and how varied one "
                  "folder is", features="inception")
    add("--splits", type=int, default=10, metavar="N", help="parts of the folder (10)")
    add = command("clip-score", clip_score, ("DRAWN",), "how well the pictures of a folder match "
                  "texts: 100 times the cosine of their CLIP embeddings", features="clip")
    add("--texts", type=Path, metavar="FILE", help="one line for each picture, in the order of "
        "their names (the prompts that the pictures' files record)")
    add = command("stats", stats, ("PICTURES", "OUT.npz"), "write mean and covariance for fid")
    dims(add)
    args = parser.parse_args(arguments)
    for name in ("batch", "subsets", "subset_size", "neighbours", "splits"):
        if getattr(args, name, 1) < 1:
            raise TinyldmError(f"--{name.replace('_', '-')} must be at least 1, not "
                               f"{getattr(args, name)}")
    return args


def options(add):
    add("--inception", metavar="FILE", help="the weights of the Inception network")
    add("--clip", metavar="FOLDER", help="a CLIP with a vision model: a folder or a file")
    add("--resize", choices=tuple(features.RESIZES), help="to the Inception network's size as "
        "pytorch-fid does (pytorch, the default), as clean-fid does, or as TensorFlow 1 did (tf)")
    add("--batch", type=int, default=50, metavar="N", help="pictures at a time (50)")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: a GPU, with CuPy (cpu)")


def dims(add):
    add("--dims", type=int, choices=(64, 192, 768, 2048), help="which of the Inception network's "
        "features (2048)")


# ---- the commands -----------------------------------------------------------------------------

def fid(args):
    a, b = (statistics_of(place, args) for place in (args.real, args.drawn))
    if len(a.mean) > SLOW:
        print("computing the distance", file=sys.stderr)
    value = frechet_distance(a, b)
    if a.count and b.count and a.count != b.count:
        note(f"{a.count} and {b.count} pictures: FIDs compare only among equal numbers of pictures")
    if 0 < min(a.count, b.count) <= len(a.mean):
        note(f"{min(a.count, b.count)} pictures are few for {len(a.mean)} features: the distance "
             "is too large, and compares only among equal numbers of pictures")
    say(f"fid {value:.6f}")


def kid(args):
    from .kid import kid

    mean, std = kid(*both_features(args), args.subsets, args.subset_size, args.seed)
    say(f"kid {mean:.6f} std {std:.6f}")


def precision_recall(args):
    from .precision_recall import precision_recall

    precision, recall = precision_recall(*both_features(args), args.neighbours)
    say(f"precision {precision:.4f} recall {recall:.4f}")


def cmmd(args):
    from .cmmd import cmmd

    say(f"cmmd {cmmd(*both_features(args)):.6f}")


def inception_score(args):
    from .inception_score import inception_score

    args.dims = 1008
    mean, std = inception_score(features_of(args.drawn, args), args.splits)
    say(f"inception-score {mean:.6f} std {std:.6f}")


def clip_score(args):
    from ..pipelines.zero_shot import ZeroShot
    from .clip_score import clip_score

    if args.clip is None:
        raise TinyldmError("a CLIP score needs a whole CLIP with its tokenizer: name its folder by "
                           "--clip")
    pictures = features.pictures_in(args.drawn)
    if args.texts:
        texts = lines_of(args.texts, len(pictures))
    else:
        texts = [recorded_prompt(args.drawn, picture) for picture in pictures]
    clip = ZeroShot.load(args.clip)
    on_device(clip.model, args)
    scores = []
    with progress(args.drawn, len(pictures)) as bar:
        for start in range(0, len(pictures), args.batch):
            part = slice(start, start + args.batch)
            images = [features.as_image(picture) for picture in pictures[part]]
            scores += [*clip_score(clip.model, clip.tokenizer, clip.processor, images,
                                   texts[part])]
            bar.update(len(images))
    say(f"clip-score {np.mean(scores):.6f}")


def lines_of(path, count):
    """A text file with one line for each of the pictures -> its lines."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise TinyldmError(f"cannot read {path} as a text ({error}): name a file with one line for "
                           "each picture") from None
    if len(lines) != count:
        raise TinyldmError(f"{path} has {len(lines)} lines for {count} pictures: give one line for "
                           "each, in the order of the pictures' names")
    return lines


def recorded_prompt(place, picture):
    """The prompt in a picture's file, as tinyldm and other programs write it."""
    from ..cli import parameters
    from ..images import read_parameters

    text = None if isinstance(picture, np.ndarray) else read_parameters(picture)
    prompt = parameters.read(text).prompt if text else ""
    if not prompt.strip():
        where = place if isinstance(picture, np.ndarray) else picture
        raise TinyldmError(f"{where} records no prompt: give the prompts by --texts, a file with "
                           "one line for each picture")
    return prompt


def stats(args):
    out = getattr(args, "out.npz")
    if out.suffix != ".npz":
        raise TinyldmError(f"{out} must end in .npz, by which other programs know it")
    write_statistics(out, statistics_of(args.pictures, args))
    say(out, exact=True)


# ---- what they share --------------------------------------------------------------------------

def statistics_of(place, args):
    """A file of statistics, or pictures -> Statistics."""
    if place.suffix == ".npz" and is_statistics(place):
        return read_statistics(place)
    return statistics(features_of(place, args), extractor(args).kind)


def is_statistics(place):
    """Whether an .npz holds statistics; one without pictures is read as such, to say what lacks."""
    names = features.read_npz(place).keys()
    return "mu" in names or "arr_0" not in names


def both_features(args):
    return [features_of(place, args) for place in (args.real, args.drawn)]


def features_of(place, args):
    """A folder of pictures, or an .npz of them -> (N,F), with a progress bar."""
    pictures = features.pictures_in(place)              # first, as a wrong name costs nothing
    chosen = extractor(args)
    with progress(place, len(pictures)) as bar:
        return features.extract(pictures, chosen, args.batch, bar.update)


def progress(place, total):
    from tqdm import tqdm  # here, so that a wrong argument is reported at once

    return tqdm(total=total, desc=place.name or str(place), unit="picture", file=sys.stderr)


def extractor(args):
    """What the options ask for, loaded once."""
    if not hasattr(args, "extractor"):
        for option, kind in OPTIONS_OF.items():
            if getattr(args, option) is not None and args.features != kind:
                raise TinyldmError(f"--{option} belongs to --features {kind}, not to "
                                   f"{args.features}")
        keep_freed_memory()
        args.extractor = EXTRACTORS[args.features](args)
    return args.extractor


def inception(args):
    from ..checkpoints.inception import load_inception

    module = load_inception(args.inception)
    return features.inception(on_device(module, args), args.dims or 2048, args.resize or "pytorch")


def clip(args):
    from ..checkpoints.components import load_model
    from ..image_processor import ImageProcessor

    if args.clip is None:
        raise TinyldmError("--features clip needs a CLIP, which is not part of tinyldm: name a "
                           "folder with its config.json, weights and preprocessor_config.json by "
                           "--clip, or use --features vae")
    module = on_device(load_model(args.clip), args)
    return features.clip(module, ImageProcessor.from_folder(args.clip))


def vae(args):
    from ..pipelines.loading import load

    return features.bundled_vae(load(device=args.device, dtype=np.float32).vae)


def on_device(module, args):
    return module.move_to(array_library(args.device))


EXTRACTORS = {"inception": inception, "clip": clip, "vae": vae}
