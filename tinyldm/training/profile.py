"""--profile of a training: where the time and the memory of an update go, and what the tape holds.

    update = Profiled(update, models)       called as before; after its second call it prints
"""
import sys
import threading
from collections import Counter
from types import SimpleNamespace

from tqdm import tqdm

from ..backend import num_threads
from ..cli.profiler import ADDITIONS, Profiler, op_name
from ..tape import nbytes_of, observed

NOTE = """
Time is that of the second update, memory that of the first. The layers are those that one thread of
{} ran; the others run other pictures of the batch at the same time. peak, added: of all threads."""


class Profiled:
    """update(...), whose first call is measured for memory, which slows it, and whose second call
    for time. models: {name: module}, whose layers are counted, forward and backward."""

    def __init__(self, update, models):
        self.update, self.models = update, SimpleNamespace(**models)
        self.found, self.kept, self.lock = [], Counter(), threading.Lock()

    def __call__(self, *inputs):
        if len(self.found) == 2:
            return self.update(*inputs)
        profiler = Profiler(self.models, backward=True, trace=not self.found)
        with profiler, observed(self._keep_longest):
            report = self.update(*inputs)
        self.found.append(profiler)
        if len(self.found) == 2:
            tqdm.write(str(self), file=sys.stderr)
        return report

    def _keep_longest(self, entries):
        kinds = Counter()
        for layer, size in nbytes_of(entries):
            kind = op_name(layer)
            kinds[type(layer).__name__ if kind == ADDITIONS else kind] += size
        with self.lock:
            self.kept = max(self.kept, kinds, key=Counter.total)

    def __str__(self):
        memory, time = self.found
        for title, table in time.tables.items():
            for name, row in table.items():
                before = memory.tables[title][name]
                row.peak, row.added = before.peak, before.added
        total = self.kept.total()
        lines = [f"{'on the tape at its peak':43}{'MB':>10}{'share':>10}"]
        lines += [f"{kind:43}{size / 1e6:10.1f}{size / total:10.1%}"
                  for kind, size in self.kept.most_common() if size]
        lines += [f"{'one part of the batch':43}{total / 1e6:10.1f}"]
        return f"{time}{NOTE.format(num_threads())}\n\n" + "\n".join(lines)
