"""float16 numbers made float32, and checked for NaN and infinity."""
import numpy as np
import pytest

from tinyldm import backend
from tinyldm.kernels import half


def all_halves():
    """All float16 numbers except infinity and NaN: (62, 1024)."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    return halves[np.isfinite(halves)].reshape(62, 1024)


@pytest.mark.parametrize("block", [100, 1 << 16])
def test_widening_is_exact(block, monkeypatch):
    monkeypatch.setattr(half, "BLOCK", block)
    x = all_halves()
    for view in (x, x.T, x[:, 3:700], x[::2, ::3], np.tile(x, (40, 1))):
        wide = half.widened(view)
        assert wide.dtype == np.float32
        np.testing.assert_array_equal(wide, view.astype(np.float32))
    assert half.widened(wide) is wide
    assert np.signbit(half.widened(np.float16([[-0.0]]))).all()


def test_infinity_and_nan_are_found():
    x = all_halves()
    assert backend.is_finite(x) and backend.is_finite(x[:0])
    for bad in (np.inf, -np.inf, np.nan):
        for dtype in (np.float16, np.float32):
            y = x.astype(dtype)
            y[61, 1023] = bad
            assert not backend.is_finite(y) and not backend.is_finite(y[::-3, ::-1])
