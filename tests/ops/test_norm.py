"""Group norm, layer norm and batch norm, and their gradients."""
import pytest

from tests.support.checks import assert_same, check_op
from tests.support.extra import MISSING, F, torch
from tests.support.reference import chw, hwc
from tinyldm import ops


def norm_inputs(rng, shape):
    """x with mean 3 and standard deviation 2, weight around 1."""
    return [rng.normal(3, 2, shape), rng.normal(1, 0.5, shape[-1]), rng.normal(size=shape[-1])]


@pytest.mark.parametrize("eps", [1e-5, 1e-1])
@pytest.mark.parametrize("shape, groups", [((1, 5, 7, 6), 3), ((3, 3, 1, 4), 4), ((2, 7, 5, 9), 1),
                                           ((3, 11, 10), 5), ((2, 1, 1, 12), 4), ((2, 6), 2)],
                         ids=str)
def test_group_norm(shape, groups, eps, rng):
    def torch_norm(x, weight, bias):
        return hwc(F.group_norm(chw(x), groups, weight, bias, eps))
    inputs = norm_inputs(rng, shape)
    check_op(ops.group_norm, ops.group_norm_backward, inputs, torch_norm,
             num_groups=groups, eps=eps)
    check_op(ops.group_norm_silu, ops.group_norm_silu_backward, inputs,
             lambda *tensors: F.silu(torch_norm(*tensors)), num_groups=groups, eps=eps)


@pytest.mark.parametrize("eps", [1e-5, 1e-1])
@pytest.mark.parametrize("shape", [(3, 5), (1, 2), (2, 7, 9), (3, 3, 5, 11)], ids=str)
def test_layer_norm(shape, eps, rng):
    check_op(ops.layer_norm, ops.layer_norm_backward, norm_inputs(rng, shape),
             lambda x, weight, bias: F.layer_norm(x, shape[-1:], weight, bias, eps), eps=eps)


@pytest.mark.parametrize("eps", [1e-5, 1e-1])
@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 9), (3, 3, 5, 11), (1, 2, 2, 1)], ids=str)
def test_batch_norm(shape, eps, rng):
    check_op(ops.batch_norm, ops.batch_norm_backward, norm_inputs(rng, shape),
             lambda x, weight, bias: hwc(F.batch_norm(chw(x), None, None, weight, bias, True,
                                                      eps=eps)), eps=eps)


@pytest.mark.parametrize("eps", [1e-3, 1e-1])
@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 9), (3, 3, 5, 11)], ids=str)
def test_batch_norm_relu(shape, eps, rng):
    def torch_norm(x, weight, bias, mean, var):
        return F.relu((x - mean) / (var + eps).sqrt() * weight + bias)
    inputs = [*norm_inputs(rng, shape), rng.normal(3, 1, shape[-1]),
              rng.uniform(0.5, 2, shape[-1])]
    check_op(ops.batch_norm_relu, ops.batch_norm_relu_backward, inputs, torch_norm, eps=eps)
    if "torch" not in MISSING:
        x, *others = map(torch.from_numpy, inputs)
        weight, bias, mean, var = others
        theirs = F.relu(F.batch_norm(chw(x), mean, var, weight, bias, eps=eps))
        assert_same(ops.batch_norm_relu(*inputs, eps)[0], hwc(theirs).numpy(), "batch norm")


@pytest.mark.parametrize("shape", [(3, 5), (1, 2), (2, 7, 9)], ids=str)
def test_unit(shape, rng):
    check_op(ops.unit, ops.unit_backward, [rng.normal(size=shape)],
             lambda x: x / x.norm(dim=-1, keepdim=True))


def test_groups_must_divide_the_channels(rng):
    with pytest.raises(AssertionError, match="5 channels"):
        ops.group_norm(*norm_inputs(rng, (1, 3, 3, 5)), 2, 1e-5)
