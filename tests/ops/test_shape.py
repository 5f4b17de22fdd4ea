"""Joining and splitting channels, patches put together, and their gradients."""
import numpy as np
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


@pytest.mark.parametrize("B, G, p, C", [(1, 1, 1, 3), (2, 3, 2, 5), (3, 2, 4, 1)])
def test_unpatchify(B, G, p, C, rng):
    """Against the original's own lines: nhwpqc -> nhpwqc."""
    def torch_unpatchify(x):
        patches = x.reshape(B, G, G, p, p, C)
        return torch.einsum("nhwpqc->nhpwqc", patches).reshape(B, G * p, G * p, C)
    x = rng.normal(size=(B, G * G, p * p * C))
    check_op(ops.unpatchify, ops.unpatchify_backward, [x], torch_unpatchify, patch_size=p)


def test_patches_of_a_convolution_come_back(rng):
    """A convolution with the identity as its kernel, and unpatchify, change nothing."""
    x, p, C = rng.normal(size=(2, 6, 6, 3)), 2, 3
    kernel = np.eye(p * p * C).reshape(p, p, C, p * p * C)
    tokens, _ = ops.conv2d(x, kernel, stride=p)
    np.testing.assert_array_equal(ops.unpatchify(tokens.reshape(2, 9, -1), p)[0], x)


def test_unpatchify_needs_a_square(rng):
    with pytest.raises(AssertionError, match="6 tokens of 8"):
        ops.unpatchify(rng.normal(size=(1, 6, 8)), 2)
