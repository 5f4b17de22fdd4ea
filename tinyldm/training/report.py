"""What a training tells while it runs: a progress bar, and files in the folder of its result.

    log.jsonl       a line per step: loss, "expected" (that of a model that knows nothing), the
                    gradient's norm, the learning rate, seconds; and a line per validation
    loss.png        both as curves, where matplotlib is installed
    samples.png     the samples, a row per step; each lies in samples/, too
    events.out...   the numbers again for TensorBoard, where tensorboard is installed

Nothing here can end a training: what goes wrong is a note.
"""
import json
import sys
import time
from contextlib import suppress

import numpy as np
from tqdm import tqdm

from ..errors import TinyldmError, note
from ..files import make_folder, replacing
from ..images import enlarged, grid, labelled

# What the bar also shows of a step's numbers.
SHOWN = {"l1": "l1 {:.4f}", "psnr": "PSNR {:.1f} dB", "kl_bits": "KL {:.0f} bits",
         "latent_std": "latents' std {:.2f}", "loss_scale": "loss scale {:g}",
         "skipped": "{} skipped"}
RECENT = 100            # steps over which the bar averages the loss
DRAW_EVERY = 60         # seconds between two drawings of the curve
SIDE, GAP = 256, 4      # of the sheet: the longest side of a picture, pixels between two


class Report:
    """folder: for the files, None for the bar alone. sample_every, validate_every: steps, 0: never.

    sample() -> PIL pictures, the same number each time. validate() -> {name: loss}.
    """

    def __init__(self, folder=None, sample_every=0, validate_every=0):
        self.folder, self.sample_every, self.validate_every = folder, sample_every, validate_every
        self.sample = self.validate = self.bar = self.events = None
        self.side = SIDE                                # of a sample in the sheet, at most
        self.lines, self.validations, self.drawn = [], [], 0.0

    def begin(self, name, step, steps, sample=None, validate=None):
        """Show the bar of a training at `step` of `steps`. What the log has beyond it is dropped:
        those steps are made again."""
        self.sample, self.validate = sample, validate
        self.recent = []
        self.bar = tqdm(total=steps, initial=step, desc=f"training {name}", smoothing=0.05)
        if self.folder:
            with _noted("the log"):
                self._begin_log(step)
        if self.folder and step == 0:
            self._look(step, steps)
        self.clock = time.monotonic()

    def _begin_log(self, step):
        make_folder(self.folder)
        kept = [line for line in read_log(self.folder) if line["step"] <= step]
        self.validations = [line for line in kept if "validation" in line]
        with replacing(self.folder / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.events = _event_writer(self.folder, step)

    def step(self, step, steps, values):
        """Tell one step's numbers: {"loss", "gradient", "learning_rate", perhaps "expected", ...}.
        """
        now = time.monotonic()
        self.recent = [*self.recent[1 - RECENT:], (values["loss"], values.get("expected"))]
        losses, expected = zip(*self.recent)
        loss = f"loss {np.mean(losses):.4f}"
        if values.get("expected"):
            loss += f" ({sum(losses) / sum(expected):.2f} of an uninformed answer's)"
        loss += "".join(f", {form.format(values[name])}" for name, form in SHOWN.items()
                        if name in values)
        self.bar.set_postfix_str(f"{loss}, gradient {values['gradient']:.2f}{memory()}",
                                 refresh=False)
        self.bar.update()
        if self.folder:
            seconds = round(now - self.clock, 3)
            self._tell(step, {"step": step, **values, "seconds": seconds}, values)
            self._look(step, steps)
        self.clock = time.monotonic()

    def tell(self, step, kind, numbers):
        """Write a line of the log that holds {kind: numbers} -> the line."""
        line = {"step": step, kind: numbers}
        self._tell(step, line, {f"{kind}/{name}": number for name, number in numbers.items()})
        return line

    def _tell(self, step, line, numbers):
        self.lines.append(json.dumps(line))
        if self.events:
            with _noted("TensorBoard's file"):
                _write_event(self.events, step, numbers)

    def _look(self, step, steps):
        """Validate and sample, where this step's turn is; also at the end."""
        def due(every):
            return every and (step % every == 0 or step == steps)
        if self.validate and due(self.validate_every):
            with _noted("the validation"):
                losses = self.validate()
                self.validations.append(self.tell(step, "validation", losses))
                mean = sum(losses.values()) / len(losses)
                tqdm.write(f"step {step}: validation loss {mean:.4f}{self._since(mean)}",
                           file=sys.stderr)
        if self.sample and due(self.sample_every):
            with _noted("the samples"):
                self._add_samples(step, self.sample())

    def _since(self, mean):
        """How the validation loss compares with the first one."""
        first = [*self.validations[0]["validation"].values()]
        ratio = mean / (sum(first) / len(first))
        return f", {ratio:.3f} of the first" if len(self.validations) > 1 else ""

    def _add_samples(self, step, pictures):
        make_folder(self.folder / "samples")
        for i, picture in enumerate(pictures):
            with replacing(self.folder / "samples" / f"{step:07}-{i}.png") as temporary:
                picture.save(temporary, "PNG")
        with replacing(self.folder / "samples.png") as temporary:
            sheet = sample_sheet(self.folder / "samples", step, self.side)
            sheet.save(temporary, "PNG")

    def saved(self, history, end=False):
        """Bring the files up to date with a state that was saved. history: (step, loss) pairs."""
        if not self.folder:
            return
        with _noted("the log"):
            with open(self.folder / "log.jsonl", "a") as file:
                file.write("".join(line + "\n" for line in self.lines))
            self.lines = []
            if self.events:
                self.events.flush()
        if end or time.monotonic() - self.drawn > DRAW_EVERY:
            with _noted("the curve"):
                plot(history, self.validations, self.folder / "loss.png")
            self.drawn = time.monotonic()

    def end(self):
        if self.bar is not None:
            self.bar.close()
        if self.events:
            self.events.close()


class _noted:
    """What goes wrong inside is a note: the training goes on."""

    def __init__(self, what):
        self.what = what

    def __enter__(self):
        pass

    def __exit__(self, kind, error, traceback):
        if isinstance(error, Exception):
            note(f"{self.what} could not be made ({error}); the training goes on")
        return isinstance(error, Exception)


def read_log(folder):
    """The lines of a folder's log as dicts; a half-written last line is left out."""
    try:
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and "step" in line]


def sample_sheet(folder, last, side=SIDE):
    """The pictures <step>-<number>.png of a folder up to a step, a row per step -> a PIL image.

    side: of one picture, at most, in pixels.
    """
    from PIL import Image

    files = sorted(file for file in folder.glob("*-*.png") if int(file.stem.split("-")[0]) <= last)
    columns = 1 + max(int(file.stem.split("-")[1]) for file in files)
    cells = [labelled(enlarged(Image.open(file), side), f"step {int(file.stem.split('-')[0])}",
                      side, lines=1) for file in files]
    return grid(cells, columns, GAP)


def averages(history):
    """[(step, loss)] -> the means of about 100 parts of equal length, (n,2)."""
    size = max(1, len(history) // 100)
    whole = len(history) // size * size
    return np.asarray(history[:whole], np.float64).reshape(-1, size, 2).mean(axis=1)


def plot(history, validations, path):
    """Draw the loss over the steps, and the validation loss of each timestep, as a PNG."""
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    if len(history):
        left.plot(*zip(*history), color="lightgrey", linewidth=0.5)
        left.plot(*averages(history).T)
    left.set(xlabel="step", ylabel="loss", title="training", yscale="log")
    for name in validations[0]["validation"] if validations else []:
        points = [(line["step"], line["validation"].get(name, np.nan)) for line in validations]
        right.plot(*zip(*points), marker=".", label=name)
    if validations:
        right.legend(fontsize="small")
    right.set(xlabel="step", title="validation, by fixed pictures", yscale="log")
    save_figure(figure, path)


def new_figure(width, height):
    """An empty figure of matplotlib, in inches. Raises TinyldmError where that is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise TinyldmError("matplotlib is missing: pip install 'tinyldm[curves]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path, dpi=100):
    """Write a figure as a PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


def memory():
    """The most memory that this process has held, as text; empty where the system does not tell."""
    try:
        import resource
    except ImportError:                                 # Windows
        return ""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin"
                                                                 else 1024)
    return f", {most / 1e9:.1f} GB"


def _event_writer(folder, step):
    """TensorBoard's writer of a folder; None without tensorboard. It forgets steps beyond `step`.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        return None
    events = EventFileWriter(str(folder))
    events.add_event(Event(wall_time=time.time(), step=step + 1,
                           session_log=SessionLog(status=SessionLog.START)))
    return events


def _write_event(events, step, numbers):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
    events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
