"""The toy world as a folder of pictures with captions, to train on as on any other pictures.

    python -m tinyldm.shapes pictures --output shapes --count 2000
    python -m tinyldm.training NAME --data shapes ...
"""
import json

import numpy as np
from PIL import Image

from ..files import new_folder
from ..training.data.pictures import progress
from .drawing import draw
from .scenes import crowd, sample


def write_pictures(output, count, seed=0, crowds=False, single=False):
    """Draw `count` pictures, 00000.png ..., and their captions, metadata.jsonl, into a new folder.

    Picture i depends on the seed and i alone, and shows no combination that is held out.
    crowds: every second picture shows a crowd of things, which no caption could name: it has none.
    single: one thing per picture, whose shape begins the name, circle_00000.png, as a class.
    Raises TinyldmError for a folder that holds something.
    """
    lines = []
    with new_folder(output) as folder:
        for i in progress("drawing pictures", range(count)):
            rng, name = np.random.default_rng([seed, i]), f"{i:05}.png"
            crowded = crowds and i % 2
            scene = crowd(rng) if crowded else sample(rng)
            if single:
                while len(scene.things) > 1:
                    scene = sample(rng)
                name = f"{scene.things[0].shape}_{name}"
            Image.fromarray(draw(scene)).save(folder / name)
            if not crowded:
                lines.append(json.dumps({"file_name": name, "text": scene.caption()}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
