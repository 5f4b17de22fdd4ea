"""Importance sampling of timesteps."""
import numpy as np
import pytest

from tests.support.tolerance import assert_allclose
from tinyldm.diffusion.timestep_sampling import LossSecondMoment, uniform
from tinyldm.errors import TinyldmError


def test_published_probabilities():
    sampler = LossSecondMoment(4, history=2)
    for _ in range(2):
        assert_allclose(sampler.probabilities(), np.full(4, .25))       # not yet full
        sampler.update(np.arange(4), np.array([1.0, 2, 3, 4]))
    assert_allclose(sampler.probabilities(), [.10015, .20005, .29995, .39985], rtol=1e-12)


def test_only_the_last_losses_count():
    sampler = LossSecondMoment(2, history=3)
    sampler.update([0] * 6 + [1] * 3, [9, 9, 9, 1, 2, 3, 3, 2, 1])
    assert_allclose(sampler.probabilities(), [.5, .5], rtol=1e-12)
    sampler.update([0], [10])
    assert sampler.losses[0].tolist() == [2, 3, 10]


def test_the_weighted_mean_is_that_of_uniform_timesteps(rng):
    sampler, losses = LossSecondMoment(5, history=1), np.array([1.0, 2, 3, 4, 10])
    sampler.update(np.arange(5), losses)
    t, weights = sampler.sample(rng, 20_000)
    assert_allclose((losses[t] * weights).mean(), losses.mean(), rtol=0.01)
    assert (losses[t] * weights).std() < 0.02 * losses.std()    # nearly no variance is left
    t, weights = uniform(rng, 20_000, 5)
    assert (weights == 1).all() and set(t) == set(range(5))
    assert_allclose(losses[t].mean(), losses.mean(), rtol=0.05)


def test_losses_of_zero_are_uniform_and_bad_numbers_end_in_one_line():
    sampler = LossSecondMoment(3, history=1)
    sampler.update(range(3), [0, 0, 0])
    assert_allclose(sampler.probabilities(), np.full(3, 1 / 3))
    for numbers in ((0, 1, .1), (3, 0, .1), (3, 1, 2)):
        with pytest.raises(TinyldmError, match="importance sampling"):
            LossSecondMoment(*numbers)
