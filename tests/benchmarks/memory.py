"""Memory at SD 1.5's size from float16 weights, against limits: --low-memory, and larger pictures.

    python -m tests.benchmarks.memory [--steps 2] [--size 512] [--rounds 5] [--folder PATH]
        [--json PATH]

Linux only. The weights are random, made in a temporary folder (2.1 GB), or in one that stays.

The command is run with --low-memory and without. What a process holds resident is of two kinds:
anonymous memory is its own (RssAnon and RssShmem in /proc/PID/status), and pages of files are a
copy of what is on the disk (RssFile), chiefly of the mapped weights: the system drops and reads
them again as it likes. The peak of each is that of samples 20 ms apart; the peak of the two
together is the kernel's own (VmHWM) and misses nothing. With --low-memory a picture of 512x512 may
take 2.5 GB of anonymous memory, and 1.5 times the time.

Then one call of the UNet, batch 1, in a process of its own for every size: the most that is held
besides the weights, in arrays and other Python objects (tracemalloc). With the size it may grow as
the number of tokens, not as its square, as a matrix of all attention scores would.
"""
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

from tests.benchmarks import timing
from tests.benchmarks.picture import commands, with_weights

GIGABYTES, SLOWDOWN = 2.5, 1.5
SIZES = 64, 96, 128         # of latents; the first one's memory sets the limit of the others
EVERY = 0.02                # seconds between two samples
KINDS = {"time, s": "seconds", "anonymous, GB": "anonymous", "of files, GB": "of_files",
         "together, GB": "together"}


def main():
    parser = timing.arguments("Memory at SD 1.5's size", rounds=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of PNDM (2)")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels (512)")
    parser.add_argument("--folder", type=Path, help="keep the weights there (a temporary folder)")
    parser.add_argument("--call", type=int, help="only print the bytes that one call of the UNet "
                        "takes at this size of latents, with the weights in --folder")
    args = parser.parse_args()
    if args.call:
        return print(bytes_of_a_call(args.folder, args.call))
    with tempfile.TemporaryDirectory() as temporary:
        folder = with_weights(args.folder or Path(temporary) / "random-sd15")
        ours = commands(folder, args.steps, args.size, Path(temporary))["tinyldm"]
        usual = [sys.executable, *ours]
        runs = timing.in_turns({"without": usual, "--low-memory": [*usual, "--low-memory"]},
                               args.rounds, warm_up=False, measure=watch)
        show(runs)
        case = f"{args.size}x{args.size} pixels, {args.steps} steps"
        figures = rows(runs, case, folder, args.rounds)
        timing.report("Stable Diffusion 1.5's memory", figures, "limit", args.json)


def rows(runs, case, folder, rounds):
    usual, low = runs["without"], runs["--low-memory"]
    yield f"{case}, --low-memory: time", "s", {
        "tinyldm": [run["seconds"] for run in low],
        "limit": [SLOWDOWN * run["seconds"] for run in usual]}
    yield f"{case}, --low-memory: anonymous memory", "GB", {
        "tinyldm": [run["anonymous"] for run in low], "limit": [GIGABYTES] * rounds}
    calls = timing.in_turns({size: size for size in SIZES}, rounds, warm_up=False,
                            measure=lambda size: gigabytes_of_a_call(folder, size))
    first, *larger = SIZES
    for size in larger:
        yield f"a call of the UNet, {size}x{size} latents: arrays", "GB", {
            "tinyldm": calls[size],
            "limit": [(size / first) ** 2 * gigabytes for gigabytes in calls[first]]}


def show(runs):
    """Print the medians of what was measured of the command, with --low-memory and without."""
    print(f"{'':16}" + "".join(f"{kind:>16}" for kind in KINDS))
    for name, samples in runs.items():
        medians = (statistics.median(run[key] for run in samples) for key in KINDS.values())
        print(f"{name:16}" + "".join(f"{median:16.3f}" for median in medians))


# ---- what is measured -----------------------------------------------------------------------

def watch(command):
    """Run a command to its end -> its wall time in seconds and peaks in gigabytes, see KINDS."""
    peaks = dict.fromkeys(("anonymous", "of_files", "together"), 0)
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while child.poll() is None:
            for kind, held in resident(child.pid).items():
                peaks[kind] = max(peaks[kind], held)
            try:
                child.wait(EVERY)
            except subprocess.TimeoutExpired:
                pass
        seconds = time.perf_counter() - start
        if child.returncode:
            errors.seek(0)
            sys.exit(f"{' '.join(command)} exited with {child.returncode}:\n{errors.read()}")
    return {"seconds": seconds, **peaks}


def resident(pid):
    """What a running process holds now, in gigabytes; together: the most it has held so far."""
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    sizes = {name: 1024 * int(kilobytes) / 1e9
             for name, kilobytes in re.findall(r"(\w+):\s+(\d+) kB", status)}
    if "VmHWM" not in sizes:                            # it has just ended
        return {}
    return {"anonymous": sizes["RssAnon"] + sizes["RssShmem"], "of_files": sizes["RssFile"],
            "together": sizes["VmHWM"]}


def gigabytes_of_a_call(folder, size):
    command = [sys.executable, "-m", "tests.benchmarks.memory", "--folder", folder, "--call",
               str(size)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) / 1e9


def bytes_of_a_call(folder, size):
    """The most that one call of the UNet holds besides the weights, scratch memory included."""
    from tests.benchmarks.unet import make_inputs
    from tinyldm.checkpoints import load_model

    unet, inputs = load_model(folder / "unet", None), make_inputs(1, size)
    tracemalloc.start()
    unet(*inputs)
    return tracemalloc.get_traced_memory()[1]


if __name__ == "__main__":
    main()
