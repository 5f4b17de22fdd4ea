"""Programs under mpirun. Run as a module, this file is one: small trainings, a rank that fails."""
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from shutil import which

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT = 200           # seconds: what hangs must not stop the tests; a busy machine is slow


@cache
def launcher():
    """The command that starts ranks, without their number; or why there is none."""
    try:
        import mpi4py  # noqa: F401
    except ImportError:
        return "mpi4py is not installed"
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else which("mpirun")
    if not found:
        return "there is no mpirun"
    version = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60)
    if "Open MPI" in version.stdout or "OpenRTE" in version.stdout:
        return [found, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
    return [found]


def skip_with_open_mpi(reason):
    if "--oversubscribe" in launcher():
        pytest.skip(f"Open MPI {reason}")


def command(ranks, *arguments):
    """The command line of a module of Python in so many ranks, 1 without mpirun."""
    if isinstance(launcher(), str):
        pytest.skip(launcher())
    start = [*launcher(), "-n", str(ranks)] if ranks > 1 else []
    return [*start, sys.executable, "-m", *map(str, arguments)]


def environment(**more):
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def run(ranks, *arguments, **options):
    """Run a module in so many ranks -> a CompletedProcess. It must end by itself."""
    return subprocess.run(command(ranks, *arguments), cwd=ROOT, capture_output=True, text=True,
                          timeout=TIMEOUT, **{"env": environment()} | options)


def start(ranks, *arguments):
    """The same, running -> a Popen."""
    return subprocess.Popen(command(ranks, *arguments), cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env=environment())


def process_of(rank, word):
    """The number of the process that is this rank of a program with `word` in its command."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            if word.encode() in (process / "cmdline").read_bytes() and any(
                    f"{name}={rank}".encode() in variables
                    for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK")):
                return int(process.name)
        except OSError:                                 # it has ended
            pass
    raise AssertionError(f"no process is rank {rank} of {word}")


def trainer_of_steps(folder, steps):
    """The weights after so many steps of `waiting` in one process."""
    from tests.support.training import trainer_of

    trainer, loss = trainer_of(folder / "x.npz", 100_000)
    for _ in range(steps):
        trainer._update(loss)
    return trainer.optimizer.data


# ---- programs ---------------------------------------------------------------------------------

def shapes(folder):
    """Two steps of the toy world's stages, small. What the shards draw depends on their number."""
    from tests.support.models import SMALL_TEXT, SMALL_UNET, SMALL_VAE
    from tinyldm.shapes import autoencoder, denoiser

    autoencoder.VAE, autoencoder.BATCH = SMALL_VAE, 8
    denoiser.UNET, denoiser.TEXT_ENCODER, denoiser.POOL = SMALL_UNET, SMALL_TEXT, 64
    if (Path(folder) / "vae.npz").exists():             # only the first rank returns from a stage
        denoiser.train_unet(Path(folder), 2, batch=8)
    else:
        autoencoder.train_vae(Path(folder), 2)


def failing(folder, how):
    """A training in which rank 1 meets something at its sixth step."""
    from tests.support.training import trainer_of
    from tinyldm import ranks

    trainer, loss = trainer_of(Path(folder) / "x.npz", 300)
    trainer.save_every = 2

    def batch_loss(rng):
        report = loss(rng)
        if trainer.step == 5 and ranks.rank() == 1:
            if how == "exception":
                raise RuntimeError("the disk of rank 1 is gone")
            if how == "exit":
                sys.exit(3)
            if how == "nan":
                report["loss"] = float("nan")
            if how == "gradient":
                trainer.parameters[0].grad[:] = float("inf")
            if how == "apart":
                trainer.optimizer.data += 1
            if how == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
        return report

    trainer.train(batch_loss)


def waiting(folder):
    """A training that goes on until it is stopped; its steps take 10 ms."""
    from tests.support.training import trainer_of
    from tinyldm import ranks

    trainer, loss = trainer_of(Path(folder) / "x.npz", 100_000)
    trainer.save_every, [parameter] = 3, trainer.parameters

    def batch_loss(rng):
        time.sleep(0.01)
        report = loss(rng)
        parameter.grad /= ranks.size()                  # all ranks have the same batch
        return {"loss": report["loss"] / ranks.size()}

    trainer.train(batch_loss)


def exchange():
    """What each call does, against the same on one array."""
    import numpy as np

    from tests.support import strict
    from tinyldm import backend, ranks

    place, parts = ranks.rank(), ranks.size()
    everything = np.random.default_rng(0).standard_normal((parts, 5, 3)).astype(np.float32)
    for dtype in np.float32, np.float64:
        own = everything[place].astype(dtype)
        ranks.add_up(own)
        np.testing.assert_allclose(own, everything.astype(dtype).sum(0), rtol=1e-5)
    with strict.installed():                            # a device's array: through the host
        cupy = backend.array_library("cuda")
        assert strict.DEVICES == [0], "there is one, which the ranks share"
        own = cupy.asarray(everything[place])
        ranks.add_up(own)
        np.testing.assert_allclose(own.get(), everything.sum(0), rtol=1e-5)
        ranks.spread(own)
    count = 2 + place                                   # ranks may have different numbers of rows
    rows = np.arange(2 * count, dtype=np.float64).reshape(count, 2) + 10 * place
    stacked = ranks.stack(rows)
    start = sum(2 + other for other in range(place))
    assert (stacked[start:start + count] == rows).all()
    gradients = [np.random.default_rng(other).standard_normal(stacked.shape)
                 for other in range(parts)]             # each rank has its own
    found = ranks.stack_backward(gradients[place], count)
    np.testing.assert_allclose(found, sum(gradients)[start:start + count])
    assert ranks.gather(place) == [*range(parts)]
    assert ranks.first(lambda: f"of {place}") == "of 0"
    print(f"threads {os.environ['OMP_NUM_THREADS']}")
    for line in ranks.gather(f"rank {place} is right"):
        print(line)


if __name__ == "__main__":
    from tinyldm import ranks as started
    from tinyldm.cli.console import status

    name, *rest = sys.argv[1:]
    sys.exit(started.program(lambda: status(lambda: globals()[name](*rest))))
