"""The machine under the arrays: NumPy or CuPy, worker threads, and the plain/fast switch.

Everything above asks an array which library it belongs to (`get_xp`) and never imports CuPy itself,
so the same code runs on the CPU and on the GPU. Nothing in tinyldm lies below this file.
"""
import contextlib
import contextvars
import ctypes
import functools
import math
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

from .errors import TinyldmError

_plain = contextvars.ContextVar("plain", default=os.environ.get("TINYLDM_PLAIN", "0") == "1")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3          # from malloc.h
_in_worker = contextvars.ContextVar("in_worker", default=False)


def get_xp(array):
    """The library an array belongs to: numpy or cupy."""
    if isinstance(array, (np.ndarray, np.generic)):
        return np
    import cupy
    return cupy.get_array_module(array)


def asarray(array, like):
    """Move an array to the device of `like`; its dtype stays."""
    xp = get_xp(like)
    return xp.asarray(array.get() if xp is np and hasattr(array, "get") else array)


def to_host(array):
    """A NumPy array with the same numbers."""
    return array if get_xp(array) is np else array.get()


def wide(dtype):
    """The dtype that numbers of a dtype are added up in: float32 for float16, else the same."""
    return np.promote_types(dtype, np.float32)


def widen(x):
    """float16 as float32, for sums and exponentials, which want more digits; wider ones as is."""
    return x.astype(wide(x.dtype), copy=False)


def add_up(x, axis):
    """x.sum(axis) in x's dtype, float16 added up in float32, which CuPy does not always do."""
    return x.sum(axis=axis, dtype=wide(x.dtype)).astype(x.dtype, copy=False)


def is_finite(x):
    """Whether x (...) holds neither infinity nor NaN."""
    if get_xp(x) is not np or x.dtype != np.float16:
        return bool(get_xp(x).isfinite(x).all())
    # NumPy's isfinite takes 25 times as long as this look at float16's bits, all ones in the
    # exponent of infinity and NaN.
    bits, block = x.reshape(-1).view(np.uint16), 1 << 16
    return all((bits[i:i + block] & 0x7c00).max() < 0x7c00 for i in range(0, bits.size, block))


def array_library(device):
    """numpy for "cpu", cupy for "cuda".

    Raises TinyldmError for another name, and where CuPy or a GPU is missing.
    """
    if device == "cpu":
        return np
    if device != "cuda":
        raise TinyldmError(f"device must be cpu or cuda, not {device!r}")
    try:
        import cupy
        count = cupy.cuda.runtime.getDeviceCount()
    except ImportError:
        raise TinyldmError("device cuda needs CuPy, which is not installed: "
                           "pip install 'tinyldm[gpu]', or use --device cpu") from None
    except Exception as error:                          # CuPy raises its own kinds without a driver
        raise TinyldmError(f"device cuda needs an NVIDIA GPU, and CuPy finds none "
                           f"({str(error).splitlines()[0]}): use --device cpu") from None
    if count == 0:
        raise TinyldmError("device cuda needs an NVIDIA GPU, and CuPy finds none: use --device cpu")
    return cupy


# ---- plain or fast --------------------------------------------------------------------------

@contextlib.contextmanager
def plain(on=True):
    """In this block every op runs as written in ops/, without its fast twin; with on=False, not so.
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
    """Decorate an op: call its fast twin from kernels/ where there is one for the first argument.

    A twin has the same signature as the op and returns the same. It may return NotImplemented for
    arguments that it does not support: then the op itself runs.
    """
    def decorate(op):
        @functools.wraps(op)
        def dispatch(x, *args, **options):
            twin = cpu if fast(x) else gpu if gpu and fast_on_gpu(x) else None
            result = twin(x, *args, **options) if twin else NotImplemented
            return op(x, *args, **options) if result is NotImplemented else result
        dispatch.cpu, dispatch.gpu = cpu, gpu
        return dispatch
    return decorate


# ---- memory ---------------------------------------------------------------------------------

def keep_freed_memory():
    """Let the C library keep freed memory, 2 GiB and what is beneath, for the next arrays.

    A map of some MB is made and dropped at every layer. Given back to the system, its memory comes
    as new pages, which must be zeroed and lie in no cache: a tenth of the time of SD 1.5's VAE
    (`python -m tests.benchmarks.leads`). The setting is the whole process's; only glibc has it,
    elsewhere nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    if not mallopt(_M_MMAP_THRESHOLD, 1 << 30):         # what is larger is not kept
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)             # the most that an older glibc takes
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


_scratch = {}                           # {(thread, name): numbers}


def scratch(name, *shape):
    """Uninitialised float32 numbers: the same memory for every call of this thread with this name.

    A kernel must not return it, because the next use of the name writes into it. New memory would
    cost a page fault every few KiB in the innermost loops.
    """
    key, size = (threading.get_ident(), name), math.prod(shape)
    flat = _scratch.get(key)
    if flat is None or flat.size < size:
        flat = _scratch[key] = np.empty(size, np.float32)
    return flat[:size].reshape(shape)


def free_scratch():
    """Give back the scratch memory of all threads; a kernel that is running keeps what it uses."""
    _scratch.clear()


# ---- worker threads -------------------------------------------------------------------------

def num_threads():
    """How many worker threads: OMP_NUM_THREADS where set, else the cores this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_threads():
    """Among how many threads work can be shared out here: within a worker there is that one."""
    return 1 if _in_worker.get() else num_threads()


class _OneBlasThread:
    """Holds BLAS to one thread while any caller is inside: the first limits, the last restores.

    The limit belongs to the process, so callers in different threads share one count.
    """

    def __init__(self):
        self.lock, self.inside, self.controller, self.limit = threading.Lock(), 0, None, None

    def __enter__(self):
        with self.lock:
            if self.inside == 0:
                if self.controller is None:
                    from threadpoolctl import ThreadpoolController
                    self.controller = ThreadpoolController()
                self._take_control()
                self.limit = self.controller.limit(limits=1, user_api="blas")
            self.inside += 1                            # not where the lines above raised

    def __exit__(self, *exc):
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self._take_control()
                self.limit.restore_original_limits()

    def _take_control(self):
        """Newer threadpoolctl silently ignores every thread but the first that ever set a limit.

        The lock and the count above keep callers apart already.
        """
        for library in self.controller.lib_controllers:
            if hasattr(library, "clear_controlling_thread"):
                library.clear_controlling_thread(force=True)


_one_blas_thread = _OneBlasThread()
_workers = None
_workers_lock = threading.Lock()


def _pool():
    global _workers
    with _workers_lock:
        if _workers is None:
            _workers = ThreadPoolExecutor(max(1, num_threads() - 1), thread_name_prefix="tinyldm")
    return _workers


def parallel(function, items):
    """[function(item) for item in items], over worker threads with BLAS held to one thread each.

    NumPy releases the interpreter's lock inside its loops and BLAS calls, so threads do run at the
    same time. The caller works as well. Called from inside a worker it runs serially: the cores are
    taken already. Where an item raises, no other is begun, and those begun are waited for.
    """
    items = list(items)
    threads = min(free_threads(), len(items))
    if threads < 2:
        return [function(item) for item in items]
    results, queue = [None] * len(items), deque(enumerate(items))       # safe without a GIL, too

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
            queue.clear()                               # nothing is left for the others
            raise

    with _one_blas_thread:
        others = [_pool().submit(contextvars.copy_context().run, work) for _ in range(threads - 1)]
        try:
            contextvars.copy_context().run(work)
        finally:                                        # those not begun by now would find nothing
            others = [other for other in others if not other.cancel()]
            wait(others)
    for other in others:
        other.result()                                  # raises what it raised
    return results
