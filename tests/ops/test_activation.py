"""SiLU, GELU, GEGLU, leaky ReLU and softmax, and their gradients."""
import numpy as np
import pytest

from tests.support.arrays import read_only
from tests.support.checks import check_op, shapes
from tests.support.extra import F, torch
from tests.support.tolerance import assert_allclose
from tinyldm import ops

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
               "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
               "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
               "softmax": lambda x: F.softmax(x, -1)}


@shapes
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name, shape, rng):
    check_op(getattr(ops, name), getattr(ops, name + "_backward"), [3 * rng.normal(size=shape)],
             ACTIVATIONS[name])


@shapes
def test_geglu(shape, rng):
    def torch_geglu(x):
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)
    x = 3 * rng.normal(size=(*shape[:-1], 2 * shape[-1]))
    check_op(ops.geglu, ops.geglu_backward, [x], torch_geglu)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_large_numbers_do_not_overflow(name):
    x = read_only([[-1e4, 0.0, 1e4], [1e4, 1e4, -1e4]])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        y, cache = getattr(ops, name)(x)
        dx = getattr(ops, name + "_backward")(np.ones_like(x), cache)
    theirs = ACTIVATIONS[name](torch.tensor(x))
    assert_allclose(y, theirs, rtol=1e-12, atol=1e-300)
    assert np.isfinite(dx).all()


@pytest.mark.parametrize("slope", [0.01, 0.5])
def test_another_slope(slope, rng):
    check_op(ops.leaky_relu, ops.leaky_relu_backward, [rng.normal(size=(3, 5))],
             lambda x: F.leaky_relu(x, slope), slope=slope)
