"""Attention in blocks of rows, and its gradients."""
import importlib

import numpy as np
import pytest

from tests.support.checks import check_op
from tests.support.extra import F
from tinyldm import ops

attention_module = importlib.import_module("tinyldm.ops.attention")   # ops.attention is the op


def torch_attention(num_heads, causal=False):
    def split_heads(x):
        return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    def attention(q, k, v, mask=None):
        added = None if mask is None else mask[:, None].to(q.dtype)
        y = F.scaled_dot_product_attention(*map(split_heads, (q, k, v)), attn_mask=added,
                                           is_causal=causal)
        return y.transpose(1, 2).flatten(2)
    return attention


@pytest.mark.parametrize("rows", [512, 4, 1])
@pytest.mark.parametrize("B, N, M, C, heads, causal", [
    (1, 9, 9, 6, 2, False), (3, 5, 7, 15, 3, False), (2, 11, 3, 4, 1, False),
    (2, 1, 1, 6, 3, False), (1, 1, 5, 4, 4, False),
    (1, 9, 9, 6, 2, True), (3, 7, 7, 5, 1, True), (2, 13, 13, 12, 4, True), (2, 1, 1, 3, 1, True)])
def test_attention(B, N, M, C, heads, causal, rows, rng, monkeypatch):
    monkeypatch.setattr(attention_module, "ROWS", rows)
    inputs = [2 * rng.normal(size=(B, tokens, C)) for tokens in (N, M, M)]
    check_op(ops.attention, ops.attention_backward, inputs, torch_attention(heads, causal),
             num_heads=heads, causal=causal)


@pytest.mark.parametrize("rows", [512, 2])
@pytest.mark.parametrize("hidden", [-2, -10000])
def test_attention_with_a_mask(rows, hidden, rng, monkeypatch):
    """Numbers added to the scores, each sample its own; where it is -10000 nothing is seen."""
    monkeypatch.setattr(attention_module, "ROWS", rows)
    inputs = [rng.normal(size=(2, tokens, 6)) for tokens in (5, 7, 7)]
    mask = np.where(rng.random((2, 5, 7)) < 0.4, hidden, 0)             # integers: no gradient
    check_op(lambda q, k, v, mask: ops.attention(q, k, v, 3, mask=mask), ops.attention_backward,
             [*inputs, mask], torch_attention(3))


def test_attention_needs_whole_heads(rng):
    with pytest.raises(AssertionError, match="5 channels"):
        ops.attention(*rng.normal(size=(3, 1, 4, 5)), num_heads=2)
