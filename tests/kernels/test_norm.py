"""Group norm and layer norm, forward and backward, against the plain ops."""
import numpy as np
import pytest

from tests.support.arrays import normal
from tests.support.tolerance import assert_allclose, assert_close
from tests.support.twins import TOLERANCE, both, plain
from tinyldm import backend, ops
from tinyldm.kernels import norm


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


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("shape", [(2, 7, 5, 33), (1, 1, 1, 4), (3, 64, 40, 32)], ids=str)
def test_batch_norm_relu(shape):
    x, C = normal(*shape, mean=1), shape[-1]
    inputs = x, normal(C, seed=1, mean=1), normal(C, seed=2), normal(C, seed=3, mean=1), \
        normal(C, seed=4) ** 2
    y, cache = norm.batch_norm_relu(*inputs, 1e-3)
    exact = plain(ops.batch_norm_relu, *(a.astype(np.float64) for a in inputs), 1e-3)
    assert y.dtype == np.float32 and (y == 0).any()
    assert_close(y, exact, TOLERANCE)
    assert all(a is b for a, b in zip(cache, inputs))
    with backend.plain():
        place = x.copy()
        assert ops.batch_norm_relu(place, *inputs[1:], 1e-3, place)[0] is place
        assert_close(place, exact, TOLERANCE)
    place = x.copy()
    in_place, _ = norm.batch_norm_relu(place, *inputs[1:], 1e-3, place)
    assert np.shares_memory(in_place, place)
    np.testing.assert_array_equal(place, y)


# ---- backward -------------------------------------------------------------------------------

def norm_inputs(rng, shape, mean):
    return [rng.normal(mean, 1, shape), rng.normal(1, 0.3, shape[-1]),
            rng.normal(0, 0.3, shape[-1])]


# The last two have several images in a block.
MAPS = [((1, 5, 7, 6), 3), ((3, 9, 11, 32), 8), ((2, 3, 1, 4), 4), ((3, 1, 1, 12), 3),
        ((1, 1, 1, 8), 1), ((3, 7, 33), 11), ((2, 12), 2), ((1, 64, 65, 36), 4),
        ((3, 37, 41, 32), 32), ((301, 3, 5, 32), 8), ((170, 9, 7, 15), 5)]


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("op", ["group_norm", "group_norm_silu"])
@pytest.mark.parametrize("mean", [0, 4])
@pytest.mark.parametrize("shape, groups", MAPS, ids=str)
def test_group_norm_backward(shape, groups, mean, op, rng):
    inputs = norm_inputs(rng, shape, mean)
    both(getattr(ops, op), getattr(ops, op + "_backward"), inputs, shape, rng,
         ("dx", "dweight", "dbias"), num_groups=groups, eps=1e-5)


@pytest.mark.parametrize("op", ["group_norm", "group_norm_silu"])
def test_group_norm_of_one_number_a_group(op, rng):
    """Each number equals the mean of its group: y is the bias, and only dbias is not 0."""
    shape = (3, 1, 1, 8)
    inputs = norm_inputs(rng, shape, 0)
    both(getattr(ops, op), getattr(ops, op + "_backward"), inputs, shape, rng,
         ("dx", "dweight", "dbias"), absolute=TOLERANCE, num_groups=8, eps=1e-5)


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("mean", [0, 4])
@pytest.mark.parametrize("shape", [(1, 6), (3, 5), (1, 1, 33), (3, 7, 9), (2, 77, 48),
                                   (3, 1, 5, 11), (3, 700, 65), (4001, 33)], ids=str)
def test_layer_norm_backward(shape, mean, rng):
    both(ops.layer_norm, ops.layer_norm_backward, norm_inputs(rng, shape, mean), shape, rng,
         ("dx", "dweight", "dbias"), eps=1e-5)
