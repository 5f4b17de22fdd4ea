"""A folder of pictures that each have a caption of their own, of the toy vocabulary's words."""
import numpy as np
from PIL import Image

CAPTIONS = ("red cat", "a low dog", "photo", "cat, red", "low red er", "x", "a cat!", "red red",
            "b", "dog low", "old cat", "hat")


def write_captioned(folder, count=9, size=(20, 16)):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize(size).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(CAPTIONS[i])
    return folder
