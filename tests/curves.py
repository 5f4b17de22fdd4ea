"""The reference curves: the loss of every stage at given steps, for one seed.

    python -m tests.curves [NAME ...]       trains and writes them into docs/trained/curves.json

REFERENCE are the stages; tests/training/test_curves.py trains the first steps of each again.
LESSONS are one training that goes well and three that do not, for docs/training-curves.md.
"""
import contextlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.sources import PACKAGE
from tinyldm.files import read_json, write_json
from tinyldm.shapes.__main__ import main as shapes
from tinyldm.shapes.scenes import COLOURS
from tinyldm.training.__main__ import main as training
from tinyldm.training.report import read_log

ROOT = PACKAGE.parent
FILE = ROOT / "docs" / "trained" / "curves.json"
GIVEN = 1, 2, 5, 10, 20                                 # steps whose loss is kept of REFERENCE
SHORT = 5                                               # steps that the tests train again

# {name: (its program, its arguments, the folder of its log)}. The recipe's rate depends on --steps.
REFERENCE = {
    "vae": (shapes, "vae --run toy --steps 5", "toy/vae"),
    "unet": (shapes, "unet --run toy --steps 5 --batch 8 --pool 64", "toy/unet"),
    "training lora": (training, "lora --data drawings --batch 4 --learning-rate 1e-3", "lora"),
    "training textual-inversion": (
        training, "textual-inversion --data drawings --token <new> --initializer red --batch 4 "
        "--learning-rate 1e-2", "textual-inversion"),
    "training unet": (training, "unet --from-scratch --data drawings --batch 4 "
                      "--learning-rate 1e-3", "unet"),
    "training autoencoder": (training, "autoencoder --data drawings --batch 4 --channels 16 32 48 "
                             "--perceptual bundled --discriminator 3 --learning-rate 1e-3",
                             "autoencoder"),
    "training ddpm": (training, "ddpm --data drawings --batch 4", "ddpm"),
    "training clip": (training, "clip --data drawings --held-out 4 --batch 8 --schedule constant "
                      "--width 96 --layers 3 --learning-rate 1e-3 --sample-every 0", "clip"),
}
# Losses agree to this after SHORT steps: see docs/training-curves.md.
TOLERANCE = 1e-4

LESSON = "lora --data stripes --batch 4 --rank 8 --targets all --steps 80 --validate-every 20 "
LESSONS = {
    "healthy": "--learning-rate 2e-3",
    "rate too high": "--learning-rate 0.1",
    "latents not scaled": "--learning-rate 2e-3 --weights unscaled",
    "another prediction": "--learning-rate 2e-3 --weights epsilon",
}
KEPT = "step", "loss", "expected", "gradient", "validation"     # of a line of their logs


def reference(name, steps):
    """Train some steps of a stage in the current folder -> {step: loss}."""
    main, arguments, folder = REFERENCE[name]
    if not Path("drawings").exists():
        run(shapes, "pictures --count 16 --output drawings")
    if main is training:
        arguments += f" --steps {steps} --validate-every 0 --output {folder}"
    run(main, arguments)
    return {line["step"]: line["loss"] for line in read_log(Path(folder)) if "loss" in line}


def lesson(name):
    """Train one of LESSONS in the current folder -> its steps and validations, as in the log."""
    stripes(Path("stripes"))
    changed_weights("unscaled", "vae/config.json", scaling_factor=0.18215)
    changed_weights("epsilon", "scheduler/scheduler_config.json", prediction_type="epsilon")
    run(training, f"{LESSON}{LESSONS[name]} --output lesson")
    return [{key: line[key] for key in KEPT if key in line} for line in read_log(Path("lesson"))]


def run(main, arguments):
    with contextlib.redirect_stdout(sys.stderr):
        assert main(arguments.split()) == 0, arguments


def stripes(folder):
    """Eight pictures of a thing that the bundled model does not know, with their captions."""
    rng, colours = np.random.default_rng(0), [COLOURS["red"], COLOURS["white"]]
    folder.mkdir()
    for i, background in enumerate("white black gray yellow green blue purple orange".split()):
        picture = np.full((64, 64, 3), COLOURS[background], np.uint8)
        side = int(rng.integers(40, 48))
        y, x = rng.integers(2, 62 - side, 2)
        row = np.array(colours, np.uint8)[np.arange(side) * 6 // side % 2]
        picture[y:y + side, x:x + side] = row[:, None]
        Image.fromarray(picture).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a big striped square on a {background} background")


def changed_weights(folder, config, **changes):
    """The bundled model in a folder, with one number of a config changed."""
    shutil.copytree(ROOT / "weights" / "shapes", folder)
    path = Path(folder, config)
    write_json(path, read_json(path) | changes)


def main(names):
    for name in names or [*REFERENCE, *LESSONS]:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            if name == "unet":                          # it trains on the VAE's latents
                reference("vae", SHORT)
            found = (lesson(name) if name in LESSONS else
                     {step: loss for step, loss in reference(name, max(GIVEN)).items()
                      if step in GIVEN})
            os.chdir(ROOT)                              # or the folder could not go everywhere
        write({name: found})


def write(new):
    """Replace curves in FILE, in the order of the tables above, a line for each line of a log."""
    curves = (json.loads(FILE.read_text()) if FILE.exists() else {}) | new
    rows = [f"{json.dumps(name)}: " + (json.dumps(curves[name]) if name in REFERENCE else "[\n"
            + ",\n".join(map(json.dumps, curves[name])) + "]")
            for name in (*REFERENCE, *LESSONS) if name in curves]
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
