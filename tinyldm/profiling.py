"""Where a run's time and memory go: by stage, by block and by op.

    with Profiler(pipe) as profile:                     # or of one model: Profiler(pipe.unet)
        pipe("a red circle on a blue background")
    print(profile)

A run is cut into pieces wherever a layer begins or ends. Each piece, with the arithmetic done in
it, belongs to one stage, one block and one op, so each of the three tables adds up to the whole.
Beside pipeline.py, which knows nothing of it; `python -m tinyldm "..." --profile` prints it.
"""
import threading
import time
import tracemalloc
from contextlib import ExitStack, contextmanager
from math import prod

import numpy as np

from .backend import get_xp
from .layers import (
    Activation,
    Conv2d,
    Embedding,
    GroupNorm,
    GroupNormSiLU,
    LayerNorm,
    Linear,
    Module,
    Upsample,
    named_modules,
    watching,
)
from .models import AutoencoderKL, UNet2DConditionModel
from .models.blocks import Attention
from .models.clip import CLIPAttention
from .models.unet import UpBlock2D
from .models.vae import Decoder, Encoder, SpatialAttention

# What a layer does itself, besides the layers inside it; of the layers not named here, additions.
ATTENTION = (Attention, CLIPAttention, SpatialAttention)
OPS = {Linear: "linear", GroupNorm: "group norm", GroupNormSiLU: "group norm + SiLU",
       LayerNorm: "layer norm", Embedding: "embedding", Upsample: "upsample",
       UpBlock2D: "concat", **dict.fromkeys(ATTENTION, "attention")}
ADDITIONS, OUTSIDE, REST = "additions, the rest", "outside the models", "the rest"
# A block is an outermost layer that is none of these.
MADE_OF_BLOCKS = UNet2DConditionModel, AutoencoderKL, Encoder, Decoder

NOTE = """\
MB: 1e6 bytes of arrays and other objects. peak: the most held at a time. added: the most above what
was held at the beginning. Weights used straight from their file's memory map do not count.
GFLOP: 1e9 multiplications and additions of the matrix products. A convolution counts as defined;
Winograd's needs fewer, so it may show more GFLOP/s than the machine can do.
of best: a share of the {:.0f} GFLOP/s that a product of 2048x2048 matrices reached just now."""


class Row:
    """A line of a table: calls, seconds, floating-point operations, bytes of memory."""

    def __init__(self):
        self.calls = self.seconds = self.flop = self.peak = self.added = 0


class Profiler:
    """Counts, inside a `with`, what the layers of its owners do: models, or what holds some.

    tables: {"by stage": {name: Row}, "by block": …, "by op": …}. Layers are counted that run in the
    thread that entered. Memory is that of the whole process; on a GPU what its pool holds between
    layers. There every layer's end is waited for, so its run is slower than without.
    """

    def __init__(self, *owners):
        self.owners, self.xp, self.dtype = owners, np, np.dtype(np.float32)
        self.tables = {"by stage": {}, "by block": {}, "by op": {}}

    def __enter__(self):
        self.thread, self.stage_name = threading.get_ident(), None
        self.frames, self.flop = [], {}                 # of each layer, its last forward's
        with ExitStack() as exits:
            if not tracemalloc.is_tracing():
                tracemalloc.start()
                exits.callback(tracemalloc.stop)
            self.held, self.now = memory(self.xp)[0], time.perf_counter()
            self._begin(REST, OUTSIDE, OUTSIDE)
            exits.callback(self._end)
            self.exits = exits
            for owner in self.owners:
                self.watch(owner)
            self.exits = exits.pop_all()
        return self

    def __exit__(self, *exc):
        self.exits.close()

    def watch(self, owner):
        """From here on count the layers in owner, too."""
        model = type(owner).__name__ if isinstance(owner, Module) else None
        layers = [(model, owner)] * bool(model) + list(named_modules(owner))
        parameter = next(parameter for _, layer in layers for parameter in layer.parameters())
        self.xp, self.dtype = get_xp(parameter.data), parameter.data.dtype
        blocks = block_names(layers)

        def watch(name, layer, forward):
            stage, op = model or name.partition(".")[0], op_name(layer)

            def counted(*inputs, **options):
                if threading.get_ident() != self.thread:
                    return forward(*inputs, **options)
                self._begin(self.stage_name or stage, blocks[layer], op)
                flop = 0
                try:
                    output = forward(*inputs, **options)
                    flop = flops(layer, inputs, output)
                    return output
                finally:
                    self._end(flop)
            return counted

        # The VAE as a whole has no forward, only its encoder and its decoder have.
        layers = [(name, layer) for name, layer in layers if hasattr(layer, "forward")]
        self.exits.enter_context(watching(layers, watch))

    @contextmanager
    def stage(self, name):
        """What runs inside is a stage of this name. Outside of all, a model's run is one."""
        before, self.stage_name = self.stage_name, name
        self._begin(name, OUTSIDE, OUTSIDE)
        try:
            yield
        finally:
            self._end()
            self.stage_name = before

    # ---- the pieces -------------------------------------------------------------------------

    def _begin(self, *names):
        """The pieces from here on belong to these rows, one of each table."""
        self._cut()
        rows = [table.setdefault(name, Row()) for table, name in zip(self.tables.values(), names)]
        before = self.frames[-1] if self.frames else [(None, 0)] * len(rows)
        frame = []                                      # (row, bytes held at its beginning)
        for row, (current, held) in zip(rows, before):
            row.calls += row is not current
            frame.append((row, held if row is current else self.held))
        self.frames.append(frame)

    def _end(self, flop=0):
        self._cut()
        for row, _ in self.frames.pop():
            row.flop += flop

    def _cut(self):
        """Count the piece that ends here to the innermost layer's rows."""
        (held, peak), now = memory(self.xp), time.perf_counter()
        for row, before in self.frames[-1] if self.frames else ():
            row.seconds += now - self.now
            row.peak, row.added = max(row.peak, peak), max(row.added, peak - before)
        self.held, self.now = held, now

    # ---- the tables -------------------------------------------------------------------------

    @property
    def seconds(self):
        """Of the whole run."""
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
        return (f"{name:26}{calls:>7}{row.seconds:10.3f}{row.seconds / self.seconds:7.1%}"
                f"{row.peak / 1e6:10.1f}{row.added / 1e6:11.1f}{gflop:>10}{speed:>9}{share:>8}")


def memory(xp):
    """(held, peak): bytes held now, and the most since the last call."""
    if xp is np:
        held_and_peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        return held_and_peak
    xp.cuda.get_current_stream().synchronize()          # so that the clock is read after the work
    return (xp.get_default_memory_pool().used_bytes(),) * 2


def block_names(layers):
    """{layer: the name of the block it is in}, of (name, layer), outer layers before inner ones."""
    names, block = {}, None
    for name, layer in layers:
        if block is None or not name.startswith(block + "."):
            block = name
        names[layer] = block
        if isinstance(layer, MADE_OF_BLOCKS):
            block = None
    return names


def op_name(layer):
    if isinstance(layer, Conv2d):
        K = layer.weight.shape[0]
        return f"conv {K}x{K}" + (f" /{layer.stride}" if layer.stride > 1 else "")
    if isinstance(layer, Activation):
        return layer.op.__name__
    return OPS.get(type(layer), ADDITIONS)


def flops(layer, inputs, output):
    """Multiplications and additions of the matrix products in a layer itself."""
    if isinstance(layer, (Linear, Conv2d)):             # every weight meets every row of y once
        return 2 * prod(layer.weight.shape) * prod(output.shape[:-1])
    if isinstance(layer, ATTENTION):                    # q @ k.T and its product with v
        context = [x for x in inputs if hasattr(x, "shape")][-1]        # (B,M,D) or (B,H,W,C)
        return 4 * output.size * prod(context.shape[1:-1])
    return 0


def product_rate(xp, dtype):
    """Floating-point operations a second of a 2048x2048 matrix product, the best of half a second.
    """
    a = xp.ones((2048, 2048), np.float32 if xp is np else dtype)    # NumPy has no fast float16
    best, stop = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < stop:
        start = time.perf_counter()
        (a @ a)[0, 0].item()                            # which waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best
