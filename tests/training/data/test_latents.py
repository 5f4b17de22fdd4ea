"""Kept latents: what the VAE gives, computed once, and only where something changed."""
import numpy as np
import pytest

from tests.support.models import SMALL_VAE, fill
from tests.support.pictures import picture
from tinyldm.errors import TinyldmError
from tinyldm.models import AutoencoderKL
from tinyldm.training.data.latents import LatentCache
from tinyldm.training.data.pictures import PictureFolder


@pytest.fixture(scope="module")
def vae():
    return fill(AutoencoderKL(SMALL_VAE))


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, size in enumerate([(70, 59), (59, 70), (40, 90)]):
        picture(i, size).save(folder / f"{i}.png")
    return folder


def look(pictures, **options):
    return PictureFolder(pictures, 32, caption="", **options)


def files(path):
    return {file: file.stat().st_mtime_ns for file in path.iterdir()}


@pytest.mark.parametrize("buckets", [False, True])
def test_it_gives_what_the_vae_gives(buckets, pictures, vae, tmp_path):
    folder = look(pictures, flip=True, buckets=buckets)
    cache = LatentCache(folder, vae, tmp_path / "latents")
    assert cache.report() == f"latents in {tmp_path / 'latents'}: 0 found, 6 computed"
    flipped = 0
    for step in range(6):
        means, stds, captions, indices = cache.batch(5, step, 2)
        images, their_captions, their_indices = folder.batch(5, step, 2)
        assert (captions, indices) == (their_captions, their_indices)
        for i, image in enumerate(images):
            mean, logvar = vae.encode(image[None])
            np.testing.assert_array_equal(means[i], mean[0])
            np.testing.assert_array_equal(stds[i], np.exp(logvar[0] / 2))
        flipped += sum(sample.flipped for sample in folder.samples(5, step, 2))
    assert flipped and means.dtype == np.float32


def test_only_what_changed_is_computed_again(pictures, vae, tmp_path):
    path = tmp_path / "latents"

    def again(expected, vae=vae, dtype="float32", **options):
        cache = LatentCache(look(pictures, **options), vae, path, dtype)
        assert (cache.found, cache.computed) == expected
        return cache

    again((0, 3))
    before = files(path)
    again((3, 0))
    assert files(path) == before
    again((3, 3), flip=True)
    picture(9).save(pictures / "1.png")                 # changed
    (pictures / "2.png").rename(pictures / "new.png")   # renamed: the same content
    picture(8).save(pictures / "3.png")                 # added
    again((2, 2))
    again((0, 4), dtype="float16")
    again((0, 4), buckets=True)                         # even where size and crop stay
    again((4, 0))
    other = fill(AutoencoderKL(SMALL_VAE))
    weight = other.quant_conv.bias
    weight.data = weight.data + np.float32(1e-3)
    again((0, 4), other)
    decoder = fill(AutoencoderKL(SMALL_VAE))            # plays no part
    weight = decoder.decoder.conv_in.bias
    weight.data = weight.data + np.float32(1e-3)
    again((4, 0), decoder)


def test_an_interruption_loses_at_most_one_picture(pictures, vae, tmp_path, monkeypatch):
    folder, calls, encode = look(pictures), [], vae.encode

    def interrupted(images):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(images)
    monkeypatch.setattr(vae, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LatentCache(folder, vae, tmp_path / "latents")
    assert len(files(tmp_path / "latents")) == 2
    assert LatentCache(folder, vae, tmp_path / "latents").computed == 1


@pytest.mark.parametrize("damage", [
    lambda file: file.write_bytes(file.read_bytes()[:100]), lambda file: file.write_bytes(b""),
    lambda file: np.savez(file, mean=np.zeros((8, 8, 8)), std=np.zeros((8, 8, 1))),
    lambda file: np.savez(file, mean=np.full((8, 8, 8), np.nan), std=np.zeros((8, 8, 8))),
])
def test_a_damaged_file_is_made_anew(damage, pictures, vae, tmp_path):
    folder = look(pictures)
    cache = LatentCache(folder, vae, tmp_path / "latents")
    expected = cache.batch(0, 0, 3)
    damage(min((tmp_path / "latents").iterdir()))
    with pytest.raises(TinyldmError, match="has vanished or is damaged: start again"):
        cache.batch(0, 0, 3)
    again = LatentCache(folder, vae, tmp_path / "latents")
    assert again.computed == 1
    np.testing.assert_array_equal(again.batch(0, 0, 3)[0], expected[0])
    min((tmp_path / "latents").iterdir()).unlink()
    with pytest.raises(TinyldmError, match="has vanished or is damaged: start again"):
        again.batch(0, 0, 3)


def test_float16_takes_half_the_space(pictures, vae, tmp_path):
    """Three digits stay, and a standard deviation of e^-15 does not become 0."""
    folder = look(pictures)
    full = LatentCache(folder, vae, tmp_path / "full")
    half = LatentCache(folder, vae, tmp_path / "half", "float16")
    for a, b in zip(full.batch(0, 0, 3)[:2], half.batch(0, 0, 3)[:2]):
        np.testing.assert_allclose(b, a, rtol=2 ** -11, atol=2 ** -25)
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).iterdir())
             for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    assert np.float16(np.exp(-15)) > 0


@pytest.mark.parametrize("bad, dtype, message", [
    (np.nan, "float32", "the VAE gives NaN or infinity for 1.png: use it in float32"),
    (np.inf, "float16", "the VAE gives NaN or infinity for 1.png"),
    (70_000, "float16", "the latents of 1.png are too large for float16: keep them as float32"),
])
def test_latents_that_are_not_finite(bad, dtype, message, pictures, vae, tmp_path, monkeypatch):
    encode, calls = vae.encode, []

    def damaged(images):
        calls.append(1)
        mean, logvar = encode(images)
        mean[0, 0, 0, 0] = bad if len(calls) == 2 else 0
        return mean, logvar
    monkeypatch.setattr(vae, "encode", damaged)
    with pytest.raises(TinyldmError, match=message):
        LatentCache(look(pictures), vae, tmp_path / "latents", dtype)
    assert len(files(tmp_path / "latents")) == 1


def test_what_cannot_be_kept(pictures, vae, tmp_path):
    path = tmp_path / "latents"
    with pytest.raises(TinyldmError, match="latents of random crops cannot be kept"):
        LatentCache(look(pictures, center_crop=False), vae, path)
    with pytest.raises(TinyldmError, match="must be multiples of 4 for this VAE, not 34"):
        LatentCache(PictureFolder(pictures, 34, caption=""), vae, path)
    with pytest.raises(TinyldmError, match="as float16 or float32, not 'int8'"):
        LatentCache(look(pictures), vae, path, "int8")
    path.touch()
    with pytest.raises(TinyldmError, match="cannot write .*latents"):
        LatentCache(look(pictures), vae, path)
