"""Pictures from files: upright, of any mode, and what is no picture."""
import struct
import subprocess
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from tests.support.pictures import picture
from tinyldm import images
from tinyldm.errors import TinyldmError
from tinyldm.images import (
    decoded,
    from_pil,
    mask_from_pil,
    open_image,
    read_parameters,
    save,
    to_pil,
)


def test_a_picture_from_a_file_is_upright(tmp_path):
    image, turned = picture(), tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x112] = 6                                     # a camera held upright
    image.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif, quality=100)
    read = open_image(turned)
    assert read.size == image.size and read.mode == "RGB"
    assert abs(np.asarray(read, int) - np.asarray(image, int)).mean() < 3


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_grey_picture_of_16_bits(tmp_path, mode):
    """Pillow's own convert would clip at 255, so nearly all pixels would be white."""
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey * 257).save(tmp_path / "in.png")
    read = open_image(tmp_path / "in.png", mode)
    assert read.mode == mode and np.array_equal(np.asarray(read.convert("L")), grey)


def test_a_grey_picture_of_16_bits_from_python():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    deep = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    assert np.array_equal(from_pil(deep, (16, 16)), from_pil(grey, (16, 16)))
    assert np.array_equal(mask_from_pil(deep, (12, 12)), mask_from_pil(grey, (12, 12)))


def test_a_picture_survives_the_way_in_and_out():
    image = picture()
    back, = to_pil(from_pil(image, image.size))
    assert np.array_equal(np.asarray(back), np.asarray(image))


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_picture(tmp_path, content):
    file = tmp_path / "in.png"
    file.write_bytes(content)
    with pytest.raises(TinyldmError, match="cannot read .*in.png as a picture"):
        open_image(file)


def test_half_a_picture_and_none(tmp_path):
    file = tmp_path / "in.png"
    picture().save(file)
    file.write_bytes(file.read_bytes()[:-200])
    for wrong in (file, tmp_path / "none.png", tmp_path):
        with pytest.raises(TinyldmError, match=r"cannot read .* as a picture \("):
            open_image(wrong)


def test_threads_leave_pythons_warnings_as_they_were():
    """Two that read at once would each put back what they found, so one of them "ignore all"."""
    before, inside, leave = warnings.filters[:], threading.Event(), threading.Event()

    def read():
        with images._reading("second"):
            inside.set()
            leave.wait(10)
    second = threading.Thread(target=read)
    with images._reading("first"):
        second.start()
        assert not inside.wait(0.1)
    leave.set()
    second.join(10)
    assert inside.is_set() and warnings.filters == before


# ---- any mode, from a file or from Python ---------------------------------------------------

MODES = "1 L P LA PA RGB RGBA RGBX CMYK YCbCr LAB HSV I F".split()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_read(mode):
    """Each looks as the grey picture it is made from, within the mode's own rounding."""
    grey = picture(mode="L")
    image = grey.point(lambda value: 255 * (value > 127)) if mode == "1" else grey
    read = from_pil(image.convert(mode), grey.size)
    assert abs(read - from_pil(image, grey.size)).max() <= (0.3 if mode == "P" else 0.03)
    assert mask_from_pil(image.convert(mode), (12, 12)).shape == (1, 12, 12, 1)


@pytest.mark.parametrize("values, expected", [
    (np.array([[0, 0.5, 1, np.nan]], np.float32), [0, 127, 255, 0]),
    (np.array([[0, 100, 255, np.inf]], np.float32), [0, 100, 255, 0]),
    (np.array([[0, 257, 65535]], np.float32), [0, 1, 255]),
    (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
    (np.array([[-5, 100, 255]], np.int32), [0, 100, 255]),
])
def test_grey_pictures_of_32_bits(values, expected):
    image = Image.fromarray(values)
    assert np.asarray(decoded("image", image)).tolist() == [expected]


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_alpha(mode):
    """Pillow cannot convert these to "L" or "RGB" in one step."""
    layer = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    layer.paste((255, 255, 255, 255), (0, 0, 4, 8))
    premultiplied = layer.convert("LA" if mode == "La" else "RGBA").convert(mode)
    with pytest.warns(UserWarning, match="one colour"):
        mask = mask_from_pil(premultiplied, (8, 8))
    assert mask[0, :, :4].all() and not mask[0, :, 4:].any()
    assert (from_pil(premultiplied, (8, 8)) == 1).all()


# ---- masks with transparency ----------------------------------------------------------------

def layer(stroke, ground, mode="RGBA"):
    """A stroke on the left half of a ground, both (r, g, b, a)."""
    image = Image.new("RGBA", (16, 16), ground)
    image.paste(stroke, (0, 0, 8, 16))
    return image.convert(mode)


def with_hole():
    """A picture whose left half was erased."""
    image = picture(size=(16, 16), mode="RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 8, 16))
    return image


CLEAR, CLEAR_WHITE = (0, 0, 0, 0), (255, 255, 255, 0)
WHITE, BLACK = (255, 255, 255, 255), (0, 0, 0, 255)
LEFT, RIGHT, NOTHING = (1, 0), (0, 1), (0, 0)


@pytest.mark.parametrize("mask, painted, said", [
    (layer(WHITE, CLEAR), LEFT, "not transparent is painted"),
    (layer(WHITE, CLEAR_WHITE), LEFT, "not transparent is painted"),
    (layer(WHITE, CLEAR, "LA"), LEFT, "not transparent is painted"),
    (layer((255, 0, 0, 255), CLEAR), LEFT, "not transparent is painted"),
    (layer((0, 0, 255, 77), CLEAR), LEFT, "not transparent is painted"),    # a brush of 30 %
    (layer((255, 255, 255, 120), CLEAR), LEFT, "not transparent is painted"),
    (with_hole(), LEFT, "those are painted"),
    (layer(CLEAR, BLACK), LEFT, "those are painted"),
    (layer(WHITE, BLACK), LEFT, None),                  # the other export of the same widgets
    (layer(BLACK, WHITE), RIGHT, None),
    (layer((255, 255, 255, 90), (0, 0, 0, 90)), LEFT, None),
    (layer(CLEAR, CLEAR), NOTHING, None), (layer(CLEAR_WHITE, CLEAR_WHITE), NOTHING, None),
    (layer(CLEAR, CLEAR_WHITE), NOTHING, None),
], ids=range(14))
@pytest.mark.parametrize("from_file", [False, True], ids=["python", "file"])
def test_a_mask_with_transparency(mask, painted, said, from_file, tmp_path):
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        if from_file:
            mask.save(tmp_path / "mask.png")
            mask = open_image(tmp_path / "mask.png", "L")
        array = mask_from_pil(mask, (16, 16))[0, :, :, 0]
    assert (array[:, :8] == painted[0]).all() and (array[:, 8:] == painted[1]).all()
    assert [said in str(note.message) for note in notes] == [True] * bool(said)


def test_white_and_black_strokes_on_a_transparent_layer():
    """An eraser that paints in black: what is black or transparent stays."""
    mask = layer(WHITE, CLEAR)
    mask.paste(BLACK, (0, 0, 8, 4))
    with pytest.warns(UserWarning, match="several greys"):
        array = mask_from_pil(mask, (16, 16))[0, :, :, 0]
    assert array[4:, :8].all() and array.sum() == 12 * 8


def test_a_mask_in_a_palette_with_transparency(tmp_path):
    mask = layer(WHITE, CLEAR).quantize()
    mask.save(tmp_path / "mask.png")
    assert Image.open(tmp_path / "mask.png").mode == "P"
    with pytest.warns(UserWarning, match="not transparent is painted"):
        array = mask_from_pil(open_image(tmp_path / "mask.png", "L"), (16, 16))
    assert array[0, :, :8].all() and array.sum() == 16 * 8


# ---- files that do harm ---------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_other_program_is_started(tmp_path, monkeypatch):
    def started(*arguments, **options):
        raise AssertionError("a program was started")
    monkeypatch.setattr(subprocess, "Popen", started)
    (tmp_path / "photo.png").write_bytes(EPS)
    with pytest.raises(TinyldmError, match="cannot read .*photo.png as a picture: give a PNG"):
        open_image(tmp_path / "photo.png")
    Image.init()
    (tmp_path / "photo.eps").write_bytes(EPS)
    with (Image.open(tmp_path / "photo.eps") as lazy,
          pytest.raises(TinyldmError, match="image as a picture .*EPS is not one of those")):
        from_pil(lazy, (8, 8))


def huge_png(path, width, height):
    """A PNG that claims a size; its pixels are missing."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(
            ">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
                     + chunk(b"IEND", b""))


@pytest.mark.parametrize("side", [8193, 10_000, 13_000, 30_000])    # Pillow warns, then refuses
def test_the_size_is_checked_before_decoding(side, tmp_path, monkeypatch):
    huge_png(tmp_path / "huge.png", side, side)

    def load(self):
        raise AssertionError("decoded")
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with warnings.catch_warnings():
        warnings.simplefilter("error")                  # Pillow's warning would be one
        with pytest.raises(TinyldmError, match="more than 67,108,864.*make it smaller"):
            open_image(tmp_path / "huge.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tif", ".ppm"])
def test_a_damaged_picture_from_python(suffix, tmp_path, small):
    file = tmp_path / f"in{suffix}"
    picture().save(file)
    file.write_bytes(file.read_bytes()[:-file.stat().st_size // 3])
    lazy = {"image": picture(), "mask": picture()}
    for name in lazy:
        try:
            image = Image.open(file)
        except OSError:                                 # found by Pillow at once
            continue
        with pytest.raises(TinyldmError, match=f"cannot read {name} as a picture"):
            small("a cat", **lazy | {name: image})


def test_a_turned_photograph_from_python(tmp_path, small):
    image, turned = picture(), tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    drawn, = small("a cat", image=Image.open(turned), num_inference_steps=2)
    expected, = small("a cat", image=image, num_inference_steps=2)
    assert drawn.size == expected.size and drawn.tobytes() == expected.tobytes()


def test_damaged_exif_does_not_matter(tmp_path):
    picture().save(tmp_path / "in.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03")
    assert open_image(tmp_path / "in.jpg").size == picture().size


def test_of_an_animation_the_first_frame(tmp_path):
    picture(0).save(tmp_path / "in.gif", save_all=True, append_images=[picture(1), picture(2)])
    with pytest.warns(UserWarning, match="in.gif is an animation of 3 frames: the first one"):
        read = open_image(tmp_path / "in.gif")
    assert np.array_equal(read, Image.open(tmp_path / "in.gif").convert("RGB"))


@pytest.mark.parametrize("size", [(0, 0), (0, 8)])
def test_a_picture_without_pixels(size):
    with pytest.raises(TinyldmError, match="it has no pixels"):
        from_pil(Image.new("RGB", size), (8, 8))


# ---- what a picture says of itself ----------------------------------------------------------

TEXT = "ein Fuchs, 狐\nNegative prompt: blur\nSteps: 20, Sampler: Euler a, Seed: 5"


def user_comment(code, text):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = code + text
    return exif


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
@pytest.mark.parametrize("code, encoding", [
    (b"UNICODE\0", "utf-16-be"), (b"UNICODE\0", "utf-16-le"), (b"ASCII\0\0\0", "utf-8"),
    (b"\0" * 8, "utf-8")])
def test_parameters_in_exif(suffix, code, encoding, tmp_path):
    file = tmp_path / f"in{suffix}"
    picture().save(file, exif=user_comment(code, TEXT.encode(encoding)))
    assert read_parameters(file) == TEXT


def test_parameters_elsewhere(tmp_path):
    file = tmp_path / "out.png"
    save(picture(), file, TEXT)
    assert read_parameters(file) == TEXT
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("prompt", '{"3": {}}')
    picture().save(file, pnginfo=chunks)
    assert read_parameters(file) == '{"3": {}}'
    picture().save(file)
    assert read_parameters(file) is None
    picture().save(tmp_path / "in.gif", comment=TEXT.encode())
    assert read_parameters(tmp_path / "in.gif") == TEXT
    with pytest.raises(TinyldmError, match="cannot read .*none.png as a picture"):
        read_parameters(tmp_path / "none.png")
