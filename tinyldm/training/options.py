"""python -m tinyldm.training NAME: the stages, and the options that they share.

A stage is a file of stages/ with `add_options(parser)`, which calls `add_shared` and adds what
is its own, and `run(options)`, which trains with `trainer`.
"""
import argparse
import math
import sys
from functools import partial
from importlib import import_module

import numpy as np

from .. import ranks
from ..backend import num_threads
from ..cli.console import notes, say
from ..cli.options import Formatter, Parser, path
from ..errors import TinyldmError, note
from . import optim, rates
from .loop import Trainer
from .loss_scale import LossScale
from .objectives import TIMESTEPS, DiffusionLoss
from .report import Report

# {NAME: what it trains}; textual-inversion is stages/textual_inversion.py.
STAGES = {"lora": "train a LoRA: a small file that teaches a model a new thing or a style",
          "textual-inversion": "train a new word for prompts, and nothing else of the model",
          "unet": "train a UNet in full, of some weights or from scratch",
          "autoencoder": "train a VAE: pictures into latents and back, new or from weights",
          "ddpm": "train a diffusion model of pictures, without a text, perhaps by class",
          "clip": "train a CLIP, which tells how well a text describes a picture"}
# python -m tinyldm.shapes
RECIPE = ("vae", "unet", "decoder", "export", "restore", "evaluate", "pictures", "compare")
MOST = 10 ** 9
DTYPES = {"float32": np.float32, "float16": np.float16}
EMAS = {"constant": optim.constant_decay, "ldm": optim.ldm_decay,
        "diffusers": optim.diffusers_decay, "warmup": optim.diffusers_warmup_decay}
# What a training that goes on must have in common with its beginning.
KEPT = ("batch", "learning_rate", "schedule", "warmup", "cycles", "power", "rules", "accumulate",
        "clip", "weight_decay", "decay_vectors", "betas", "adam_eps", "ema", "ema_form", "seed",
        "min_snr", "noise_offset", "timesteps", "dtype")
TO_THE_END = ("linear", "cosine", "cosine_with_restarts", "polynomial")     # they depend on --steps
DESCRIPTION = """Train on your own pictures. Each NAME has its own --help.

The recipe of the bundled model is another program: python -m tinyldm.shapes.
"""


def run(arguments=None):
    """Train a stage. Raises TinyldmError for whatever is wrong."""
    options = parse(arguments)
    with notes():
        _stage(options.stage).run(options)


def parse(arguments):
    """Arguments -> a namespace. Raises TinyldmError for what is wrong in one option alone."""
    arguments = [*(sys.argv[1:] if arguments is None else arguments)]
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name in RECIPE and (name not in STAGES or "--run" in arguments):
        raise TinyldmError("the bundled model's recipe is a program of its own: "
                           f"python -m tinyldm.shapes {' '.join(arguments)}")
    parser = Parser("python -m tinyldm.training", description=DESCRIPTION,
                    formatter_class=Formatter)
    stages = parser.add_subparsers(dest="stage", metavar="NAME", required=True)
    for stage, text in STAGES.items():
        sub = stages.add_parser(stage, help=text, description=text, formatter_class=Formatter)
        if stage == name:                               # only its file is imported
            _stage(name).add_options(sub)
    return parser.parse_args(arguments)


def _stage(name):
    return import_module(f".stages.{name.replace('-', '_')}", __package__)


# ---- options ----------------------------------------------------------------------------------

def add_shared(parser, *, steps, learning_rate, batch=1, warmup=0, schedule="constant",
               betas=(0.9, 0.999), weight_decay=0.01, clip=1.0, adam_eps=1e-8, ema=0.0):
    """Add what every stage offers. The keywords are this stage's defaults."""
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=whole(1), default=steps, metavar="N", help="updates of the whole training, "
        f"also of one that goes on ({steps})")
    add("--batch", type=whole(1, 10_000), default=batch, metavar="N", help="pictures at a time "
        f"({batch})")
    add("--accumulate", type=whole(1, 10_000), default=1, metavar="K", help="batches of one "
        "update: K times as many pictures count, in the memory of one batch (1)")
    add("--learning-rate", type=real(0, above=True), default=learning_rate, metavar="R",
        help=f"its peak ({learning_rate:g})")
    add("--schedule", choices=rates.SCHEDULES, default=schedule, metavar="NAME", help="how the "
        f"learning rate goes on: {', '.join(rates.SCHEDULES)} ({schedule})")
    add("--warmup", type=whole(0), default=warmup, metavar="N", help="updates in which the "
        f"learning rate rises; constant has none ({warmup})")
    add("--cycles", type=whole(1), default=1, metavar="N", help="of cosine_with_restarts (1)")
    add("--power", type=real(0), default=1.0, metavar="P", help="of polynomial (1)")
    add("--rules", type=rules, default="1", metavar="RULES", help="of piecewise_constant: "
        "1:10,0.1:20,0.01 multiplies the learning rate by 1 before step 10, by 0.1 before step 20, "
        "then by 0.01")
    add("--seed", type=whole(0), default=0, metavar="K", help="of all random choices (0)")
    add = parser.add_argument_group("optimiser (AdamW)").add_argument
    add("--betas", type=real(0, 1), nargs=2, default=betas, metavar=("B1", "B2"),
        help="decays of the averages of gradients and of their squares "
        f"({betas[0]:g} {betas[1]:g})")
    add("--adam-eps", type=real(0, above=True), default=adam_eps, metavar="E",
        help=f"({adam_eps:g})".replace("e-0", "e-"))
    add("--weight-decay", type=real(0), default=weight_decay, metavar="W",
        help=f"({weight_decay:g})")
    add("--decay-vectors", action="store_true", help="let biases and norms decay, too")
    add("--clip", type=real(0), default=clip, metavar="C", help="largest norm of the gradient; 0 "
        f"switches clipping off ({clip:g})")
    add("--ema", type=real(0, 1), default=ema, metavar="D", help="train, and at the end write, "
        f"an average of the weights with the decay D, such as 0.999; 0 switches it off ({ema:g})")
    add("--ema-form", choices=EMAS, default="ldm", metavar="NAME", help="how the decay rises to "
        f"D: {', '.join(EMAS)} (ldm)")
    add_computing(parser)


def add_computing(parser):
    add = parser.add_argument_group("computing").add_argument
    add("--checkpoints", action="store_true", help="less memory and more time: the inside of each "
        "block is computed again in backward")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (cpu)")
    add("--dtype", choices=DTYPES, default="float32", help="to compute in: float16 takes half of "
        "the memory and is fast on a GPU; what is trained is kept in float32, too, and the loss is "
        "scaled (float32)")


def add_diffusion(parser):
    """Add the options of a diffusion loss."""
    add = parser.add_argument_group("loss").add_argument
    add("--min-snr", type=real(0), default=0.0, metavar="G", help="weigh timesteps by the smaller "
        "of their signal-to-noise ratio and G; 5 is usual, 0 switches it off (0)")
    add("--noise-offset", type=real(0), default=0.0, metavar="S", help="add noise of this size, "
        "the same for all pixels of a channel, for darker and brighter pictures (0)")
    add("--timesteps", choices=TIMESTEPS, default="uniform", metavar="NAME",
        help=f"how they are drawn: {' or '.join(TIMESTEPS)} (uniform)")


def add_output(parser, output, prompts=True, sample_every=0):
    """Add what is written, and how a training goes on. prompts: whether samples need them."""
    add = parser.add_argument_group("what is written").add_argument
    add("--output", type=path, default=output, metavar="FOLDER", help="of the result, the state, "
        f"the log, the curve and the samples ({output})")
    add("--resume", nargs="?", const="exact", choices=("exact", "changed"), default=False,
        metavar="changed", help="go on with the training in the folder; it must have the same "
        "options and pictures, unless --resume changed is given")
    add("--save-every", type=whole(0), default=0, metavar="N", help="steps between two saves; 0 "
        "saves once a minute (0)")
    add_looks(add, sample_every)
    add("--profile", action="store_true", help="after two updates print where their time and "
        "memory went: by stage, block, op and thread, and what is kept for backward")
    if prompts:
        add("--sample-prompt", action="append", default=[], metavar="TEXT", help="what to draw; "
            "may be given several times")


def add_looks(add, sample_every=0):
    """Add how often a training looks at its model. add: a parser's add_argument."""
    add("--validate-every", type=whole(0), default=100, metavar="N", help="steps between two looks "
        "at the loss of fixed pictures, noise and timesteps; 0 switches it off (100)")
    add("--sample-every", type=whole(0), default=sample_every, metavar="N", help="steps between "
        f"two samples, which one sheet collects; 0 switches them off ({sample_every})")


def whole(least, most=MOST):
    """The type of an option: text -> a whole number from `least` to `most`."""
    def parsed(text):
        try:
            if least <= int(text) <= most:
                return int(text)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, not "
                                         f"{text!r}")
    return parsed


def real(least, most=math.inf, above=False):
    """The type of an option: text -> a finite number from (or above) `least`, and below 1 if `most`
    is 1."""
    def parsed(text):
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if (least < number if above else least <= number) and number < most:
            return number
        raise argparse.ArgumentTypeError(
            f"expected a number {'above' if above else 'from'} {least}"
            f"{'' if most == math.inf else f' and below {most}'}, not {text!r}")
    return parsed


def rules(text):
    try:
        rates.parse_rules(text)
    except TinyldmError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


# ---- the loop that they ask for ---------------------------------------------------------------

def trainer(options, named_parameters, *, data="", batches_per_epoch=None, settings=None,
            terms=1):
    """The Trainer of the options; its state lies in state.npz of the folder --output.

    named_parameters: pairs of a name and a Parameter to train. data: the fingerprint of the
    pictures. batches_per_epoch: see Trainer. settings: what else the training depends on, {option:
    value}. terms: of how many numbers the loss is a sum, where it is no mean: see LossScale.
    """
    if ranks.size() > 1:
        if options.batch < ranks.size():
            raise TinyldmError(f"--batch {options.batch} leaves some of the {ranks.size()} ranks "
                               f"without a picture: make it {ranks.size()} or a multiple of it")
        say(f"{ranks.size()} ranks, with {num_threads()} threads each here")
    schedule = {
        "cosine_with_restarts": partial(rates.cosine_with_restarts, cycles=options.cycles),
        "polynomial": partial(rates.polynomial, power=options.power),
        "piecewise_constant": partial(rates.piecewise_constant,
                                      rules=rates.parse_rules(options.rules)),
    }.get(options.schedule, rates.SCHEDULES[options.schedule])
    half = options.dtype == "float16"
    if half and options.device == "cpu":
        note("float16 is slower than float32 on a CPU: it is for --device cuda")
    beta1, beta2 = options.betas
    optimizer = partial(
        optim.AdamW, weight_decay=options.weight_decay, beta1=beta1, beta2=beta2,
        eps=options.adam_eps, clip=options.clip, decay_vectors=options.decay_vectors,
        ema=partial(EMAS[options.ema_form], most=options.ema) if options.ema else None,
        scaling=LossScale(terms=terms) if half else None)
    kept = KEPT + (("steps",) if options.schedule in TO_THE_END else ())
    kept = {f"--{name.replace('_', '-')}": getattr(options, name) for name in kept
            if hasattr(options, name)}
    return Trainer(options.output / "state.npz", named_parameters, options.steps,
                   options.learning_rate, options.warmup, optimizer, schedule=schedule,
                   seed=options.seed, accumulation=options.accumulate,
                   batches_per_epoch=batches_per_epoch, settings=kept | (settings or {}), data=data,
                   resume=options.resume, save_every=options.save_every,
                   report=Report(options.output, options.sample_every, options.validate_every),
                   profile=options.profile)


def diffusion_loss_from(options, schedule):
    """The DiffusionLoss that the options of add_diffusion ask for."""
    return DiffusionLoss(schedule, options.min_snr, options.timesteps, options.noise_offset)
