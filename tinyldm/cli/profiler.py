"""The profiler: where a run's time and memory go, by stage, by block and by op.

    with Profiler(pipe) as profile:                     # or of one model: Profiler(pipe.unet)
        pipe("a big red circle on a blue background")
    print(profile)

A run is cut into pieces wherever a layer begins or ends. Each piece, with its arithmetic, belongs
to one stage, one block and one op, so each of the three tables adds up to the whole run.
`python -m tinyldm "..." --profile` prints them.
"""
import threading
import time
import tracemalloc
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from math import prod

import numpy as np

from ..bad_layer import backward_hooks
from ..errors import TinyldmError
from ..layers import Conv2d, Linear, Module, forward_hooks, named_modules
from ..models import AutoencoderKL, UNet2DConditionModel
from ..models.blocks import Attention
from ..models.clip import CLIPAttention
from ..models.unet import UpBlock2D
from ..models.vae import Decoder, Encoder

ADDITIONS, OUTSIDE, REST = "additions, the rest", "outside the models", "the rest"
ATTENTION = Attention, CLIPAttention
MADE_OF_BLOCKS = UNet2DConditionModel, AutoencoderKL, Encoder, Decoder

NOTE = """\
MB: 1e6 bytes of arrays and other objects. peak: the most in use at a time. added: the most above
what was in use at the beginning. Weights read from their file's memory map do not count.
GFLOP: 1e9 multiplications and additions of the matrix products. A convolution counts by its
definition; Winograd's needs fewer, so it may show more GFLOP/s than the machine can do.
of best: a share of the {:.0f} GFLOP/s that a product of 2048x2048 matrices reached just now."""


class Row:
    """A row of a table: calls, seconds, floating-point operations, bytes of memory."""

    def __init__(self):
        self.calls = self.seconds = self.flop = self.peak = self.added = 0


class Profiler:
    """Inside a `with`, count what the layers of `owners` do: models, or objects that have some.

    tables: {"by stage": {name: Row}, "by block": …, "by op": …}, memory in bytes. Only the forwards
    in the thread that entered the `with` are counted; memory is that of all threads. Tracing memory
    makes large layers 5 % and small ones 50 % slower, so it is on only while a model runs
    for the first time; the rest costs 5 us per layer. On a GPU, memory is what the pool has in use
    between layers, and every layer is waited for.
    backward: count backwards, too, in rows of their own: "unet backward", "linear backward".
    trace: whether to trace memory all the time (True) or never (False).
    """

    def __init__(self, *owners, backward=False, trace=None):
        self.owners, self.xp, self.dtype = owners, np, np.dtype(np.float32)
        self.backward, self.trace = backward, trace
        self.tables = {title: defaultdict(Row) for title in ("by stage", "by block", "by op")}

    def __enter__(self):
        self.thread, self.stage_name = threading.get_ident(), None
        self.depth, self.ran = 0, {}                    # layers running; {layer: has it run}
        with ExitStack() as exits:
            self.memory = Memory()
            exits.callback(self.memory.trace, False)
            if self.trace is False:
                self.memory.trace(False)
            self.frame = [(Row(), 0)] * len(self.tables)    # for the time before, in no table
            self.held, self.now = 0, time.perf_counter()
            outer = self._begin(REST, OUTSIDE, OUTSIDE)
            exits.callback(self._end, outer)
            self.exits = exits
            for owner in self.owners:
                self.add(owner)
            self.exits = exits.pop_all()
        return self

    def __exit__(self, *exc):
        self.exits.close()

    def add(self, owner):
        """From here on count the layers in owner, too."""
        model = type(owner).__name__ if isinstance(owner, Module) else None
        layers = [(model, owner)] * bool(model) + list(named_modules(owner))
        if not layers:
            raise TinyldmError(f"Profiler expects models or a pipeline, not {owner!r:.60}")
        if first := next((layer for _, layer in layers if layer.parameters()), None):
            self.xp, self.dtype = first.xp, first.dtype
        blocks = block_names(layers)

        def count(name, layer, backward=False):
            stage, op = model or name.partition(".")[0], op_name(layer)
            names = (f"{stage} backward", blocks[layer], f"{op} backward") if backward else (
                stage, blocks[layer], op)
            product = backward_flops if backward else flops

            def counted(forward, *inputs, **options):
                if threading.get_ident() != self.thread:
                    return forward(*inputs, **options)
                if not self.depth:
                    self._cut()                         # first: switching tracing loses the peak
                    self.memory.trace(self.xp is np and not self.ran[layer] if self.trace is None
                                      else self.trace)
                outer, flop = self._begin(self.stage_name or names[0], *names[1:]), 0
                self.depth += 1
                try:
                    output = forward(*inputs, **options)
                    flop = product(layer, inputs, output)
                    return output
                finally:
                    self.depth -= 1
                    self.ran[layer] = True
                    self._end(outer, flop)
            return counted

        # Each layer once. The VAE as a whole has no forward, only its encoder and decoder.
        new = {layer: name for name, layer in layers
               if layer not in self.ran and hasattr(layer, "forward")}
        self.ran |= dict.fromkeys(new, False)
        self.exits.enter_context(forward_hooks({layer: count(new[layer], layer) for layer in new}))
        if self.backward:
            self.exits.enter_context(backward_hooks(
                {layer: count(new[layer], layer, backward=True) for layer in new}))

    @contextmanager
    def stage(self, name):
        """What runs inside is a stage of this name. Outside of any, each model is a stage."""
        before, self.stage_name = self.stage_name, name
        outer = self._begin(name, OUTSIDE, OUTSIDE)
        try:
            yield
        finally:
            self._end(outer)
            self.stage_name = before

    # ---- the pieces -------------------------------------------------------------------------

    def _begin(self, *names):
        """From here on pieces belong to these rows, one per table -> the frame before."""
        self._cut()
        outer, self.frame = self.frame, []              # a frame: (row, bytes in use at its start)
        for table, name, (current, held) in zip(self.tables.values(), names, outer):
            row = table[name]
            row.calls += row is not current
            self.frame.append((row, held if row is current else self.held))
        return outer

    def _end(self, outer, flop=0):
        self._cut()
        for row, _ in self.frame:
            row.flop += flop
        self.frame = outer
        outer[-1] = outer[-1][0], self.held             # what a layer leaves is not the outer op's

    def _cut(self):
        """End a piece here and add it to the rows of its frame."""
        (held, peak), now = self.memory.read(self.xp), time.perf_counter()
        for row, before in self.frame:
            row.seconds += now - self.now
            row.peak = max(row.peak, peak)
            row.added = max(row.added, peak - before)
        self.held, self.now = held, now

    # ---- the tables -------------------------------------------------------------------------

    @property
    def seconds(self):
        """The time of the whole run."""
        return sum(row.seconds for row in self.tables["by stage"].values())

    def __str__(self):
        rate = product_rate(self.xp, self.dtype)
        lines = []
        for title, table in self.tables.items():
            lines.append(f"{title:26}{'calls':>7}{'time, s':>10}{'share':>7}{'peak, MB':>10}"
                         f"{'added, MB':>11}{'GFLOP':>10}{'GFLOP/s':>9}{'of best':>8}")
            rows = list(table.items())
            if title == "by op":
                rows.sort(key=lambda item: -item[1].seconds)
            lines += [self._line(name, row, rate) for name, row in rows] + [""]
        return "\n".join(lines) + NOTE.format(rate / 1e9)

    def _line(self, name, row, rate):
        calls = "-" if name in (ADDITIONS, OUTSIDE, REST) else row.calls
        gflop = speed = share = "-"
        if row.flop:
            gflop, speed = f"{row.flop / 1e9:.2f}", f"{row.flop / row.seconds / 1e9:.1f}"
            share = f"{row.flop / row.seconds / rate:.0%}"
        part = row.seconds / (self.seconds or 1)
        return (f"{name:26}{calls:>7}{row.seconds:10.3f}{part:7.1%}"
                f"{row.peak / 1e6:10.1f}{row.added / 1e6:11.1f}{gflop:>10}{speed:>9}{share:>8}")


class Memory:
    """The bytes that this process's arrays and other objects use, or a GPU's arrays."""

    def __init__(self):
        self.before, self.ours = 0, not tracemalloc.is_tracing()    # in use when tracing last ended
        self.trace(True)

    def trace(self, wanted):
        """Switch tracing on or off; leave it on if it was on before the profiler."""
        if wanted and not tracemalloc.is_tracing():
            tracemalloc.start()
        elif not wanted and self.ours and tracemalloc.is_tracing():
            self.before += tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()

    def read(self, xp):
        """(held, peak): bytes in use now, and the most since the last call."""
        if xp is not np:
            xp.cuda.get_current_stream().synchronize()  # the clock is to be read after the work
            return (xp.get_default_memory_pool().used_bytes(),) * 2
        held, peak = tracemalloc.get_traced_memory()    # 0, 0 while off
        tracemalloc.reset_peak()
        return self.before + held, self.before + peak


def block_names(layers):
    """[(name, layer)], an outer layer before those inside it -> {layer: the name of its block}.

    A block is an outermost layer that is not itself made of blocks.
    """
    names, block = {}, None
    for name, layer in layers:
        if block is None or not name.startswith(block + "."):
            block = name
        names[layer] = block
        if isinstance(layer, MADE_OF_BLOCKS):
            block = None
    return names


def op_name(layer):
    """The op of a layer, or what it does besides calling the layers inside it."""
    if isinstance(layer, Conv2d):
        K, L = layer.weight.shape[:2]
        return f"conv {K}x{L}" + (f" /{layer.stride}" if layer.stride > 1 else "")
    if hasattr(layer, "op"):                            # norms and activations
        return layer.op.__name__
    if isinstance(layer, ATTENTION):
        return "attention"
    if isinstance(layer, UpBlock2D):
        return "concat"
    return ADDITIONS if any(named_modules(layer)) else type(layer).__name__.lower()


def flops(layer, inputs, output):
    """Multiplications and additions of a layer's own matrix products."""
    if isinstance(layer, (Linear, Conv2d)):             # one of each per weight and row of y
        return 2 * prod(layer.weight.shape) * prod(output.shape[:-1])
    if isinstance(layer, ATTENTION):                    # q @ k.T and its product with v
        context = [x for x in inputs if hasattr(x, "shape")][-1]        # (B,M,D) or (B,H,W,C)
        return 4 * output.size * prod(context.shape[1:-1])
    return 0


def backward_flops(layer, inputs, _):
    """The same of a backward: dx, and dweight where the layer is trained. Attention's, which runs
    its forward's products again, is not counted."""
    if isinstance(layer, (Linear, Conv2d)):
        return flops(layer, (), inputs[0]) * (1 + layer.is_trained())
    return 0


def product_rate(xp, dtype):
    """Floating-point operations per second of a 2048x2048 matrix product: the best in 0.5 s."""
    a = xp.ones((2048, 2048), np.float32 if xp is np else dtype)    # NumPy has no fast float16
    best, stop = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < stop:
        start = time.perf_counter()
        (a @ a)[0, 0].item()                            # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best
