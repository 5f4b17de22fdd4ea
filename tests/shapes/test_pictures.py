"""The toy world as a folder to train on."""
import json

import numpy as np
import pytest

from tinyldm.errors import TinyldmError
from tinyldm.shapes.judge import score
from tinyldm.shapes.pictures import write_pictures
from tinyldm.shapes.recipe import run
from tinyldm.training.data.pictures import PictureFolder


def test_a_folder_of_pictures_with_true_captions(tmp_path):
    run(["pictures", "--output", str(tmp_path / "few"), "--count", "5"])
    run(["pictures", "--output", str(tmp_path / "more"), "--count", "20"])
    few, more = (PictureFolder(tmp_path / name, 64) for name in ("few", "more"))
    assert [len(few), len(more)] == [5, 20]
    assert [item.digest for item in few.items] == [item.digest for item in more.items][:5]
    images, captions, _ = more.batch(0, 0, 20)
    pictures = list(((images + 1) * 127.5).round().astype(np.uint8))
    assert score(pictures, captions)["all"] == 1


def test_crowds_have_no_caption(tmp_path):
    write_pictures(tmp_path / "crowds", 6, seed=1, crowds=True)
    lines = (tmp_path / "crowds" / "metadata.jsonl").read_text().splitlines()
    named = [json.loads(line)["file_name"] for line in lines]
    assert named == ["00000.png", "00002.png", "00004.png"]
    report = PictureFolder(tmp_path / "crowds", 64, caption="").report()
    assert len([*(tmp_path / "crowds").glob("*.png")]) == 6 and "captions are not used" in report


def test_a_folder_that_holds_something_stays(tmp_path):
    (tmp_path / "mine.png").write_bytes(b"mine")
    with pytest.raises(TinyldmError, match="exists already"):
        write_pictures(tmp_path, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.png"]


def test_single_things_begin_the_names_with_their_shapes(tmp_path):
    run(["pictures", "--output", str(tmp_path / "single"), "--count", "12", "--single"])
    lines = (tmp_path / "single" / "metadata.jsonl").read_text().splitlines()
    for i, line in enumerate(map(json.loads, lines)):
        shape, number = line["file_name"].removesuffix(".png").split("_")
        assert number == f"{i:05}" and f" {shape} on a " in line["text"]
    assert len(lines) == len([*(tmp_path / "single").glob("*.png")]) == 12
