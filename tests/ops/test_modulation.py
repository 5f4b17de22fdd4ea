"""Layer norm and residual branches under a sample's condition, and their gradients."""
import numpy as np
import pytest

from tests.support.checks import check_op
from tests.support.extra import F
from tests.support.reference import chw, hwc
from tests.support.tolerance import assert_allclose
from tests.support.twins import both
from tinyldm import ops

SHAPES = pytest.mark.parametrize("B, N, C", [(1, 1, 2), (2, 3, 5), (3, 7, 12)])


@SHAPES
@pytest.mark.parametrize("eps", [1e-6, 1e-1])
def test_ada_layer_norm(B, N, C, eps, rng):
    def torch_norm(x, shift, scale):
        return F.layer_norm(x, (C,), eps=eps) * (1 + scale[:, None]) + shift[:, None]
    inputs = [rng.normal(3, 2, (B, N, C)), rng.normal(size=(B, C)), rng.normal(size=(B, C))]
    check_op(ops.ada_layer_norm, ops.ada_layer_norm_backward, inputs, torch_norm, eps=eps)


@pytest.mark.parametrize("shape, groups", [((1, 2, 3, 4), 2), ((3, 5, 4, 6), 3)], ids=str)
def test_ada_group_norm_silu(shape, groups, rng):
    B, *_, C = shape

    def torch_norm(x, weight, bias, shift, scale):
        h = hwc(F.group_norm(chw(x), groups, weight, bias, 1e-5))
        return F.silu(h * (1 + scale[:, None, None]) + shift[:, None, None])
    inputs = [rng.normal(3, 2, shape), rng.normal(size=C), rng.normal(size=C),
              rng.normal(size=(B, C)), rng.normal(size=(B, C))]
    check_op(ops.ada_group_norm_silu, ops.ada_group_norm_silu_backward, inputs, torch_norm,
             num_groups=groups, eps=1e-5)


@SHAPES
def test_add_gated(B, N, C, rng):
    inputs = [rng.normal(size=(B, N, C)), rng.normal(size=(B, N, C)), rng.normal(size=(B, C))]
    check_op(ops.add_gated, ops.add_gated_backward, inputs,
             lambda x, h, gate: x + gate[:, None] * h)


def test_gate_zero_changes_nothing(rng):
    x, h = rng.normal(size=(2, 2, 3, 4))
    np.testing.assert_array_equal(ops.add_gated(x, h, np.zeros((2, 4)))[0], x)


@pytest.mark.parametrize("N", [5, 300])
def test_the_fast_layer_norm_serves_each_sample(N, rng):
    inputs = [rng.normal(3, 2, (2, N, 64)), rng.normal(size=(2, 64)), rng.normal(size=(2, 64))]
    y, _ = ops.ada_layer_norm(*(x.astype(np.float32) for x in inputs), 1e-6)
    assert_allclose(y, ops.ada_layer_norm(*inputs, 1e-6)[0], rtol=1e-4, atol=1e-4)
    both(ops.ada_layer_norm, ops.ada_layer_norm_backward, inputs, (2, N, 64), rng,
         ("dx", "dshift", "dscale"), eps=1e-6)
