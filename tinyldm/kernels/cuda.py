"""The twins for a GPU: one kernel makes one pass over memory where CuPy's own calls make many.

CuPy runs an op of a dozen array operations as a dozen kernels. Each reads and writes the whole
array, two bytes per thread. The kernels of cuda.cu, which this file launches, read 16 bytes per
thread and keep intermediate results in registers. Matrix products are NVIDIA's: 2-D ones by CuPy's
@, attention's stacks by cuBLAS directly, because CuPy converts stacks of float16 matrices to
float32 first. All statistics, sums and exponentials are float32. Stored results have x's dtype,
float16 or float32.

The caches are those of the plain ops, so a plain backward pass fits a forward pass from here. The
tests compile the kernels with NVIDIA's compiler, which needs no GPU, and run them, thread by
thread, on the host.
"""
import functools
import math
from pathlib import Path

import numpy as np

from ..backend import add_up, get_xp, widen
from .attention import split_heads
from .im2col import sides
from .winograd import turn

COLUMNS = 1 << 26           # numbers of im2col at a time: 128 MiB in float16
SCORES = 1 << 26            # attention scores at a time: 256 MiB
THREADS = 256               # per block
CHANNELS = 4096             # at most so many channels and groups in group norm: its sums lie
GROUPS = 256                # in shared memory
SILU, GELU, QUICK_GELU, GEGLU, GELU_TANH = range(5)
TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 2}              # CUDA_R_32F, CUDA_R_16F
SOURCE = Path(__file__).with_suffix(".cu").read_text("utf-8")


def options(T, pack):
    """The options for the compiler: T is "float" or "__half", pack the numbers at a time."""
    return "-std=c++17", f"-DTINYLDM_T={T}", f"-DTINYLDM_PACK={pack}"


@functools.cache
def _module(xp, dtype, pack):
    T = {np.dtype(np.float16): "__half", np.dtype(np.float32): "float"}[dtype]
    return xp.RawModule(code=SOURCE, options=options(T, pack))


@functools.cache
def _kernel(xp, dtype, pack, name):
    return _module(xp, dtype, pack).get_function(name)


def _launch(name, x, width, arrays, numbers, grid, block=(THREADS,), shared=0):
    """Queue a kernel on contiguous arrays, in packs if these divide the last axis, of `width`.

    numbers: a Python int is passed as int, a float as float, a NumPy number with its own type.
    """
    pack = 16 // x.dtype.itemsize
    if width % pack or any(array.data.ptr % 16 for array in arrays):
        pack = 1
    numbers = [{int: np.int32, float: np.float32}.get(type(n), lambda n: n)(n) for n in numbers]
    kernel = _kernel(get_xp(x), x.dtype, pack, name)
    kernel(grid(pack) if callable(grid) else grid, block, (*arrays, *numbers), shared_mem=shared)


def _blocks(size):
    """The grid for one thread per pack, as a function of the pack's size."""
    return lambda pack: (-(-size // (pack * THREADS)),)


def _contiguous(x, *others):
    """The arrays, made contiguous and of x's dtype."""
    xp = get_xp(x)
    return [xp.ascontiguousarray(array, x.dtype) for array in (x, *others)]


# ---- activations ------------------------------------------------------------------------------

def silu(x):
    """Twin of ops.silu. x (...) -> y (...)."""
    return _activation(x, SILU, x.shape[-1]), x


def gelu(x):
    """Twin of ops.gelu. x (...) -> y (...)."""
    return _activation(x, GELU, x.shape[-1]), x


def quick_gelu(x):
    """Twin of ops.quick_gelu. x (...) -> y (...)."""
    return _activation(x, QUICK_GELU, x.shape[-1]), x


def gelu_tanh(x):
    """Twin of ops.gelu_tanh. x (...) -> y (...)."""
    return _activation(x, GELU_TANH, x.shape[-1]), x


def geglu(x):
    """Twin of ops.geglu. x (...,2F) -> y (...,F)."""
    return _activation(x, GEGLU, x.shape[-1] // 2), x


def silu_backward(dy, x):
    """Twin of ops.silu_backward. dy (...), x (...) -> dx (...)."""
    return _activation_backward(dy, x, SILU)


def gelu_backward(dy, x):
    """Twin of ops.gelu_backward. dy (...), x (...) -> dx (...)."""
    return _activation_backward(dy, x, GELU)


def quick_gelu_backward(dy, x):
    """Twin of ops.quick_gelu_backward. dy (...), x (...) -> dx (...)."""
    return _activation_backward(dy, x, QUICK_GELU)


def gelu_tanh_backward(dy, x):
    """Twin of ops.gelu_tanh_backward. dy (...), x (...) -> dx (...)."""
    return _activation_backward(dy, x, GELU_TANH)


def geglu_backward(dy, x):
    """Twin of ops.geglu_backward. dy (...,F), x (...,2F) -> dx (...,2F)."""
    return _activation_backward(dy, x, GEGLU)


def _activation(x, kind, F):
    y = get_xp(x).empty((*x.shape[:-1], F), x.dtype)
    _launch("activation", x, F, [*_contiguous(x), y], [np.int64(y.size), F, kind], _blocks(y.size))
    return y


def _activation_backward(dy, x, kind):
    F = dy.shape[-1]
    x, dy = _contiguous(x, dy)
    dx = get_xp(x).empty_like(x)
    _launch("activation_backward", x, F, [x, dy, dx], [np.int64(dy.size), F, kind],
            _blocks(dy.size))
    return dx


# ---- norms ------------------------------------------------------------------------------------

def layer_norm(x, weight, bias, eps):
    """Twin of ops.layer_norm. x (...,C), weight (C,), bias (C,) -> y (...,C)."""
    C, rows = x.shape[-1], math.prod(x.shape[:-1])
    xp = get_xp(x)
    y = xp.empty(x.shape, x.dtype)
    mean, rstd = (xp.empty((*x.shape[:-1], 1), np.float32) for _ in range(2))
    _launch("layer_norm", x, C, [*_contiguous(x, weight, bias), y, mean, rstd],
            [rows, C, float(eps)], (-(-rows // 4),), (32, 4))
    return y, (x, weight, mean, rstd)


def group_norm(x, weight, bias, num_groups, eps):
    """Twin of ops.group_norm. x (B,...,C), weight (C,), bias (C,) -> y (B,...,C)."""
    return _group_norm(x, weight, bias, num_groups, eps, silu=False)


def group_norm_silu(x, weight, bias, num_groups, eps):
    """Twin of ops.group_norm_silu. x (B,...,C), weight (C,), bias (C,) -> y (B,...,C)."""
    return _group_norm(x, weight, bias, num_groups, eps, silu=True)


def _group_norm(x, weight, bias, num_groups, eps, silu):
    B, C, G = x.shape[0], x.shape[-1], num_groups
    N = math.prod(x.shape[1:-1])
    if C % G or C > CHANNELS or G > GROUPS:
        return NotImplemented
    arrays, xp = _contiguous(x, weight, bias), get_xp(x)
    y = xp.empty(x.shape, x.dtype)
    mean, rstd = (xp.empty((B, 1, G, 1), np.float32) for _ in range(2))
    rows = max(16, -(-N // 128))                        # pixels per chunk
    chunks = -(-N // rows)
    sums = xp.empty((B, chunks, G, 2), np.float32)
    most = 2 * 4 * max(THREADS * 16 // x.dtype.itemsize, C)             # bytes: sums and squares
    _launch("group_norm_sums", x, C, [arrays[0], sums], [N, C, G, rows], (chunks, B), shared=most)
    rows = max(16, -(-N // 256))
    _launch("group_norm", x, C, [*arrays, sums, y, mean, rstd],
            [N, C, G, chunks, rows, float(eps), int(silu)], (-(-N // rows), B))
    cache = x, weight, mean, rstd
    return y, (bias, cache) if silu else cache


def layer_norm_backward(dy, cache, frozen=False):
    """Twin of ops.layer_norm_backward. dy (...,C) -> dx (...,C), dweight (C,), dbias (C,)."""
    x, weight, mean, rstd = cache
    C, rows = x.shape[-1], math.prod(x.shape[:-1])
    if C > CHANNELS:
        return NotImplemented
    (x, dy, like), dx = _contiguous(x, dy, weight), get_xp(x).empty(x.shape, x.dtype)
    _launch("layer_norm_backward", x, C, [x, dy, like, mean, rstd, dx], [rows, C], (-(-rows // 4),),
            (32, 4))
    if frozen:
        return dx, None, None
    return dx, *_norm_gradients(_norm_sums((1, rows, 0), x, dy, like, like, mean, rstd), weight)


def group_norm_backward(dy, cache, frozen=False):
    """Twin of ops.group_norm_backward. dy (B,...,C) -> dx (B,...,C), dweight (C,), dbias (C,)."""
    return _group_norm_backward(dy, cache[1], cache, frozen, silu=False)


def group_norm_silu_backward(dy, cache, frozen=False):
    """Twin of ops.group_norm_silu_backward. dy (B,...,C) -> dx (B,...,C), dweight, dbias (C,)."""
    return _group_norm_backward(dy, *cache, frozen, silu=True)


def _group_norm_backward(dy, bias, cache, frozen, silu):
    x, weight, mean, rstd = cache
    B, C, G = x.shape[0], x.shape[-1], mean.shape[2]
    N = math.prod(x.shape[1:-1])
    if C > CHANNELS:
        return NotImplemented
    arrays = _contiguous(x, dy, weight, bias)
    dx = get_xp(x).empty(x.shape, x.dtype)
    sums = _norm_sums((B, N, G), *arrays, mean, rstd, silu)
    means = (sums * weight).reshape(B, 2, G, C // G).sum(axis=3) / np.float32(N * (C // G))
    _launch("group_norm_backward", x, C, [*arrays, mean, rstd, means, dx],
            [N, C, G, np.int64(x.size), int(silu)], _blocks(x.size))
    return dx, *((None, None) if frozen else _norm_gradients(sums, weight))


def _norm_sums(sizes, x, dy, weight, bias, mean, rstd, silu=False):
    """Per image and channel, the sums over all N rows of what arrives at a norm, and of that times
    the normalised x: (B,2,C). sizes: B, N, and the number of groups, 0 for a layer norm."""
    (B, N, G), C = sizes, x.shape[-1]
    rows = max(16, -(-N * B // 1024))                   # per chunk: a thousand blocks fill a GPU
    chunks = -(-N // rows)
    sums = get_xp(x).empty((B, chunks, 2, C), np.float32)
    most = 2 * 4 * max(THREADS * 16 // x.dtype.itemsize, C)             # bytes
    _launch("norm_sums", x, C, [x, dy, weight, bias, mean, rstd, sums], [N, C, G, rows, int(silu)],
            (chunks, B), shared=most)
    return sums.sum(axis=1)


def _norm_gradients(sums, weight):
    dbias, dweight = sums.sum(axis=0).astype(weight.dtype, copy=False)
    return dweight, dbias


# ---- convolution ------------------------------------------------------------------------------

def conv2d(x, weight, bias=None, stride=1, padding=(0, 0)):
    """Twin of ops.conv2d: im2col and one product, some output pixels at a time.

    x (B,H,W,C), weight (K,L,C,O), bias (O,) or None -> y (B,Ho,Wo,O).
    """
    (B, H, W, C), (K, L, weight_C, O) = x.shape, weight.shape
    if C != weight_C:
        return NotImplemented
    (top, bottom), (left, right) = sides(padding)
    Ho, Wo = (H + top + bottom - K) // stride + 1, (W + left + right - L) // stride + 1
    xp, matrix = get_xp(x), weight.reshape(K * L * C, O).astype(x.dtype, copy=False)
    y = xp.empty((B * Ho * Wo, O), x.dtype)
    for first, columns in _columns(x, weight.shape, stride, padding, (Ho, Wo)):
        xp.matmul(columns, matrix, out=y[first:first + len(columns)])
    if bias is not None:
        y += bias
    return y.reshape(B, Ho, Wo, O), (x, weight, stride, padding)


def _columns(x, kernel, stride, padding, size):
    """For some output pixels at a time: the first one's number, and the pixels of x (B,H,W,C) that
    each of them reads, (pixels,K*L*C). kernel: the weight's shape. size: Ho, Wo."""
    (B, H, W, C), (K, L, *_), (Ho, Wo) = x.shape, kernel, size
    (top, bottom), (left, right) = sides(padding)
    xp, pixels, width = get_xp(x), B * Ho * Wo, K * L * C
    maps, = _contiguous(x)
    if K == L == stride == 1 and not top + bottom + left + right:
        yield 0, maps.reshape(pixels, C)
        return
    step = max(1, COLUMNS // width)
    for first in range(0, pixels, step):
        columns = xp.empty((min(step, pixels - first), width), x.dtype)
        numbers = [H, W, C, K, L, stride, top, left, Ho, Wo, *np.int64([first, columns.size])]
        _launch("im2col", x, C, [maps, columns], numbers, _blocks(columns.size))
        yield first, columns


def conv2d_backward(dy, cache):
    """Twin of ops.conv2d_backward: dweight is one product with the columns of x, some rows at a
    time. dy (B,Ho,Wo,O) -> dx (B,H,W,C), dweight (K,L,C,O), dbias (O,)."""
    x, weight, stride, padding = cache
    dx = conv2d_input_backward(dy, weight, x.shape, stride, padding)
    if dx is NotImplemented:
        return dx
    rows, dweight = dy.reshape(-1, dy.shape[-1]), 0
    for first, columns in _columns(x, weight.shape, stride, padding, dy.shape[1:3]):
        part = columns.T @ rows[first:first + len(columns)]
        dweight = widen(dweight) + part if first else part
    dweight = dweight.astype(np.promote_types(x.dtype, weight.dtype), copy=False)
    return dx, dweight.reshape(weight.shape), add_up(rows, axis=0)


def conv2d_input_backward(dy, weight, shape, stride=1, padding=(0, 0)):
    """Twin of ops.conv2d_input_backward, stride 1: the convolution of dy with the turned kernel.

    Each pixel of x is read under every position of the kernel, so its gradient is a window of dy.
    dy (B,Ho,Wo,O), weight (K,L,C,O), shape (B,H,W,C) of x -> dx (B,H,W,C).
    """
    (top, bottom), (left, right) = sides(padding)
    K, L = weight.shape[:2]
    if stride != 1 or max(top, bottom) >= K or max(left, right) >= L:
        return NotImplemented
    around = (K - 1 - top, K - 1 - bottom), (L - 1 - left, L - 1 - right)
    return conv2d(dy, turn(weight), padding=around)[0]


# ---- attention --------------------------------------------------------------------------------

def attention(q, k, v, num_heads, causal=False, mask=None):
    """Twin of ops.attention without a mask. q (B,N,C), k (B,M,C), v (B,M,C) -> y (B,N,C).

    The scores are computed for some images or some queries at a time, in float32: float16 has too
    few digits for the exponential of a large score.
    """
    if q.shape[2] % num_heads or mask is not None:
        return NotImplemented
    cache = q, k, v, num_heads, causal, mask
    q, k, v = _contiguous(q, k, v)
    y = get_xp(q).empty_like(q)
    queries, keys, values, out = (split_heads(x, num_heads) for x in (q, k, v, y))
    for start, some, rows in _pieces(queries, keys):
        weights = _weights(queries[rows], keys[some], start, causal)
        _products(weights, values[some], out[rows])
    return y, cache


def attention_backward(dy, cache):
    """Twin of ops.attention_backward without a mask. dy (B,N,C) -> dq (B,N,C), dk, dv (B,M,C)."""
    *qkv, num_heads, causal, mask = cache
    if mask is not None:
        return NotImplemented
    q, k, v, dy = _contiguous(*qkv, dy)
    xp = get_xp(q)
    dq, dk, dv = xp.empty_like(q), *(xp.empty(k.shape, np.float32) for _ in range(2))
    queries, keys, values, dout, dqueries, dkeys, dvalues = (
        split_heads(x, num_heads) for x in (q, k, v, dy, dq, dk, dv))
    for start, some, rows in _pieces(queries, keys):
        weights = _weights(queries[rows], keys[some], start, causal)
        dweights, dscores = xp.empty(weights.shape, np.float32), xp.empty_like(weights)
        _products(dout[rows], values[some].swapaxes(2, 3), dweights)
        M, scale = weights.shape[3], queries.shape[3] ** -0.5
        _launch("softmax_backward", q, M, [weights, dweights, dscores], [M, scale],
                (weights.size // M,), _threads(M))
        _products(dscores, keys[some], dqueries[rows])
        later = start > 0                               # keys and values serve all queries
        _products(dscores.swapaxes(2, 3), queries[rows], dkeys[some], add=later)
        _products(weights.swapaxes(2, 3), dout[rows], dvalues[some], add=later)
    return tuple(d.astype(x.dtype, copy=False) for d, x in zip((dq, dk, dv), qkv))


def _pieces(queries, keys):
    """Some images, or some queries of one image, at a time: the first query's number, which images
    of the keys, and which part of the queries."""
    (B, h, N, _), M = queries.shape, keys.shape[2]
    images = max(1, SCORES // (h * N * M))
    step = max(1, SCORES // (h * M))                    # N or more, unless one image has too many
    for first in range(0, B, images):
        for start in range(0, N, step):
            some = slice(first, first + images)
            yield start, some, (some, slice(None), slice(start, start + step))


def _weights(queries, keys, start, causal):
    """softmax(queries @ keys.T / sqrt(d)): (I,h,n,d), (I,h,M,d) -> (I,h,n,M)."""
    (I, h, n, d), M, xp = queries.shape, keys.shape[2], get_xp(queries)
    scores = xp.empty((I, h, n, M), np.float32)
    weights = scores if queries.dtype == np.float32 else xp.empty_like(scores, queries.dtype)
    _products(queries, keys.swapaxes(2, 3), scores, d ** -0.5)
    _launch("softmax", queries, M, [scores, weights], [M, n, start, int(causal)], (I * h * n,),
            _threads(M))
    return weights


def _threads(M):
    """The block for a row of M scores."""
    return 32 * min(8, -(-M // 256)),


def _products(a, b, y, factor=1, add=False):
    """y = factor * a @ b, or y += that, for stacks of matrices. a (I,h,n,k), b (I,h,k,m), y
    (I,h,n,m): views in which one of the last two axes is contiguous; of y, the last."""
    xp, (I, h, n, m), k = get_xp(y), y.shape, a.shape[3]
    cublas, handle = xp.cuda.cublas, xp.cuda.get_cublas_handle()
    numbers = np.array([factor, add], np.float32)[:, None]              # the call reads them
    # cuBLAS stores matrices by columns, which are our rows. So it computes y.T = b.T @ a.T.
    turned = [cublas.CUBLAS_OP_N if _is_by_rows(x) else cublas.CUBLAS_OP_T for x in (b, a)]
    # One call has all heads of an image or one head of all images, whichever are more.
    calls, count, axis = (I, h, 1) if I < h else (h, I, 0)
    # Of each: how far apart, in numbers, two rows and two matrices of a call are.
    steps = [(_row(x), x.strides[axis] // x.itemsize) for x in (b, a, y)]
    mode = cublas.getPointerMode(handle)                # others use this handle, too
    cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_HOST)      # the two numbers lie there
    try:
        for i in range(calls):
            of_b, of_a, of_y = ((x.data.ptr + i * x.strides[1 - axis], TYPES[x.dtype], *step)
                                for x, step in zip((b, a, y), steps))
            cublas.gemmStridedBatchedEx(
                handle, *turned, m, n, k, numbers[0].ctypes.data, *of_b, *of_a,
                numbers[1].ctypes.data, *of_y, count, cublas.CUBLAS_COMPUTE_32F,
                cublas.CUBLAS_GEMM_DEFAULT)
    finally:
        cublas.setPointerMode(handle, mode)


def _is_by_rows(x):
    return x.strides[3] == x.itemsize


def _row(x):
    """How far apart, in numbers, two rows of each matrix of x lie, or two columns if it lies by
    columns: at least the length of one, which cuBLAS asks for even where there is only one."""
    along, across = (3, 2) if _is_by_rows(x) else (2, 3)
    return max(x.shape[along], x.strides[across] // x.itemsize)
