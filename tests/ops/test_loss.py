"""The losses and their gradients."""
import numpy as np
import pytest

from tests.support.arrays import read_only
from tests.support.checks import check_op, shapes
from tests.support.extra import F, library, torch
from tests.support.reference import chw
from tests.support.tolerance import within
from tinyldm import ops


@shapes
@pytest.mark.parametrize("name, torch_loss", [("mse", F.mse_loss), ("l1", F.l1_loss)])
def test_distance(name, torch_loss, shape, rng):
    check_op(getattr(ops, name), getattr(ops, name + "_backward"),
             [rng.normal(size=shape), rng.normal(size=shape)], torch_loss)


def test_l1_has_no_slope_where_both_are_equal():
    x = read_only([1.0, -2.0, 3.0])
    dx, dtarget = ops.l1_backward(1.5, ops.l1(x, x)[1])
    assert not dx.any() and not dtarget.any()


@shapes
def test_hinge(shape, rng):
    """Also where fewer answers are about made pictures, and what is beyond 1 has no slope."""
    def reference(real, fake):
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    real, fake = 1 + rng.normal(size=shape), -1 + rng.normal(size=(*shape[:-1], 2))
    check_op(ops.hinge, ops.hinge_backward, [real, fake], reference)
    dreal, dfake = ops.hinge_backward(1.0, ops.hinge(real, fake)[1])
    assert not dreal[real > 1].any() and not dfake[fake < -1].any()
    assert (dreal[real < 1] < 0).all() and (dfake[fake > -1] > 0).all()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 7, 2), (2, 3, 3, 4)], ids=str)
def test_kl_normal(shape, rng):
    def reference(mean, logvar):                        # sums over a sample
        normal = library("diffusers.models.autoencoders.vae").DiagonalGaussianDistribution
        return normal(torch.cat([chw(mean), chw(logvar)], 1)).kl().mean()
    check_op(ops.kl_normal, ops.kl_normal_backward,
             [rng.normal(size=shape), rng.normal(size=shape)], reference)


@pytest.mark.parametrize("R, V", [(1, 1), (1, 5), (7, 3), (5, 11)])
def test_cross_entropy(R, V, rng):
    check_op(ops.cross_entropy, ops.cross_entropy_backward,
             [5 * rng.normal(size=(R, V)) + 1000, rng.integers(0, V, R)], F.cross_entropy)


@pytest.mark.parametrize("N", [1, 2, 7])
def test_contrastive(N, rng):
    def reference(logits):
        return library("transformers.models.clip.modeling_clip").image_text_contrastive_loss(logits)
    logits = 5 * rng.normal(size=(N, N)) + 1000
    check_op(ops.contrastive, ops.contrastive_backward, [logits], reference)


def test_contrastive_of_one_pair_and_of_equal_logits():
    loss, cache = ops.contrastive(np.array([[3.0]]))
    assert loss == 0 and not ops.contrastive_backward(1.0, cache).any()
    within(ops.contrastive(np.full((2, 2), 7.0))[0] - np.log(2), 1e-15)
    with pytest.raises(AssertionError, match="2 images and 3 texts are not pairs"):
        ops.contrastive(np.zeros((2, 3)))
