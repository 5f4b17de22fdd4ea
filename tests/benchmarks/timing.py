"""What the benchmarks share: timing in turns, processes measured from outside, one table.

Contestants alternate, A B A B, so that a machine that slows down for a minute slows both; the ratio
is that of their medians, ours to the reference's: below 1 is faster or smaller than the reference.
"""
import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.figures import amount
from tinyldm import backend
from tinyldm.cli.profiler import Profiler

PAUSE = 0.2                 # seconds
SHORT = 1                   # seconds


def arguments(description, rounds):
    """A parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"runs of each ({rounds})")
    parser.add_argument("--json", metavar="PATH", help="write the numbers there as well")
    return parser


def seconds(function):
    """Of one call; of a short one the second: after a pause all threads have to wake up first."""
    for _ in range(2):
        start = time.perf_counter()
        function()
        taken = time.perf_counter() - start
        if taken > SHORT:
            break
    return taken


def in_turns(contestants, rounds, warm_up=True, measure=seconds):
    """{name: contestant} -> {name: [measure(contestant) in every round]}, A B A B.

    Threads that one has left spinning in wait for more work would slow the next one down: a pause.
    """
    results = {name: [] for name in contestants}
    for number in range(-int(warm_up), rounds):
        for name, contestant in contestants.items():
            time.sleep(PAUSE)
            result = measure(contestant)
            if number >= 0:
                results[name].append(result)
    return results


def profile(module, function):
    """Print where time and memory of one call go, after a first one."""
    function()
    with Profiler(module) as profile:
        function()
    print(profile)


def process(command):
    """Run a command to its end -> {"seconds": wall time, "gigabytes": peak resident memory}.

    POSIX only. On Linux a child's peak starts at its parent's, so the caller must be small itself.
    """
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    error = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(map(str, command))} exited with {child.returncode}:\n{error[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": seconds, "gigabytes": usage.ru_maxrss * unit / 1e9}


def processes(commands, rounds):
    """{name: arguments of this Python}, run in turns -> {name: [seconds]}, {name: [gigabytes]}."""
    commands = {name: [sys.executable, *command] for name, command in commands.items()}
    samples = in_turns(commands, rounds, warm_up=False, measure=process)
    return [{name: [run[quantity] for run in runs] for name, runs in samples.items()}
            for quantity in ("seconds", "gigabytes")]


def machine():
    """What the numbers depend on."""
    from importlib.metadata import version

    from threadpoolctl import threadpool_info

    blas = {f"{pool['internal_api']} {pool['version']}" for pool in threadpool_info()
            if pool["user_api"] == "blas"}
    return {"machine": f"{platform.system()} {platform.machine()}, {_processor()}",
            "cores": os.cpu_count(), "threads": backend.num_threads(),
            "load": round(os.getloadavg()[0], 1), "python": platform.python_version(),
            "blas": ", ".join(sorted(blas)),
            **{name: version(name) for name in ("numpy", "torch", "diffusers", "transformers")}}


def _processor():
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
        return re.search(r"model name\s*: (.*)", text)[1]
    except (OSError, TypeError):                        # another system; another kind of processor
        return platform.processor()


def report(title, rows, reference, path=None, **more):
    """Print the medians and ratio of each row as soon as it is there; to a path, write JSON too.
    more: of the machine.

    rows: (what, unit, {contestant: [numbers]}) each, the contestants "tinyldm" and the reference.
    """
    about = machine() | more
    print(f"\n{title}\n" + ", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{'':46}{'tinyldm':>12}{reference:>18}{'ratio':>8}")
    figures = []
    for what, unit, samples in rows:
        ours, theirs = (statistics.median(samples[name]) for name in ("tinyldm", reference))
        print(f"{what:46}{amount(ours, unit):>12}{amount(theirs, unit):>18}{ours / theirs:8.3f}",
              flush=True)
        figures.append({"what": what, "unit": unit, "ratio": ours / theirs, "samples": samples})
    if path:
        content = {"title": title, "reference": reference, "about": about, "figures": figures}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", "utf-8")
