"""What the benchmarks share: timing in turns, processes measured from outside, one table.

Contestants alternate, A B A B, so that a machine that slows down for a minute slows both; their
medians are divided by the reference's: below 1 is faster or smaller than the reference.
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

from tinyldm import backend
from tinyldm.profiling import Profiler


def arguments(description, rounds):
    """A parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"runs of each ({rounds})")
    parser.add_argument("--json", metavar="PATH", help="write the numbers there as well")
    return parser


def in_turns(contestants, rounds, warm_up=True):
    """{name: function} -> {name: [the dict it returned, or else its seconds]}, A B A B."""
    results = {name: [] for name in contestants}
    for number in range(-int(warm_up), rounds):
        for name, function in contestants.items():
            start = time.perf_counter()
            result = function()
            seconds = time.perf_counter() - start
            if number >= 0:
                results[name].append(result if isinstance(result, dict) else seconds)
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
    """{name: arguments of this Python}, run in turns -> {quantity: {name: [numbers]}}."""
    contestants = {name: lambda command=command: process([sys.executable, *command])
                   for name, command in commands.items()}
    samples = in_turns(contestants, rounds, warm_up=rounds > 1)
    quantities = {"wall time, s": "seconds", "peak memory, GB": "gigabytes"}
    return {quantity: {name: [run[key] for run in runs] for name, runs in samples.items()}
            for quantity, key in quantities.items()}


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


def report(title, tables, reference, path=None):
    """Print each contestant's median and its ratio to the reference's; to a path, write JSON too.

    tables: {quantity: {contestant: [numbers]}}; reference: one of the contestants.
    """
    about = machine()
    print(f"\n{title}\n" + ", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{'':40}{'median':>10}  / {reference}")
    results = {}
    for quantity, samples in tables.items():
        medians = {name: statistics.median(numbers) for name, numbers in samples.items()}
        ratios = {name: median / medians[reference] for name, median in medians.items()}
        print(quantity)
        for name in samples:
            print(f"  {name:38}{medians[name]:10.3f}{ratios[name]:10.3f}")
        results[quantity] = {"medians": medians, "ratios": ratios, "samples": samples}
    if path:
        content = {"title": title, "reference": reference, "about": about, "results": results}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", "utf-8")
