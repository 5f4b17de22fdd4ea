"""Runs CUDA kernels on the host, thread by thread, for the stand-in for CuPy in strict.py.

g++ compiles the source after a few lines that define CUDA's keywords. The threads of a block are
fibers of one thread. Each runs to the next point where all must meet (__syncthreads, or an exchange
between the lanes of a warp); then another fiber continues, in random order, so that a missing
__syncthreads changes the result. Blocks run one after another. If a thread ends while others wait
at such a point, the threads have diverged: an error here, undefined on a device.
"""
import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

WORDS = r"""
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <setjmp.h>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
typedef _Float16 __half;
struct dim3 { unsigned x, y, z; };
static dim3 threadIdx, blockIdx, blockDim, gridDim;
static inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

// A fiber starts by setcontext and continues by longjmp, which is faster: it makes no system call.
struct Fiber { jmp_buf place; unsigned exchanges; float lanes[2]; char state; };
enum { FRESH, WAITS, ENDED };
static std::vector<Fiber> fibers;
static std::vector<char> stacks;
static jmp_buf home;
static unsigned current;
alignas(16) static char dynamic_shared[48 << 10];

static void meet() {
    fibers[current].state = WAITS;
    if (!_setjmp(fibers[current].place)) _longjmp(home, 1);
}
static void __syncthreads() { meet(); }
static float __shfl_xor_sync(unsigned, float value, int other) {
    unsigned turn = fibers[current].exchanges++ % 2;     // the other may not have read the last one
    fibers[current].lanes[turn] = value;
    meet();
    return fibers[current ^ other].lanes[turn];
}

static void (*body)(void*);
static void* arguments;
static void enter() {
    body(arguments);
    fibers[current].state = ENDED;
    _longjmp(home, 1);
}

template <class F> static int launch(dim3 grid, dim3 block, bool meets, F function) {
    unsigned count = block.x * block.y * block.z;
    gridDim = grid, blockDim = block;
    body = [](void* f) { (*static_cast<F*>(f))(); };
    arguments = &function;
    fibers.resize(count);
    const size_t size = 64 << 10;
    stacks.resize(meets ? count * size : 0);
    std::vector<unsigned> order(count);
    for (unsigned i = 0; i < count; i++) order[i] = i;
    std::mt19937 random(0);
    for (unsigned b = 0; b < grid.x * grid.y * grid.z; b++) {
        blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
        auto place = [&](unsigned i) {
            current = i;
            threadIdx = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        };
        if (!meets) {
            for (unsigned i = 0; i < count; i++) place(i), function();
            continue;
        }
        memset(dynamic_shared, 0xff, sizeof dynamic_shared);            // NaN until written
        for (Fiber& fiber : fibers) fiber.state = FRESH, fiber.exchanges = 0;
        for (unsigned ended = 0; ended < count;) {
            std::shuffle(order.begin(), order.end(), random);
            ended = 0;
            for (unsigned i : order) {
                place(i);
                if (!_setjmp(home)) {
                    if (fibers[i].state == WAITS) _longjmp(fibers[i].place, 1);
                    ucontext_t context;
                    getcontext(&context);
                    context.uc_stack.ss_sp = &stacks[i * size];
                    context.uc_stack.ss_size = size;
                    makecontext(&context, enter, 0);
                    setcontext(&context);
                }
                ended += fibers[current].state == ENDED;
            }
            if (ended && ended < count) return 1;
        }
    }
    return 0;
}
"""
KERNEL = re.compile(r'extern "C" __global__ void (\w+)\((.*?)\) \{(.*?)^\}', re.S | re.M)
MEETINGS = ("__syncthreads", "warp_")


class RawModule:
    """Like cupy.RawModule. options: -std and -D, as for NVIDIA's compiler."""

    def __init__(self, *, code, options):
        self.library, self.kernels = _compile(code, options)

    def get_function(self, name):
        parameters, meets = self.kernels[name]
        function = self.library[f"launch_{name}"]

        def launch(grid, block, args, *, shared_mem=0):
            assert len(args) == len(parameters), f"{name} takes {len(parameters)}, got {len(args)}"
            assert shared_mem <= 48 << 10, "more shared memory than every device has"
            sizes = [ctypes.c_uint(n) for n in (*grid, 1, 1)[:3] + (*block, 1, 1)[:3]]
            passed = [_argument(*pair) for pair in zip(parameters, args)]
            assert function(*sizes, meets, *passed) == 0, f"threads of {name} diverged"
        return launch


def _argument(parameter, value):
    """The value for C, after a check of its type. Strict arrays have `host`."""
    if "*" in parameter:
        assert value.host.flags.c_contiguous, f"{parameter}: strides are not passed on"
        if "float*" in parameter:
            assert value.host.dtype == np.float32, f"{parameter} is given {value.host.dtype}"
        return ctypes.c_void_p(value.data.ptr)
    kind = {"int": np.int32, "float": np.float32, "index_t": np.int64}[parameter.split()[0]]
    assert type(value) is kind, f"{parameter} is given {type(value)}"
    return {"int": ctypes.c_int, "float": ctypes.c_float, "index_t": ctypes.c_longlong}[
        parameter.split()[0]](value)


@functools.cache
def _compile(code, options):
    """-> the library, {kernel: (its parameters, whether its threads meet)}."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    kernels, launches = {}, []
    for name, parameters, text in KERNEL.findall(code):
        parameters = [" ".join(p.split()) for p in parameters.split(",")]
        kernels[name] = parameters, any(word in text for word in MEETINGS)
        given = ", ".join(p.split()[-1] for p in parameters)
        launches.append(
            f'extern "C" int launch_{name}(unsigned gx, unsigned gy, unsigned gz, unsigned bx, '
            f"unsigned by, unsigned bz, bool meets, {', '.join(parameters)}) {{ return launch("
            f"{{gx, gy, gz}}, {{bx, by, bz}}, meets, [=] {{ {name}({given}); }}); }}")
    code = code.replace("#include <cuda_fp16.h>", WORDS)
    code = re.sub(r"extern __shared__ float (\w+)\[\];",
                  r"float* \1 = reinterpret_cast<float*>(dynamic_shared);", code)
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
        source.write_text(code + "\n".join(launches))
        done = subprocess.run(["g++", "-O1", "-shared", "-fPIC", *options, "-o", library, source],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
        return ctypes.CDLL(str(library)), kernels


class Cublas:
    """Like the module cupy.cuda.cublas. pointer_mode: whether alpha and beta are on the host."""

    CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT = 0, 1, 68, -1
    CUBLAS_POINTER_MODE_HOST, CUBLAS_POINTER_MODE_DEVICE = 0, 1
    pointer_mode = CUBLAS_POINTER_MODE_HOST

    def getPointerMode(self, handle):
        return self.pointer_mode

    def setPointerMode(self, handle, mode):
        self.pointer_mode = mode

    def gemmStridedBatchedEx(self, handle, transa, transb, m, n, k, alpha, A, Atype, lda, strideA,
                             B, Btype, ldb, strideB, beta, C, Ctype, ldc, strideC, count, compute,
                             algo):
        """The names are those of cuBLAS's manual."""
        assert (compute, algo) == (68, -1)
        assert self.pointer_mode == self.CUBLAS_POINTER_MODE_HOST, "alpha and beta are on the host"
        alpha, beta = (ctypes.c_float.from_address(place).value for place in (alpha, beta))

        def matrix(place, kind, rows, columns, leading, stride):            # stored by columns
            assert leading >= rows
            dtype = np.dtype({0: np.float32, 2: np.float16}[kind])
            numbers = (count - 1) * stride + (columns - 1) * leading + rows
            memory = np.frombuffer((ctypes.c_char * (numbers * dtype.itemsize)).from_address(place),
                                   dtype)
            strides = np.array([stride, 1, leading]) * dtype.itemsize
            return np.lib.stride_tricks.as_strided(memory, (count, rows, columns), strides)

        a = matrix(A, Atype, *((k, m) if transa else (m, k)), lda, strideA).astype(np.float32)
        b = matrix(B, Btype, *((n, k) if transb else (k, n)), ldb, strideB).astype(np.float32)
        a, b = a.swapaxes(1, 2) if transa else a, b.swapaxes(1, 2) if transb else b
        c = matrix(C, Ctype, m, n, ldc, strideC)
        product = alpha * (a @ b)
        c[:] = product if beta == 0 else product + beta * c
