"""A folder of pictures with captions."""
import numpy as np
from PIL import Image


def write_pictures(folder, count=5, size=(32, 32),
                   captions=("red cat", "a low dog", "photo", "cat, red")):
    """Random pictures of a few colours, with captions beside them, in turn."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize(size).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(captions[i % len(captions)])
    return folder
