"""Joining and splitting channels, and their gradients."""
import pytest

from tests.support.checks import check_op, shapes
from tests.support.extra import torch
from tinyldm import ops
from tinyldm.backend import get_xp


@shapes
def test_concat(shape, rng):
    inputs = [rng.normal(size=shape), rng.normal(size=(*shape[:-1], 3))]
    check_op(ops.concat, ops.concat_backward, inputs, lambda a, b: torch.cat([a, b], -1))


@shapes
def test_split(shape, rng):
    x = rng.normal(size=(*shape[:-1], 2 * shape[-1]))

    def split(x):
        halves, cache = ops.split(x)
        return get_xp(x).stack(halves), cache
    check_op(split, ops.split_backward, [x], lambda x: torch.stack(x.chunk(2, -1)))


def test_split_needs_an_even_number(rng):
    with pytest.raises(AssertionError, match="5 channels"):
        ops.split(rng.normal(size=(2, 5)))
