"""The stand-in for CuPy refuses what CuPy refuses, each idiom by name, and allows the rest."""
import operator

import numpy as np
import pytest

from tests.support.strict import CUPY, Array, cupy, installed
from tinyldm.backend import get_xp

needs_cupy = pytest.mark.skipif(CUPY is None, reason="CuPy is not installed")
# Read by the lambdas below: host arrays h, and on the device a, float16 x, ids i.
h = np.arange(6, dtype=np.float32).reshape(2, 3)


def fresh():
    return cupy, cupy.asarray(h), cupy.asarray(h.astype(np.float16)), cupy.asarray(np.array([1, 0]))


REFUSED = {
    "Unsupported type": [                               # beside an array, in either direction
        lambda xp, a, x, i: a + h, lambda xp, a, x, i: h + a, lambda xp, a, x, i: a @ h.T,
        lambda xp, a, x, i: h @ a.T, lambda xp, a, x, i: a == h, lambda xp, a, x, i: h < a,
        lambda xp, a, x, i: np.array(2.0) * a, lambda xp, a, x, i: a * np.array(2.0),
        lambda xp, a, x, i: operator.iadd(a, h), lambda xp, a, x, i: operator.setitem(a, 0, h[0]),
        lambda xp, a, x, i: a[np.array([0])], lambda xp, a, x, i: xp.concatenate([a, h]),
        lambda xp, a, x, i: xp.where(a > 0, h, a), lambda xp, a, x, i: xp.maximum(a, h),
        lambda xp, a, x, i: xp.ascontiguousarray(h), lambda xp, a, x, i: xp.exp(h),
        lambda xp, a, x, i: xp.add.at(a, np.array([0]), 1.0),
        lambda xp, a, x, i: a + [1, 2, 3], lambda xp, a, x, i: xp.exp([1.0])],
    "Implicit conversion": [
        lambda xp, a, x, i: np.asarray(a), lambda xp, a, x, i: np.array([a, a]),
        lambda xp, a, x, i: operator.setitem(h.copy(), 0, a[0]), lambda xp, a, x, i: h[a]],
    "does not support ufuncs": [
        lambda xp, a, x, i: np.exp(a), lambda xp, a, x, i: np.add(h, 1, out=a),
        lambda xp, a, x, i: operator.iadd(h.copy(), a), lambda xp, a, x, i: np.add.at(a, 0, 1)],
    "of a CuPy array: use xp": [
        lambda xp, a, x, i: np.sum(a), lambda xp, a, x, i: np.shape(a),
        lambda xp, a, x, i: np.concatenate([a, a]), lambda xp, a, x, i: np.where(a, 0, 1)],
    "CuPy has no": [
        lambda xp, a, x, i: operator.imatmul(a, a), lambda xp, a, x, i: xp.random,
        lambda xp, a, x, i: xp.fft, lambda xp, a, x, i: xp.__path__],
    "a CuPy array has no": [lambda xp, a, x, i: a.__array_interface__],
    "added up in float16": [
        lambda xp, a, x, i: x.sum(axis=0), lambda xp, a, x, i: x.mean(),
        lambda xp, a, x, i: xp.var(x), lambda xp, a, x, i: xp.add.at(x, 0, 1.0)],
    "is slow": [
        lambda xp, a, x, i: x[None] @ x.T[None], lambda xp, a, x, i: a[None] @ a.T,
        lambda xp, a, x, i: xp.matmul(a, a[0])],
    "assigned twice": [lambda xp, a, x, i: operator.setitem(a, i * 0, 1.0)],
    "out of bounds": [lambda xp, a, x, i: a[i + 1]],
    "numbers beyond": [
        lambda xp, a, x, i: (a - 1).astype(np.uint8), lambda xp, a, x, i: (a / 0).astype(int)],
}
REFUSED_IF_CUPY_IS_THERE_TO_ASK = {
    "CuPy has no": [
        lambda xp, a, x, i: xp.errstate(all="ignore"), lambda xp, a, x, i: xp.nditer,
        lambda xp, a, x, i: xp.insert, lambda xp, a, x, i: xp.frompyfunc,
        lambda xp, a, x, i: xp.einsum_path, lambda xp, a, x, i: xp.longdouble],
    "a CuPy array has no": [
        lambda xp, a, x, i: a.setflags(write=False), lambda xp, a, x, i: a.ctypes,
        lambda xp, a, x, i: a.resize],
    "is not in CuPy": [
        lambda xp, a, x, i: xp.multiply.at(a, 0, 2.0), lambda xp, a, x, i: xp.maximum.reduce(a),
        lambda xp, a, x, i: xp.minimum.accumulate(a), lambda xp, a, x, i: xp.fmax.reduceat(a, i)],
    "CuPy's .* takes no": [
        lambda xp, a, x, i: xp.exp(a, where=a > 0), lambda xp, a, x, i: xp.add(a, a, subok=False),
        lambda xp, a, x, i: a.sum(where=a > 0), lambda xp, a, x, i: a.max(axis=0, initial=0),
        lambda xp, a, x, i: xp.mean(a, where=a > 0), lambda xp, a, x, i: xp.clip(a, min=0),
        lambda xp, a, x, i: xp.zeros(3, like=a)],
}


def cases(table):
    return [pytest.param(idiom, message, id=f"{message} {number}")
            for message, idioms in table.items() for number, idiom in enumerate(idioms)]


@pytest.mark.parametrize("idiom, message", cases(REFUSED))
def test_refused(idiom, message):
    with pytest.raises((TypeError, AttributeError, ValueError, IndexError), match=message):
        idiom(*fresh())


@needs_cupy
@pytest.mark.parametrize("idiom, message", cases(REFUSED_IF_CUPY_IS_THERE_TO_ASK))
def test_refused_because_cupy_lacks_it(idiom, message):
    with pytest.raises((TypeError, AttributeError, NotImplementedError), match=message):
        idiom(*fresh())


@pytest.mark.parametrize("idiom", [
    lambda xp, a, i: 2 * a - 1, lambda xp, a, i: np.float32(2) ** a, lambda xp, a, i: a @ a.T,
    lambda xp, a, i: a[None] @ a.T[None], lambda xp, a, i: -abs(a) // 2, lambda xp, a, i: ~(a > 2),
    lambda xp, a, i: a.sum(axis=0, keepdims=True), lambda xp, a, i: xp.mean(a, axis=1),
    lambda xp, a, i: a.astype(np.float16).sum(dtype=np.float32), lambda xp, a, i: a.max(),
    lambda xp, a, i: a.astype(np.float16) @ a.astype(np.float16).T, lambda xp, a, i: a[i, i],
    lambda xp, a, i: a[a > 2], lambda xp, a, i: a.T.reshape(-1)[1:], lambda xp, a, i: a.shape,
    lambda xp, a, i: xp.where(a > 2, -xp.inf, a), lambda xp, a, i: xp.pad(a, ((0, 1), (1, 0))),
    lambda xp, a, i: xp.concatenate([a, a], axis=-1), lambda xp, a, i: xp.split(a, 2)[1],
    lambda xp, a, i: xp.full(3, 2.5, a.dtype), lambda xp, a, i: xp.promote_types(a.dtype, float),
    lambda xp, a, i: xp.stack([*a]), lambda xp, a, i: xp.exp(a, dtype=np.float64),
    lambda xp, a, i: float(a[1, 2]) + len(a), lambda xp, a, i: bool((a > 2).any()),
    lambda xp, a, i: xp.add.reduce(a), lambda xp, a, i: xp.multiply.outer(a[0], a[1]),
    lambda xp, a, i: f"{a[1, 1]:.2f}", lambda xp, a, i: [*range(3)][i[0]],
])
def test_allowed(idiom):
    ids = np.array([1, 0])
    expected = idiom(np, h, ids)
    ours = idiom(cupy, cupy.asarray(h), cupy.asarray(ids))
    if isinstance(expected, (np.ndarray, np.generic)):
        assert isinstance(ours, Array) and ours.dtype == expected.dtype
        ours = ours.get()
    np.testing.assert_array_equal(ours, expected)


def test_in_place():
    a = same = cupy.asarray(h)
    a[1:] += 1
    a *= 2
    a[a > 11] = 0
    cupy.add.at(a, (cupy.asarray([0, 0]), cupy.asarray([1, 1])), 5)
    assert a is same
    np.testing.assert_array_equal(a.get(), [[0, 12, 4], [8, 10, 0]])
    np.testing.assert_array_equal(h[0], [0, 1, 2])      # the host's memory is another


def test_get_xp():
    with installed() as xp:
        assert get_xp(xp.asarray(h)) is xp and get_xp(h) is np
    assert not isinstance(np.asarray(h), xp.ndarray)


@pytest.mark.parametrize("idiom, waits", [
    (lambda a: float(a[0, 0]), 1), (lambda a: a.get(), 1), (lambda a: a[1, 1].item(), 1),
    (lambda a: bool((a < 9).all()), 1), (lambda a: a.tolist(), 1), (lambda a: a[a > 2], 1),
    (lambda a: cupy.asnumpy(a), 1), (lambda a: a.sum() * a[0].max() + 1, 0),
])
def test_waits_are_counted(idiom, waits, monkeypatch):
    monkeypatch.setattr(Array, "waits", 0)
    idiom(cupy.asarray(h))
    assert Array.waits == waits


@needs_cupy
@pytest.mark.parametrize("idiom, error", [
    (lambda a: np.asarray(a), TypeError), (lambda a: h[a], TypeError),
    (lambda a: operator.setitem(h.copy(), ..., a), TypeError),
    (lambda a: operator.setitem(a, ..., h), ValueError),
    (lambda a: a.sum(where=True), TypeError), (lambda a: a.max(initial=0), TypeError),
    (lambda a: a.setflags(write=False), AttributeError), (lambda a: a.ctypes, AttributeError),
    (lambda a: CUPY.maximum.reduce(a), NotImplementedError),
    (lambda a: CUPY.multiply.at(a, 0, 2), NotImplementedError),
])
def test_cupy_itself_refuses(idiom, error):
    """As far as it gets without a GPU: an array over memory that nobody looks at."""
    memory = CUPY.cuda.UnownedMemory(1 << 16, 24, None, device_id=0)
    with pytest.raises(error):
        idiom(CUPY.ndarray((2, 3), np.float32, CUPY.cuda.MemoryPointer(memory, 0)))
