"""Worker threads, BLAS's threads, and the choice between plain and fast."""
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import threadpoolctl

from tests.support.threads import run_threads
from tinyldm import backend

# ---- worker threads -------------------------------------------------------------------------

def blas_threads():
    pools = threadpoolctl.threadpool_info()
    return [pool["num_threads"] for pool in pools if pool["user_api"] == "blas"]


def test_parallel_keeps_the_order(two_threads):
    first_may_end = threading.Event()

    def work(item):
        if item == 0:
            assert first_may_end.wait(10)               # a serial run would wait in vain
        if item == 7:
            first_may_end.set()
        return item, threading.current_thread()
    results = backend.parallel(work, iter(range(8)))
    assert [item for item, _ in results] == list(range(8))
    threads = {thread for _, thread in results}
    assert len(threads) == 2 and threading.current_thread() in threads  # the caller works, too


@pytest.mark.parametrize("items", [[], [3]])
def test_parallel_of_one_item_stays_here(items, two_threads):
    here = threading.current_thread()
    assert backend.parallel(lambda item: (item, threading.current_thread()), items) == [
        (item, here) for item in items]


def test_parallel_within_a_worker_is_serial(two_threads):
    """Workers waiting for workers would wait for ever; the cores are taken anyhow."""
    def outer(item):
        here = threading.current_thread()
        inner = backend.parallel(lambda i: (item, i, threading.current_thread() is here), range(3))
        assert all(same for *_, same in inner)
        return [i for _, i, _ in inner]
    assert backend.parallel(outer, range(6)) == [[0, 1, 2]] * 6
    assert not backend._in_worker.get()


def test_parallel_hands_over_an_exception_and_goes_on(two_threads):
    before = blas_threads()

    def work(item):
        if item == 2:
            raise KeyError(item)
        return item
    with pytest.raises(KeyError, match="2"):
        backend.parallel(work, range(5))
    assert blas_threads() == before
    assert backend.parallel(work, [0, 1]) == [0, 1]


def test_after_an_exception_nothing_is_begun_or_still_running(two_threads):
    began, ended, both = [], [], threading.Barrier(2)

    def work(item):
        began.append(item)
        both.wait(10)                                   # two are under way when one of them raises
        if item == 0:
            raise KeyError(item)
        time.sleep(0.1)
        ended.append(item)
    with pytest.raises(KeyError, match="0"):
        backend.parallel(work, range(50))
    assert sorted(began) == [0, 1] and ended == [1]


def test_parallel_holds_blas_to_one_thread_and_lets_it_go(two_threads):
    with threadpoolctl.threadpool_limits(2, "blas"):
        before = blas_threads()
        inside = backend.parallel(lambda _: blas_threads(), range(4))
        assert inside == [[1] * len(before)] * 4
        assert blas_threads() == before


def test_blas_is_let_go_by_the_last_of_several_callers(two_threads):
    """Callers overlap in time: the one that ends first must not free BLAS for the other."""
    with threadpoolctl.threadpool_limits(2, "blas"):
        before, limited = blas_threads(), []
        with backend._workers:                  # the caller that stays longer
            run_threads(lambda: backend.parallel(abs, range(4)), 3)
            limited += blas_threads()
        assert limited == [1] * len(before)
        assert blas_threads() == before


def test_blas_is_held_and_let_go_by_any_thread(two_threads):
    """threadpoolctl may ignore all threads but the first that set a limit: here this one."""
    with threadpoolctl.threadpool_limits(2, "blas"):
        before, inside = blas_threads(), []
        run_threads(lambda: inside.extend(backend.parallel(lambda _: blas_threads(), range(4))), 1)
        assert inside == [[1] * len(before)] * 4
        backend._workers.__enter__()            # first in: this thread; last out: another
        run_threads(lambda: backend._workers.__exit__(None, None, None), 1)
        assert blas_threads() == before


def test_a_limit_of_blas_that_failed_is_tried_again(monkeypatch):
    one, fails = backend._Workers(), [True]
    limit = threadpoolctl.ThreadpoolController.limit

    def failing(self, **options):
        if fails:
            raise OSError(fails.pop())
        return limit(self, **options)
    monkeypatch.setattr(threadpoolctl.ThreadpoolController, "limit", failing)
    with threadpoolctl.threadpool_limits(2, "blas"):
        before = blas_threads()
        with pytest.raises(OSError), one:
            pass
        with one:
            assert blas_threads() == [1] * len(before)
        assert blas_threads() == before


def test_no_iterator_is_shared_by_the_threads(two_threads, monkeypatch):
    """Without a GIL, two threads may advance it at once, which a generator never allows."""
    def slow(items):
        for pair in zip(range(len(items)), items):
            time.sleep(0.001)
            yield pair
    monkeypatch.setattr(backend, "enumerate", slow, raising=False)
    assert backend.parallel(lambda item: time.sleep(0.001) or item, range(50)) == list(range(50))


def test_num_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert backend.num_threads() == 3
    for nonsense in ("", "0", "many", "-1"):
        monkeypatch.setenv("OMP_NUM_THREADS", nonsense)
        assert 1 <= backend.num_threads() <= os.cpu_count()


# ---- plain or fast --------------------------------------------------------------------------

X = np.ones(3, np.float32)


@pytest.fixture
def fast_by_default():
    token = backend._plain.set(False)                   # also under TINYLDM_PLAIN=1
    yield
    backend._plain.reset(token)


def test_fast_is_for_float32_numpy_arrays(fast_by_default):
    assert backend.fast(X)
    assert not backend.fast(X.astype(np.float64)) and not backend.fast(X.astype(np.float16))


def test_plain_ends_with_its_block_and_nests(fast_by_default):
    with backend.plain():
        with backend.plain():
            assert not backend.fast(X)
        assert not backend.fast(X)
    assert backend.fast(X)
    with pytest.raises(KeyError), backend.plain():
        raise KeyError
    assert backend.fast(X)


def test_plain_reaches_the_workers_and_no_other_thread(fast_by_default, two_threads):
    with backend.plain():
        assert backend.parallel(lambda _: backend.fast(X), range(4)) == [False] * 4
        seen = []
        run_threads(lambda: seen.append(backend.fast(X)), 1)
        default = os.environ.get("TINYLDM_PLAIN", "0") != "1"
        assert seen == [default]
    assert backend.parallel(lambda _: backend.fast(X), range(4)) == [True] * 4


@pytest.mark.parametrize("value, fast", [("1", False), ("0", True), ("", True)])
def test_plain_by_the_environment(value, fast):
    code = ("import numpy; from tinyldm import backend; "
            "print(backend.fast(numpy.ones(3, numpy.float32)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "TINYLDM_PLAIN": value})
    assert done.stdout.strip() == str(fast)
