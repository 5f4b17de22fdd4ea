"""The options of the command line, and the pictures that they ask for.

--help must be fast, so what takes long to import is imported inside functions.
"""
import argparse
import itertools
import os
import re
import shutil
import sys
import textwrap
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__, ranks
from ..errors import TinyldmError, note
from ..pipelines.interpolation import Between, ends
from .console import say
from .fields import FIELDS, NEGATIVE, NOISE, RESCALE, SEED, check_meant, fields_of
from .parameters import label

INTERPOLATED = 8            # pictures from one prompt, seed or image to another
MOST_PICTURES = 10_000      # of one command; more is a typing mistake
MOST_BYTES = 1 << 22        # of prompts on standard input
LARGEST_SCALE = 64
RANDOM_SEEDS = 2**31        # valid for every kind of noise, with --count added to it

NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

# What other programs and Python call an option. An underscore is a dash, too.
ALIASES = {
    "--num-inference-steps": "--steps", "--guidance-scale": "--guidance", "--cfg": "--guidance",
    "--cfg-scale": "--guidance", "--negative-prompt": "--negative", "--num-images": "--count",
    "--num-images-per-prompt": "--count", "--scheduler": "--sampler", "--model": "--weights",
    "--batch-size": "--count", "--init-image": "--image",
    "--mask-image": "--mask", "--denoising-strength": "--strength",
    "--cfg-rescale": "--guidance-rescale", "--spacing": "--timestep-spacing",
    "--class": "--label", "--class-label": "--label", "--class-labels": "--label",
}

HELP = """Draw a picture of a prompt into out.png.

The bundled model knows one language, and nothing else:

    a {small|big} {colour} {shape}
    [{above|below|left of|right of} a {small|big} {colour} {shape}]
    on a {colour} background

    colour: red, green, blue, yellow, orange, purple, white, black, pink, gray
    shape: circle, square, triangle, star, heart, ring, cross, diamond

--weights takes Stable Diffusion's, which know the world, and other models', such as DDPM's and
DiT's, some of which draw without a prompt.

examples:
  python -m tinyldm "a big red star on a white background" --show
  python -m tinyldm --random --count 9 --scale 4
  python -m tinyldm "an astronaut" --weights stable-diffusion-v1-5/stable-diffusion-v1-5
"""


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line like all others, and no abbreviations of options."""

    unknown = ()                # arguments that look like options and are none

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, allow_abbrev=False, **options)
        self._negative_number_matcher = NEGATIVE_NUMBER     # argparse's own reads no exponents
        self.register("type", int, partial(number, int, "a whole number, such as 4"))
        self.register("type", float, partial(number, float, "a number, such as 0.5"))

    def parse_known_args(self, args=None, namespace=None):
        args = [*(sys.argv[1:] if args is None else args)]
        end = args.index("--") if "--" in args else len(args)
        args[:end] = map(self._spelled, args[:end])
        self.unknown = [arg for arg in args[:end] if self._is_unknown(arg)]
        return super().parse_known_args(args, namespace)

    def parse_args(self, args=None, namespace=None):
        args, rest = self.parse_known_args(args, namespace)
        if rest and not self.unknown:
            self.error(f"{' '.join(rest)} is left over: arguments without -- stand together, and "
                       "texts of several words in quotes")
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return args

    def error(self, message):
        raise TinyldmError(f"{message}{self._hint()} (--help lists the options)")

    def _print_message(self, message, file=None):       # of --help and --version
        say(message.rstrip("\n"))

    def _spelled(self, arg):
        """An argument with the option's own name in place of an alias."""
        name, equals, value = arg.partition("=")
        if not name.startswith("--") or name in self._names():
            return arg
        dashed = name.replace("_", "-")
        own = ALIASES.get(dashed, dashed)
        return f"{own}{equals}{value}" if own in self._names() else arg

    def _is_unknown(self, arg):
        return (re.match(r"-[^\s\d.]|-[\d.]+[^\d.]", arg) and " " not in arg
                and not NEGATIVE_NUMBER.match(arg) and arg.partition("=")[0] not in self._names())

    def _names(self):
        """Every option, also those of sub-commands."""
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._names()

    def _hint(self):
        """What may be meant by the first unknown option; nothing if there is none."""
        if not self.unknown:
            return ""
        name = self.unknown[0].partition("=")[0]
        if name == "--prompt":
            return ": a prompt stands by itself, without a name"
        if name.startswith("--"):
            names = [*dict.fromkeys(self._names())]
            near = [other for other in names if other.startswith(name) and len(name) > 3]
            near = near or get_close_matches(name, [*names, *ALIASES], 1, 0.75)
            return f": did you mean {' or '.join(near[:3])}?" if near else ""
        return (": options have two dashes; a prompt that begins with a dash stands last, after -- "
                f"(-- \"{self.unknown[0]}\"), and such a value after = (--negative=\"-...\")")


def parse(arguments):
    """Arguments -> a namespace. Raises TinyldmError for what is wrong in one option alone."""
    parser = Parser("python -m tinyldm", usage="python -m tinyldm \"PROMPT\" [options]",
                    description=HELP, add_help=False, formatter_class=Formatter)
    for title, add in (("what to draw", what_to_draw), ("how to draw it", how_to_draw),
                       ("from a picture", from_a_picture), ("one after another", series),
                       ("the model", the_model), ("what to write and show", output),
                       ("the machine, and this program", machine)):
        add(parser.add_argument_group(title).add_argument)
    parser.set_defaults(on_the_way=None, told={})
    args = parser.parse_args(arguments)
    if args.like or args.from_parameters is not None:
        from .parameters import options

        found = options(args)
        told = {name: (value, parser.get_default(name)) for name, value in found.items()}
        parser.set_defaults(**found, told=told)         # what is given in the command counts more
        args = parser.parse_args(arguments)
    if args.random and args.prompt:
        raise TinyldmError("--random draws a prompt of its own: leave one of them out")
    if not args.random and not args.prompt and args.weights is None:
        parser.error("the following arguments are required: prompt")
    if args.seed == "random":
        from secrets import randbelow

        args.seed = ranks.first(lambda: randbelow(RANDOM_SEEDS))
        print(f"seed: {args.seed}", file=sys.stderr)
    return args


class Formatter(argparse.RawDescriptionHelpFormatter):
    """The description as it is; options in a narrow column, so that each takes a line or two."""

    def __init__(self, prog, **options):
        width = min(shutil.get_terminal_size().columns - 2, 98)
        super().__init__(prog, **{"max_help_position": 25, "width": width} | options)

    def _split_lines(self, text, width):
        return textwrap.wrap(text, width, break_on_hyphens=False)       # names of files and options


def what_to_draw(add):
    add("prompt", nargs="*", metavar="PROMPT", help=r"at any length: (word) and (word:1.3) count "
        r"more, [word] less, \( and \[ are plain brackets, BREAK starts a new chunk of 75 tokens; "
        "several prompts give several pictures; - reads them from standard input, one per line")
    add("--random", action="store_true", help="draw a prompt of the bundled model's language, "
        "by the seed")
    add("--like", type=path, metavar="FILE", help="draw a picture again: its file tells how, if "
        "tinyldm, a web interface or ComfyUI wrote it; the options given here count more")
    add("--from-parameters", metavar="FILE", help="the same from a text: a prompt, Negative "
        "prompt: ..., Steps: 20, Sampler: Euler a, ...; - reads it from standard input")
    add("--label", action="append", type=label, metavar="L", help="for a model of classes: the "
        "class to draw, its number or its name; given several times, several pictures")
    add("--negative", default=NEGATIVE, metavar="TEXT", help="what not to draw")
    add("--seed", type=seed, default=SEED, metavar="K", help="where the noise comes from: a "
        "whole number, or random (0)")
    add("--count", type=int, metavar="N", help="pictures per prompt, with the seeds K, K + 1, ...: "
        "out-0.png, out-1.png, ... and all on one sheet, out-sheet.png (1; with --to-... "
        f"{INTERPOLATED})")
    add("--width", type=int, metavar="W", help="in pixels (the weights' own)")
    add("--height", type=int, metavar="H", help="in pixels (the weights' own)")


def how_to_draw(add):
    add("--steps", type=int, metavar="N", help="1 to 1000; more is slower and finer (what the "
        "weights recommend)")
    add("--guidance", type=float, metavar="S", help="how strongly to follow the prompt; up to 1 "
        "the negative prompt plays no part (what the weights recommend, or else 7.5; Stable "
        "Diffusion XL 5, Latent Consistency Models 8.5)")
    add("--guidance-rescale", type=float, default=RESCALE, metavar="R", help="0 to 1: how much to "
        "undo of the over-saturation that guidance causes (0)")
    add("--sampler", metavar="NAME", help="ddpm, ddim, pndm, euler, euler_ancestral, heun, lms, "
        "dpmpp_2m, dpmpp_2m_sde, unipc, deis or lcm; euler, heun, lms, dpmpp_2m, dpmpp_2m_sde, "
        "unipc and deis also with _karras or _exponential behind the name (the weights' own)")
    add("--timestep-spacing", metavar="NAME", help="how the steps are spread over the training "
        "timesteps: leading, trailing or linspace (the weights' own; for a single file in up to 8 "
        "steps without guidance, as Turbo models take them, trailing)")
    add("--clip-skip", type=int, metavar="N", help="how many of the text encoder's last layers to "
        "leave out, counted as in diffusers (0)")
    add("--noise", metavar="NAME", default=NOISE, help="whose normal numbers the seed "
        "stands for: torch-cpu, torch-cuda or numpy (torch-cpu)")


def from_a_picture(add):
    add("--image", type=path, metavar="FILE", help="a picture to begin from; the new one gets its "
        "size, unless --width and --height are given")
    add("--strength", type=float, metavar="S", help="0 to 1: how much of it to draw anew (0.8, "
        "with a mask 1; Stable Diffusion XL 0.3, with a mask 0.9999)")
    add("--mask", type=path, metavar="FILE", help="a picture, white where to paint and black where "
        "the image is to stay, as well as the VAE can render it")
    add("--noise-level", type=int, metavar="N", help="for a model that enlarges a picture, or "
        "varies it: how much noise to add to what it reads of the picture first (the model's own)")


def series(add):
    add("--variation", type=float, metavar="V", help="0 to 1: draw --count variations of the "
        "seed's picture, with this share of other seeds' noise")
    add("--to-prompt", metavar="TEXT", help="draw --count pictures that lead from the prompt to "
        "this one")
    add("--to-seed", type=int, metavar="K", help="the same from seed to seed")
    add("--to-image", type=path, metavar="FILE", help="the same from --image to this picture, by "
        "interpolating their latents")


def the_model(add):
    add("--weights", metavar="W", help="a folder in the diffusers layout, a single file in the "
        "original one, or a name on the Hugging Face hub: owner/name, or owner/name/file for a "
        "single file there, also with @revision, or the page's address (the bundled model)")
    add("--ema", action="store_true", help="if a single file has the UNet's weights twice, use "
        "those averaged over the training")
    add("--vae", metavar="VAE", help="the VAE to use in place of the weights' own, which single "
        "files may lack: a file, a folder, or a name on the Hugging Face hub")
    add("--prediction-type", metavar="TYPE", help="what the UNet predicts, where the weights do "
        "not say it: epsilon, v_prediction or sample")
    add("--lora", type=lora, action="append", default=[], metavar="FILE[:W]", help="a LoRA to add "
        "to the weights, times W (1): a file, a folder, or a name on the Hugging Face hub; may be "
        "given several times")
    add("--lora-folder", type=path, metavar="FOLDER", help="where the LoRAs lie that a prompt "
        "names as <lora:NAME:W>: NAME.safetensors, in it or below it")
    add("--embedding", action="append", default=[], metavar="FILE", help="a textual inversion: a "
        "learned word to use in the prompt, the one in the file, else the file's name; "
        "a file, a folder, or a name on the Hugging Face hub; may be given several times")


def output(add):
    add("--output", type=output_path, default=Path("out.png"), metavar="FILE", help="in any "
        "picture format that Pillow writes (out.png)")
    add("--scale", type=int, default=1, metavar="N", help="write every pixel N x N times as large, "
        "for small pictures (1)")
    add("--show", action="store_true", help="draw in the terminal, too, while the picture emerges; "
        "needs 24-bit colours")
    add("--preview", type=int, metavar="N", help="every N steps write the picture as predicted so "
        "far: out-step5.png, out-step10.png, ...")
    add("--animate", type=path, metavar="FILE", help="write a .gif or .webp of the steps, or with "
        "--to-... of the pictures")
    add("--profile", action="store_true", help="at the end print where time and memory went: by "
        "stage, by block and by op")


def machine(add):
    add("--device", default="cpu", metavar="NAME", help="cpu or cuda (cpu)")
    add("--dtype", metavar="NAME", help="float16, float32 or float64, for weights and computation "
        "(float32, where large weights of float16 files stay float16; on cuda float16)")
    add("--low-memory", action="store_true", help="less memory, more time; decodes pictures larger "
        "than the weights' own in tiles, which changes them a little")
    add("--version", action="version", version=f"tinyldm {__version__}", help="print it and leave")
    add("-h", "--help", action="help", help="print this and leave")


def number(kind, expected, text):
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {text!r}; give "
                                         f"{expected}") from None


def path(text):
    if address := re.match(r"(\w+)://", text):
        raise argparse.ArgumentTypeError(
            f"{text} is an address, not a file on this machine: "
            + ("name the file by its path" if address[1] == "file" else "name one; what is on the "
               "web must be downloaded first"))
    return Path(os.path.expanduser(text))               # Path's own fails for unknown users


def output_path(text):
    if text.endswith(("/", os.sep)) and not os.path.isdir(path(text)):
        raise argparse.ArgumentTypeError(f"there is no folder {text}: make it, and name a file in "
                                         f"it, such as {text}out.png")
    return path(text)


def lora(text):
    """FILE or FILE:WEIGHT -> (file, weight): what follows the last colon, if it is a number.

    A file may itself be named so: it counts if it is there.
    """
    if os.path.isfile(text):
        return text, 1.0
    file, colon, weight = text.rpartition(":")
    try:
        return (file, float(weight)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def seed(text):
    try:
        return "random" if text.strip().lower() == "random" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a seed is a whole number, or random, not {text!r}"
                                         ) from None


class Job(NamedTuple):
    """A picture to draw: these options of stream. Prompt, seed and image may be a Between."""

    prompt: Any
    seed: Any
    image: Any                                          # a PIL image, or None
    mask: Any                                           # the same
    label: Any = None                                   # a number or a name, or None

    @property
    def weight(self):
        """The weight of its Between; None without one."""
        return next((value.weight for value in self if isinstance(value, Between)), None)


def jobs(args, pipeline):
    """The pictures that the arguments ask for -> [Job]. Raises TinyldmError for a wrong argument.

    pipeline: the class of the weights' pipeline. With --random the prompts are empty: they are
    drawn when the model's language is known.
    """
    from ..images import open_image

    check_meant(args, pipeline)

    between_two = interpolates(args)
    if args.random and args.weights and not os.path.isdir(args.weights):
        raise TinyldmError("--random is for a model with a little language of its own, such as "
                           "the bundled one: give a prompt, or leave --weights out")
    if not 1 <= args.scale <= LARGEST_SCALE:
        raise TinyldmError(f"--scale must be from 1 to {LARGEST_SCALE}, not {args.scale}")
    if args.to_image and not args.image:
        raise TinyldmError("--to-image needs an --image to lead from: give both")
    if args.variation is not None and between_two:
        raise TinyldmError("--variation and --to-... exclude each other: leave one out")
    if args.variation is not None and not 0 <= args.variation <= 1:
        raise TinyldmError(f"--variation must be from 0 to 1, not {args.variation:g}")
    alone = args.on_the_way is not None                 # one picture of another command's series
    count = (INTERPOLATED if between_two and not alone else 1) if args.count is None else args.count
    if count < 1 + (between_two and not alone):
        raise TinyldmError(f"--count must be at least {1 + between_two}, not {count}")
    args.prompt = prompts(args)
    if args.lora_folder:
        from .parameters import with_loras

        if not args.lora_folder.is_dir():
            raise TinyldmError(f"there is no folder {args.lora_folder}: --lora-folder names one "
                               "with LoRAs")
        args.prompt = with_loras(args, args.prompt)
    labels = args.label or [None]
    if (pictures := count * len(args.prompt) * len(labels)) > MOST_PICTURES:
        raise TinyldmError(f"one command draws at most {MOST_PICTURES} pictures, not {pictures}: "
                           "draw them in parts, with --seed")
    image, to_image = (file and open_image(file) for file in (args.image, args.to_image))
    mask = args.mask and open_image(args.mask, "L")

    def between(first, second, i):
        weight = args.on_the_way if alone else i / max(1, count - 1)
        return first if second is None else Between(first, second, weight)

    found = []
    for prompt, own_label in itertools.product(args.prompt, labels):
        for i in range(count):
            if between_two:
                seed = between(args.seed, args.to_seed, i)
            elif args.variation is not None:
                seed = Between(args.seed, args.seed + 1 + i, args.variation)
            else:
                seed = args.seed + i
            found.append(Job(between(prompt, args.to_prompt, i), seed,
                             between(image, to_image, i), mask, own_label))
    check(found, args, pipeline)
    return found


def prompts(args):
    """The prompts of the arguments, with standard input's in the place of "-"."""
    if args.random or not args.prompt:
        return [""]
    if "-" not in args.prompt:
        if len(args.prompt) > 1 and not any(" " in prompt for prompt in args.prompt):
            note(f"{len(args.prompt)} prompts of one word each are drawn: put a prompt of several "
                 "words in quotes")
        return args.prompt
    if args.from_parameters == "-":
        raise TinyldmError("standard input cannot hold both the prompts and the parameters: put "
                           "the parameters into a file")
    content = ranks.first(_standard_input)              # mpirun gives it to the first rank alone
    if len(content) > MOST_BYTES:
        raise TinyldmError(f"standard input has more than {MOST_BYTES >> 20} MiB: give one prompt "
                           "per line")
    lines = [line.strip() for line in content.split("\n") if line.strip()]
    if not lines:
        raise TinyldmError("standard input holds no prompt: give one per line")
    return [text for prompt in args.prompt for text in (lines if prompt == "-" else [prompt])]


def _standard_input():
    try:
        if sys.stdin is None:
            raise ValueError("it is closed")
        return sys.stdin.buffer.read(MOST_BYTES + 1).decode("utf-8-sig")
    except (OSError, ValueError) as error:              # closed, or no text
        raise TinyldmError(f"cannot read prompts from standard input ({error}): give one UTF-8 "
                           "line per prompt") from None


def check(found, args, pipeline):
    """Raise TinyldmError for what is wrong in any job, before anything is loaded."""
    from ..pipelines.request import check_finite
    from ..text.prompt import parse as parse_prompt

    for _, weight in args.lora:
        check_finite("weight", weight)
    for job in found:
        request(job, args, pipeline).generators()
    for text in dict.fromkeys(text for job in found for text in ends(job.prompt)):
        parse_prompt(text)


def request(job, args, pipeline):
    """The options of a picture for a pipeline, which checks them as from Python."""
    values = {FIELDS[option]: getattr(args, option) for option in FIELDS} | job._asdict()
    known = fields_of(pipeline)
    return pipeline.Options(**{field: value for field, value in values.items() if field in known
                               and (value is not None or field in job._fields)})


def interpolates(args):
    return any(end is not None for end in (args.to_prompt, args.to_seed, args.to_image))
