"""Class pictures for DreamBooth: drawn once, and only those that are missing."""
import re

import numpy as np
import pytest
from PIL import Image

from tinyldm.errors import TinyldmError
from tinyldm.training.data.class_pictures import draw_class_pictures
from tinyldm.training.data.pictures import PictureFolder


class Pipe:
    """Draws a picture of one colour, which depends on its seed."""

    def __init__(self, fails_at=None):
        self.seeds, self.fails_at = [], fails_at

    def __call__(self, prompt, seed, **options):
        self.seeds.append(seed)
        if len(self.seeds) == self.fails_at:
            raise KeyboardInterrupt
        return [Image.new("RGB", (24, 24), (15 * seed % 256, 0, 0))]


def names(path):
    return sorted(file.name for file in path.iterdir() if file.suffix == ".jpg")


def test_what_is_missing_is_drawn(tmp_path):
    path = tmp_path / "class"
    with pytest.raises(KeyboardInterrupt):
        draw_class_pictures(Pipe(fails_at=3), "a photo of a dog", path, 4, seed=10)
    assert len(names(path)) == 2
    pipe = Pipe()
    assert draw_class_pictures(pipe, "a photo of a dog", path, 4, seed=10) == 2
    assert pipe.seeds == [12, 13]
    assert draw_class_pictures(pipe, "a photo of a dog", path, 4, seed=10) == 0
    (path / names(path)[1]).unlink()
    assert draw_class_pictures(pipe, "a photo of a dog", path, 5, seed=10) == 2
    assert pipe.seeds == [12, 13, 11, 14]
    assert all(re.fullmatch(r"[0-4]-[0-9a-f]{40}\.jpg", name) for name in names(path))
    folder = PictureFolder(path, 16, strict=True)
    assert folder.report()[:2] == [f"{path}: 5 pictures", "captions: 5 from .txt files"]
    assert {item.caption for item in folder.items} == {"a photo of a dog"}
    assert folder.report()[3:] == []


def test_other_pictures_count_as_well(tmp_path):
    for i in range(3):
        Image.new("RGB", (24, 24), (0, i, 0)).save(tmp_path / f"{i}.png")
    pipe = Pipe()
    assert draw_class_pictures(pipe, "a dog", tmp_path, 3) == 0
    assert draw_class_pictures(pipe, "a dog", tmp_path, 5) == 2 and pipe.seeds == [0, 1]


def test_pictures_of_another_prompt(tmp_path):
    draw_class_pictures(Pipe(), "a dog", tmp_path, 2)
    with pytest.raises(TinyldmError, match=r"pictures of another prompt than 'a cat' \(2: 0-"):
        draw_class_pictures(Pipe(), "a cat", tmp_path, 2)


@pytest.mark.parametrize("number", [0, -1, 2.0, "3", None])
def test_the_number_is_whole(number, tmp_path):
    with pytest.raises(TinyldmError, match="number of class pictures must be a whole number"):
        draw_class_pictures(Pipe(), "a dog", tmp_path, number)


def test_with_a_pipeline(small, tmp_path):
    draw_class_pictures(small, "a cat", tmp_path, 2, seed=3, num_inference_steps=2)
    expected, = small("a cat", seed=4, num_inference_steps=2)
    drawn = Image.open(tmp_path / next(name for name in names(tmp_path) if name[0] == "1"))
    assert drawn.size == expected.size
    # JPEG keeps the mean colours; this picture is close to noise.
    means = [np.asarray(image, float).mean(axis=(0, 1)) for image in (drawn, expected)]
    np.testing.assert_allclose(*means, atol=4)
