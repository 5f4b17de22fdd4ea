"""Worker threads where something fails, and where no lock of the interpreter helps."""
import time

import pytest
import threadpoolctl

from tinyldm import backend


def blas_threads():
    pools = threadpoolctl.threadpool_info()
    return [pool["num_threads"] for pool in pools if pool["user_api"] == "blas"]


def test_a_limit_of_blas_that_failed_is_tried_again(monkeypatch):
    one, fails = backend._OneBlasThread(), [True]
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


def test_no_iterator_is_shared_by_the_threads(monkeypatch):
    """Python without a GIL may advance it in two threads at once; a generator refuses that always.
    """
    def slow(items):
        for pair in zip(range(len(items)), items):
            time.sleep(0.001)
            yield pair
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(backend, "_workers", None)
    monkeypatch.setattr(backend, "enumerate", slow, raising=False)
    assert backend.parallel(lambda item: time.sleep(0.001) or item, range(50)) == list(range(50))
    backend._workers.shutdown()
