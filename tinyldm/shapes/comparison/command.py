"""python -m tinyldm.shapes compare NAME: train one system of the comparison, and measure it.

    NAME     -> RUN/NAME: state, log, curve, weights to draw with, samples.png, numbers.json
    sizes    -> RUN/sizes/...: the same of latent models of several sizes
    table    -> docs/comparison.md, and its figures and numbers

All systems have the same budget: as many steps as one core of an Intel Xeon makes in about eight
minutes, when nothing else runs on the machine.
"""
import json
from functools import partial

import numpy as np
from PIL import Image

from ...checkpoints import save
from ...cli.console import say
from ...files import replacing, write_json
from ...images import grid
from ...training.report import read_log
from . import models
from .data import Data
from .measure import measure
from .table import write_table

SHOWN, GAP = 10, 2          # pictures in a row of the figure, pixels between them

# {NAME: (how it is trained, steps)}, in the order of the table.
SYSTEMS = {
    "true": (models.true, 0),
    "round-trip": (models.round_trip, 0),
    "vae": (models.vae, 1550),
    "ddpm": (models.pixels, 1150),
    "improved-ddpm": (partial(models.pixels, learned=True), 1125),
    "latent": (models.latent, 1750),
    "dit": (models.dit, 2750),
    "cascade": (models.cascade, 850),
    "prior": (models.prior, 1250),
}
# Imagen's question: what does a larger text encoder buy, what a larger UNet? Channels and layers of
# the one, channels of the other's levels; "base" has those of the system above.
SIZES = {"text-16": {"text": (16, 1)}, "text-32": {"text": (32, 1)}, "base": {},
         "text-128": {"text": (128, 3)}, "unet-16": {"widths": (16, 24, 32)},
         "unet-24": {"widths": (24, 32, 48)}, "unet-48": {"widths": (48, 64, 96)}}
SIZES_STEPS = 600


def compare(name, run, docs):
    """Do what the file's docstring says. Raises TinyldmError where something is missing."""
    if name == "table":
        write_table(run, docs, SYSTEMS, SIZES)
        return
    data = Data(run)
    if name != "sizes":
        one(data, run / name, *SYSTEMS[name])
        return
    for size, changes in SIZES.items():
        one(data, run / "sizes" / size, partial(models.latent, **changes), SIZES_STEPS)


def seconds_of(log):
    """The seconds of a training's steps, as those of the fastest tenth: what other programs on the
    same machine cost does not count."""
    seconds = [line["cpu"] for line in read_log(log.parent) if "cpu" in line]
    return len(seconds) * float(np.quantile(seconds, 0.1))


def one(data, folder, train, steps):
    """Train, measure and write one system."""
    trained = train(data, folder, steps)
    if trained.pipe and not (folder / "weights").exists():
        save(trained.pipe, folder / "weights", np.float16)
    numbers, pictures = measure(data, trained)
    numbers |= {"steps": steps, "training": sum(
        map(seconds_of, sorted(folder.rglob("log.jsonl"))))}
    row = grid([Image.fromarray(picture) for picture in pictures[:SHOWN]], SHOWN, GAP)
    write_json(folder / "numbers.json", numbers)        # makes the folder
    with replacing(folder / "samples.png") as temporary:
        row.save(temporary, "PNG")
    say(json.dumps(numbers, indent=2))
