"""Pictures from files: upright, of any mode, and what is no picture."""
import numpy as np
import pytest
from PIL import Image

from tests.support.pictures import picture
from tinyldm.errors import TinyldmError
from tinyldm.images import from_pil, mask_from_pil, open_image, to_pil


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
