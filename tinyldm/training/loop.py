"""The training loop: a batch split into shards, progress, and a state that is saved and resumed.

The recipe in shapes/ brings the losses and the data; optim.py makes the update.
"""
import math
import time

import numpy as np
from tqdm import tqdm

from ..backend import keep_freed_memory, parallel
from ..errors import TinyldmError
from ..layers import SHARD
from .optim import AdamW, learning_rate
from .state import check_writable, held_signals, read_npz, unusable, write_npz

SAVE_EVERY = 60         # seconds
SHARDS = 4              # the same on every machine, so that every machine computes the same sums


def split_batch(loss, batch, rng):
    """Run loss(*shard, rng, share) on each shard of a batch, over worker threads; sum the reports.

    batch: arrays; a shard has the same rows of each. share: its part of the whole. Each shard draws
    from a generator of its own, and gradients and reports are added in the order of the shards. So
    the result depends neither on which thread was first nor on the number of threads.
    """
    size = len(batch[0])
    count = min(SHARDS, size)
    bounds = np.linspace(0, size, count + 1).astype(int)
    generators = rng.spawn(count)

    def run(i):
        shard = [array[bounds[i]:bounds[i + 1]] for array in batch]
        token = SHARD.set(i)
        try:
            return loss(*shard, generators[i], len(shard[0]) / size)
        finally:
            SHARD.reset(token)

    reports = parallel(run, range(count))
    return {name: float(sum(report[name] for report in reports)) for name in reports[0]}


class Trainer:
    """`steps` updates of some parameters, with one state file that is saved every minute."""

    def __init__(self, path, named_parameters, steps, peak_rate, warmup=200, optimizer=AdamW):
        if not (0 <= steps < math.inf and 0 <= peak_rate < math.inf):
            raise TinyldmError("the steps and the learning rate of a training must be finite and "
                               f"from 0, not {steps} and {peak_rate}")
        self.path, self.steps, self.peak_rate, self.warmup = path, steps, peak_rate, warmup
        self.optimizer = optimizer(named_parameters)
        self.begun = 0                                  # the step of the optimiser's first update
        self.history = []                               # one (step, loss) per step
        check_writable(path)
        self.written = self._written()
        if self.written:
            self._resume()

    def _resume(self):
        own = self.optimizer.state()
        state = read_npz(self.path, {name: np.shape(value) for name, value in own.items()}
                         | {"begun": (), "history": (None, 2)})
        for name in self.optimizer.STATE:
            if state[name].dtype != own[name].dtype:
                raise unusable(self.path, f"{name!r} is {state[name].dtype}, not {own[name].dtype}")
        for name in ("steps", "begun"):
            if state[name].dtype.kind not in "iu" or state[name] < 0:
                raise unusable(self.path, f"{name!r} is {state[name]}, not a whole number from 0")
        self.history = state["history"].tolist()
        self.begun = int(state["begun"])
        self.optimizer.load_state(state)

    @property
    def step(self):
        """How many updates the parameters have had."""
        return self.begun + self.optimizer.steps

    def save(self):
        """Write the state file, whole or not at all.

        Raises TinyldmError, and leaves the file as it is, for weights that are not finite and
        where the file is not the one last saved or read here.
        """
        if not self.optimizer.is_finite():
            raise TinyldmError(f"the weights are NaN or infinite at step {self.step}: {self.path} "
                               "keeps the last good state; take a smaller learning rate")
        if self._written() not in (self.written, None):
            raise TinyldmError(f"another training wrote {self.path} meanwhile: this one stops at "
                               f"step {self.step}, unsaved; run one at a time in a folder")
        with held_signals():                            # or the next save would see another's file
            write_npz(self.path, history=self.history, begun=self.begun, **self.optimizer.state())
            self.written = self._written()

    def _written(self):
        return self.path.stat().st_mtime_ns if self.path.exists() else None

    def train(self, batch_loss):
        """Train to the last step, with a progress bar.

        batch_loss(rng) adds a batch's gradients to the parameters and returns a report, a dict of
        numbers with "loss". Ctrl-C and SIGTERM end the training after the current step, and are
        raised when its state is saved.
        Raises TinyldmError where a loss, a gradient or a weight is not finite; then the state file
        holds the last good state.
        """
        keep_freed_memory()
        saved = time.monotonic()
        with (held_signals() as signals,
              tqdm(total=self.steps, initial=self.step, desc=f"training {self.path.stem}",
                   smoothing=0.05) as bar):
            try:
                while self.step < self.steps and not signals:
                    report, norm = self._update(batch_loss)
                    self.history.append((self.step, report["loss"]))
                    recent = np.mean([loss for _, loss in self.history[-100:]])
                    bar.set_postfix_str(f"loss {recent:.4f}, gradient {norm:.2f}", refresh=False)
                    bar.update()
                    if time.monotonic() - saved > SAVE_EVERY:
                        self.save()
                        saved = time.monotonic()
            finally:
                self.save()

    def _update(self, batch_loss):                      # -> the report, the gradient's norm
        # One generator per step: a resumed run continues as if it had never stopped.
        rng = np.random.default_rng([1, self.step])
        report = batch_loss(rng)
        if not np.isfinite(report["loss"]):
            raise TinyldmError(f"the loss is {report['loss']} at step {self.step}: take a smaller "
                               "learning rate")
        norm = self.optimizer.step(learning_rate(
            self.step, self.peak_rate, self.warmup, self.steps, self.begun))
        return report, norm


def trained(run, stage):
    """The state file of a stage in the folder `run`. Raises TinyldmError where there is none."""
    path = run / f"{stage}.npz"
    if not path.exists():
        raise TinyldmError(f"{run} holds no {path.name}: run `python -m tinyldm.training {stage} "
                           f"--run {run}` first")
    return path
