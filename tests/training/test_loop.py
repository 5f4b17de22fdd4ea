"""The training loop: shards, resuming, and what stops it."""
import math
import re
import time
from functools import partial, reduce
from types import SimpleNamespace

import numpy as np
import pytest

from tinyldm import ops
from tinyldm.bad_layer import bad_layer
from tinyldm.errors import TinyldmError
from tinyldm.layers import Linear, Module, Parameter, Tape
from tinyldm.training import loop
from tinyldm.training.loop import Trainer
from tinyldm.training.optim import AdamW, initialise, load_ema
from tinyldm.training.shards import over_shards, split_batch
from tinyldm.training.state import locked


def test_shards_add_up_to_the_batch():
    seen = []

    def loss(numbers, letters, rng, share):
        seen.append((*numbers, *letters))
        return {"loss": share * 2.0}
    batch = list(range(7)), "abcdefg"
    assert split_batch(loss, batch, np.random.default_rng(0)) == {"loss": pytest.approx(2.0)}
    assert sorted(seen) == [(0, "a"), (1, 2, "b", "c"), (3, 4, "d", "e"), (5, 6, "f", "g")]


def test_on_a_gpu_shards_are_computed_as_one():
    """One call, with the draws that the shards of a CPU would make."""
    def drawn(rows, rng, share):
        noise = rng.standard_normal((len(rows), 3), np.float32)
        return rows, noise, rng.normal(-1, 2, len(rows)), share

    apart, (together,) = (over_shards(drawn, [list(range(10))], np.random.default_rng(0), xp)
                          for xp in (np, object()))
    assert len(apart) == 4 and sum(part[3] for part in apart) == together[3] == 1
    assert sum((part[0] for part in apart), []) == together[0]
    for place in (1, 2):
        np.testing.assert_array_equal(np.concatenate([part[place] for part in apart]),
                                      together[place])


@pytest.mark.parametrize("threads", ["1", "2", "3", "8"])
def test_the_sum_of_gradients_does_not_depend_on_threads(threads, monkeypatch):
    """Shards end in a random order, and float32 sums depend on the order that they are added in."""
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    rng = np.random.default_rng(0)
    parts = rng.standard_normal((64, 1000)).astype(np.float32) * 10.0 ** rng.integers(-3, 3, 64)[
        :, None].astype(np.float32)

    def gradient(delays):
        parameter = Parameter(1000)

        def loss(delays, parts, rng, share):
            time.sleep(delays[0])
            for part in parts:
                parameter.add_grad(part)
            return {"loss": share * float(rng.random())}
        return split_batch(loss, [delays, parts], np.random.default_rng(1)), parameter.grad
    report, expected = gradient(np.zeros(64))
    for seed in range(3):
        again, found = gradient(0.01 * np.random.default_rng(seed).random(64))
        assert again == report
        np.testing.assert_array_equal(found, expected)
    shards = [reduce(np.add, parts[i:i + 16]) for i in range(0, 64, 16)]     # in this order
    np.testing.assert_array_equal(expected, (shards[0] + shards[1]) + (shards[2] + shards[3]))


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
    with pytest.raises(TinyldmError, match="the loss is nan at step 0: take a smaller"):
        trainer.train(lambda rng: {"loss": math.nan})


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])     # 1e38: its square overflows
def test_a_gradient_that_is_not_finite_leaves_the_last_good_state(bad, tmp_path):
    """The loss is finite throughout: only the gradient says that something went wrong."""
    path, parameter = tmp_path / "x.npz", Parameter(4)
    parameter.data = np.ones(4, np.float32)
    trainer = Trainer(path, [("x", parameter)], 5, 0.1)

    def batch_loss(rng):
        parameter.add_grad(np.full(4, bad if trainer.step == 3 else 0.5, np.float32))
        return {"loss": 1.0}
    with pytest.raises(TinyldmError, match="the gradient of .* is NaN or infinite"):
        trainer.train(batch_loss)
    with np.load(path) as state:
        assert state["steps"] == 3 and len(state["history"]) == 3
        assert all(np.isfinite(state[name]).all() for name in ("data", "m", "v", "ema"))
        np.testing.assert_array_equal(state["data"], parameter.data)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    path, parameter = tmp_path / "x.npz", Parameter(2)
    parameter.data = np.zeros(2)
    trainer = Trainer(path, [("x", parameter)], 5, 0.1)
    trainer.save()
    content = path.read_bytes()
    parameter.data[0] = math.nan
    with pytest.raises(TinyldmError, match="NaN or infinite at step 0: .*x.npz keeps the last"):
        trainer.save()
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]


# ---- NaN, locks, disks ------------------------------------------------------------------------

class Layers(Module):
    """Two linear layers and a mean of squares."""

    def __init__(self):
        self.first, self.second = Linear(3, 4), Linear(4, 2)
        initialise(self, np.random.default_rng(0))

    def forward(self, x, tape):
        return self.second(self.first(x, tape), tape)

    def backward(self, dy, tape):
        return self.first.backward(self.second.backward(dy, tape), tape)


def layered(path, spoil, accumulation=1):
    """Train Layers; spoil(model, step) may break something before a step."""
    model = Layers()
    trainer = Trainer(path, model.named_parameters(), 5, 0.01, accumulation=accumulation)
    trainer.models, trainer.about = {"net": model}, "pictures a.png, b.png, t 7"

    def loss(x, rng, share):
        tape = Tape()
        y = model(x, tape)
        value, cache = ops.mse(y, 0 * y)
        dy = ops.mse_backward(np.float32(share), cache)[0]
        model.backward(spoil(model, trainer.step, dy), tape)
        return {"loss": share * float(value)}

    def batch_loss(rng):
        return split_batch(loss, [rng.standard_normal((8, 3)).astype(np.float32)], rng)
    trainer.train(batch_loss)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_first_layer_whose_output_is_not_finite_is_named(accumulation, tmp_path):
    def spoil(model, step, dy):
        if step == 2:
            model.second.weight.data[0, 0] = math.nan
        return dy
    with pytest.raises(TinyldmError, match="keeps the last good state"):
        layered(tmp_path / "x.npz", spoil, accumulation)

    def overflow(x, tape):                              # in the layer, while all weights are good
        return Linear.forward(layer, x, tape) * np.float32(math.inf)
    model = Layers()
    layer = model.second
    layer.forward = overflow
    assert bad_layer({"net": model}, lambda: model(np.ones((2, 3), np.float32), Tape())
                     ) == ("net.second", "output")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_first_layer_whose_gradient_is_not_finite_is_named(tmp_path):
    """The loss is finite; the gradient overflows in the second layer's backward."""
    def spoil(model, step, dy):
        return dy if step < 2 else np.full_like(dy, 3e38)
    with pytest.raises(TinyldmError) as error:
        layered(tmp_path / "x.npz", spoil)
    said = str(error.value)
    assert re.search("the gradient of .* is NaN or infinite at step 2: take a smaller learning "
                     r"rate \(it was .*\), .*first layer whose gradient is not finite is "
                     "net.second; the batch: pictures a.png, b.png, t 7; .*x.npz keeps the last "
                     "good", said)
    with np.load(tmp_path / "x.npz") as state:
        assert state["steps"] == 2 and np.isfinite(state["data"]).all()


def test_two_trainings_in_one_folder(tmp_path):
    """The second says so before it computes anything."""
    with locked(tmp_path), pytest.raises(TinyldmError, match="another training runs in .*wait for"):
        quadratic(tmp_path / "x.npz", 3)
    quadratic(tmp_path / "x.npz", 3)                    # unlocked again


def test_a_disk_without_room_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(TinyldmError, match="takes 0 MB, and the disk of .* has 0 MB left: make"):
        quadratic(tmp_path / "x.npz", 3)


def test_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch):
    """The training goes on, the file stays whole, and the next save succeeds."""
    original, calls = np.savez, []

    def savez(*arguments, **arrays):
        calls.append(arrays["steps"])
        if arrays["steps"] == 2:
            raise OSError(28, "No space left on device")
        original(*arguments, **arrays)
    monkeypatch.setattr(loop, "SAVE_EVERY", -1)
    monkeypatch.setattr(np, "savez", savez)
    with pytest.warns(UserWarning, match="No space left on device.*the training goes on"):
        quadratic(tmp_path / "x.npz", 4)
    with np.load(tmp_path / "x.npz") as state:
        assert state["steps"] == 4 and 3 in calls


# ---- accumulation -----------------------------------------------------------------------------

def test_accumulated_batches_are_one_large_batch_and_an_epoch_cuts_a_group_short(tmp_path):
    """Five batches an epoch in groups of two: three updates, the last of one batch, halved."""
    seen, parameter = [], Parameter(2)
    parameter.data = np.zeros(2)
    trainer = Trainer(tmp_path / "x.npz", [("x", parameter)], 6, 0.1, accumulation=2,
                      batches_per_epoch=5, optimizer=partial(AdamW, clip=0))
    norms = []

    def batch_loss(rng):
        seen.append((trainer.step, trainer.batch))
        parameter.add_grad(np.array([3.0, 4.0]))
        return {"loss": 1.0}
    original = trainer.optimizer.step
    trainer.optimizer.step = lambda *arguments: norms.append(original(*arguments)) or norms[-1]
    trainer.train(batch_loss)
    assert seen == [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (3, 5), (3, 6), (4, 7), (4, 8), (5, 9)]
    assert norms == pytest.approx([5, 5, 2.5, 5, 5, 2.5])
