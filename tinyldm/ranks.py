"""Several processes of one program, as `mpirun -n 2 python -m tinyldm...` starts them: its ranks.

Each rank computes its part, and the first, rank 0, is the only one that writes and says anything:

    program(main)           a program's outermost call: one of the ranks, or all there is
    add_up(array)           the sum over all ranks, on each of them
    share(count)            the part of `count` things that this rank does
    first(function)         what the first rank found, on each of them

Without mpirun there is one rank, and nothing here imports mpi4py. The calls that exchange something
are collective: every rank makes the same ones in the same order, or all wait for ever. So what is
decided by one rank's clock, files or signals is exchanged before anyone acts on it.
Source: MPI: A Message-Passing Interface Standard 4.1, chapter 6, "Collective Communication".
"""
import functools
import io
import os
import sys
import time
import traceback
import warnings
from collections import deque

from .errors import TinyldmError

SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")    # set by the mpirun of Open MPI, and of MPICH
GRACE = 2.0             # seconds in which the first rank may say what is wrong with all
PASSED_ON = 0.5         # seconds in which mpirun prints what a rank said: abort drops the rest
LAST_LINES = 30         # of a rank that fails

_alone = False          # the other ranks have ended


@functools.cache
def _world():
    """MPI's communicator of all ranks; None without mpirun. Raises TinyldmError without mpi4py."""
    started = max(int(os.environ.get(name) or 1) for name in SIZES)
    if started == 1:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # of the wrong mpirun: said below
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:        # RuntimeError: it finds no MPI library
        reason = (str(error).splitlines() or ["it cannot be imported"])[0]
        raise TinyldmError(f"mpirun started {started} processes, but mpi4py cannot connect them "
                           f"({reason}): pip install 'tinyldm[mpi]', or leave mpirun out") from None
    if MPI.COMM_WORLD.size != started:
        library = " ".join(MPI.Get_library_version().split("\n")[0].split())
        raise TinyldmError(f"mpirun started {started} processes, but mpi4py sees "
                           f"{MPI.COMM_WORLD.size}, because it uses {library}: start them with the "
                           "mpirun of that library")
    return MPI.COMM_WORLD


def rank():
    """The number of this rank, from 0."""
    return _world().rank if _world() else 0


def size():
    """How many ranks there are."""
    return _world().size if _world() else 1


@functools.cache
def neighbours():
    """The ranks on this machine: the place of this one among them, and their cores per rank."""
    if not _world():
        return 0, None
    from mpi4py import MPI
    here = _world().Split_type(MPI.COMM_TYPE_SHARED)
    cores = (os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity")
             else {*range(os.cpu_count() or 1)})
    # Open MPI binds ranks to cores of their own, MPICH lets each use all.
    return here.rank, max(1, len(set().union(*here.allgather(cores))) // here.size)


# ---- the exchange -----------------------------------------------------------------------------

def share(count):
    """The part of range(count) that is this rank's: neighbours, the first rank has the longest."""
    parts = size()
    start, end = (-(-count * number // parts) for number in (rank(), rank() + 1))
    return range(start, end)


def add_up(array):
    """Sum a contiguous float32 or float64 array over all ranks, in place; each has the same bits.

    The numbers of a GPU go through the host, because MPI libraries seldom read a GPU's memory.
    """
    if _world():
        _in_place(array, _sum)


def spread(array):
    """Give every rank the first rank's numbers of an array, in place."""
    if _world():
        _in_place(array, lambda host: _world().Bcast(host, root=0))


def _sum(host):
    from mpi4py import MPI
    _world().Allreduce(MPI.IN_PLACE, host, op=MPI.SUM)


def _in_place(array, run):
    from .backend import asarray, to_host  # here: it imports NumPy
    host = to_host(array)
    run(host)
    if host is not array:
        array[...] = asarray(host, like=array)


def stack(array):
    """Rows (n,...) of each rank, on the host -> all rows, in the order of the ranks."""
    if not _world():
        return array
    import numpy as np
    return np.concatenate(gather(array))


def stack_backward(dstacked, count):
    """The gradient (N,...) of `stack`'s result on each rank -> that of this rank's `count` rows.

    Every rank has used all rows, so the gradients are added over the ranks.
    """
    if not _world():
        return dstacked
    start, dstacked = sum(gather(count)[:rank()]), dstacked.copy()
    add_up(dstacked)
    return dstacked[start:start + count]


def gather(value):
    """-> [value of each rank], on every rank."""
    return _world().allgather(value) if _world() else [value]


def first(function):
    """function() of the first rank, for all ranks; its TinyldmError is raised on all.

    No rank goes on before all have come here.
    """
    if not _world():
        return function()
    found, error = None, None
    if rank() == 0:
        try:
            found = function()
        except TinyldmError as problem:
            error = problem
    found, error = gather((found, error))[0]
    if error:
        raise error
    return found


def leave_to_first():
    """End all ranks except the first, by SystemExit. From now on the first one is alone.

    Every rank must come here, so that none waits for another.
    """
    global _alone
    if rank():
        raise SystemExit
    _alone = True


# ---- a program --------------------------------------------------------------------------------

def program(main):
    """Run main() -> its exit status. Where one rank fails, all end, with its status.

    MPI would leave the others waiting for it. Ranks besides the first are silent; only what one of
    them alone fails of is said.
    """
    try:
        world = _world()
    except TinyldmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not world:
        return main()
    # Before NumPy is imported, whose BLAS reads it then.
    os.environ.setdefault("OMP_NUM_THREADS", str(neighbours()[1]))
    said, heard = sys.stderr, None
    if rank():
        sys.stdout, sys.stderr = open(os.devnull, "w"), (heard := _LastLines())
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if code and not _alone:
        if heard:
            time.sleep(GRACE)                           # it ends here if the first rank fails, too
            lines = [*heard.text().splitlines(), f"ended with status {code}, and the others "
                     "with it; what was saved last stays"]
            said.write("".join(["\n", *(f"rank {rank()}: {line}\n" for line in lines)]))
        sys.stdout.flush()
        said.flush()
        time.sleep(PASSED_ON)
        world.Abort(code if isinstance(code, int) else 1)
    return code


class _LastLines(io.TextIOBase):
    """Standard error of a silent rank."""

    def __init__(self):
        self.parts = deque(maxlen=20 * LAST_LINES)

    def write(self, text):
        self.parts.append(text)
        return len(text)

    def text(self):
        """What was written, from the error on; empty without one."""
        text = "".join(self.parts)
        start = max(text.rfind("Traceback (most"), text.rfind("error: "))
        return text[start:] if start >= 0 else ""
