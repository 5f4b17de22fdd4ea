"""Decoding and encoding in tiles: the same pictures as diffusers, for tiles of any size."""
import numpy as np
import pytest
import torch

import tinyldm
from tests.support.arrays import normal
from tests.support.models import VAES, fill, vae_config
from tests.support.pairs import vae_pair
from tests.support.reference import nchw, nhwc
from tests.support.tolerance import assert_close
from tinyldm import backend
from tinyldm.models import AutoencoderKL
from tinyldm.shapes.drawing import draw
from tinyldm.shapes.scenes import sample

# Of latents: exactly one tile, one row more, a rest on both sides, less high than a tile.
SIZES = [(8, 8), (9, 8), (13, 7), (17, 13), (14, 19), (3, 29)]


@pytest.mark.parametrize("dtype, kind, allowed", [
    pytest.param(torch.float64, np.float64, 1e-8, id="float64"),
    pytest.param(torch.float32, np.float32, 1e-4, id="float32")])
@pytest.mark.parametrize("name", VAES)
def test_tiles_are_those_of_diffusers(name, dtype, kind, allowed):
    levels = len(VAES[name]["block_out_channels"])
    for tile in (8, 4):
        config = dict(VAES[name], sample_size=tile * 2 ** (levels - 1))
        reference, module = vae_pair(config, dtype)
        reference.enable_tiling()
        for size in SIZES:
            z = normal(2, *size, 4, dtype=kind)
            with torch.no_grad():
                theirs = nhwc(reference.decode(nchw(z)).sample)
            with backend.plain():
                assert_close(module.decode_tiled(z), theirs, allowed, f"{size}, tiles of {tile}")


@pytest.mark.parametrize("dtype, kind, allowed", [
    pytest.param(torch.float64, np.float64, 1e-8, id="float64"),
    pytest.param(torch.float32, np.float32, 1e-4, id="float32")])
def test_a_picture_is_encoded_in_tiles_as_diffusers_does(dtype, kind, allowed):
    for tile in (8, 4):
        config = dict(VAES["two levels"], sample_size=tile * 2)
        reference, module = vae_pair(config, dtype)
        reference.enable_tiling()
        for height, width in SIZES:
            images = normal(2, 2 * height, 2 * width, 3, dtype=kind)
            with torch.no_grad():
                theirs = reference.encode(nchw(images)).latent_dist
            with backend.plain():
                mean, logvar = module.encode_tiled(images)
            where = f"{height}x{width}, tiles of {tile}"
            assert_close(mean, nhwc(theirs.mean), allowed, where)
            assert_close(logvar, nhwc(theirs.logvar), allowed, where)


def test_a_picture_that_fits_in_one_tile_is_the_same():
    vae = fill(AutoencoderKL(vae_config(dict(VAES["two levels"], sample_size=16))))
    z = normal(1, 8, 5, 4)
    np.testing.assert_array_equal(vae.decode_tiled(z), vae.decode(z))


@pytest.mark.parametrize("pixels", [1, 2, 3, 5, 7, 32, [16, 8], None])
def test_tiles_of_any_size_make_a_whole_picture(pixels):
    """diffusers needs tiles of a multiple of 4 latents. Without a size it is 32 pixels."""
    vae = fill(AutoencoderKL(vae_config(dict(VAES["two levels"], sample_size=pixels))))
    images = vae.decode_tiled(normal(1, 7, 18, 4))
    assert images.shape == (1, 14, 36, 3) and np.isfinite(images).all()


def test_tiles_change_a_picture_a_little():
    """Norms see one tile, not the picture. Here four pictures of the bundled model make one."""
    pipe = tinyldm.load()
    rng = np.random.default_rng(0)
    parts = [draw(sample(rng)) for _ in range(4)]
    picture = np.concatenate([np.concatenate(parts[:2], 1), np.concatenate(parts[2:], 1)])
    latents, _ = pipe.vae.encode((picture / 127.5 - 1).astype(np.float32)[None])
    difference = abs(pipe.vae.decode_tiled(latents) - pipe.vae.decode(latents)) * 127.5
    assert 0.1 < difference.mean() < 4
