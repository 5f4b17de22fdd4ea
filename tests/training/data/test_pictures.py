"""A folder of pictures: what is found in it, sizes and crops, and batches keyed by their step."""
import json
import os
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.support.pictures import picture
from tinyldm.errors import TinyldmError
from tinyldm.training.data import pictures as data
from tinyldm.training.data.pictures import PictureFolder, bucket_sizes, cover, nearest_bucket


def fill(folder, count=5, size=(70, 59)):
    """Pictures a.png, b.png ... with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        name = "abcdefghijklmnopqrstuvwxyz"[i]
        picture(i, size).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"picture {name}")
    return folder


def found(folder, start):
    """The one line of the report that begins so."""
    [line] = [line for line in folder.report() if line.startswith(start)]
    return line


# ---- what lies in the folder ------------------------------------------------------------------

def test_a_correct_folder_is_reported_in_three_lines(tmp_path):
    folder = PictureFolder(fill(tmp_path), 32, flip=True)
    assert folder.report() == [
        f"{tmp_path}: 5 pictures", "captions: 5 from .txt files",
        "resized to 32 on the shorter side, cut to 32x32 in the middle, half of them mirrored"]
    assert [item.caption for item in folder.items] == [f"picture {letter}" for letter in "abcde"]
    assert folder.items[0].size == (70, 59) and folder.items[0].target == (32, 32)


@pytest.mark.parametrize("make, message", [
    (lambda path: None, "holds no pictures, but none: name the folder in which they lie"),
    (lambda path: (path / "notes.pdf").touch(), "holds no pictures, but 1: notes.pdf"),
    (lambda path: (path / "a.png").write_text("no picture"), "holds no picture that can be read"),
    (lambda path: picture().save(path / "a.png"), "has no captions: write a file metadata.jsonl"),
    (lambda path: (path.rmdir(), path.touch()), r"cannot read the folder .* \(Not a directory\)"),
    (lambda path: path.rmdir(), r"cannot read the folder .* \(No such file or directory\)"),
])
def test_a_folder_that_cannot_be_trained_on(make, message, tmp_path):
    path = tmp_path / "pictures"
    path.mkdir()
    make(path)
    with pytest.raises(TinyldmError, match=message):
        PictureFolder(path, 32)


@pytest.mark.parametrize("resolution", [7, 8193, 64.0, "64", None, True])
def test_the_resolution_is_a_whole_number(resolution, tmp_path):
    with pytest.raises(TinyldmError, match="the resolution must be a whole number from 8 to 8192"):
        PictureFolder(tmp_path, resolution)


def test_what_cannot_be_read_is_named_and_skipped(tmp_path):
    fill(tmp_path, 1)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.png").write_text("a picture of a dog")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    start = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    (tmp_path / "huge.png").write_bytes(whole[:8] + b"\0\0\0\x0d" + start
                                        + zlib.crc32(start).to_bytes(4, "big") + whole[33:])
    Image.new("RGB", (3000, 1)).save(tmp_path / "narrow.png")
    folder = PictureFolder(tmp_path, 512, caption="a dog")
    assert [item.name for item in folder.items] == ["a.png"]
    line = found(folder, "pictures that cannot be read and are skipped (6: ")
    for said in ("cut.png: ", "text.png: its content is no picture", "empty.jpg: its content is no",
                 "phone.jpg: it is HEIC, which is not supported: save it as JPEG",
                 "huge.png: it has more than 67,108,864 pixels", "narrow.png: with 3000x1 pixels"):
        assert said in line
    with pytest.raises(TinyldmError, match="`strict` does not allow(.|\n)*cut.png"):
        PictureFolder(tmp_path, 512, caption="a dog", strict=True)


def test_what_is_done_to_odd_pictures_is_said(tmp_path):
    fill(tmp_path, 1)
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1, (80, 40)).save(tmp_path / "phone.jpg", exif=exif)
    clear = picture(2).convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    picture(3).save(tmp_path / "film.gif", save_all=True, append_images=[picture(4), picture(5)])
    picture(6).convert("CMYK").save(tmp_path / "print.jpg")
    Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(tmp_path / "scan.png")
    picture(7, (20, 90)).save(tmp_path / "small.png")
    folder = PictureFolder(tmp_path, 32, caption="a dog")
    lines = folder.report()[3:]
    assert sorted(lines) == [
        "animations, of which the first frame is used (1: film.gif: 3 frames)",
        "pictures converted to 8 bits of red, green and blue (3: film.gif: P, print.jpg: CMYK, "
        "scan.png: I;16)",
        "pictures too small, which are enlarged (1: small.png: 20x90)",
        "pictures turned as their EXIF says (1: phone.jpg)",
        "pictures with the same content (1: copy.png = a.png)",
        "pictures with transparent parts, behind which is white (1: clear.png)"]
    images = {item.name: folder.image(folder._sample(0, 0, i))
              for i, item in enumerate(folder.items)}
    assert (images["clear.png"] == 1).all()
    assert abs(images["scan.png"] - (40_000 / 65535 * 2 - 1)).max() < 0.01
    phone = next(item for item in folder.items if item.name == "phone.jpg")
    assert phone.size == (40, 80)


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
def test_links_and_strange_entries(tmp_path):
    """A loop ends, a pipe is not waited for, and a hidden file is none of the pictures."""
    inside = fill(tmp_path / "one", 1)
    (inside / "loop").symlink_to(tmp_path)
    (tmp_path / "two").symlink_to(inside)
    (tmp_path / "self.png").symlink_to("self.png")
    picture().save(tmp_path / ".hidden.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(inside / "pipe.txt")
    folder = PictureFolder(tmp_path, 32)
    assert [item.name for item in folder.items] == ["one/a.png"]
    assert found(folder, data.BROKEN) == "links that lead nowhere (1: self.png)"
    assert found(folder, data.LINKS).endswith("(2: two, one/loop)")


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
def test_a_name_that_is_no_utf8(tmp_path):
    fill(tmp_path, 1)
    os.rename(os.fsencode(tmp_path / "a.png"), os.fsencode(tmp_path) + b"/\xff.png")
    os.rename(os.fsencode(tmp_path / "a.txt"), os.fsencode(tmp_path) + b"/\xff.txt")
    folder = PictureFolder(tmp_path, 32)
    assert folder.items[0].caption == "picture a" and len(folder.fingerprint) == 64
    assert folder.batch(0, 0, 1)[0].shape == (1, 32, 32, 3)
    assert str(TinyldmError(found(folder, data.NAMES))).endswith("(1: ?.png)")


def test_what_may_not_be_read(tmp_path, monkeypatch):
    """A folder inside without permission is named, and the rest is used."""
    fill(tmp_path, 1)
    fill(tmp_path / "closed", 1)
    scandir = os.scandir

    def refuse(path):
        if str(path).rstrip("/").endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    folder = PictureFolder(tmp_path, 32)
    assert len(folder) == 1
    assert found(folder, data.FOLDERS).endswith("(1: closed: Permission denied)")
    with pytest.raises(TinyldmError, match="cannot read the folder .*Permission denied"):
        PictureFolder(tmp_path / "closed", 32)


def test_ten_thousand_files_are_found_in_seconds(tmp_path):
    """Pictures and captions that do not fit, where looking for similar names would take longest."""
    (tmp_path / "a.png").write_text("no picture")
    for i in range(5000):
        (tmp_path / f"some_longer_name_{i}.png").touch()
        (tmp_path / f"another_longer_name_{i}.txt").touch()
    start = time.perf_counter()
    with pytest.raises(TinyldmError, match=r"skipped \(5001: a.png: .* and 4993 more\)"):
        PictureFolder(tmp_path, 32)
    assert time.perf_counter() - start < 8


def test_names_and_captions_cannot_write_to_the_terminal(tmp_path):
    """Names may hold escape sequences and newlines; so may a folder's."""
    folder = tmp_path / "a\x1b[31m\nb"
    folder.mkdir()
    picture().save(folder / "\x1b]0;title\x07.jpg")
    (folder / "x\n\x1b[2J.png").touch()
    for line in PictureFolder(folder, 32, caption="red \x1b[31m").report():
        assert line.isprintable()


# ---- sizes ------------------------------------------------------------------------------------

def test_centre_crop_equals_torchvision(tmp_path):
    """Resize(32, LANCZOS), CenterCrop(32), ToTensor, Normalize, as in diffusers' scripts.

    torchvision rounds the longer side down and half a pixel to the even one: written out here.
    """
    sizes = [(70, 59), (59, 70), (32, 32), (33, 32), (35, 32), (31, 90), (97, 61), (20, 20)]
    for i, size in enumerate(sizes):
        picture(i, size).save(tmp_path / f"{i}.png")
    images, _, indices = PictureFolder(tmp_path, 32, caption="").batch(0, 0, len(sizes))
    for image, i in zip(images, indices):
        w, h = sizes[i]
        new = (int(32 * w / h), 32) if h <= w else (32, int(32 * h / w))
        left, top = (int(round((side - 32) / 2.0)) for side in new)
        resized = picture(i, (w, h)).resize(new, Image.Resampling.LANCZOS)
        expected = np.asarray(resized.crop((left, top, left + 32, top + 32))).astype(np.float32)
        np.testing.assert_array_equal(image, (expected / 255 - np.float32(0.5)) / np.float32(0.5))


def test_kohyas_buckets():
    """The table of kohya-ss/sd-scripts for 512x512, from 256 to 1024."""
    half = [(256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640),
            (448, 576)]
    assert bucket_sizes(512) == sorted([*half, (512, 512), *(size[::-1] for size in half)])
    for resolution in (8, 64, 100, 256, 300, 768, 1024):
        assert all(W * H <= resolution ** 2 and W % 8 == H % 8 == 0
                   for W, H in bucket_sizes(resolution))


@pytest.mark.parametrize("size, bucket, resized", [
    ((1000, 1000), (512, 512), (512, 512)), ((4000, 3000), (576, 448), (597, 448)),
    ((3000, 4000), (448, 576), (448, 597)), ((1920, 1080), (640, 384), (683, 384)),
    ((500, 5000), (256, 1024), (256, 2560)), ((257, 256), (512, 512), (514, 512)),
])
def test_the_bucket_of_a_picture(size, bucket, resized):
    """The nearest ratio of width to height: for 16:9, 640x384 with 1.67 and not 704x320 with 2.2.
    """
    assert nearest_bucket(size, bucket_sizes(512)) == bucket
    assert cover(size, bucket, 0.5) == resized


# ---- batches ----------------------------------------------------------------------------------

def drawn(folder, seed, steps, batch_size):
    return [sample for step in steps for sample in folder.samples(seed, step, batch_size)]


@pytest.mark.parametrize("buckets", [False, True])
def test_an_epoch_holds_each_picture_once(buckets, tmp_path):
    fill(tmp_path, 5)
    for i in range(3):
        picture(i, (90, 40)).save(tmp_path / f"wide{i}.png")
    folder = PictureFolder(tmp_path, 32, buckets=buckets, caption="")
    for batch_size in (1, 2, 4, 8) if not buckets else (1, 2, 3, 16):
        steps = folder.batches_per_epoch(batch_size)
        orders = []
        for epoch in range(3):
            batches = [folder.samples(0, step, batch_size)
                       for step in range(epoch * steps, (epoch + 1) * steps)]
            orders.append([sample.index for batch in batches for sample in batch])
            assert sorted(orders[-1]) == list(range(8))
            for batch in batches:
                assert 1 <= len(batch) <= batch_size
                assert len({folder.items[sample.index].target for sample in batch}) == 1
        assert orders[0] != orders[1] != orders[2]
    assert folder.samples(0, 5, 2) != folder.samples(1, 5, 2)


def test_batches_depend_on_nothing_but_their_key(tmp_path):
    """Neither on what was asked before nor on how a step's samples are split."""
    fill(tmp_path, 5)
    options = {"center_crop": False, "flip": True, "caption": ["one", "two", "three"]}
    folder, again = (PictureFolder(tmp_path, 32, **options) for _ in range(2))
    samples = drawn(folder, 3, range(6), 4)
    assert drawn(again, 3, [5], 4) == samples[20:]
    assert drawn(again, 3, range(12), 2) == samples and drawn(again, 3, range(3), 8) == samples
    images, captions, indices = folder.batch(3, 2, 4)
    assert captions == [s.caption for s in samples[8:12]]
    assert indices == [s.index for s in samples[8:12]]
    np.testing.assert_array_equal(images[1], again.image(samples[9]))


def test_every_choice_is_drawn(tmp_path):
    fill(tmp_path, 2)
    folder = PictureFolder(tmp_path, 32, center_crop=False, flip=True, caption=["x", "y", "z"])
    samples = drawn(folder, 0, range(300), 1)
    assert {sample.caption for sample in samples} == {"x", "y", "z"}
    assert {sample.flipped for sample in samples} == {False, True}
    assert {sample.left for sample in samples} == set(range(37 - 32 + 1))
    assert {sample.top for sample in samples} == {0}
    flipped = next(sample for sample in samples if sample.flipped)
    np.testing.assert_array_equal(folder.image(flipped)[:, ::-1],
                                  folder.image(flipped._replace(flipped=False)))
    assert not any(s.flipped for s in drawn(PictureFolder(tmp_path, 32), 0, range(50), 1))


def test_captions_with_sides_are_named_where_pictures_are_mirrored(tmp_path):
    fill(tmp_path, 3)
    (tmp_path / "b.txt").write_text("a dog Left of a cat")
    (tmp_path / "c.txt").write_text("a bright leftover")
    assert found(PictureFolder(tmp_path, 32, flip=True), data.SIDES).endswith("(1: b.png)")
    assert len(PictureFolder(tmp_path, 32).report()) == 3


def test_repeats_of_a_folders_name(tmp_path):
    fill(tmp_path / "3_my dog", 1)
    picture(1).save(tmp_path / "3_my dog" / "plain.png")
    picture(2).save(tmp_path / "1_cat.png")
    fill(tmp_path / "2023_paris", 1)
    folder = PictureFolder(tmp_path, 32)
    items = {item.name: item for item in folder.items}
    assert items["3_my dog/a.png"].caption == "picture a"
    assert items["3_my dog/plain.png"].caption == "my dog"
    assert items["1_cat.png"].repeats == items["2023_paris/a.png"].repeats == 1
    assert folder.report()[:2] == [f"{tmp_path}: 4 pictures, 8 per epoch with their repeats",
                                   "captions: 2 from .txt files, 1 from the names of folders"]
    assert found(folder, data.MANY).endswith("(1: 2023_paris)")
    epoch = [sample.index for sample in drawn(folder, 0, range(4), 2)]
    assert sorted(epoch) == sorted(folder.entries.tolist()) and len(epoch) == 8


def test_a_file_that_changes_meanwhile(tmp_path):
    folder = PictureFolder(fill(tmp_path, 1), 32)
    picture(0, (90, 90)).save(tmp_path / "a.png")
    with pytest.raises(TinyldmError, match=r"a.png has 90x90 pixels now, not 70x59"):
        folder.batch(0, 0, 1)
    (tmp_path / "a.png").unlink()
    with pytest.raises(TinyldmError, match="a.png"):
        folder.batch(0, 0, 1)


def test_the_fingerprint_changes_with_what_is_trained_on(tmp_path):
    fill(tmp_path / "x")
    fill(tmp_path / "y")
    first = PictureFolder(tmp_path / "x", 32).fingerprint
    assert PictureFolder(tmp_path / "y", 32).fingerprint == first       # the place plays no part
    others = [PictureFolder(tmp_path / "x", 32, **option).fingerprint
              for option in ({"flip": True}, {"buckets": True}, {"center_crop": False},
                             {"caption": "x"})]
    others.append(PictureFolder(tmp_path / "x", 40).fingerprint)
    (tmp_path / "y" / "a.txt").write_text("another caption")
    others.append(PictureFolder(tmp_path / "y", 32).fingerprint)
    picture(9).save(tmp_path / "y" / "a.png")
    others.append(PictureFolder(tmp_path / "y", 32).fingerprint)
    assert len({first, *others}) == 1 + len(others)


def test_the_sheet_shows_what_the_model_sees(tmp_path):
    fill(tmp_path, 5, (200, 128))
    (tmp_path / "metadata.jsonl").write_text(json.dumps(
        {"file_name": "a.png", "text": "a long caption with \u56fe and \x1b[31m, " * 30}))
    folder = PictureFolder(tmp_path, 128)
    sheet = folder.sheet(4)
    cell = 128 + 3 * 13
    assert sheet.size == (2 * 128 + data.GAP, 2 * cell + data.GAP)
    seen = np.asarray(sheet.crop((0, 0, 128, 128)), np.float32) / 127.5 - 1
    np.testing.assert_allclose(seen, folder.image(folder._sample(0, 0, 0)), atol=1e-6)
    assert np.asarray(sheet.crop((0, 128, 128, cell))).min() < 128      # text


# ---- a part of the pictures ----------------------------------------------------------------------

def test_pictures_are_left_out_and_held_out(tmp_path):
    """What is left out is in no batch, nor is it held out; the fingerprint stays."""
    folder = PictureFolder(fill(tmp_path, 9), 32)
    before = folder.fingerprint
    folder.leave_out([0, 4])
    held = folder.hold_out(3)
    assert held == [1, 3, 6], "at equal distances among the seven"
    drawn = {sample.index for step in range(8) for sample in folder.samples(0, step, 2)}
    assert drawn == {2, 5, 7, 8} and len(folder) == 4 and folder.fingerprint == before
    with pytest.raises(TinyldmError, match="4 of .* 4 pictures cannot be held out"):
        folder.hold_out(4)
    assert PictureFolder(fill(tmp_path / "all", 9), 32).hold_out(3) == [0, 3, 6]


@pytest.mark.parametrize("filter", ["lanczos", "bicubic"])
def test_pictures_are_resized_by_the_filter(filter, tmp_path):
    folder = PictureFolder(fill(tmp_path, 1), 32, filter=filter)
    with Image.open(tmp_path / "a.png") as image:
        small = image.convert("RGB").resize(folder.items[0].resized,
                                            Image.Resampling[filter.upper()])
    left = folder.centred(0).left
    expected = np.asarray(small, np.float32)[:, left:left + 32] / 255 * 2 - 1
    np.testing.assert_array_equal(folder.image(folder.centred(0)), expected)
