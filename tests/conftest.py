"""Fixtures of several test files."""
import signal

import numpy as np
import pytest

from tests.support import extra, tolerance, words
from tests.support.small_pipelines import smallest
from tinyldm import backend
from tinyldm.kernels import blocks
from tinyldm.pipelines.loading import load


def pytest_addoption(parser):
    parser.addoption("--tolerances", type=float, metavar="SHARE",
                     help="list the tests whose error is more than this share of what they allow")


def pytest_configure(config):
    """Signals do what they do by default, also where nohup or a background job ignores them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):                       # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_ignore_collect(collection_path):
    name = collection_path.name
    if name.startswith("test_") and name.endswith(".py") and extra.is_left_out(collection_path):
        return True


def pytest_collection_modifyitems(config, items):
    """Without CLIP's vocabulary, what needs it is deselected."""
    if not words.VOCABULARY.is_dir():
        needing = [item for item in items if item.get_closest_marker("clip_vocabulary")]
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]


def pytest_terminal_summary(terminalreporter, config):
    if extra.MISSING:
        terminalreporter.write_line(extra.what_it_adds())
    if share := config.getoption("--tolerances"):
        terminalreporter.section("error / allowed")
        terminalreporter.write_line("\n".join(tolerance.report(share)))


@pytest.fixture
def exact_sqrt(monkeypatch):
    """torch's float32 square root, made the nearest float, which NumPy's is.

    It is MKL's, whose last digit depends on the processor: on some, one in five is not the nearest.
    Rescaling to zero terminal SNR magnifies that: 1 - alpha_bar keeps four digits at small t, and
    sigma = 4096 multiplies the last one.
    """
    torch = pytest.importorskip("torch")

    def sqrt(x):
        return torch.from_numpy(np.asarray(np.sqrt(x.numpy())))

    power = torch.Tensor.__pow__
    monkeypatch.setattr(torch.Tensor, "sqrt", sqrt)
    monkeypatch.setattr(torch.Tensor, "__pow__",
                        lambda x, exponent: sqrt(x) if exponent == 0.5 else power(x, exponent))


@pytest.fixture(params=[1 << 12, blocks.BLOCK], ids=["small blocks", "blocks"])
def block_size(request, monkeypatch):
    """Elementwise kernels with several blocks, and threads, for small arrays as well."""
    monkeypatch.setattr(blocks, "BLOCK", request.param)
    monkeypatch.setattr(blocks, "SERIAL", request.param // 2)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def two_threads(monkeypatch):
    """The caller and one worker, whatever this machine has."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(backend, "_workers", backend._Workers())
    yield
    if backend._workers.pool:
        backend._workers.pool.shutdown()


# ---- a small pipeline -------------------------------------------------------------------------

@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """The smallest pipeline's folder, for tests that only read it."""
    return smallest(tmp_path_factory.mktemp("smallest"))


@pytest.fixture(scope="session")
def weights(small_folder):
    return small_folder


@pytest.fixture
def small(small_folder):
    """The smallest pipeline, which a test may change."""
    return load(small_folder)
