"""erf against the C library (math.erf) and torch."""

import math

import numpy as np
import pytest

from tests.support.extra import torch
from tests.support.tolerance import assert_allclose, within
from tinyldm.ops.erf import erf


def test_equals_the_c_library_in_float64():
    x = np.concatenate([np.linspace(-7, 7, 20001), np.linspace(-0.5, 0.5, 2001),
                        10.0 ** np.arange(-300, 300, 25)])
    x.setflags(write=False)
    expected = np.array([math.erf(value) for value in x])
    assert_allclose(erf(x), expected, rtol=1e-15, atol=0)


def test_the_three_ranges_meet_without_a_step():
    for edge in (0.46875, 4.0, 6.0):
        below, at, above = erf(np.array([np.nextafter(edge, 0), edge, np.nextafter(edge, 9)]))
        within(abs(np.array([at - below, above - at])), 4e-16)


@pytest.mark.parametrize("dtype, atol", [(np.float32, 2e-7), (np.float16, 1e-3)])
def test_keeps_the_dtype(dtype, atol):
    x = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(dtype) * 3
    y = erf(x)
    assert y.dtype == dtype and y.shape == x.shape
    assert_allclose(y, torch.erf(torch.from_numpy(x).double()), rtol=0, atol=atol)


def test_special_values():
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(erf(x), [0.0, -0.0, 1.0, -1.0, np.nan])
    assert np.signbit(erf(x)[1])
