"""What the arrays run on: NumPy or CuPy, plain ops or fast twins, memory, and worker threads.

All other code asks an array for its library (`get_xp`) and does not import CuPy itself, so the same
code runs on the CPU and on the GPU. This file imports only the error class and ranks.py.
"""
import contextlib
import contextvars
import ctypes
import functools
import inspect
import math
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

from . import ranks
from .errors import TinyldmError

_plain = contextvars.ContextVar("plain", default=os.environ.get("TINYLDM_PLAIN", "0") == "1")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3          # from malloc.h
_in_worker = contextvars.ContextVar("in_worker", default=False)


def get_xp(array):
    """The library that an array belongs to: numpy or cupy."""
    if isinstance(array, (np.ndarray, np.generic)):
        return np
    import cupy
    return cupy.get_array_module(array)


def asarray(array, like):
    """Copy an array to the device of `like`. The dtype does not change."""
    xp = get_xp(like)
    return xp.asarray(array.get() if xp is np and hasattr(array, "get") else array)


def to_host(array):
    """The same numbers as a NumPy array."""
    return array.get() if hasattr(array, "get") else array      # CuPy arrays have it


def wide(dtype):
    """The dtype in which to add up numbers of a dtype: float32 for float16, otherwise the same."""
    return np.promote_types(dtype, np.float32)


def widen(x):
    """float16 as float32, because sums and exponentials need more digits; wider types unchanged."""
    return x.astype(wide(x.dtype), copy=False)


def add_up(x, axis):
    """x.sum(axis) in x's dtype. float16 is added up in float32, which CuPy does not always do."""
    if axis == 0 and x.ndim == 2 and fast_on_gpu(x):
        # CuPy's sum has one block of threads for some columns, too few to fill a GPU. cuBLAS adds
        # up in float32.
        return (get_xp(x).ones((1, len(x)), x.dtype) @ x)[0]
    return x.sum(axis=axis, dtype=wide(x.dtype)).astype(x.dtype, copy=False)


def is_finite(x):
    """Whether x (...) holds neither infinity nor NaN."""
    if get_xp(x) is not np or x.dtype != np.float16:
        return bool(get_xp(x).isfinite(x).all())
    # NumPy's isfinite takes 25 times as long as looking at the bits: in infinity and NaN, all bits
    # of the exponent are 1.
    bits, block = x.reshape(-1).view(np.uint16), 1 << 16
    return all((bits[i:i + block] & 0x7c00).max() < 0x7c00 for i in range(0, bits.size, block))


def array_library(device):
    """numpy for "cpu", cupy for "cuda".

    Raises TinyldmError for other names, and if CuPy or a GPU is missing.
    """
    if device == "cpu":
        return np
    if device != "cuda":
        raise TinyldmError(f"device must be cpu or cuda, not {device!r}")
    try:
        import cupy
        count, reason = cupy.cuda.runtime.getDeviceCount(), ""
    except ImportError:
        raise TinyldmError("device cuda needs CuPy, which is not installed: "
                           "pip install 'tinyldm[gpu]', or use --device cpu") from None
    except Exception as error:                          # without a driver: CuPy's own kinds
        count, reason = 0, f" ({str(error).splitlines()[0]})"
    if count == 0:
        raise TinyldmError(f"device cuda needs an NVIDIA GPU, and CuPy finds none{reason}: "
                           "use --device cpu")
    if ranks.size() > 1:                                # those of a machine take its GPUs in turn
        cupy.cuda.Device(ranks.neighbours()[0] % count).use()
    return cupy


# ---- plain or fast --------------------------------------------------------------------------

@contextlib.contextmanager
def plain(on=True):
    """Within this block, run every op as written in ops/, without its fast twin from kernels/.

    on=False: use the fast twins again.
    """
    token = _plain.set(on)
    try:
        yield
    finally:
        _plain.reset(token)


def fast(x):
    """Whether the float32 NumPy twins in kernels/ may be used for x."""
    return type(x) is np.ndarray and x.dtype == np.float32 and not _plain.get()


def fast_on_gpu(x):
    """Whether the CuPy twins in kernels/cuda.py, for float16 and float32, may be used for x."""
    return (not isinstance(x, (np.ndarray, np.generic)) and x.dtype in (np.float16, np.float32)
            and not _plain.get())


def fast_twin(cpu=None, gpu=None):
    """Decorator: run the op's fast twin if there is one for the first argument's library and dtype.

    A twin has the same signature and the same results as the op. For arguments that it does not
    support, it returns NotImplemented, and the op itself runs.
    """
    def decorate(op):
        first, *_ = inspect.signature(op).parameters

        @functools.wraps(op)
        def dispatch(*args, **options):
            x = args[0] if args else options[first]
            twin = cpu if fast(x) else gpu if gpu and fast_on_gpu(x) else None
            result = twin(*args, **options) if twin else NotImplemented
            return op(*args, **options) if result is NotImplemented else result
        dispatch.cpu, dispatch.gpu = cpu, gpu
        return dispatch
    return decorate


# ---- memory ---------------------------------------------------------------------------------

def keep_freed_memory():
    """Let the C library keep up to 2 GiB of freed memory for the next arrays.

    Every layer makes and drops maps of several MB. If their memory went back to the system, the
    next maps would get new pages, which the system must fill with zeros and which are in no cache.
    That costs a tenth of the time of SD 1.5's VAE (`python -m tests.benchmarks.leads`). The setting
    holds for the whole process. Only glibc has it; with other libraries nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    if not mallopt(_M_MMAP_THRESHOLD, 1 << 30):         # larger arrays are not kept
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)             # the largest value of older versions
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


_scratch = {}                           # {(thread, name): numbers}


def scratch(name, *shape):
    """Uninitialised float32 numbers, in the same memory for all calls of a thread with one name.

    A kernel must not return them, because the next call with the name overwrites them. New memory
    would cost a page fault every few KiB in the innermost loops.
    """
    key, size = (threading.get_ident(), name), math.prod(shape)
    flat = _scratch.get(key)
    if flat is None or flat.size < size:
        flat = _scratch[key] = np.empty(size, np.float32)
    return flat[:size].reshape(shape)


def free_scratch():
    """Free the scratch memory of all threads. Kernels that are running keep what they use."""
    _scratch.clear()


# ---- worker threads -------------------------------------------------------------------------

def num_threads():
    """The number of threads: OMP_NUM_THREADS if set, otherwise the cores this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_threads():
    """The number of threads that can share work here: inside a worker thread only 1."""
    return 1 if _in_worker.get() else num_threads()


class _Workers:
    """The pool of worker threads. While it is in use (`with`), BLAS is limited to one thread.

    The limit holds for the process, so callers in different threads share one count: the first
    sets the limit, the last to leave lifts it.
    """

    def __init__(self):
        self.lock, self.inside, self.pool, self.controller = threading.Lock(), 0, None, None

    def __enter__(self):
        with self.lock:
            if self.pool is None:
                from threadpoolctl import ThreadpoolController
                self.controller = ThreadpoolController()
                self.pool = ThreadPoolExecutor(max(1, num_threads() - 1),
                                               thread_name_prefix="tinyldm")
            if self.inside == 0:
                self._take_control()
                self.limit = self.controller.limit(limits=1, user_api="blas")
            self.inside += 1                            # not if the lines above raised
            return self.pool

    def __exit__(self, *exc):
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self._take_control()
                self.limit.restore_original_limits()

    def _take_control(self):
        """Make threadpoolctl accept a limit from this thread.

        Newer versions silently ignore all threads except the first that set a limit. The lock and
        the count above already keep the callers apart.
        """
        for library in self.controller.lib_controllers:
            if hasattr(library, "clear_controlling_thread"):
                library.clear_controlling_thread(force=True)


_workers = _Workers()


def parallel(function, items):
    """[function(item) for item in items], shared among worker threads, each with one BLAS thread.

    NumPy releases the interpreter's lock inside its loops and BLAS calls, so the threads run at the
    same time. The calling thread works as well. Inside a worker the items run one after another,
    because the cores are in use already. If an item raises, no new item starts, and parallel waits
    for the running ones before it raises.
    """
    items = list(items)
    threads = min(free_threads(), len(items))
    if threads < 2:
        return [function(item) for item in items]
    results, queue = [None] * len(items), deque(enumerate(items))       # also safe without a GIL

    def work():
        _in_worker.set(True)
        try:
            while True:
                try:
                    i, item = queue.popleft()
                except IndexError:
                    return
                results[i] = function(item)
        except BaseException:
            queue.clear()                               # the others find nothing left
            raise

    with _workers as pool:
        others = [pool.submit(contextvars.copy_context().run, work) for _ in range(threads - 1)]
        try:
            contextvars.copy_context().run(work)
        finally:                                        # those that have not started find nothing
            others = [other for other in others if not other.cancel()]
            wait(others)
    for other in others:
        other.result()                                  # raises what it raised
    return results
