"""Attention in blocks of keys against the plain op."""
import numpy as np
import pytest

from tests.support.arrays import normal
from tests.support.tolerance import assert_close
from tests.support.twins import TOLERANCE, plain
from tinyldm import backend, ops
from tinyldm.kernels import attention


@pytest.fixture(autouse=True, params=[0, 1000, attention.FEW])
def few(request, monkeypatch):
    """0: every head by itself, in blocks of keys. 1000: small ones several at a time."""
    monkeypatch.setattr(attention, "FEW", request.param)
    monkeypatch.setattr(attention, "SERIAL", request.param)


def blocked(*args, **options):
    return attention.attention(*args, **options)[0]


@pytest.mark.parametrize("B, N, M, C, heads", [
    (2, 64, 64, 32, 4), (1, 1, 1, 4, 1), (3, 63, 77, 40, 5), (1, 1, 77, 8, 2), (2, 300, 1, 12, 3),
    (1, 1500, 1100, 16, 2), (1, 77, 77, 48, 12)])
@pytest.mark.parametrize("scale", [1, 12])          # 12: scores of 1000, one weight near 1
def test_attention(B, N, M, C, heads, scale):
    q, k = normal(B, N, C, scale=scale), normal(B, M, C, seed=1, scale=scale)
    v = normal(B, M, C, seed=2)
    y = blocked(q, k, v, heads)
    exact = plain(ops.attention, *(a.astype(np.float64) for a in (q, k, v)), heads)
    # Large scores have float32's relative error of 6e-8, in the plain op as well.
    allowed = TOLERANCE if scale == 1 else 2 * max(
        abs(plain(ops.attention, q, k, v, heads) - exact).max() / exact.std(), TOLERANCE)
    assert y.dtype == np.float32
    assert_close(y, exact, allowed)


@pytest.mark.parametrize("N, heads", [(1, 1), (7, 2), (77, 4), (1500, 1)])
@pytest.mark.parametrize("scale", [1, 12])
def test_causal_attention(N, heads, scale):
    q, k, v = normal(2, N, 16, scale=scale), normal(2, N, 16, seed=1), normal(2, N, 16, seed=2)
    y = blocked(q, k, v, heads, causal=True)
    assert_close(y, plain(ops.attention, q, k, v, heads, causal=True), TOLERANCE)


@pytest.mark.parametrize("size", [0.1, 79.0, 81.0, 5000.0])
def test_attention_on_both_sides_of_its_bound(size, monkeypatch):
    """Scores up to 2^size: below SAFE, no maximum is subtracted. Several items per head."""
    monkeypatch.setattr(attention, "ITEM", 64)
    q, k, v = normal(1, 300, 8), normal(1, 600, 8, seed=1), normal(1, 600, 8, seed=2)
    q = q * np.float32(size * np.sqrt(8) / np.log2(np.e) /
                       (attention._largest_norm(q[0]) * attention._largest_norm(k[0])))
    exact = plain(ops.attention, *(x.astype(np.float64) for x in (q, k, v)), 1)
    assert_close(blocked(q, k, v, 1), exact, TOLERANCE)


def test_attention_with_a_block_of_keys_hidden_by_infinity():
    q, k, v = abs(normal(1, 10, 8)), normal(1, 600, 8, seed=1).copy(), normal(1, 600, 8, seed=2)
    k[:, :300, 0] = -np.inf
    with np.errstate(invalid="ignore"):
        assert_close(blocked(q, k, v, 1), plain(ops.attention, q, k, v, 1), TOLERANCE)


def test_attention_passes_nan_on_and_does_not_overflow():
    q, k, v = (normal(1, 300, 8, seed=seed) for seed in range(3))
    assert np.isfinite(blocked(q * 1e4, k * 1e4, v, 2)).all()
    broken = q.copy()
    broken[0, 5] = np.nan
    y = blocked(broken, k, v, 2)
    assert np.isnan(y[0, 5]).all() and np.isfinite(np.delete(y, 5, axis=1)).all()


# ---- backward -------------------------------------------------------------------------------

@pytest.mark.parametrize("B, N, M, C, heads", [
    (2, 64, 64, 32, 4), (1, 1, 1, 4, 1), (3, 63, 77, 40, 5), (2, 300, 1, 12, 3),
    (1, 600, 700, 8, 1), (1, 77, 77, 48, 12)])
@pytest.mark.parametrize("scale", [1, 12])          # 12: scores of 1000, one weight near 1
@pytest.mark.parametrize("causal", [False, True])
def test_attention_backward(B, N, M, C, heads, scale, causal):
    M = N if causal else M
    q, k = normal(B, N, C, scale=scale), normal(B, M, C, seed=1, scale=scale)
    v, dy = normal(B, M, C, seed=2), normal(B, N, C, seed=3)
    ours = attention.attention_backward(dy, (q, k, v, heads, causal, None))
    own, exact = ([*plain_backward(dy, q, k, v, heads, causal, dtype)]
                  for dtype in (np.float32, np.float64))
    for gradient, plainly, wanted in zip(ours, own, exact, strict=True):
        # Large scores have float32's relative error of 6e-8, in the plain op as well.
        allowed = max(TOLERANCE, 3 * abs(plainly - wanted).max() / max(wanted.std(), 1e-30))
        assert gradient.dtype == np.float32
        if wanted.std() > 1e-12:                    # of one key alone, dq and dk are 0
            assert_close(gradient, wanted, allowed)
        else:
            assert abs(gradient).max() < 1e-4


def plain_backward(dy, q, k, v, heads, causal, dtype):
    dy, q, k, v = (x.astype(dtype) for x in (dy, q, k, v))
    with backend.plain():
        return ops.attention_backward(dy, (q, k, v, heads, causal, None))


@pytest.mark.parametrize("size", [79.0, 81.0])
def test_attention_backward_on_both_sides_of_its_bound(size):
    """As in forward; all queries and keys point the same way, so that scores come near the bound.
    """
    q, k = abs(normal(1, 300, 8)) + 1, abs(normal(1, 600, 8, seed=1)) + 1
    v, dy = normal(1, 600, 8, seed=2), normal(1, 300, 8, seed=3)
    q = q * np.float32(size * np.sqrt(8) / np.log2(np.e) /
                       (attention._largest_norm(q[0]) * attention._largest_norm(k[0])))
    ours = attention.attention_backward(dy, (q, k, v, 1, False, None))
    for gradient, wanted in zip(ours, plain_backward(dy, q, k, v, 1, False, np.float64)):
        assert_close(gradient, wanted, TOLERANCE)


def test_attention_backward_leaves_masks_to_the_op():
    q = normal(1, 300, 8)
    cache = q, q, q, 2, False, np.zeros((1, 300, 300), np.float32)
    assert attention.attention_backward(q, cache) is NotImplemented
