"""Each fast twin in kernels/ against its plain op, in float32, with read-only inputs."""
import numpy as np
import pytest

from tests.support.reference import assert_close
from tests.support.tolerance import assert_allclose, within
from tinyldm import backend, ops
from tinyldm.kernels import activation, attention, blocks, conv, half, im2col, norm, winograd
from tinyldm.kernels.product import product

TOLERANCE = 2e-4            # of the output's standard deviation


def normal(*shape, seed=0, scale=1.0, mean=0.0):
    x = np.random.default_rng(seed).normal(mean, scale, size=shape).astype(np.float32)
    x.flags.writeable = False
    return x


def plain(op, *args, **options):
    with backend.plain():
        return op(*args, **options)[0]


# ---- convolution ----------------------------------------------------------------------------

CONV_SHAPES = [             # B, H, W, C, O
    (2, 16, 16, 32, 48), (1, 7, 9, 5, 3), (1, 1, 1, 4, 8), (3, 16, 18, 8, 8), (3, 5, 4, 33, 70),
    (1, 64, 64, 4, 32), (2, 64, 9, 32, 4), (1, 3, 200, 8, 6), (40, 8, 8, 16, 16),
    (1, 70, 33, 6, 130)]


def where_the_kernel_fits(paddings):
    return [(shape, padding) for shape in CONV_SHAPES for padding in paddings
            if min(shape[1:3]) + sum(padding) >= 3]


@pytest.mark.parametrize("shape, padding", where_the_kernel_fits(
    [(1, 1), (0, 1), (0, 0), (2, 2), (1, 0), (3, 3), (5, 4)]), ids=str)
@pytest.mark.parametrize("strip_tiles, long, columns", [(16, 1, 64), (128, 1 << 30, 1 << 11)],
                         ids=["strips, sums", "whole maps, products"])
def test_winograd(shape, padding, strip_tiles, long, columns, monkeypatch):
    B, H, W, C, O = shape
    monkeypatch.setattr(winograd, "STRIP_TILES", strip_tiles)
    monkeypatch.setattr(winograd, "LONG", long)
    monkeypatch.setattr(winograd, "WEIGHTS", columns)
    x, bias = normal(B, H, W, C), normal(O, seed=2)
    weight = normal(3, 3, C, O, seed=1, scale=(9 * C) ** -0.5)
    y = winograd.conv3x3(x, weight, bias, padding)
    assert y.dtype == np.float32
    assert_close(y, plain(ops.conv2d, x, weight, bias, 1, padding), TOLERANCE)
    without = winograd.conv3x3(x, weight, None, padding)
    assert_close(without, plain(ops.conv2d, x, weight, None, 1, padding), TOLERANCE)
    dy = normal(*y.shape, seed=3)
    with backend.plain():
        _, dweight, _ = ops.conv2d_backward(dy, (x, weight, 1, padding))
    assert_close(winograd.dweight3x3(dy, x, padding), dweight, TOLERANCE)


def test_winograd_is_as_accurate_as_its_points_promise():
    """Root mean square error 8e-7 at 64 channels, half of that with the points 0, +-1, +-2."""
    x, weight = normal(2, 32, 32, 64), normal(3, 3, 64, 64, seed=1, scale=1 / 24)
    exact = plain(ops.conv2d, x.astype(np.float64), weight.astype(np.float64), None, 1, (1, 1))
    error = winograd.conv3x3(x, weight, None) - exact
    within(np.sqrt((error ** 2).mean()), 1e-6 * exact.std())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape, padding", where_the_kernel_fits([(1, 1), (0, 0), (0, 1)]), ids=str)
def test_im2col(shape, stride, padding, monkeypatch):
    B, H, W, C, O = shape
    monkeypatch.setattr(im2col, "STRIP_BYTES", 1 << 16)     # strips for small maps, too
    x, bias = normal(B, H, W, C), normal(O, seed=2)
    weight = normal(3, 3, C, O, seed=1, scale=(9 * C) ** -0.5)
    y = im2col.conv2d(x, weight, bias, stride, padding)
    assert_close(y, plain(ops.conv2d, x, weight, bias, stride, padding), TOLERANCE)


@pytest.mark.parametrize("shape, padding", where_the_kernel_fits([(1, 1), (0, 0), (0, 1), (2, 2)]),
                         ids=str)
def test_convolution_of_few_outputs(shape, padding):
    B, H, W, C, _ = shape
    x, bias, weight = normal(B, H, W, C), normal(3, seed=2), normal(3, 3, C, 3, seed=1, scale=0.1)
    for b in (bias, None):
        assert_close(conv.few_outputs(x, weight, b, padding),
                     plain(ops.conv2d, x, weight, b, 1, padding), TOLERANCE)


def test_upsampling():
    x = normal(2, 5, 3, 4)
    for size in (None, (9, 5), (10, 5)):
        np.testing.assert_array_equal(ops.upsample_nearest(x, size)[0],
                                      plain(ops.upsample_nearest, x, size))


# ---- norms ----------------------------------------------------------------------------------

@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("shape, groups", [
    ((2, 8, 8, 64), 32), ((3, 7, 9, 32), 8), ((1, 1, 1, 64), 4), ((1, 64, 64, 320), 32),
    ((70, 4, 4, 32), 32),
    ((2, 5, 12), 3), ((3, 4), 1), ((1, 300, 200, 4), 2)], ids=str)
@pytest.mark.parametrize("mean", [0, 30])
def test_group_norm(shape, groups, mean):
    x = normal(*shape, mean=mean)
    weight, bias = normal(shape[-1], seed=1, mean=1), normal(shape[-1], seed=2)
    exact = [a.astype(np.float64) for a in (x, weight, bias)]
    for name in ("group_norm_silu", "group_norm"):      # below: the cache of the last
        y, cache = getattr(norm, name)(x, weight, bias, groups, 1e-5)
        assert y.dtype == np.float32
        assert_close(y, plain(getattr(ops, name), *exact, groups, 1e-5), TOLERANCE)
    with backend.plain():
        _, (_, _, *expected) = ops.group_norm(*exact, groups, 1e-5)
    for ours, theirs in zip(cache[2:], expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == np.float32
        assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_group_norm_survives_a_mean_a_thousand_deviations_away():
    x, ones = normal(1, 64, 64, 32, mean=1000), normal(32, scale=0, mean=1)
    y, (*_, rstd) = norm.group_norm(x, ones, 0 * ones, 8, 1e-6)
    exact = plain(ops.group_norm, x.astype(np.float64), ones, 0 * ones, 8, 1e-6)
    deviation = x.astype(np.float64).reshape(-1, 8, 4).std(axis=(0, 2))
    assert_allclose(rstd.ravel(), 1 / deviation, rtol=1e-5)
    assert_close(y, exact, 1e-3)        # x itself has an error of 6e-5 of its std


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("shape", [
    (2, 77, 64), (1, 1, 4), (3, 7, 33), (5, 12), (1, 4096, 32), (2, 3, 1280)], ids=str)
def test_layer_norm(shape):
    x = normal(*shape, mean=3)
    weight, bias = normal(shape[-1], seed=1, mean=1), normal(shape[-1], seed=2)
    y, cache = norm.layer_norm(x, weight, bias, 1e-5)
    with backend.plain():
        expected, (_, _, *statistics) = ops.layer_norm(x, weight, bias, 1e-5)
    assert_close(y, expected, TOLERANCE)
    for ours, theirs in zip(cache[2:], statistics, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == np.float32
        assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


# ---- activations ----------------------------------------------------------------------------

@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("name", ["silu", "quick_gelu", "gelu", "geglu"])
@pytest.mark.parametrize("shape", [
    (2, 8), (1, 1, 4), (3, 7, 9, 6), (2, 1500, 66), (3, 70000), (0, 4)], ids=str)
def test_activations(name, shape):
    x = normal(*shape, scale=3)
    y, expected = getattr(activation, name)(x)[0], plain(getattr(ops, name), x)
    assert y.dtype == np.float32 and y.shape == expected.shape
    if x.size:
        assert_close(y, expected, TOLERANCE)


@pytest.mark.parametrize("name", ["silu", "quick_gelu", "gelu"])
def test_activations_everywhere(name):
    """Error below 1e-6, relative for large results, also for large x. NaN stays NaN."""
    x = np.concatenate([np.linspace(-12, 12, 200001), [-1e30, -1e4, 1e4, 1e30, np.nan]])
    x = x.astype(np.float32)[:, None]
    expected = plain(getattr(ops, name), x.astype(np.float64))
    y = getattr(activation, name)(x)[0]
    assert np.isnan(y[-1]) and not np.isnan(y[:-1]).any()
    within(abs(y - expected)[:-1], 1e-6 * np.maximum(1, abs(expected[:-1])))


# ---- attention ------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def few_scores_too(monkeypatch):
    monkeypatch.setattr(attention, "FEW", 0)


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


# ---- blocks ---------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [
    (1, 1, 1), (3, 7, 5), (70, 16, 32), (2, 5000, 320), (1, 3, 200000), (1, 0, 4)], ids=str)
def test_blocks_cover_everything_once(shape):
    counted = np.zeros(shape)

    def count(block):
        counted[block] += 1
        assert counted[block].size <= max(blocks.BLOCK, shape[-1])
    blocks.over_blocks(count, *shape)
    assert (counted == 1).all()


# ---- products -------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(700, 40), (3, 5, 130), (0, 6), (2, 0, 3, 8)], ids=str)
@pytest.mark.parametrize("O", [1, 260])
def test_linear_and_its_backward(shape, O):
    x, weight, bias = normal(*shape), normal(O, shape[-1], seed=1), normal(O, seed=2)
    y, cache = ops.linear(x, weight, bias)
    dy = normal(*shape[:-1], O, seed=3)
    ours = y, *ops.linear_backward(dy, cache)
    exact = [a.astype(np.float64) for a in (x, weight, bias, dy)]
    y, cache = ops.linear(*exact[:3])
    for a, b in zip(ours, (y, *ops.linear_backward(exact[3], cache)), strict=True):
        assert a.shape == b.shape and a.dtype == np.float32
        if b.size:
            assert_allclose(a, b, atol=1e-4 * max(abs(b).max(), 1))


@pytest.mark.parametrize("shape", [(2, 16, 9, 33), (1, 70, 64, 5)], ids=str)
def test_convolution_1x1_and_its_backward(shape):
    x, weight, bias = normal(*shape), normal(1, 1, shape[-1], 40, seed=1), normal(40, seed=2)
    y, cache = ops.conv2d(x, weight, bias)
    dy = normal(*y.shape, seed=3)
    ours = y, *ops.conv2d_backward(dy, cache)
    with backend.plain():
        y, cache = ops.conv2d(x, weight, bias)
        for a, b in zip(ours, (y, *ops.conv2d_backward(dy, cache)), strict=True):
            assert_close(a, b, TOLERANCE)


# ---- float16 weights ------------------------------------------------------------------------

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


@pytest.mark.parametrize("R, I, O", [
    (5, 7, 3), (3, 7, 5), (1, 1, 1), (700, 40, 600), (600, 30, 700), (77, 768, 700),
    (17, 700, 770)])
def test_product(R, I, O):
    x, weight, bias = normal(R, I), normal(O, I, seed=1), normal(O, seed=2)
    assert_close(product(x, weight.T, bias), x @ weight.T + bias, TOLERANCE)
    assert_close(product(x, np.ascontiguousarray(weight.T)), x @ weight.T, TOLERANCE)
    narrow = weight.astype(np.float16)
    assert_close(product(x, narrow.T, bias), x @ narrow.astype(np.float32).T + bias, TOLERANCE)
    assert_close(product(x, np.ascontiguousarray(narrow.T)), x @ narrow.astype(np.float32).T,
                 TOLERANCE)


@pytest.mark.parametrize("shape", [(2, 16, 16, 32, 48), (1, 70, 33, 40, 33), (1, 7, 9, 5, 3),
                                   (2, 64, 64, 40, 340)], ids=str)
@pytest.mark.parametrize("K, stride", [(3, 1), (3, 2), (1, 1)])
def test_convolution_with_a_float16_weight(shape, K, stride):
    """Forward and backward are the same as with the weight widened in advance."""
    B, H, W, C, O = shape
    x, bias = normal(B, H, W, C), normal(O, seed=2)
    weight = normal(K, K, C, O, seed=1, scale=(K * K * C) ** -0.5).astype(np.float16)
    wide = weight.astype(np.float32)
    y, cache = ops.conv2d(x, weight, bias, stride, (K // 2, K // 2))
    expected, expected_cache = ops.conv2d(x, wide, bias, stride, (K // 2, K // 2))
    np.testing.assert_array_equal(y, expected)
    dy = normal(*y.shape, seed=3)
    for ours, theirs in zip(ops.conv2d_backward(dy, cache),
                            ops.conv2d_backward(dy, expected_cache), strict=True):
        np.testing.assert_array_equal(ours, theirs)
