"""The GPU kernels tested without a GPU: compiled by NVIDIA's compiler, and run on the host.

NVRTC needs no device and compiles the code that CuPy would load. cuda_host.py runs the kernels on
strict arrays. That tests arithmetic, indices and synchronisation, not speed. check_op also runs the
kernels in all cases of tests/ops.
"""
import numpy as np
import pytest

from tests.support import cuda_host, strict
from tests.support.arrays import normal
from tests.support.checks import FLOAT16, KERNEL, gradients_of
from tests.support.gpu import LARGE
from tests.support.tolerance import assert_allclose, assert_close, within
from tinyldm import backend, ops
from tinyldm.kernels import cuda

try:
    from cuda import pathfinder
    from cupy_backends.cuda.libs import nvrtc
    HEADERS = pathfinder.find_nvidia_header_directory("cudart")
except ImportError:
    HEADERS = None

TOLERANCE = {np.float32: KERNEL, np.float16: FLOAT16}


@pytest.fixture
def xp():
    with strict.installed() as cupy, backend.plain(False):
        yield cupy


# ---- NVIDIA's compiler ----------------------------------------------------------------------

@pytest.mark.skipif(HEADERS is None, reason="CuPy, NVRTC or CUDA's headers are not installed")
@pytest.mark.parametrize("T, whole", [("float", 4), ("__half", 8)])
@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_the_source_compiles(arch, T, whole):
    for pack in (1, whole):
        program = nvrtc.createProgram(cuda.SOURCE, "kernels.cu", [], [])
        try:
            nvrtc.compileProgram(program, (*cuda.options(T, pack), f"-arch={arch}",
                                           f"-I{HEADERS}"))
        except nvrtc.NVRTCError:
            pytest.fail(nvrtc.getProgramLog(program))
        assert "warning" not in nvrtc.getProgramLog(program)
        for name, _, _ in cuda_host.KERNEL.findall(cuda.SOURCE):
            assert name.encode() in nvrtc.getCUBIN(program)


# ---- numbers --------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("op, shapes, params", [
    ("silu", [(3, 5, 16)], {}), ("gelu", [(300, 7)], {}), ("quick_gelu", [(2, 8)], {}),
    ("gelu_tanh", [(3, 16)], {}), ("gelu_tanh", [(300, 7)], {}),
    ("geglu", [(2, 5, 48)], {}), ("geglu", [(2, 5, 6)], {}),
    ("layer_norm", [(2, 7, 320), (320,), (320,)], {"eps": 1e-5}),
    ("layer_norm", [(7, 33), (33,), (33,)], {"eps": 1e-5}),
    ("group_norm", [(3, 5, 9), (9,), (9,)], {"num_groups": 3, "eps": 1e-6}),
    ("group_norm", [(2, 5, 7, 64), (64,), (64,)], {"num_groups": 32, "eps": 1e-5}),
    ("group_norm_silu", [(2, 40, 40, 96), (96,), (96,)], {"num_groups": 32, "eps": 1e-5}),
    ("group_norm_silu", [(1, 3, 3, 2560), (2560,), (2560,)], {"num_groups": 32, "eps": 1e-5}),
    # too large for the kernel's shared memory: the plain op
    ("group_norm", [(1, 2, 2, 4160), (4160,), (4160,)], {"num_groups": 32, "eps": 1e-5}),
    ("group_norm_silu", [(1, 2, 2, 600), (600,), (600,)], {"num_groups": 300, "eps": 1e-5}),
    ("conv2d", [(2, 5, 7, 16), (3, 3, 16, 24), (24,)], {"padding": (1, 1)}),
    ("conv2d", [(2, 6, 7, 3), (3, 3, 3, 8), (8,)], {"stride": 2, "padding": (0, 1)}),
    ("conv2d", [(3, 7, 9, 8), (1, 1, 8, 4), (4,)], {}),
    ("attention", [(3, 9, 32), (3, 77, 32), (3, 77, 32)], {"num_heads": 4}),
    ("attention", [(2, 300, 10), (2, 300, 10), (2, 300, 10)], {"num_heads": 2, "causal": True}),
    ("attention", [(1, 1, 8), (1, 1, 8), (1, 1, 8)], {"num_heads": 1}),
    ("attention", [(2, 5, 8), (2, 1, 8), (2, 1, 8)], {"num_heads": 4}),     # one key
    ("attention", [(5, 6, 8), (5, 3, 8), (5, 3, 8)], {"num_heads": 2}),     # more images than heads
], ids=lambda value: value if isinstance(value, str) else None)
def test_kernels(op, shapes, params, dtype, xp):
    """Against the plain op in float64, forward and backward. The cache is the plain op's."""
    inputs = [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    backward = getattr(ops, f"{op}_backward")
    y, cache = getattr(ops, op)(*map(xp.asarray, inputs), **params)
    dy = normal(*y.shape, dtype=dtype, seed=9)
    found = [y, *gradients_of(backward, xp.asarray(dy), cache, inputs).values()]
    with backend.plain():
        expected, wide = getattr(ops, op)(*(x.astype(np.float64) for x in inputs), **params)
        expected = [expected, *gradients_of(backward, dy.astype(np.float64), wide, inputs).values()]
        _, same = getattr(ops, op)(*map(xp.asarray, inputs), **params)
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.dtype == dtype
        within(abs(ours.get() - theirs).max(), TOLERANCE[dtype] * abs(theirs).max(), f"result {i}")
    for ours, plain in zip(flat(cache), flat(same), strict=True):
        if isinstance(plain, strict.Array):
            assert ours.dtype == plain.dtype and ours.shape == plain.shape
        else:
            assert ours == plain


def flat(cache):
    for item in cache if isinstance(cache, tuple) else (cache,):
        if isinstance(item, tuple):
            yield from flat(item)
        else:
            yield item


def test_some_pixels_or_queries_at_a_time(monkeypatch, xp):
    """As if the columns of a map, or the scores, were too many for one piece."""
    x, weight = xp.asarray(normal(2, 7, 9, 8)), xp.asarray(normal(3, 3, 8, 16, seed=1))
    q, k, v = (xp.asarray(normal(3, 11, 16, seed=seed)) for seed in range(3))

    def results():
        for op, inputs, params in (("conv2d", [x, weight, None], {"padding": (1, 1)}),
                                   ("attention", [q, k, v], {"num_heads": 4, "causal": True})):
            y, cache = getattr(ops, op)(*inputs, **params)
            yield y.get()
            dy = xp.asarray(normal(*y.shape, seed=9))
            backward = getattr(ops, f"{op}_backward")
            for gradient in gradients_of(backward, dy, cache, inputs).values():
                yield gradient.get()
    whole = list(results())
    monkeypatch.setattr(cuda, "COLUMNS", 72 * 50)       # 126 pixels: three pieces
    for scores in (4 * 11 * 3, 2 * 4 * 11 * 11):        # three queries; two of the three images
        monkeypatch.setattr(cuda, "SCORES", scores)
        for ours, expected in zip(results(), whole, strict=True):
            within(abs(ours - expected).max(), KERNEL * abs(expected).max())


def test_attention_leaves_cublas_as_it_was(xp):
    """Another user of the handle may have set the mode in which factors are on the device."""
    cublas = xp.cuda.cublas
    q, k, v = (xp.asarray(normal(1, 5, 8, seed=seed)) for seed in range(3))
    expected = ops.attention(q, k, v, 2)[0].get()
    cublas.setPointerMode(None, cublas.CUBLAS_POINTER_MODE_DEVICE)
    try:
        np.testing.assert_array_equal(ops.attention(q, k, v, 2)[0].get(), expected)
        assert cublas.getPointerMode(None) == cublas.CUBLAS_POINTER_MODE_DEVICE
    finally:
        cublas.setPointerMode(None, cublas.CUBLAS_POINTER_MODE_HOST)


def test_arrays_that_do_not_lie_in_packs(xp):
    """A view that does not begin at a multiple of 16 bytes, and views with strides."""
    rows = normal(9, 9, 16)
    for view in (lambda x: x.reshape(-1)[1:1 + 8 * 16].reshape(8, 16), lambda x: x[:, ::2],
                 lambda x: x.transpose(1, 0, 2)):
        with backend.plain():
            expected, _ = ops.silu(view(rows))
        assert_close(ops.silu(view(xp.asarray(rows)))[0].get(), expected, TOLERANCE[np.float32])


@pytest.mark.parametrize("ours, expected", LARGE)
def test_large_numbers_in_float16(ours, expected, xp):
    assert_allclose(np.squeeze(ours()), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("op, shapes, params", [
    ("silu", [(3, 8)], {}), ("geglu", [(3, 16)], {}),
    ("layer_norm", [(3, 8), (8,), (8,)], {"eps": 1e-5}),
    ("group_norm", [(3, 5, 8), (8,), (8,)], {"num_groups": 2, "eps": 1e-5}),
    ("conv2d", [(3, 3, 3, 8), (3, 3, 8, 8)], {"padding": (1, 1)}),
    ("attention", [(3, 5, 8)] * 3, {"num_heads": 2}),
], ids=lambda value: value if isinstance(value, str) else None)
def test_nan_comes_through(op, shapes, params, xp):
    """And stays in its picture, so that the pipeline can name the picture and the layer."""
    inputs = [normal(*shape, seed=i).copy() for i, shape in enumerate(shapes)]
    inputs[0].reshape(3, -1)[1, -1] = np.nan
    y = getattr(ops, op)(*map(xp.asarray, inputs), **params)[0].get()
    assert [bool(np.isnan(part).any()) for part in y] == [False, True, False]


# ---- the stand-in for the device ----------------------------------------------------------------

def run(body, *args, parameters="float* y", threads=64):
    code = f'#include <cuda_fp16.h>\nextern "C" __global__ void f({parameters}) {{\n{body}\n}}\n'
    module = cuda_host.RawModule(code=code, options=("-std=c++17",))
    module.get_function("f")((1,), (threads,), args)


def test_a_missing_meeting_is_seen(xp):
    body = """__shared__ float x[64];
        x[threadIdx.x] = threadIdx.x;
        %s
        y[threadIdx.x] = x[63 - threadIdx.x];"""
    y = xp.asarray(np.zeros(64, np.float32))
    run(body % "__syncthreads();", y)
    np.testing.assert_array_equal(y.get(), np.arange(64)[::-1])
    run("__syncthreads();" + body % "", y)              # all meet, but in the wrong place
    assert (y.get() != np.arange(64)[::-1]).any()


@pytest.mark.parametrize("body, message", [
    ("if (threadIdx.x < 32) __syncthreads();", "diverged"),
    ("if (threadIdx.x) return; __syncthreads();", "diverged"),
    ("y = z;", "error"),
])
def test_what_a_device_would_not_run(body, message, xp):
    with pytest.raises(AssertionError, match=message):
        run(body, xp.asarray(np.zeros(64, np.float32)))


@pytest.mark.parametrize("parameters, argument, message", [
    ("int n", 3, "class 'int'"), ("float a", np.float64(3), "float64"),
    ("float* y", np.zeros(3), "float64"), ("float* y", np.zeros((3, 4), np.float32).T, "strides"),
])
def test_arguments_of_another_type_are_seen(parameters, argument, message):
    if isinstance(argument, np.ndarray):
        argument = strict.Array(argument)
    with pytest.raises(AssertionError, match=message):
        run("", argument, parameters=parameters)
