"""The three ways to the size of the Inception network: tables of other programs, and torch."""
import numpy as np
import pytest

from tests.support.extra import F, torch
from tests.support.reference import has_avx2, nchw, nhwc
from tests.support.tolerance import assert_allclose
from tinyldm.metrics.resize import RESIZES, bicubic, bilinear

FOUR, EIGHT = [0, 10, 40, 90], [0, 10, 40, 90, 160, 250, 200, 30]


def tf1(picture, size):
    return bilinear(picture, size, half_pixel=False)


@pytest.mark.parametrize("resize, larger, smaller", [
    (bilinear, [0, 2.5, 7.5, 17.5, 32.5, 52.5, 77.5, 90], [5, 65, 205, 115]),
    (tf1, [0, 5, 10, 25, 40, 65, 90, 90], [0, 40, 160, 200]),
    (bicubic, [-.8824, 1.2409, 5.7252, 15.625, 30.625, 53.1298, 81.1679, 94.4118],
     [4.1004, 63.7452, 205.6371, 130])])
def test_rows_as_other_programs_resize_them(resize, larger, smaller):
    for row, size, expected in (FOUR, 8, larger), (EIGHT, 4, smaller):
        picture = np.tile(np.float32(row)[:, None, None], (1, len(row), 3))
        for turned in (picture, picture.swapaxes(0, 1)):
            resized = resize(np.ascontiguousarray(turned), size)
            resized = resized if turned is picture else resized.swapaxes(0, 1)
            assert resized.dtype == np.float32 and resized.shape == (size, size, 3)
            assert_allclose(resized, np.tile(np.array(expected)[:, None, None], (1, size, 3)),
                            atol=1e-4)


@pytest.mark.parametrize("size", [(299, 299), (32, 32), (640, 480), (7, 300), (1, 1)], ids=str)
def test_pytorchs_bilinear(size, rng):
    picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    tensor = nchw(picture[None]).float() / 255
    theirs = 2 * F.interpolate(tensor, (299, 299), mode="bilinear", align_corners=False) - 1
    assert_allclose(RESIZES["pytorch"](picture), nhwc(theirs)[0], atol=1e-6 if has_avx2() else 1e-4)


def test_clean_fids_bicubic(rng):
    """Pillow's filter on floats is torch's antialiased one, before it is rounded."""
    picture = rng.integers(0, 256, (320, 411, 3), dtype=np.uint8)
    theirs = F.interpolate(torch.from_numpy(picture.transpose(2, 0, 1)[None].astype(np.float32)),
                           (299, 299), mode="bicubic", antialias=True, align_corners=False)
    assert_allclose(RESIZES["clean"](picture), (nhwc(theirs.clip(0, 255))[0] - 128) / 128,
                    atol=1e-4)


@pytest.mark.parametrize("name", RESIZES)
def test_range_and_size(name):
    for value, expected in (0, -1), (255, 1 if name == "pytorch" else 127 / 128):
        y = RESIZES[name](np.full((5, 9, 3), value, np.uint8))
        assert y.shape == (299, 299, 3) and y.dtype == np.float32
        assert_allclose(y, expected, atol=1e-6)
