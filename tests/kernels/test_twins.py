"""Which function an op runs: its fast twin or its own lines."""
import inspect

import numpy as np
import pytest

from tests.support import strict
from tinyldm import backend, kernels, ops

CPU = {"silu", "gelu", "gelu_tanh", "quick_gelu", "geglu", "geglu_backward", "attention",
       "attention_backward", "conv2d", "conv2d_backward", "conv2d_input_backward",
       "upsample_nearest", "linear", "linear_backward", "linear_input_backward", "group_norm",
       "group_norm_backward", "group_norm_silu", "group_norm_silu_backward", "layer_norm",
       "layer_norm_backward", "batch_norm_relu", "average_pool"}
GPU = {"silu", "gelu", "gelu_tanh", "quick_gelu", "geglu", "attention", "conv2d",
       "group_norm", "group_norm_silu", "layer_norm"}
GPU |= {f"{name}_backward" for name in GPU} | {"conv2d_input_backward"}


def twins(device):
    return {name: getattr(op, device) for name, op in vars(ops).items()
            if getattr(op, device, None)}


def test_every_twin_has_its_ops_name_and_signature():
    """The other files here compare all in these lists with their ops."""
    assert twins("cpu").keys() == CPU and twins("gpu").keys() == GPU
    for device in ("cpu", "gpu"):
        for name, twin in twins(device).items():
            assert twin.__module__.startswith(kernels.__name__) and twin.__name__ == name
            assert inspect.signature(twin) == inspect.signature(getattr(ops, name)), name


@backend.fast_twin(cpu=lambda x, y=1: ("cpu", x, y) if y else NotImplemented,
                   gpu=lambda x, y=1: ("gpu", x, y))
def both(x, y=1):
    return "plain", x, y


@backend.fast_twin(cpu=lambda x: ("cpu", x))
def only_cpu(x):
    return "plain", x


ARRAYS = {dtype: np.ones(3, dtype) for dtype in (np.float16, np.float32, np.float64, np.int32)}


@pytest.fixture(autouse=True)
def fast_by_default():
    with backend.plain(False):                          # also under TINYLDM_PLAIN=1
        yield


@pytest.mark.parametrize("dtype", ARRAYS)
def test_the_first_argument_decides(dtype):
    x = ARRAYS[dtype]
    on_cpu = "cpu" if dtype == np.float32 else "plain"
    on_gpu = "gpu" if dtype in (np.float16, np.float32) else "plain"
    assert both(x) == (on_cpu, x, 1) and both(x, y=2) == (on_cpu, x, 2)
    assert only_cpu(x) == only_cpu(x=x) == (on_cpu, x)
    assert both(x[0]) == ("plain", x[0], 1)             # a NumPy number is no array
    with strict.installed() as cupy:
        x = cupy.asarray(x)
        assert both(x)[0] == on_gpu and only_cpu(x)[0] == "plain"
        with backend.plain():
            assert both(x)[0] == "plain"


def test_the_op_runs_where_the_twin_does_not_serve_and_within_plain():
    x = ARRAYS[np.float32]
    assert both(x, 0) == ("plain", x, 0)
    with backend.plain():
        assert both(x) == ("plain", x, 1)
        with backend.plain(False):
            assert both(x)[0] == "cpu"


@pytest.mark.parametrize("op, shapes, params, message", [
    ("group_norm", [(1, 3, 5), (5,), (5,)], (2, 1e-5), "5 channels"),
    ("group_norm_silu", [(1, 3, 5), (5,), (5,)], (2, 1e-5), "5 channels"),
    ("attention", [(1, 100, 5)] * 3, (2,), "5 channels"),
    ("conv2d", [(1, 3, 3, 5), (3, 3, 4, 4)], (), "5 channels, weight expects 4"),
    ("upsample_nearest", [(1, 3, 4, 2)], ((6, 5),), "6, 5"),
])
def test_what_does_not_fit_is_refused_by_the_op(op, shapes, params, message):
    with strict.installed() as cupy:
        for xp in (np, cupy):
            arrays = [xp.asarray(np.ones(shape, np.float32)) for shape in shapes]
            with pytest.raises(AssertionError, match=message):
                getattr(ops, op)(*arrays, *params)
