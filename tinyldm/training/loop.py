"""What both stages of training share: a batch's shards over the cores, progress, saved state."""
import time

import numpy as np
from tqdm import tqdm

from ..backend import keep_freed_memory, num_threads, parallel
from ..errors import TinyldmError
from ..files import replacing
from .optim import AdamW, learning_rate

SAVE_EVERY = 60         # seconds


def split_batch(loss, size, rng):
    """Run loss(rows, rng, share) on a shard of the batch a worker; sums what they report.

    Each shard draws from a generator of its own, so the result does not depend on which thread is
    first.
    """
    count = min(num_threads(), size)
    bounds = np.linspace(0, size, count + 1).astype(int)
    shards = [(slice(a, b), child, (b - a) / size)
              for a, b, child in zip(bounds, bounds[1:], rng.spawn(count))]
    reports = parallel(lambda shard: loss(*shard), shards)
    return {name: float(sum(report[name] for report in reports)) for name in reports[0]}


class Trainer:
    """An optimiser of some parameters for a number of steps; one state file, saved every minute."""

    def __init__(self, path, named_parameters, steps, peak_rate, warmup=200, optimizer=AdamW):
        self.path, self.steps, self.peak_rate, self.warmup = path, steps, peak_rate, warmup
        self.optimizer = optimizer(named_parameters)
        self.begun = 0                                  # the step of the optimiser's first update
        self.history = []                               # (step, loss) a step
        self.written = self._written()
        if path.exists():
            with np.load(path) as state:
                self.optimizer.load_state(state)
                self.begun = int(state["begun"])
                self.history = state["history"].tolist()

    @property
    def step(self):
        """How many steps the parameters have had."""
        return self.begun + self.optimizer.steps

    def save(self):
        """Raises TinyldmError where the file is not the one last saved or read here."""
        if self._written() != self.written:
            raise TinyldmError(f"another training wrote {self.path} meanwhile: this one stops at "
                               f"step {self.step}, unsaved; run one at a time in a folder")
        save_state(self.path, self.optimizer, self.begun, self.history)
        self.written = self._written()

    def _written(self):
        return self.path.stat().st_mtime_ns if self.path.exists() else None

    def train(self, batch_loss):
        """batch_loss(rng) adds a batch's gradients to the parameters and returns what to report."""
        keep_freed_memory()
        saved = time.monotonic()
        bar = tqdm(total=self.steps, initial=self.step,
                   desc=f"training {self.path.stem}", smoothing=0.05)
        try:
            while self.step < self.steps:
                # A generator a step: a resumed run goes on as if never stopped.
                rng = np.random.default_rng([1, self.step])
                report = batch_loss(rng)
                if not np.isfinite(report["loss"]):
                    raise FloatingPointError(f"loss is {report['loss']} at step {self.step}")
                norm = self.optimizer.step(learning_rate(
                    self.step, self.peak_rate, self.warmup, self.steps, self.begun))
                self.history.append((self.step, report["loss"]))
                recent = np.mean([loss for _, loss in self.history[-100:]])
                bar.set_postfix_str(f"loss {recent:.4f}, gradient {norm:.2f}", refresh=False)
                bar.update()
                if time.monotonic() - saved > SAVE_EVERY:
                    self.save()
                    saved = time.monotonic()
        finally:
            bar.close()
            self.save()


def trained(run, stage):
    """The state file of a stage in the folder `run`. Raises TinyldmError where there is none."""
    path = run / f"{stage}.npz"
    if not path.exists():
        raise TinyldmError(f"{run} holds no {path.name}: run `python -m tinyldm.training {stage} "
                           f"--run {run}` first")
    return path


def save_state(path, optimizer, begun, history):
    """A training's state in one file. begun: the step at which the optimiser's averages began."""
    write_npz(path, history=np.array(history), begun=begun, **optimizer.state())


def write_npz(path, **arrays):
    """Arrays by name in one file, atomically, as weight files are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
