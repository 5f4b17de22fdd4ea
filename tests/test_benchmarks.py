"""The benchmarks time the same work on both sides."""
import pytest

from .benchmarks import training


def test_both_training_steps_train_alike():
    batch = training.make_batch(6)
    training.assert_same_work(*training.our_step(batch), *training.their_step(batch))


def test_another_training_step_is_seen():
    batch = training.make_batch(2)
    other = (*batch[:3], 1.01 * batch[3])
    with pytest.raises(AssertionError, match="losses"):
        training.assert_same_work(*training.our_step(batch), *training.their_step(other))
