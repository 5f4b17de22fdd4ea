"""Normal numbers against torch's CPU generator, bit for bit."""
from fractions import Fraction

import numpy as np
import pytest
import torch

from tinyldm import noise
from tinyldm.errors import TinyldmError

SEEDS = [0, 42, 2**31, 2**32 + 5, 2**63 + 1, -1]
SIZES = [*range(101), 255, 256, 257, 511, 1000, 1024, 1025, 4095, 4096, 9999, 12288, 16384, 16391,
         24576, 30000, 36863, 36864]


def assert_same_bits(ours, theirs):
    theirs = theirs.numpy()
    assert ours.dtype == theirs.dtype == np.float32 and ours.shape == theirs.shape
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


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
    """Mixed sizes on one generator: the kept number of the scalar path outlives a block draw."""
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
    """Two million, so that rare roundings come up too."""
    expected = torch.randn(2_000_000, generator=torch.Generator().manual_seed(11))
    assert_same_bits(noise.randn(2_000_000, 11), expected)


def rounded_once(a, b, c):
    """The float32 number nearest to a * b + c, which is no tie, in exact fractions."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    near = np.float32(float(exact))
    around = [np.nextafter(near, np.float32(-np.inf)), near,
              np.nextafter(near, np.float32(np.inf))]
    return min(around, key=lambda value: abs(Fraction(float(value)) - exact))


def test_fma_rounds_once():
    """Sums that lie 2**-64 beside the middle of two float32 numbers: rounding twice goes wrong."""
    big, small = np.float32((1 + 2**-20) * 2**-12), np.float32((1 - 2**-20) * 2**-12)
    a = np.array([big, -big, big, -big] * 2)
    b = np.full(8, small)
    c = np.float32([1, 1, -1, -1] * 2) + np.float32([0] * 4 + [2**-23, 2**-23, -2**-23, -2**-23])
    expected = np.array([rounded_once(*abc) for abc in zip(a, b, c)])
    naive = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (naive != expected).any()                                # the cases do bite
    np.testing.assert_array_equal(noise.fma(a, b, c), expected)


def test_fma_of_random_numbers():
    a, b, c = np.random.default_rng(0).normal(size=(3, 2000)).astype(np.float32)
    expected = np.array([rounded_once(*abc) for abc in zip(a, b, c)])
    np.testing.assert_array_equal(noise.fma(a, b, c), expected)


@pytest.mark.parametrize("seed", [-2**63, 2**64 - 1, np.int64(-5), np.uint64(2**63 + 9)])
def test_seeds_at_the_edges_of_torchs_range(seed):
    expected = torch.randn(40, generator=torch.Generator().manual_seed(int(seed)))
    assert_same_bits(noise.randn(40, seed), expected)


@pytest.mark.parametrize("seed", [-2**63 - 1, 2**64, 1.0, "7", None])
def test_seeds_torch_does_not_take(seed):
    with pytest.raises(TinyldmError, match=r"whole number from -2\*\*63 to 2\*\*64 - 1, got"):
        noise.randn(4, seed)
