"""Tables of rows and the sinusoidal embedding of timesteps, and their gradients."""
import numpy as np
import pytest

from tests.support.checks import check_op
from tests.support.extra import F, library, torch
from tests.support.tolerance import assert_allclose
from tinyldm import ops


@pytest.mark.parametrize("ids", [[0], [[4, 4, 1], [4, 0, 1]], [[[6], [0]], [[6], [6]]]], ids=str)
def test_embedding(ids, rng):
    """A repeated id gets the sum of its gradients; an unused id gets zeros."""
    check_op(ops.embedding, ops.embedding_backward, [np.array(ids), rng.normal(size=(7, 5))],
             lambda ids, weight: F.embedding(ids, weight))


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("B, dim", [(1, 6), (3, 7), (5, 32), (2, 5)])
def test_timestep_embedding(B, dim, shift, flip, rng):
    def sinusoids(t):                                     # diffusers' function, but in float64
        angles = t[:, None] * 10000.0 ** -(torch.arange(dim // 2).double() / (dim // 2 - shift))
        y = torch.cat([angles.cos(), angles.sin()] if flip else [angles.sin(), angles.cos()], 1)
        return F.pad(y, (0, dim % 2))
    t = rng.uniform(0, 50, B)
    check_op(ops.timestep_embedding, ops.timestep_embedding_backward, [t], sinusoids,
             dim=dim, flip_sin_to_cos=flip, freq_shift=shift)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
def test_timestep_embedding_in_float32(shift, flip, rng):
    t, dim = rng.uniform(0, 50, 5), 33
    ours, _ = ops.timestep_embedding(t.astype(np.float32), dim, flip, shift)
    embeddings = library("diffusers.models.embeddings")
    theirs = embeddings.get_timestep_embedding(torch.from_numpy(t), dim, flip, shift)
    assert_allclose(ours, theirs, rtol=0, atol=2e-5)
