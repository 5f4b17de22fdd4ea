"""The linear layer's matrix product and its gradients."""
import numpy as np
import pytest

from tests.support import strict
from tests.support.checks import check_op
from tests.support.extra import F
from tests.support.tolerance import assert_allclose
from tinyldm import ops


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape, out", [((3, 5), 7), ((1, 1), 1), ((2, 3, 5), 1),
                                        ((3, 5, 7, 9), 11)], ids=str)
def test_linear(shape, out, with_bias, rng):
    bias = rng.normal(size=out) if with_bias else None
    check_op(ops.linear, ops.linear_backward,
             [rng.normal(size=shape), rng.normal(size=(out, shape[-1])), bias], F.linear)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_gradient_of_the_input_alone(dtype, rng):
    x, weight, dy = (rng.normal(size=shape).astype(dtype)
                     for shape in [(2, 3, 5), (7, 5), (2, 3, 7)])
    expected, *_ = ops.linear_backward(dy, (x, weight))
    np.testing.assert_array_equal(ops.linear_input_backward(dy, weight), expected)
    with strict.installed() as cupy:
        found = ops.linear_input_backward(*map(cupy.asarray, (dy, weight)))
        allowed = 1e-2 if dtype == np.float16 else 1e-5
        assert_allclose(found.get(), expected, allowed, allowed)


@pytest.mark.parametrize("B, C", [(3, 5), (1, 1)])
def test_scale_shift(B, C, rng):
    check_op(ops.scale_shift, ops.scale_shift_backward,
             [rng.normal(size=(B, C)), rng.normal(size=(1, C)), rng.normal(size=(1, C))],
             lambda x, scale, shift: x * scale + shift)


@pytest.mark.parametrize("N, M, P", [(1, 1, 1), (3, 3, 5), (2, 7, 4)])
def test_similarity(N, M, P, rng):
    check_op(ops.similarity, ops.similarity_backward,
             [rng.normal(size=(N, P)), rng.normal(size=(M, P)), rng.normal(size=())],
             lambda a, b, log_scale: log_scale.exp() * a @ b.T)
