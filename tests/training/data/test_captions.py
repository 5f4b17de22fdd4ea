"""Captions in the ecosystem's forms, what is wrong with them, and the encoder's length."""
import json
from collections import defaultdict

import pytest

from tests.support.pictures import picture
from tinyldm.errors import TinyldmError
from tinyldm.training.data import captions
from tinyldm.training.data.captions import find_captions, fit, is_misnamed, read_metadata
from tinyldm.training.data.pictures import PictureFolder


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))


def look(root, pictures):
    """find_captions over all files below root -> captions, forms, findings."""
    findings = defaultdict(list)
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return *find_captions(root, sorted({*files, *pictures}), pictures, findings), findings


# ---- the forms --------------------------------------------------------------------------------

def test_metadata_names_pictures_relative_to_itself(tmp_path):
    write(tmp_path / "train" / "metadata.jsonl",
          {"file_name": "a.png", "text": " a dog "},
          {"file_name": "./more/b.png", "text": ["one", " ", "two"]},
          {"file_name": "caf\u00e9.png", "text": "the accent is a letter of its own on the disk"})
    found, forms, findings = look(tmp_path, ["train/a.png", "train/cafe\u0301.png",
                                             "train/more/b.png"])
    assert found["train/a.png"] == ("a dog",) and found["train/more/b.png"] == ("one", "two")
    assert set(forms.values()) == {"metadata.jsonl"} and len(found) == 3 and not findings


def test_metadata_as_csv(tmp_path):
    (tmp_path / "metadata.csv").write_bytes(
        '\ufefffile_name,text,other\r\na.png,"a dog, ""big""\r\nand wet",x\r\nb.png,a cat\r\n'
        .encode())
    found, forms, findings = look(tmp_path, ["a.png", "b.png"])
    assert found == {"a.png": ('a dog, "big"\nand wet',), "b.png": ("a cat",)}
    assert forms["a.png"] == "metadata.csv" and not findings


def test_files_beside_the_pictures(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa dog\n")
    (tmp_path / "b.CAPTION").write_text("\n  a cat  \nand a second line\n")
    (tmp_path / "c.d.txt").write_text("")
    (tmp_path / "e.txt").write_bytes("a dog".encode("utf-16"))
    found, forms, findings = look(tmp_path, ["a.png", "b.jpg", "c.d.png", "e.png"])
    assert found == {"a.png": ("a dog",), "b.jpg": ("a cat",), "c.d.png": ("",)}
    assert forms == {"a.png": ".txt files", "b.jpg": ".caption files", "c.d.png": ".txt files"}
    assert findings == {captions.LINES: ["b.CAPTION"], captions.EMPTY: ["c.d.png: c.d.txt"],
                        captions.UNREADABLE: ["e.txt: not UTF-8"]}


def test_of_several_captions_the_first_form_counts(tmp_path):
    write(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "first"},
          {"file_name": "a.png", "text": "again"})
    (tmp_path / "a.txt").write_text("second")
    (tmp_path / "a.caption").write_text("third")
    found, _, findings = look(tmp_path, ["a.png"])
    assert found == {"a.png": ("first",)}
    assert findings == {captions.SEVERAL: ["a.png: metadata.jsonl, metadata.jsonl",
                                           "a.png: metadata.jsonl, a.txt",
                                           "a.png: metadata.jsonl, a.caption"]}


@pytest.mark.parametrize("orphan, picture_name, hint", [
    ("train/x.jpg", "x.jpg", "train/x.jpg: is it for x.jpg?"),
    ("more\\x.jpg", "more/x.jpg", "more\\x.jpg: is it for more/x.jpg?"),
    ("IMG_0l.jpg", "IMG_01.jpg", "IMG_0l.jpg: is it for IMG_01.jpg?"),
    ("dag.png", "Dog.jpeg", "dag.png: is it for Dog.jpeg?"),
    ("dog.png.txt", "dog.png", "dog.png.txt: is it for dog.png?"),
    ("dog.png", "zebra-042.jpg", "dog.png"), ("../../etc/passwd", "a.png", "../../etc/passwd"),
])
def test_captions_without_a_picture(orphan, picture_name, hint, tmp_path):
    """The nearest picture without a caption is suggested."""
    write(tmp_path / "metadata.jsonl", {"file_name": orphan, "text": "a dog"},
          {"file_name": "nothing.gif", "text": "a cat"})
    _, _, findings = look(tmp_path, [picture_name])
    assert findings == {captions.ORPHANS: [hint, "nothing.gif"]}


def test_a_picture_may_be_named_metadata(tmp_path):
    write(tmp_path / "metadata.jsonl", {"file_name": "metadata.png", "text": "a dog"})
    assert look(tmp_path, ["metadata.png"])[2] == {}


@pytest.mark.parametrize("name, near", [
    ("metadata.json1", True), ("metadata.json", True), ("meta-data.jsonl", True),
    ("Metadata.jsonl", True), ("metadata.parquet", True), ("metdata.csv", True),
    ("metadata.jsonl", False), ("metadata.csv", False), ("readme.md", False), ("a.png", False)])
def test_misnamed_metadata(name, near):
    assert is_misnamed(name) == near


def test_a_misnamed_file_is_named_where_captions_are_missing(tmp_path):
    picture().save(tmp_path / "a.png")
    write(tmp_path / "metadata.json1", {"file_name": "a.png", "text": "a dog"})
    with pytest.raises(TinyldmError, match=r"has no captions(.|\n)*\(1: metadata.json1\)"):
        PictureFolder(tmp_path, 32)


def test_pictures_without_a_caption(tmp_path):
    """They train with an empty one, are named, and `strict` stops."""
    for name in "abc":
        picture().save(tmp_path / f"{name}.png")
    write(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "a dog"},
          {"file_name": "b.png", "text": None})
    folder = PictureFolder(tmp_path, 32)
    assert [item.captions for item in folder.items] == [("a dog",), ("",), ("",)]
    assert f"{captions.NO_CAPTION} (2: b.png, c.png)" in folder.report()
    with pytest.raises(TinyldmError, match=r"\(2: b.png, c.png\)"):
        PictureFolder(tmp_path, 32, strict=True)


def test_one_caption_for_all(tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("not used")
    (tmp_path / "metadata.jsonl").write_text("damaged")
    assert PictureFolder(tmp_path, 32, caption="a dog").items[0].captions == ("a dog",)
    several = PictureFolder(tmp_path, 32, caption=["a dog", "a photo"])
    assert several.report()[1] == "2 captions, of which one is drawn each time"
    for wrong in ([], 3, ["a", None], b"a"):
        with pytest.raises(TinyldmError, match="the caption for all pictures must be a string"):
            PictureFolder(tmp_path, 32, caption=wrong)


# ---- damaged metadata -------------------------------------------------------------------------

@pytest.mark.parametrize("text, message", [
    ('{"file_name": "a.png", "caption": "a dog"}',
     r"has no key text, but \(2: file_name, caption\): name the key of the captions text"),
    ('{"image": "a.png", "text": "a dog"}',
     r"line 1: expected the name of a picture in the key file_name, found 2: image, text"),
    ('{"file_name": "a.png", "text": "a"}\n{"file_name": "", "text": "b"}', "line 2: expected the"),
    ('\n{"file_name": "a.png", "text": 3}', "line 2: text must be a string of valid Unicode"),
    ('{"file_name": "a.png", "text": ["a", null]}', "text must be a string of valid Unicode or a"),
    ('{"file_name": "a.png", "text": "\\ud800"}', "text must be a string of valid Unicode"),
    ("[\n", "line 1 is no JSON"), ('{"file_name": ', "line 1 is no JSON"), ("3", "no JSON object"),
    ("[" * 100_000, "cannot be read"), ("\xff", "cannot be read .*: write UTF-8"),
])
def test_damaged_metadata(text, message, tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(TinyldmError, match=message):
        read_metadata(tmp_path / "metadata.jsonl")


@pytest.mark.parametrize("text, message", [
    ("file_name;text\na.png;a dog\n", "file_name, found 1: file_name;text"),
    ("file_name,label\na.png,1\n", r"has no key text, but \(2: file_name, label\)"),
    ("file_name,text\n,a dog\n", "line 2: expected the name"),
    ("file_name,text\na.png," + "x" * 200_000, "cannot be read .field larger"),
])
def test_damaged_csv(text, message, tmp_path):
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(TinyldmError, match=message):
        read_metadata(tmp_path / "metadata.csv")


def test_a_line_may_hold_unicodes_line_ends(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a\u2028b"}\n')
    assert read_metadata(tmp_path / "metadata.jsonl") == [("a.png", ["a\u2028b"])]


# ---- the encoder's length ---------------------------------------------------------------------

class Letters:
    """A tokenizer with one token per letter, 10 long with start and end."""

    model_max_length = 10

    @staticmethod
    def ids(text):
        return [ord(letter) for letter in text if letter != " "]


@pytest.mark.parametrize("caption, kept, lost", [
    ("", "", 0), ("a dog", "a dog", 0), ("12345678", "12345678", 0), ("a big dog", "a big dog", 0),
    ("a big dog sits", "a big dog", 4), ("a  big,  catty thing", "a  big,", 10),
    ("123456789", "12345678", 1), ("  123456789 a", "  12345678", 2),
])
def test_long_captions_are_cut_at_a_word(caption, kept, lost):
    assert fit(caption, Letters) == (kept, lost)


def test_what_is_cut_is_reported(tmp_path):
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "b.png")
    texts = ["a dog", "a large dog sits"]
    write(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": texts},
          {"file_name": "b.png", "text": "a cat"})
    folder = PictureFolder(tmp_path, 32)
    before = folder.fingerprint
    folder.fit_captions(Letters)
    folder.fit_captions(Letters)
    assert folder.items[0].captions == ("a dog", "a large") and folder.fingerprint == before
    assert folder.report()[-1] == ("captions too long for the text encoder, cut at a word "
                                   "(1: a.png: 7 tokens too long)")
