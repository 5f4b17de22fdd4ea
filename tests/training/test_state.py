"""A training's state: what is no state of it, and signals and kills at chosen points."""
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest

from tests.support.training import SIZE, trainer_of
from tinyldm.cli.draw import status
from tinyldm.errors import TinyldmError
from tinyldm.layers import Parameter
from tinyldm.training import loop, state
from tinyldm.training.loop import Trainer
from tinyldm.training.optim import Muon, load_ema
from tinyldm.training.state import read_npz, write_npz


def content(path):
    with np.load(path) as arrays:
        return dict(arrays)


def assert_same(path, expected):
    found, expected = content(path), content(expected)
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.fixture
def whole(tmp_path):
    """The state of a training that was never stopped."""
    trainer, batch_loss = trainer_of(tmp_path / "whole" / "x.npz")
    trainer.train(batch_loss)
    return trainer.path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "x.npz"


# ---- what is no state of this training ------------------------------------------------------

GOOD = {"data": np.ones(SIZE), "m": np.ones(SIZE), "v": np.ones(SIZE), "ema": np.ones(SIZE),
        "steps": 2, "begun": 0, "history": [(1, 0.5), (2, 0.4)]}


def changed(**changes):
    return {name: value for name, value in (GOOD | changes).items() if value is not None}


@pytest.mark.parametrize("arrays, message", [
    (changed(data=np.ones(1)), r"'data' has the shape \(1,\), not \(6,\)"),     # was broadcast
    (changed(data=np.float64(1)), r"'data' has the shape \(\), not \(6,\)"),
    (changed(v=np.ones((SIZE, 1))), r"'v' has the shape \(6, 1\), not \(6,\)"),
    (changed(ema=np.ones(SIZE + 1)), r"'ema' has the shape \(7,\), not \(6,\)"),
    (changed(m=None), "it lacks 'm'"), (changed(steps=None), "it lacks 'steps'"),
    (changed(history=None), "it lacks 'history'"), ({"weight": np.ones(3)}, "it lacks 'data'"),
    ({}, "it lacks 'data'"),
    (changed(data=np.full(SIZE, math.nan)), "'data' is not made of finite numbers"),
    (changed(v=np.full(SIZE, math.inf)), "'v' is not made of finite numbers"),
    (changed(data=np.full(SIZE, "a")), "'data' is not made of finite numbers"),
    (changed(data=np.full(SIZE, 1j)), "'data' is not made of finite numbers"),
    (changed(data=np.array([None] * SIZE)), "it cannot be read, Object arrays"),
    (changed(data=np.ones(SIZE, np.float32)), "'data' is float32, not float64"),
    (changed(m=np.ones(SIZE, int)), "'m' is int64, not float64"),
    (changed(steps=-1), "'steps' is -1, not a whole number"),
    (changed(steps=2.5), "'steps' is 2.5, not a whole number"),
    (changed(steps=[1, 2]), r"'steps' has the shape \(2,\)"),
    (changed(begun="x"), "'begun' is not made of finite numbers"),
    (changed(history=np.ones((3, 3))), r"'history' has the shape \(3, 3\), not \(None, 2\)"),
    (changed(history=[1.0, 2.0]), r"'history' has the shape \(2,\)"),
])
def test_arrays_that_do_not_belong_to_a_training(arrays, message, path):
    path.parent.mkdir()
    np.savez(path, **arrays)
    before = path.read_bytes()
    with pytest.raises(TinyldmError, match=f"x.npz is no whole state of this training: .*{message}"
                       ".*; delete it to begin anew, or name another folder"):
        trainer_of(path)
    assert path.read_bytes() == before


def damage(whole):
    at = whole.index(b"ema.npy") + 150                  # in its numbers
    return whole[:at] + b"\xff" * 10 + whole[at + 10:]


@pytest.mark.parametrize("spoil", [
    lambda whole: b"", lambda whole: b"x", lambda whole: whole[:len(whole) // 2],
    lambda whole: whole[:-1], damage,
    lambda whole: b"\x93NUMPY\x01\0v\0" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (), }"
    .ljust(117) + b"\n" + b"\0" * 8, lambda whole: b"\x80\x04K\x01.", lambda whole: b"PK\x05\x06",
], ids=["empty", "letter", "half", "truncated", "damaged", "npy", "pickle", "zip"])
def test_files_that_hold_no_state(spoil, whole, path):
    write_npz(path)
    path.write_bytes(spoil(whole.read_bytes()))
    with pytest.raises(TinyldmError, match="x.npz is no whole state of this training"):
        trainer_of(path)
    with pytest.raises(TinyldmError, match="x.npz is no whole state of this training"):
        load_ema(path, [("x", Parameter(SIZE))])


def test_averages_of_other_parameters(whole):
    with pytest.raises(TinyldmError, match=r"'ema' has the shape \(6,\), not \(7,\)"):
        load_ema(whole, [("x", Parameter(SIZE + 1))])


def test_a_state_without_losses_is_one(path):
    path.parent.mkdir()
    for history in ([], np.ones((0, 2))):
        np.savez(path, **changed(history=history))
        assert trainer_of(path)[0].step == 2
    assert read_npz(path, {"history": (None, 2)})["history"].size == 0


@pytest.mark.parametrize("steps, rate", [(-1, 0.1), (5, math.nan), (5, math.inf), (5, -1.0),
                                         (math.nan, 0.1)])
def test_numbers_that_make_no_training(steps, rate, path):
    with pytest.raises(TinyldmError, match="must be finite and from 0, not"):
        trainer_of(path, steps, rate=rate)
    assert not path.parent.exists()


@pytest.mark.parametrize("parent", ["file/run", "file", "/proc/none"])
def test_a_folder_that_cannot_be_made_is_found_at_once(parent, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TinyldmError, match="cannot write .*choose another place"):
        trainer_of(tmp_path / parent / "x.npz")


@pytest.mark.parametrize("optimizer", [loop.AdamW, Muon])
def test_a_training_that_diverges_keeps_the_last_good_state(optimizer, path):
    """The loss and the gradient are finite, only the updated weights are not."""
    trainer, _ = trainer_of(path, optimizer=optimizer, rate=1e308)
    trainer.save()
    before = path.read_bytes()

    def batch_loss(rng):
        trainer.optimizer.places[0][1].add_grad(np.ones(SIZE))
        return {"loss": 1.0}
    with (np.errstate(over="ignore", invalid="ignore"),
          pytest.raises(TinyldmError, match="NaN or infinite at step .* keeps the last good")):
        trainer.train(batch_loss)
    assert path.read_bytes() == before


# ---- signals --------------------------------------------------------------------------------

def interrupt(monkeypatch, owner, name, number=signal.SIGINT, before=True, times=1):
    """Let a function of the package be hit by a signal just before or after it."""
    original, left = getattr(owner, name), [times]

    def hit(*arguments, **options):
        def signalled():
            left[0] -= 1
            if left[0] >= 0:
                os.kill(os.getpid(), number)
        if before:
            signalled()
        result = original(*arguments, **options)
        if not before:
            signalled()
        return result
    monkeypatch.setattr(owner, name, hit)


POINTS = [(Trainer, "learning_rate", True), (loop.AdamW, "step", True),
          (loop.AdamW, "_update", True), (loop.AdamW, "_update", False),
          (Trainer, "save", True), (state.np, "savez", True), (state.np, "savez", False),
          (os, "replace", True), (os, "replace", False), (Trainer, "_written", False)]


@pytest.mark.parametrize("owner, name, before", POINTS,
                         ids=[f"{name}-{'before' if b else 'after'}" for _, name, b in POINTS])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_point_loses_nothing(number, owner, name, before, path, whole, monkeypatch):
    """The state is that of whole steps, and a resumed training ends as if never stopped."""
    monkeypatch.setattr(loop, "SAVE_EVERY", -1)         # save after every step
    trainer, batch_loss = trainer_of(path)
    trainer.save()

    class Terminated(KeyboardInterrupt):
        pass

    def terminate(*_):
        raise Terminated
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, number, before)
        outer = signal.signal(signal.SIGTERM, terminate)
        try:
            with pytest.raises(KeyboardInterrupt):
                trainer.train(batch_loss)
        finally:
            assert signal.signal(signal.SIGTERM, outer) is terminate
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert content(path)["steps"] == len(content(path)["history"]) == trainer.step == 1
    assert [file.name for file in path.parent.iterdir()] == ["x.npz"]
    again, batch_loss = trainer_of(path)
    again.train(batch_loss)
    assert_same(path, whole)


def test_further_signals_during_the_save_do_not_lose_it(path, monkeypatch):
    trainer, batch_loss = trainer_of(path)
    trainer.save()
    with monkeypatch.context() as patch:
        interrupt(patch, Trainer, "learning_rate")
        interrupt(patch, state.np, "savez", times=3)
        interrupt(patch, os, "replace", before=False, times=3)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(batch_loss)
    assert content(path)["steps"] == 1
    trainer.train(batch_loss)                           # not "another training wrote"
    assert content(path)["steps"] == 5


def test_a_second_signal_stops_at_once(path):
    """In the middle of a step, without another save: the file is whole, and of the last save."""
    trainer, batch_loss = trainer_of(path)

    def impatient(rng):
        if trainer.step == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second signal was held back")
        return batch_loss(rng)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(impatient)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert content(path)["steps"] == 0 and trainer.step == 2
    trainer.train(batch_loss)                           # in memory, too, all is whole
    assert content(path)["steps"] == 5


def test_the_command_ends_with_its_status_after_a_signal(path, capsys, monkeypatch):
    trainer, batch_loss = trainer_of(path)
    interrupt(monkeypatch, Trainer, "learning_rate")
    assert status(lambda: trainer.train(batch_loss)) == 130
    assert "interrupted" in capsys.readouterr().err and content(path)["steps"] == 1


def test_an_ignored_signal_stays_ignored(path, monkeypatch):
    """As nohup wishes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt(monkeypatch, Trainer, "learning_rate", signal.SIGHUP)
        trainer, batch_loss = trainer_of(path)
        trainer.train(batch_loss)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert content(path)["steps"] == 5


def test_a_deleted_state_is_written_again(path):
    trainer, batch_loss = trainer_of(path)
    trainer.save()
    path.unlink()
    path.parent.rmdir()
    trainer.train(batch_loss)
    assert content(path)["steps"] == 5


# ---- kills ----------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from tests.support.training import trainer_of
from tinyldm.training import loop
loop.SAVE_EVERY = -1
owner, name, before, call = sys.argv[2], sys.argv[3], sys.argv[4] == "True", int(sys.argv[5])
owner = {"os": os, "np": np}[owner]
original, calls = getattr(owner, name), []
def hit(*arguments, **options):
    calls.append(name)
    if before and len(calls) == call:
        os.kill(os.getpid(), signal.SIGKILL)
    original(*arguments, **options)
    if len(calls) == call:
        os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, name, hit)
trainer, batch_loss = trainer_of(Path(sys.argv[1]))
trainer.train(batch_loss)
"""


@pytest.mark.parametrize("owner, name, before, call, steps", [
    ("np", "savez", True, 3, 1), ("np", "savez", False, 3, 1), ("os", "fsync", False, 3, 1),
    ("os", "replace", True, 4, 2), ("os", "replace", False, 4, 3)])
def test_a_kill_leaves_a_whole_state(owner, name, before, call, steps, path, whole):
    done = subprocess.run([sys.executable, "-c", KILLED, path, owner, name, str(before), str(call)],
                          capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert content(path)["steps"] == steps
    trainer, batch_loss = trainer_of(path)
    trainer.train(batch_loss)
    assert_same(path, whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the trainings are forks, which start at once")
def test_kills_at_random_moments_lose_at_most_what_was_not_saved(tmp_path):
    """Thirty in one training: the file is always whole, and the end is that of no interruption."""
    steps, save_every, rng = 3000, 3, np.random.default_rng(0)
    path, reader, saved = tmp_path / "x.npz", *os.pipe()

    def train(path, steps):
        trainer, batch_loss = trainer_of(path, steps)
        trainer.save_every = save_every
        trainer.train(batch_loss, write=lambda: os.write(saved, b"%9d" % trainer.step))

    os.set_blocking(reader, False)
    for _ in range(30):
        child = os.fork()
        if not child:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                train(path, steps)
            finally:
                os._exit(0)
        time.sleep(0.02 + 0.08 * rng.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        said = b""
        with suppress(BlockingIOError):                 # nothing was saved in this short time
            said = os.read(reader, 1 << 16)
        if said:
            last = int(said[-9:])
            assert last <= content(path)["steps"] <= last + save_every
    at = int(content(path)["steps"])
    assert 0 < at < steps
    train(path, at + 5)
    plain, batch_loss = trainer_of(tmp_path / "whole" / "x.npz", at + 5)
    plain.steps = steps                                 # the rate's plan of the killed trainings
    while plain.step < at:
        plain._update(batch_loss)
    plain.steps = at + 5
    plain.train(batch_loss)
    for name in ("data", "m", "v", "ema", "history"):
        np.testing.assert_array_equal(content(path)[name], content(plain.path)[name])


# ---- settings ---------------------------------------------------------------------------------

def with_settings(path, resume, settings, data="a"):
    parameter = Parameter(SIZE)
    parameter.data = np.zeros(SIZE)
    return Trainer(path, [("x", parameter)], 5, 0.1, settings=settings, data=data, resume=resume)


def test_a_training_goes_on_as_it_began_or_names_each_difference(path):
    settings = {"--clip": 1.0, "--betas": (0.9, 0.999)}
    with pytest.raises(TinyldmError, match="no training to go on with, .*x.npz is missing: leave"):
        with_settings(path, "exact", settings)
    with_settings(path, False, settings).save()
    with pytest.raises(TinyldmError, match="holds a training already: --resume goes on with it"):
        with_settings(path, False, settings)
    assert with_settings(path, "exact", settings).step == 0
    with pytest.raises(TinyldmError) as error:
        with_settings(path, "exact", settings | {"--clip": 0}, data="b")
    said = str(error.value)
    assert "the pictures are others; --clip is 0, it was 1.0" in said and "--betas" not in said
    assert "--resume changed" in said and "\n" not in said
    assert with_settings(path, "changed", settings | {"--clip": 0}, data="b").step == 0
