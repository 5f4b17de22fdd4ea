"""The training loop: shards, resuming, and what stops it."""
import math

import numpy as np
import pytest

from tinyldm.errors import TinyldmError
from tinyldm.layers import Parameter
from tinyldm.training.loop import Trainer, split_batch
from tinyldm.training.optim import load_ema


def test_shards_add_up_to_the_batch():
    seen = []

    def loss(rows, rng, share):
        seen.append((rows.start, rows.stop))
        return {"loss": share * 2.0}
    assert split_batch(loss, 7, np.random.default_rng(0)) == {"loss": pytest.approx(2.0)}
    assert sorted(seen)[0][0] == 0 and sorted(seen)[-1][1] == 7


def quadratic(path, steps):
    """A training of one vector towards noisy targets; its state lies in path."""
    parameter = Parameter(6)
    parameter.data = np.zeros(6)
    trainer = Trainer(path, [("x", parameter)], steps, 0.1, warmup=2)

    def batch_loss(rng):
        difference = parameter.data - rng.standard_normal(6)
        parameter.add_grad(difference)
        return {"loss": float((difference ** 2).sum())}
    trainer.train(batch_loss)
    return parameter, trainer


def test_a_resumed_training_goes_on_as_if_never_stopped(tmp_path):
    whole, trainer = quadratic(tmp_path / "whole.npz", 9)
    for steps in (4, 9):                                # the rates differ by the plan's length ...
        part, _ = quadratic(tmp_path / "part.npz", steps)
    again, _ = quadratic(tmp_path / "whole.npz", 9)     # ... and a finished one stays as it is
    np.testing.assert_array_equal(whole.data, again.data)
    assert len(trainer.history) == 9
    with np.load(tmp_path / "part.npz") as state:
        assert state["steps"] == 9 and len(state["history"]) == 9
        ema = state["ema"]
    loaded = Parameter(6)
    load_ema(tmp_path / "part.npz", [("x", loaded)])
    np.testing.assert_array_equal(loaded.data, ema)


def test_two_trainings_of_one_file(tmp_path):
    """The second to save stops and leaves what the first has written."""
    path, parameter = tmp_path / "x.npz", Parameter(2)
    parameter.data = np.zeros(2)
    first, second = (Trainer(path, [("x", parameter)], 5, 0.1) for _ in range(2))
    first.save()
    content = path.read_bytes()
    with pytest.raises(TinyldmError, match="another training wrote .*x.npz meanwhile"):
        second.save()
    assert path.read_bytes() == content
    first.save()


def test_a_loss_that_is_not_a_number_stops(tmp_path):
    parameter = Parameter(2)
    parameter.data = np.zeros(2)
    trainer = Trainer(tmp_path / "x.npz", [("x", parameter)], 5, 0.1)
    with pytest.raises(FloatingPointError, match="step 0"):
        trainer.train(lambda rng: {"loss": math.nan})
