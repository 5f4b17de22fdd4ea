"""python -m tinyldm.inspect FILE: what a checkpoint is, or how a picture was made.

    a file of weights       its kind, layout and precision, what it says of itself (what the model
                            predicts, for how few steps), what of it is missing, unexpected or left
                            out, and its parameters by module
    a component's folder    the same, and what does not fit the model that its config.json names
    a pipeline's folder     the same of every component
    --shapes                of a folder or a file with weights, the shape of every block's output
    a picture               its size, and what tinyldm or another program recorded in it: prompt,
                            steps, sampler, seed ...

It reads headers, not weights, so it is fast for files of any size. Anything else ends in one line,
`error: ...`, and exit status 2.
"""
import json
import math
import os
from collections import Counter
from pathlib import Path

from ..checkpoints.components import (
    build_model,
    class_name,
    find_weights,
    read_files,
)
from ..checkpoints.formats.foreign import HEAD, is_picture
from ..checkpoints.formats.reading import read_tensors
from ..checkpoints.layout import fitted
from ..checkpoints.single_file.ddpm import is_original, public_tensors
from ..checkpoints.single_file.kinds import family, layout_of
from ..cli.console import say
from ..cli.options import Parser
from ..errors import TinyldmError, clean
from ..files import read_json
from .fit import describe_fit, lists

PNG = b"\x89PNG\r\n\x1a\n"
LONGEST_LINE = 20_000           # characters; prompts are long
LONGEST_JSON = 500              # of nodes that nothing here knows
LARGEST = 8192                  # --size
MOST_ROWS, WIDEST = 100, 60     # of the table of modules


def run(arguments=None):
    """Print what a file is. Raises TinyldmError for a bad argument or an unknown file."""
    parser = Parser("python -m tinyldm.inspect", description="Print what a checkpoint is, or how "
                    "a picture was made.")
    parser.add_argument("file", type=Path, help="a file of weights, the folder of a pipeline or "
                        "of one component, or a picture")
    parser.add_argument("--shapes", action="store_true", help="print the shape of every block's "
                        "output instead; of a folder, the config.json is enough")
    parser.add_argument("--size", type=int, metavar="N", help="with --shapes, height "
                        "and width of the input, in pixels or latents; default: the config's own")
    args = parser.parse_args(arguments)
    if args.size is not None and not (args.shapes and 1 <= args.size <= LARGEST):
        raise TinyldmError(f"--size must be from 1 to {LARGEST}, and is for --shapes, which must "
                           "be given, too")
    if args.shapes:
        from .shapes import describe_shapes  # takes long to import

        lines = describe_shapes(args.file, args.size)
    else:
        lines = describe(args.file)
    for line in lines:
        say(clean(line, LONGEST_LINE))


def describe(path):
    """What a file or folder is -> lines of text. Raises TinyldmError for anything unknown."""
    path = Path(path)
    if os.path.isfile(path / "model_index.json"):
        return describe_pipeline(path)
    if os.path.isdir(path):
        return describe_component(path)
    try:
        with open(path, "rb") as file:
            start = file.read(HEAD)
    except (OSError, ValueError) as error:
        raise TinyldmError(f"cannot read {path} ({getattr(error, 'strerror', error)}): name a "
                           "file or a folder") from None
    if is_picture(start):
        return describe_picture(path)
    tensors = read_tensors(path)
    return [f"{path}", *describe_tensors(tensors, describe_fit(path, tensors))]


# ---- folders --------------------------------------------------------------------------------

def describe_pipeline(folder):
    """Lines on a folder with a model_index.json: its class, its scheduler, every component."""
    index = read_json(folder / "model_index.json")
    lines = [f"{folder}: {index.get('_class_name')}", "  layout: diffusers"]
    for part, named in index.items():
        if not isinstance(named, list) or named[:1] == [None]:
            continue                                    # a setting, or a component left out
        if not (folder / part).is_dir() and not (folder / "config.json").is_file():
            lines.append(f"  missing: the folder {part}")
    for place in folder / "scheduler", folder:          # the oldest have all files in one folder
        if not (place / "scheduler_config.json").is_file():
            continue
        config = read_json(place / "scheduler_config.json")
        lines.append(f"  scheduler: {config.get('_class_name')}, the model predicts "
                     f"{config.get('prediction_type', 'epsilon')}")
    for config in sorted([*folder.glob("*/config.json"), *folder.glob("config.json")]):
        try:
            lines += ["", *describe_component(config.parent)]
        except TinyldmError as error:                   # go on with the others
            lines += [f"{config.parent}", f"  not read: {error}"]
    return lines


def describe_component(folder):
    """Lines on a folder with a config.json: its weights, and what does not fit that config."""
    if not (folder / "config.json").is_file():
        raise TinyldmError(f"{folder} holds neither a model_index.json (a pipeline) nor a "
                           "config.json (a component): name a folder or a file that does")
    config = read_json(folder / "config.json")
    stored = read_files(find_weights(folder))
    name = class_name(config) or (is_original(config) and "UNet2DModel, as the original DDPM "
                                  "describes it")
    return [f"{folder}: {name}", *describe_tensors(stored), *compare(folder, stored)]


def compare(folder, stored):
    """Lines on how a component's weights differ from its config's model."""
    stored = public_tensors(stored)
    try:
        parameters = dict(build_model(folder).named_parameters())
    except TinyldmError as error:
        return [f"  not compared with a model: {error}"]
    return lists(parameters, fitted(stored, parameters), stored)


# ---- tensors --------------------------------------------------------------------------------

def describe_tensors(tensors, more=()):
    """Lines on {name: StoredTensor}: layout, kind, precision, `more`, parameters by module."""
    layout, kind = layout_of(tensors)
    kind = kind or f"unknown, with keys such as {', '.join(list(tensors)[:3]) or 'none'}"
    kinds = filter(None, [kind, family(tensors)])
    formats = Counter(tensor.format for tensor in tensors.values())
    precision = ", ".join(f"{count:,} x {name}" for name, count in formats.most_common())
    return [f"  layout: {layout or 'unknown'}", f"  kind: {', '.join(kinds)}",
            f"  precision: {precision or 'no tensors'}", *more, *table(tensors)]


def table(tensors):
    """Lines of a table: tensors and parameters of each module, and of all."""
    counts, numbers = Counter(), Counter()
    for name, tensor in tensors.items():
        counts[module_of(name)] += 1
        numbers[module_of(name)] += math.prod(tensor.shape)
    modules = sorted(counts)
    rows = [(clean(module, WIDEST), counts[module], numbers[module])
            for module in modules[:MOST_ROWS]]
    total = "total", counts.total(), numbers.total()
    width = max(len(row[0]) for row in [*rows, total, ("module",)])
    lines = [f"  {module:<{width}} {count:>8,} {number:>14,}" for module, count, number in rows]
    if len(modules) > MOST_ROWS:
        lines.append(f"  and {len(modules) - MOST_ROWS:,} more modules")
    return [f"  {'module':<{width}} {'tensors':>8} {'parameters':>14}", *lines,
            "  {:<{width}} {:>8,} {:>14,}".format(*total, width=width)]


def module_of(name):
    """The module of a key: its first two words, or of kohya's LoRAs the model."""
    if name.startswith("lora_"):
        return "_".join(name.split("_")[:2])
    return ".".join(name.split(".")[:-1][:2]) or name


# ---- pictures -------------------------------------------------------------------------------

def describe_picture(path):
    """Lines on a picture: its size, and how it was made. Raises TinyldmError if it is damaged."""
    from ..images import read_parameters, size_and_mode  # takes long to import

    try:
        text = read_parameters(path)                    # first: it reads the whole file
        (width, height), mode = size_and_mode(path)
    except TinyldmError as error:
        with open(path, "rb") as file:
            what = "a damaged PNG" if file.read(len(PNG)) == PNG else "a picture that is damaged"
        raise TinyldmError(f"{path} is {what} ({error}): get it again") from None
    first = f"{path}: a picture of {width}x{height} pixels, mode {mode}, which "
    if text is None:
        return [first + "says nothing about how it was made"]
    return [first + "records", *(f"  {line}" for line in record(text))]


def record(text):
    """What a picture records -> lines: the text itself, or the known part of a program's JSON."""
    from ..cli.parameters import KNOWN, read

    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text.splitlines()
    try:
        block = read(text)
    except TinyldmError:                                # nodes that only their program knows
        return [clean(text, LONGEST_JSON)]
    values = [f"{name}: {value}" for name, value in block.values.items() if name.lower() in KNOWN]
    negative = f"Negative prompt: {block.negative}" if block.negative else ""
    return [*block.prompt.splitlines(), *negative.splitlines(), *filter(None, [", ".join(values)])]
