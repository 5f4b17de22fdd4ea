"""Normal numbers: bit for bit those of torch on the CPU; those of a GPU as far as published."""
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.support.reference import has_avx2
from tests.support.tolerance import assert_allclose
from tinyldm import noise
from tinyldm.errors import TinyldmError

SEEDS = [0, 42, 2**31, 2**32 + 5, 2**63 + 1, -1]
SIZES = [*range(101), 255, 256, 257, 511, 1000, 1024, 1025, 4095, 4096, 9999, 12288, 16384, 16391,
         24576, 30000, 36863, 36864]


def assert_same_bits(ours, theirs):
    theirs = theirs.numpy()
    assert ours.dtype == theirs.dtype == np.float32 and ours.shape == theirs.shape
    if has_avx2():
        np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    else:           # three roundings of an angle on both sides, by 2^-22 each, times radii up to 6
        assert_allclose(ours, theirs, rtol=2**-22, atol=2 * 3 * 6 * 2**-22)


@pytest.mark.parametrize("seed", SEEDS)
def test_randn_equals_torch(seed):
    for size in SIZES:
        torch.manual_seed(seed)
        assert_same_bits(noise.randn(size, seed), torch.randn(size))


@pytest.mark.parametrize("shape", [(), 7, (0,), (3, 5), (1, 4, 64, 64), (2, 3, 5, 7), (2, 0, 3)])
def test_shapes(shape):
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    assert_same_bits(noise.randn(shape, 3), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_successive_draws_equal_torch(seed):
    """Mixed sizes on one generator: the kept number of a pair survives a draw of blocks."""
    ours, theirs = noise.Generator(seed), torch.Generator().manual_seed(seed)
    for size in [3, 16, 1, 5, 100, 0, 1, 4096, 15, 17, 2, 1, 33, 15, 36864, 1, 20]:
        assert_same_bits(ours.randn(size), torch.randn(size, generator=theirs))
        assert_same_bits(ours.uniform((size, 3)), torch.rand((size, 3), generator=theirs))


def test_published_first_values():
    """The first latents of Stable Diffusion for seed 0, and torch.randn(10) for seed 0."""
    np.testing.assert_array_equal(noise.randn((1, 4, 64, 64), 0)[0, 0, 0, :3],
                                  np.float32([-1.12583983, -1.15236020, -0.25057858]))
    np.testing.assert_array_equal(noise.randn(10, 0)[:3],
                                  np.float32([1.54099607, -0.29342890, -2.17878938]))


def test_a_radius_of_zero():
    """One u1 in 16 million is 1: its radius is sqrt(-2 ln 1) = -0, and torch's normals are +0."""
    seed, place = 18381, 1399
    normals = noise.randn(4096, seed)
    assert normals[place] == normals[place + 8] == 0
    assert_same_bits(normals, torch.randn(4096, generator=torch.Generator().manual_seed(seed)))


def test_many_numbers():
    """Two million, so that rare roundings occur, too."""
    expected = torch.randn(2_000_000, generator=torch.Generator().manual_seed(11))
    assert_same_bits(noise.randn(2_000_000, 11), expected)


def rounded_once(a, b, c):
    """The float32 number nearest to a * b + c (no tie), computed with exact fractions."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    near = np.float32(float(exact))
    around = [np.nextafter(near, np.float32(-np.inf)), near,
              np.nextafter(near, np.float32(np.inf))]
    return min(around, key=lambda value: abs(Fraction(float(value)) - exact))


def test_fma_rounds_once():
    """Sums 2**-64 away from the middle of two float32 numbers: rounding twice is wrong there."""
    big, small = np.float32((1 + 2**-20) * 2**-12), np.float32((1 - 2**-20) * 2**-12)
    a = np.array([big, -big, big, -big] * 2)
    b = np.full(8, small)
    c = np.float32([1, 1, -1, -1] * 2) + np.float32([0] * 4 + [2**-23, 2**-23, -2**-23, -2**-23])
    expected = np.array([rounded_once(*abc) for abc in zip(a, b, c)])
    naive = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (naive != expected).any()                                # the cases matter
    np.testing.assert_array_equal(noise.fma(a, b, c), expected)


def test_fma_of_random_numbers():
    a, b, c = np.random.default_rng(0).normal(size=(3, 2000)).astype(np.float32)
    expected = np.array([rounded_once(*abc) for abc in zip(a, b, c)])
    np.testing.assert_array_equal(noise.fma(a, b, c), expected)


@pytest.mark.parametrize("seed", [-2**63, 2**64 - 1, np.int64(-5), np.uint64(2**63 + 9)])
def test_seeds_at_the_edges_of_torchs_range(seed):
    expected = torch.randn(40, generator=torch.Generator().manual_seed(int(seed)))
    assert_same_bits(noise.randn(40, seed), expected)


@pytest.mark.parametrize("kind", [noise.Generator, noise.CudaGenerator])
@pytest.mark.parametrize("seed", [-2**63 - 1, 2**64, 1.0, "7", None])
def test_seeds_torch_does_not_take(seed, kind):
    with pytest.raises(TinyldmError, match=r"whole number from -2\*\*63 to 2\*\*64 - 1, got"):
        kind(seed)


# ---- as on a GPU ----------------------------------------------------------------------------

@pytest.mark.parametrize("counter, key, expected", [
    ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0),
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1])])
def test_philox_known_answers(counter, key, expected):
    """From Random123, the paper's library: kat_vectors, philox4x32 with 10 rounds."""
    words = noise.philox(np.array(counter, np.uint64)[:, None], key)
    assert words[:, 0].tolist() == expected


def test_published_cuda_numbers():
    """AUTOMATIC1111/stable-diffusion-webui, modules/rng_philox.py: Generator(0).randn((3, 4)).

    Its angles up to 2 pi are rounded to float32 twice, by 2^-22 each, and times radii up to 3.
    """
    expected = [[-0.92466259, -0.42534415, -2.6438457, 0.14518388],
                [-0.12086657, -0.57972564, -0.62285122, -0.32838709],
                [-1.07454231, -0.36314407, -1.67105067, 2.26550497]]
    ours = noise.CudaGenerator(0).randn((3, 4))
    assert ours.dtype == np.float32
    assert_allclose(ours, expected, atol=3 * 2 * 2**-22)


@pytest.mark.parametrize("seed, published", [
    (9, [0.8888, -0.5659, 0.5834, -0.7469, 1.1912, -0.3923, 1.1241, -0.4424]),
    (3, [-0.5649, 0.2402, -0.5518, 0.1248, 1.1328, -0.2443, -0.0325, -1.0078])])
def test_noise_that_a_gpu_drew(seed, published):
    """Given pure noise (t = 1000), Stable Diffusion 1.4's UNet predicts about that noise.

    So these outputs, from diffusers' test_models_unet_2d_condition.py, show the noise of a GPU.
    """
    drawn = noise.CudaGenerator(seed).randn((4, 4, 64, 64))[-1, -2:, -2:, :2].reshape(-1)
    assert np.corrcoef(drawn, published)[0, 1] > 0.999
    assert abs(drawn - published).max() < 0.1


def one_cuda_number(seed, i, threads, calls=0):
    """Number i of a draw after `calls` calls, computed alone and in float64."""
    turn, place = divmod(i, 4 * threads)
    which, thread = divmod(place, threads)
    counter = np.array([[calls + turn], [0], [thread], [0]], np.uint64)
    words = noise.philox(counter, (seed % 2**32, seed // 2**32))[:, 0].tolist()
    u, v = (np.float32(word) * 2.0**-32 + 2.0**-33 for word in words[which // 2 * 2:][:2])
    return math.sqrt(-2 * math.log(u)) * (math.sin, math.cos)[which % 2](2 * math.pi * v)


@pytest.mark.parametrize("threads", [1, 8, 200])
@pytest.mark.parametrize("seed", [0, 2**32 + 5, 2**64 - 1])
def test_the_places_of_a_threads_numbers(threads, seed):
    """Successive draws of fewer, as many and far more numbers than the threads give per call."""
    generator, calls = noise.CudaGenerator(seed, threads), 0
    for shape in [(3,), (), (8, 4), (0,), (2, 3, 37), (1,)]:
        ours = generator.randn(shape).reshape(-1)
        working = min(threads, max(ours.size, 1))
        expected = [one_cuda_number(seed, i, working, calls) for i in range(ours.size)]
        assert_allclose(ours, expected, atol=3e-6)
        calls += math.ceil(ours.size / (4 * working))


def test_small_draws_are_the_same_on_every_gpu():
    t4, h100 = (noise.CudaGenerator(1, threads) for threads in (40960, 270336))
    np.testing.assert_array_equal(t4.randn((4, 96, 96)), h100.randn((4, 96, 96)))
    assert (t4.randn((4, 128, 128)) != h100.randn((4, 128, 128))).any()


def test_a_million_cuda_numbers_are_normal():
    normals = noise.CudaGenerator(5).randn(1_000_000).astype(np.float64)
    assert abs(normals.mean()) < 4e-3 and abs(normals.std() - 1) < 3e-3
    assert abs((normals ** 4).mean() - 3) < 0.03 and np.isfinite(normals).all()


# ---- as in NumPy ----------------------------------------------------------------------------

def test_numpy_numbers():
    """apple/ml-stable-diffusion's test of its RNG gives the last five of 10,000 numbers."""
    ours, theirs = noise.NumpyGenerator(12345), np.random.RandomState(12345)
    normals = ours.randn(10000)
    assert_allclose(normals[-5:], [-0.86285345, 2.15229409, -0.00670556, -1.21472309,
                                              0.65498866], atol=1e-7)
    np.testing.assert_array_equal(normals, theirs.standard_normal(10000).astype(np.float32))
    for shape in [(3,), (), (2, 3, 5)]:
        drawn = ours.randn(shape)
        assert drawn.dtype == np.float32 and drawn.shape == shape
        np.testing.assert_array_equal(drawn, theirs.standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, None])
def test_seeds_numpy_does_not_take(seed):
    with pytest.raises(TinyldmError, match=r"whole number from 0 to 2\*\*32 - 1, got"):
        noise.NumpyGenerator(seed)


def test_unknown_noise():
    with pytest.raises(TinyldmError, match="unknown noise 'mps'; known: torch-cpu, torch-cuda, nu"):
        noise.get_generator("mps")
