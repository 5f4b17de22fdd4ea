"""A training step in two ranks of one thread, against one process; and what the exchange costs.

    python -m tests.benchmarks.ranks [--batch 32] [--rounds 5] [--json PATH]

A step is Trainer's, of the bundled UNet in full: forward, backward, the sum over the ranks, AdamW
with clipping and averaged weights. The exchange is that sum alone, beside the same addition of two
arrays in one process. Each run is a process of its own, or two under mpirun.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.benchmarks import timing
from tests.support.ranks import launcher
from tinyldm import backend, load_model, ops, ranks
from tinyldm.checkpoints import resolve
from tinyldm.layers import Tape
from tinyldm.shapes.configs import LATENT_CHANNELS
from tinyldm.training.loop import Trainer
from tinyldm.training.shards import split_batch

# Numbers of the gradient: a LoRA of rank 4 on SD 1.5's attention, the bundled UNet, SD 1.5's UNet.
SIZES = {"a LoRA of SD 1.5, 3.2 MB": 797_184, "the bundled UNet, 22 MB": None,
         "SD 1.5's UNet, 3.4 GB": 859_520_964}
LARGEST = 25_000_000        # numbers that are exchanged at a time: of a larger gradient, a part
REPEATS = 2


def main():
    parser = timing.arguments("Two ranks beside one process", rounds=5)
    parser.add_argument("--batch", type=int, default=32, help="latents of a step (32)")
    parser.add_argument("--run", choices=("step", "exchange", "add"), help="one run of one of them")
    args = parser.parse_args()
    if args.run:
        return print(json.dumps({"step": steps, "exchange": exchanges, "add": additions}
                                [args.run](args.batch)))
    if isinstance(launcher(), str):
        sys.exit(launcher())

    def run(what, processes, threads):
        start = [*launcher(), "-n", str(processes)] if processes > 1 else []
        command = [*start, sys.executable, "-m", "tests.benchmarks.ranks", "--run", what, "--batch",
                   str(args.batch)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100,
                              env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    step = timing.in_turns({contestant: contestant for contestant in
                            (("step", 2, 1), ("step", 1, 1), ("step", 1, 2))}, args.rounds,
                           warm_up=False, measure=lambda contestant: run(*contestant))
    sums = timing.in_turns({"exchange": ("exchange", 2, 1), "add": ("add", 1, 1)}, args.rounds,
                           warm_up=False, measure=lambda contestant: run(*contestant))
    what = f"a step of the bundled UNet, batch {args.batch}"
    rows = [(f"{what}, 1 thread", "s", {"tinyldm": step["step", 2, 1],
                                        "one process": step["step", 1, 1]}),
            (f"{what}, 2 threads", "s", {"tinyldm": step["step", 2, 1],
                                         "one process": step["step", 1, 2]})]
    rows += [(f"the exchange of {name}", "s",
              {"tinyldm": [found[name] for found in sums["exchange"]],
               "one process": [found[name] for found in sums["add"]]}) for name in SIZES]
    timing.report("Two ranks of one thread", rows, "one process", args.json)


def steps(batch):
    """Seconds of one step, the mean of several."""
    backend.keep_freed_memory()
    unet, rng = load_model(resolve() / "unet", np.float32), np.random.default_rng(0)
    x_t, target = rng.standard_normal((2, batch, 16, 16, LATENT_CHANNELS), np.float32)
    context = rng.standard_normal((batch, 77, 128), np.float32)
    timesteps = rng.integers(1000, size=batch)

    def loss_of(x_t, timesteps, context, target, share):
        tape = Tape()
        loss, cache = ops.mse(unet(x_t, timesteps, context, tape), target)
        unet.backward(ops.mse_backward(np.float32(share), cache)[0], tape)
        return {"loss": share * loss}

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Path(folder) / "x.npz", unet.named_parameters(), 100, 1e-4)
        for number in range(1 + REPEATS):
            if number == 1:                             # the first one warms up
                begun = time.perf_counter()
            trainer._update(lambda _: split_batch(loss_of, [x_t, timesteps, context, target]))
    return (time.perf_counter() - begun) / REPEATS


def exchanges(_):
    """{name: seconds of ranks.add_up}."""
    return _timed(ranks.add_up)


def additions(_):
    """{name: seconds of a += b}."""
    return _timed(lambda array: np.add(array, array, out=array))


def _timed(run):
    found = {}
    for name, size in SIZES.items():
        size = size or sum(parameter.data.size for parameter in
                           load_model(resolve() / "unet", np.float32).parameters())
        part = np.zeros(min(size, LARGEST), np.float32)
        taken = []
        for _ in range(1 + REPEATS):
            ranks.gather(None)                          # both begin at the same time
            begun = time.perf_counter()
            run(part)
            taken.append(time.perf_counter() - begun)
        found[name] = min(taken[1:]) * size / part.size
    return found


if __name__ == "__main__":
    sys.exit(ranks.program(main))
