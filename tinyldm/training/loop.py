"""The training loop: updates, progress, and a state that is saved and resumed.

A stage brings the model, the data and batch_loss; shards.py splits a batch, optim.py makes the
update, rates.py its learning rate, state.py what lies on the disk. Everything random is keyed by
the seed and the number of the batch, never by what ran before, so that a training that goes on is
one that never stopped.

Under mpirun each rank has its part of every batch's shards, and all make the same update from the
sum of their gradients. The first rank alone reads and writes files, draws samples and reports.
"""
import math
import signal
import time
import zlib
from contextlib import nullcontext
from functools import partial

import numpy as np

from .. import ranks
from ..backend import asarray, keep_freed_memory, to_host
from ..bad_layer import bad_layer
from ..errors import TinyldmError, note
from ..files import make_folder
from .optim import AdamW, NotFinite, Overflow
from .rates import half_cosine
from .report import Report
from .state import (
    CannotWrite,
    check_room,
    check_same,
    check_writable,
    from_text,
    held_signals,
    locked,
    read_npz,
    to_text,
    unusable,
    write_npz,
)

SAVE_EVERY = 60         # seconds
NUMBERS = 32            # of a report, at most: they travel behind the gradient
COMPARE_EVERY = 100     # steps between two comparisons of all ranks' weights


class Trainer:
    """`steps` updates of some parameters, with one state file that is saved on the way.

    path: the state, an .npz file. named_parameters: pairs of a name and a Parameter to train.
    peak_rate, warmup, schedule: the learning rate, see rates.py. optimizer: makes one from the
    named parameters.
    seed: of all that batch_loss draws. accumulation: the batches of one update. batches_per_epoch:
    an epoch's last update takes the batches that are left (None: there are no epochs).
    settings: what a resumed training must have in common with the stored one, {name: a value for
    JSON}, and data, the fingerprint of its pictures. resume: None goes on where the state file is
    there; False expects none; "exact" expects one, "changed" one with other settings or data.
    save_every: updates between two saves (None: a minute). report: a Report (None: the bar alone).
    profile: whether to print where the time and the memory of an update went: see profile.py.
    """

    def __init__(self, path, named_parameters, steps, peak_rate, warmup=200, optimizer=AdamW, *,
                 schedule=half_cosine, seed=1, accumulation=1, batches_per_epoch=None,
                 settings=None, data="", resume=None, save_every=None, report=None,
                 profile=False):
        if not (0 <= steps < math.inf and 0 <= peak_rate < math.inf):
            raise TinyldmError("the steps and the learning rate of a training must be finite and "
                               f"from 0, not {steps} and {peak_rate}")
        self.path, self.steps, self.peak_rate, self.warmup = path, steps, peak_rate, warmup
        self.schedule, self.seed, self.save_every = schedule, seed, save_every
        self.accumulation, self.batches_per_epoch = accumulation, batches_per_epoch
        self.settings = {"data": data} | (settings or {})
        self.batch = 0                                  # the number of the batch being computed
        self.about = ""                                 # what is in it, for messages: set by stages
        self.models = {}                                # {name: module}, for messages, too
        self.profile = profile
        self.report = Report() if ranks.rank() else report or Report()
        self.stopped = False                            # another rank was asked to stop
        self.constrain = None                           # see train
        named_parameters = list(named_parameters)
        self.parameters = [parameter for _, parameter in named_parameters]
        self.optimizer = optimizer(named_parameters)
        self.begun = 0                                  # the step of the optimiser's first update
        self.history = []                               # one (step, loss) per step
        self.written = None
        self.begun, self.optimizer.steps, self.optimizer.scaling = ranks.first(
            partial(self._open, resume))
        if ranks.size() > 1:
            self._agree()

    def _open(self, resume):                            # -> begun, the optimiser's steps, scaling
        path = self.path
        check_writable(path)
        self.written = self._written()
        if resume is False and self.written:
            raise TinyldmError(f"{path} holds a training already: --resume goes on with it, or "
                               "name another folder with --output")
        if resume and not self.written:
            raise TinyldmError(f"there is no training to go on with, {path} is missing: leave "
                               "--resume out, or name its folder with --output")
        if self.written:
            self._resume(resume)
        return self.begun, self.optimizer.steps, self.optimizer.scaling

    def _agree(self):
        """Begin with the first rank's numbers on all ranks."""
        others = [place for place, settings in enumerate(ranks.gather(self.settings))
                  if settings != self.settings]
        if others:
            raise TinyldmError(f"rank {others[0]} has other options or pictures: all ranks must "
                               "see the same files, on a shared disk or in the same places")
        for name in self.optimizer.STATE:
            ranks.spread(getattr(self.optimizer, name))
        self.optimizer.show()

    def _resume(self, resume):
        if resume == "exact":                           # before shapes, which follow from options
            stored = read_npz(self.path, {"settings": (None,)}, optional=("settings",))
            check_same(self.path, self.settings, from_text(self.path, stored.get("settings")))
        own = self.optimizer.state()
        state = read_npz(self.path, {name: np.shape(value) for name, value in own.items()}
                         | {"begun": (), "history": (None, 2), "settings": (None,)},
                         optional=("settings", "scaling"))
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

    @property
    def scale(self):
        """What batch_loss multiplies the gradient of its loss by, before it goes backward."""
        return self.optimizer.scaling.scale if self.optimizer.scaling else 1.0

    def save(self):
        """Write the state file, whole or not at all.

        Raises TinyldmError, and leaves the file as it is, for weights that are not finite and
        where the file is not the one last saved or read here.
        """
        if bad := self.optimizer.not_finite():
            raise TinyldmError(f"the weights {bad} are NaN or infinite at step {self.step}: "
                               f"{self.path} keeps the last good state; take a smaller learning "
                               "rate")
        if self._written() not in (self.written, None):
            raise TinyldmError(f"another training wrote {self.path} meanwhile: this one stops at "
                               f"step {self.step}, unsaved; run one at a time in a folder")
        with held_signals():                            # or the next save would see another's file
            try:
                write_npz(self.path, history=self.history, begun=self.begun,
                          settings=to_text(self.settings), **self.optimizer.state())
            except TinyldmError as error:
                raise CannotWrite(str(error)) from None
            self.written = self._written()

    def _written(self):
        return self.path.stat().st_mtime_ns if self.path.exists() else None

    def train(self, batch_loss, *, write=None, sample=None, validate=None, constrain=None):
        """Train to the last step, with a progress bar.

        batch_loss(rng) adds a batch's gradients to the parameters and returns a report, a dict of
        numbers with "loss"; self.batch is the batch's number. The first Ctrl-C or SIGTERM ends the
        training after the current step, and is raised when its state is saved; the second one stops
        at once, and the file keeps the state last saved.
        write(): writes the result, after each save of the state. sample() -> pictures, and
        validate() -> {name: loss}, of fixed prompts and of fixed pictures: see report.py. write and
        sample see the averaged weights, if there are any. constrain(): changes the weights, in
        place, after each update.
        Under mpirun a signal to any rank stops all after the same step, and only the first rank
        returns: the others end here, by SystemExit.
        Raises TinyldmError where a loss, a gradient or a weight is not finite; then the state file
        holds the last good state.
        """
        keep_freed_memory()
        self.constrain = constrain
        self._forget_gradients()                        # of a step that was stopped
        make_folder(self.path.parent)
        lock = nullcontext() if ranks.rank() else locked(self.path.parent)
        with lock, held_signals(most=1) as signals:
            if not self.written and not ranks.rank():   # now, not in an hour: is there room?
                check_room(self.path, sum(array.nbytes for name, array in
                                          self.optimizer.state().items() if name != "steps"))
                self.save()
            saved = time.monotonic()
            report, update = self.report, self._update
            if self.profile and not ranks.rank():
                from .profile import Profiled  # its imports take time
                update = Profiled(update, self.models)
            report.begin(self.path.stem, self.step, self.steps,
                         sample and self.averaged(sample), validate)
            try:
                # One rank may not stop alone: the others would wait for it.
                while self.step < self.steps and not (signals if ranks.size() == 1 else
                                                      self.stopped):
                    report.step(self.step + 1, self.steps, update(batch_loss, signals))
                    if (self.step % self.save_every == 0 if self.save_every
                            else time.monotonic() - saved > SAVE_EVERY):
                        self._save(write, last=False)
                        saved = time.monotonic()
            finally:
                if len(signals) < 2:
                    self._save(write)
                report.end()
            ranks.leave_to_first()
            if self.stopped and not signals:
                signals.append(signal.SIGINT)

    def averaged(self, run, exact=False):
        """run, but with the averaged weights in place of the trained ones, if there are any; exact:
        see AdamW.averaged."""
        def averaged():
            with self.optimizer.averaged(exact):
                return run()
        return averaged

    def _save(self, write, last=True):
        """Save the state, the log and the result. A disk that is full on the way is a note."""
        if ranks.rank():
            return
        try:
            self.save()
        except CannotWrite as error:
            if last:
                raise
            note(f"{error}; the training goes on, and the file keeps the state saved before")
            return
        self.report.saved(self.history, last)
        if write:
            self.averaged(write, exact=True)()

    def _update(self, batch_loss, signals=()):           # -> {"loss", "gradient", ...}
        scaling, report = self.optimizer.scaling, None
        if not scaling:
            return self._attempt(batch_loss, signals)
        while report is None:
            with np.errstate(over="ignore", invalid="ignore"):      # float16 on NumPy
                report = self._attempt(batch_loss, signals)
        return report | {"loss_scale": scaling.scale, "skipped": scaling.skipped}

    def _attempt(self, batch_loss, signals):
        """One update; None where the gradient is not finite, and a smaller loss scale may help."""
        reports, rate, batches = [], self.learning_rate(), self._batches()

        def run(place):
            self.batch = batches[place]
            # A generator for each batch: a resumed run continues as if it had never stopped.
            return batch_loss(np.random.default_rng([self.seed, self.step, place]))

        def run_again():
            for place in range(len(reports)):
                run(place)

        for place in range(len(batches)):
            reports.append(run(place))
            if not np.isfinite(reports[-1]["loss"]):
                break
        report = {name: sum(report[name] for report in reports) / len(reports)
                  for name in reports[0]}
        try:
            with held_signals():                        # all of the update, or nothing
                grad = None
                if ranks.size() > 1:
                    grad, report = self._exchange(report, bool(signals))
                if not np.isfinite(report["loss"]):
                    raise NotFinite(f"the loss is {report['loss']}")
                # Groups that an epoch's end cuts short count less: accelerate divides them alike.
                try:
                    norm = self.optimizer.step(rate, self.accumulation, grad)
                except Overflow:
                    return None
                if self.constrain:
                    self.optimizer.constrain(self.constrain)
                self.history.append((self.step, report["loss"]))
        except NotFinite as error:
            raise self._bad(f"{error} at step {self.step}", rate, run_again) from None
        if ranks.size() > 1 and self.step % COMPARE_EVERY == 0:
            self._compare()
        return report | {"gradient": norm, "learning_rate": rate}

    def _exchange(self, report, stop):
        """The sums of all ranks' gradients and reports, in one message, which also says whether
        any of them has to stop. So all decide the same. -> the gradient, the report"""
        grad = self.optimizer.gradient(NUMBERS)
        assert len(report) < NUMBERS, report
        numbers = np.zeros(NUMBERS, grad.dtype)
        numbers[:1 + len(report)] = [stop, *report.values()]
        grad[-NUMBERS:] = asarray(numbers, like=grad)
        ranks.add_up(grad)
        numbers = to_host(grad[-NUMBERS:]).tolist()
        self.stopped = numbers[0] > 0
        return grad[:-NUMBERS], dict(zip(report, numbers[1:]))

    def _compare(self):
        """Raise TinyldmError if the ranks' weights have become different."""
        hashes = ranks.gather(zlib.crc32(to_host(self.optimizer.data)))
        if len({*hashes}) > 1:
            raise TinyldmError(f"the weights of rank {[h != hashes[0] for h in hashes].index(True)}"
                               f" are others than those of rank 0 at step {self.step}: start again "
                               "from the last save with --resume, on machines of one kind")

    def _bad(self, what, rate, run):
        """The TinyldmError about a loss or a gradient that is not finite: where, and what to try.
        """
        where = f"; the batch: {self.about}" if self.about else ""
        if self.models:
            self._forget_gradients()
            with np.errstate(all="ignore"):
                layer, of = bad_layer(self.models, run)
            found = [one for one in ranks.gather((layer, of)) if one[0]]
            where = (f"; the first layer whose {found[0][1]} is not finite is {found[0][0]}"
                     if found else "; no layer is to blame") + where
        self._forget_gradients()
        ranks.leave_to_first()                          # it saves, and says what is wrong
        return TinyldmError(f"{what}: take a smaller learning rate (it was {rate:g}), or see what "
                            f"is wrong with the batch{where}; {self.path} keeps the last good "
                            "state")

    def _forget_gradients(self):
        for parameter in self.parameters:
            parameter.grad = None

    def _batches(self):
        """The numbers of the batches of the next update."""
        size, epoch = self.accumulation, self.batches_per_epoch
        if not epoch:
            return range(self.step * size, (self.step + 1) * size)
        number, place = divmod(self.step, math.ceil(epoch / size))
        return range(number * epoch + place * size, number * epoch + min((place + 1) * size, epoch))

    def learning_rate(self):
        """The rate of the next update."""
        begun = {"begun": self.begun} if self.begun else {}
        return self.schedule(self.step, self.peak_rate, self.warmup, self.steps, **begun)
