"""A stand-in for CuPy where there is no GPU: NumPy arrays that allow what arrays on a device allow.

`installed()` puts it in CuPy's place. What CuPy refuses is refused: host arrays among its own,
conversion without `.get()`, names and keywords it does not have. Those are asked of CuPy itself,
which imports without a GPU, so they are never out of date; where it is not installed every name of
NumPy passes. Refused as well is what CuPy answers, but wrongly or slowly:

- sums of float16, which are added up in float16 where the library CUB takes them over;
- products of stacks of float16 matrices, or of a stack and one matrix: no tensor cores, and copies;
- indices beyond the end (they wrap round) or twice (either wins), numbers a narrower type lacks.

It shows that CuPy would accept the calls and what dtypes come out; the numbers are NumPy's, so it
says nothing of those that a device computes. tests/test_gpu.py compares them where there is one.

Whatever makes the host wait for the device is counted in `Array.waits`.
"""
import inspect
import operator
import re
import sys
from contextlib import contextmanager
from functools import cache, partial
from types import ModuleType, SimpleNamespace

import numpy as np

from tests.support import cuda_host

try:
    import cupy as CUPY
except ImportError:
    CUPY = None

SUMS = ("sum", "prod", "mean", "var", "std", "cumsum", "cumprod")
UFUNC_METHODS = {"at": 3, "reduce": 1, "accumulate": 1, "reduceat": 2, "outer": 2}  # and arguments


# ---- what CuPy has --------------------------------------------------------------------------

def exists(path):
    """Whether CuPy has what a dotted path names, say "add.at"."""
    owner = found = CUPY
    for name in path.split("."):
        try:
            owner, found = found, getattr(found, name, None)
        except ImportError:                             # it is there, the library behind it is not
            return True
        if found is None:
            return False
    if isinstance(owner, CUPY.ufunc) and name in UFUNC_METHODS:
        try:                                            # it refuses before it looks at the array
            found(*[None] * UFUNC_METHODS[name])
        except NotImplementedError:
            return False
        except Exception:
            pass
    return True


@cache
def keywords_of(real):
    """The names of what a function of CuPy takes, or None where it takes any."""
    if isinstance(real, CUPY.ufunc):
        return {"out", "dtype", "casting"}
    try:
        parameters = inspect.signature(real).parameters
    except ValueError:                                  # compiled: the docstring begins with it
        return set(re.findall(r"\w+", real.__doc__.splitlines()[0]))
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else set(parameters)


# ---- arrays ---------------------------------------------------------------------------------

def unwrap(value):
    """The NumPy arrays inside what a function of CuPy is given."""
    if isinstance(value, Array):
        return value.host
    if isinstance(value, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>: a host array among CuPy's")
    if isinstance(value, (list, tuple)):
        return type(value)(map(unwrap, value))
    return value


def wrap(value):
    if isinstance(value, (np.ndarray, np.generic)):
        return Array(np.asarray(value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(wrap, value))
    return value


def call(real, function, *args, **keywords):
    """NumPy's function on the arrays inside, in the terms of CuPy's function `real`."""
    if keywords and real is not None and (known := keywords_of(real)) is not None:
        if unknown := keywords.keys() - known:
            raise TypeError(f"CuPy's {real.__name__} takes no {', '.join(unknown)}")
    keywords = {name: unwrap(value) for name, value in keywords.items()}
    with np.errstate(all="ignore"):                     # a GPU warns of nothing
        return wrap(function(*unwrap(args), **keywords))


def operand(value):
    """An operand beside an array: another one, or a number."""
    if isinstance(value, (Array, bool, int, float, complex, np.generic)):
        return value
    raise TypeError(f"Unsupported type {type(value)} beside an array of CuPy")


def not_float16(array, what):
    if array.dtype == np.float16:
        raise TypeError(f"{what} of float16 would be added up in float16: use float32")


class Array:
    """As cupy.ndarray: what is not written out here goes to the NumPy array inside."""

    __slots__ = ("host",)
    __array_ufunc__ = None                              # NumPy's operators leave it to ours
    waits = 0                                           # how often the host waited for a number

    def __init__(self, host):
        self.host = host

    def __array__(self, *args, **keywords):
        raise TypeError("Implicit conversion to a NumPy array is not allowed: use .get()")

    def __array_function__(self, function, *args):
        raise TypeError(f"np.{function.__name__} of a CuPy array: use xp's")

    def __getattr__(self, name):
        if name.startswith("_") or CUPY and not hasattr(CUPY.ndarray, name):
            raise AttributeError(f"a CuPy array has no {name}")
        value = getattr(self.host, name)
        if not callable(value):
            return wrap(value)
        return partial(call, CUPY and getattr(CUPY.ndarray, name), value)

    def __getitem__(self, index):
        Array.waits += any(is_mask(part) for part in parts(index))      # how many are True?
        return wrap(self.host[unwrap(index)])

    def __setitem__(self, index, value):
        if any(isinstance(part, Array) and not is_mask(part) for part in parts(index)):
            times = np.zeros(self.host.shape, int)
            np.add.at(times, unwrap(index), 1)
            if times.max(initial=0) > 1:
                raise IndexError("an entry is assigned twice: which one wins is undefined")
        self.host[unwrap(index)] = unwrap(operand(value))

    def astype(self, dtype, *args, **keywords):
        if self.host.dtype.kind == "f" and np.dtype(dtype).kind in "iu":
            info = np.iinfo(dtype)
            if not ((self.host >= info.min) & (self.host <= info.max)).all():
                raise ValueError(f"numbers beyond {dtype}: what becomes of them differs")
        real = CUPY and CUPY.ndarray.astype
        return call(real, self.host.astype, dtype, *args, **keywords)

    def __len__(self):
        return len(self.host)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __repr__(self):
        return f"Array({self.host!r})"

    def __matmul__(self, other):
        a, b = self.host, unwrap(operand(other))
        if np.ndim(b) != a.ndim:
            raise TypeError(f"{a.shape} @ {np.shape(b)} is slow: reshape to one matrix of rows")
        if a.ndim > 2 and a.dtype == b.dtype == np.float16:
            raise TypeError("a stack of float16 matrices is slow: reshape to one, or use float32")
        dtype = np.result_type(a, b)
        wide = np.promote_types(dtype, np.float32)      # cuBLAS adds up in float32
        return wrap(np.matmul(a, b, dtype=wide).astype(dtype, copy=False))

    def __rmatmul__(self, other):
        operand(other)

    def __imatmul__(self, other):
        raise TypeError("CuPy has no @=")

    @property
    def data(self):
        return SimpleNamespace(ptr=self.host.ctypes.data)

    def get(self):
        Array.waits += 1
        return self.host.copy()


def parts(index):
    return index if isinstance(index, tuple) else (index,)


def is_mask(index):
    return isinstance(index, Array) and index.dtype == bool


def _operators():
    def forward(function):
        return lambda self, other: call(None, function, self, operand(other))

    def reflected(function):
        return lambda self, other: call(None, function, operand(other), self)

    def unary(function):
        return lambda self: call(None, function, self)

    def in_place(function):
        def method(self, other):
            with np.errstate(all="ignore"):
                function(self.host, unwrap(operand(other)))
            return self
        return method

    def summing(name):
        def method(self, *args, **keywords):
            if len(args) < 2 and keywords.get("dtype") is None:
                not_float16(self, name)
            real = CUPY and getattr(CUPY.ndarray, name)
            return call(real, getattr(self.host, name), *args, **keywords)
        return method

    def waiting(function):
        def method(self, *args):
            Array.waits += 1
            return function(self.host, *args)
        return method

    for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split():
        function = getattr(operator, f"__{name}__")
        yield f"__{name}__", forward(function)
        yield f"__r{name}__", reflected(function)
        yield f"__i{name}__", in_place(getattr(operator, f"__i{name}__"))
    for name in "lt le eq ne gt ge".split():
        yield f"__{name}__", forward(getattr(operator, name))
    for name in "abs neg pos invert".split():
        yield f"__{name}__", unary(getattr(operator, name))
    for name in SUMS:
        yield name, summing(name)
    for function in (bool, float, int, complex, format, operator.index):
        yield f"__{function.__name__}__", waiting(function)
    for name in ("item", "tolist"):
        yield name, waiting(getattr(np.ndarray, name))


for _name, _method in _operators():
    setattr(Array, _name, _method)


# ---- the library ----------------------------------------------------------------------------

class Ufunc:
    """As cupy.ufunc, around NumPy's."""

    def __init__(self, ufunc):
        self.ufunc, self.real = ufunc, getattr(CUPY, ufunc.__name__, None)

    def __call__(self, *args, **keywords):
        return call(self.real, self.ufunc, *map(operand, args), **keywords)

    def __getattr__(self, name):
        if CUPY and not exists(f"{self.ufunc.__name__}.{name}"):
            raise NotImplementedError(f"{self.ufunc.__name__}.{name} is not in CuPy")

        def method(array, *args):
            if name != "outer":
                not_float16(array, f"{self.ufunc.__name__}.{name}")
            return call(None, getattr(self.ufunc, name), array, *args)
        return method


DEVICES = []                # the numbers of those in use, in turn


def synchronize():
    Array.waits += 1


class Library:
    """As the module cupy."""

    ndarray = Array
    RawModule = cuda_host.RawModule
    cuda = SimpleNamespace(
        cublas=cuda_host.Cublas(),
        get_cublas_handle=lambda: 1,
        runtime=SimpleNamespace(getDeviceCount=lambda: 1),
        Device=lambda number: SimpleNamespace(use=lambda: DEVICES.append(number)),
        get_current_stream=lambda: SimpleNamespace(synchronize=synchronize))

    linalg = SimpleNamespace(norm=lambda array: wrap(np.linalg.norm(unwrap(array))))

    def get_default_memory_pool(self):
        return SimpleNamespace(used_bytes=lambda: 0)

    def __getattr__(self, name):
        value = getattr(np, name)
        if name.startswith("_") or isinstance(value, ModuleType) or CUPY and not exists(name):
            raise AttributeError(f"CuPy has no {name}, or not NumPy's")
        if isinstance(value, np.ufunc):
            return Ufunc(value)
        if name in SUMS:
            return lambda array, *args, **keywords: getattr(array, name)(*args, **keywords)
        if callable(value) and not isinstance(value, type):
            return partial(call, getattr(CUPY, name, None), value)
        return value

    def asarray(self, array, dtype=None):
        """The way to the device: never the memory of the host."""
        if isinstance(array, Array):
            return array if dtype is None else array.astype(dtype, copy=False)
        return Array(np.array(array, dtype))

    array = asarray

    def matmul(self, a, b, out=None):
        result = a @ b
        if out is None:
            return result
        assert out.host.flags.c_contiguous and out.dtype == result.dtype, "out= would be a copy"
        out[...] = result
        return out

    def asnumpy(self, array):
        return array.get() if isinstance(array, Array) else np.asarray(array)

    def get_array_module(self, *arrays):
        return self if any(isinstance(array, Array) for array in arrays) else np


cupy = Library()


@contextmanager
def installed():
    """Within it `import cupy` gives the stand-in."""
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = cupy
    try:
        yield cupy
    finally:
        del sys.modules["cupy"]
        if before is not None:
            sys.modules["cupy"] = before
