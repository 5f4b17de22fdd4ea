"""The twins for a GPU: one kernel makes one pass over memory where CuPy's own calls make many.

CuPy runs an op of a dozen array operations as a dozen kernels. Each reads and writes the whole
array, two bytes per thread. The kernels below read 16 bytes per thread and keep intermediate
results in registers. Matrix products are NVIDIA's: 2-D ones by CuPy's @, attention's stacks by
cuBLAS directly, because CuPy converts stacks of float16 matrices to float32 first. All statistics,
sums and exponentials are float32. Stored results have x's dtype, float16 or float32.

Convolution's gradients are products of the same columns. All other backward passes are the plain
ones, because the caches are those of the plain ops. The tests compile SOURCE with NVIDIA's
compiler, which needs no GPU, and run it, thread by thread, on the host.
"""
import functools
import math

import numpy as np

from ..backend import add_up, get_xp
from .im2col import sides

COLUMNS = 1 << 26           # numbers of im2col at a time: 128 MiB in float16
SCORES = 1 << 26            # attention scores at a time: 256 MiB
THREADS = 256               # per block
CHANNELS = 4096             # at most so many channels and groups in group norm: its sums lie
GROUPS = 256                # in shared memory
SILU, GELU, QUICK_GELU, GEGLU, GELU_TANH = range(5)
TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 2}              # CUDA_R_32F, CUDA_R_16F

# T is float or __half. PACK numbers are read and written at once: 16 bytes, or 1 number if an array
# does not divide into such packs. The function below with a kernel's name launches it.
SOURCE = r"""
#include <cuda_fp16.h>

typedef TINYLDM_T T;                                    // a macro T would be replaced in headers
constexpr int PACK = TINYLDM_PACK;
struct alignas(PACK * sizeof(T)) Pack { T v[PACK]; };
typedef long long index_t;

__device__ inline Pack load(const T* x) { return *reinterpret_cast<const Pack*>(x); }
__device__ inline void store(T* y, const Pack& pack) { *reinterpret_cast<Pack*>(y) = pack; }

__device__ inline float warp_sum(float x) {
    for (int lane = 16; lane; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int lane = 16; lane; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
    return x;
}

__device__ inline float silu(float x) { return x / (1 + expf(-x)); }

__device__ inline float activate(float x, int kind) {
    if (kind == 0) return silu(x);
    if (kind == 2) return x / (1 + expf(-1.702f * x));
    if (kind == 4) return x / (1 + expf(x * (-1.5957691f - 0.071354816f * x * x)));
    return 0.5f * x * erfcf(-0.70710678f * x);
}

// y[i] = activate(x[i]), size numbers; kind 3, GEGLU: x (rows,2F), y (rows,F), size = rows * F.
extern "C" __global__ void activation(const T* x, T* y, index_t size, int F, int kind) {
    index_t i = (index_t(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
    if (i >= size) return;
    Pack out;
    if (kind == 3) {
        const T* value = x + i / F * 2 * F + i % F;
        Pack a = load(value), gate = load(value + F);
        for (int j = 0; j < PACK; j++) out.v[j] = T(float(a.v[j]) * activate(float(gate.v[j]), 1));
    } else {
        Pack a = load(x + i);
        for (int j = 0; j < PACK; j++) out.v[j] = T(activate(float(a.v[j]), kind));
    }
    store(y + i, out);
}

// One warp per row of x (rows,C), four rows per block.
extern "C" __global__ void layer_norm(const T* x, const T* weight, const T* bias, T* y, float* mean,
                                      float* rstd, int rows, int C, float eps) {
    int row = blockIdx.x * 4 + threadIdx.y, lane = threadIdx.x;
    bool inside = row < rows;                           // all lanes must meet in warp_sum
    x += index_t(inside ? row : 0) * C;
    float sum = 0, squares = 0;
    for (int c = lane * PACK; c < C; c += 32 * PACK) {
        Pack a = load(x + c);
        for (int j = 0; j < PACK; j++) sum += float(a.v[j]);
    }
    float centre = warp_sum(sum) / C;
    for (int c = lane * PACK; c < C; c += 32 * PACK) {
        Pack a = load(x + c);
        for (int j = 0; j < PACK; j++) {
            float centred = float(a.v[j]) - centre;
            squares += centred * centred;
        }
    }
    float scale = rsqrtf(warp_sum(squares) / C + eps);
    if (!inside) return;
    y += index_t(row) * C;
    for (int c = lane * PACK; c < C; c += 32 * PACK) {
        Pack a = load(x + c), w = load(weight + c), b = load(bias + c);
        for (int j = 0; j < PACK; j++)
            a.v[j] = T((float(a.v[j]) - centre) * scale * float(w.v[j]) + float(b.v[j]));
        store(y + c, a);
    }
    if (lane == 0) { mean[row] = centre; rstd[row] = scale; }
}

// Sums over a chunk of pixels of one image of x (B,N,C), per group: block (chunk, image) writes
// sums (B,chunks,G,2) of x - pivot and of its square. The pivot is the group's first number in the
// image. Without it, mean square minus squared mean could cancel.
extern "C" __global__ void group_norm_sums(const T* x, float* sums, int N, int C, int G, int rows) {
    extern __shared__ float by_channel[];               // (lanes,C) sums, then squares
    int packs = C / PACK, lanes = packs < blockDim.x ? blockDim.x / packs : 1, size = C / G;
    int stop = (blockIdx.x + 1) * rows < N ? (blockIdx.x + 1) * rows : N;
    float* squares = by_channel + lanes * C;
    x += index_t(blockIdx.y) * N * C;
    for (int item = threadIdx.x; item < lanes * packs; item += blockDim.x) {
        int lane = item / packs, c = item % packs * PACK;
        float sum[PACK], square[PACK], pivot[PACK];
        for (int j = 0; j < PACK; j++) {
            sum[j] = square[j] = 0;
            pivot[j] = float(x[(c + j) / size * size]);
        }
        for (int n = blockIdx.x * rows + lane; n < stop; n += lanes) {
            Pack a = load(x + index_t(n) * C + c);
            for (int j = 0; j < PACK; j++) {
                float shifted = float(a.v[j]) - pivot[j];
                sum[j] += shifted;
                square[j] += shifted * shifted;
            }
        }
        for (int j = 0; j < PACK; j++) {
            by_channel[lane * C + c + j] = sum[j];
            squares[lane * C + c + j] = square[j];
        }
    }
    __syncthreads();
    for (int g = threadIdx.x; g < G; g += blockDim.x) {
        float sum = 0, square = 0;
        for (int lane = 0; lane < lanes; lane++)
            for (int c = g * size; c < (g + 1) * size; c++) {
                sum += by_channel[lane * C + c];
                square += squares[lane * C + c];
            }
        float* out = sums + ((index_t(blockIdx.y) * gridDim.x + blockIdx.x) * G + g) * 2;
        out[0] = sum;
        out[1] = square;
    }
}

// Each block adds up the chunks of its image, then writes its rows of y = norm(x) or silu(norm(x)).
extern "C" __global__ void group_norm(const T* x, const T* weight, const T* bias, const float* sums,
                                      T* y, float* mean, float* rstd, int N, int C, int G,
                                      int chunks, int rows, float eps, int with_silu) {
    __shared__ float centre[256], scale[256];
    int packs = C / PACK, size = C / G;
    index_t first = index_t(blockIdx.y) * N * C;
    for (int g = threadIdx.x; g < G; g += blockDim.x) {
        float sum = 0, square = 0, count = float(N) * size;
        for (int chunk = 0; chunk < chunks; chunk++) {
            const float* part = sums + ((index_t(blockIdx.y) * chunks + chunk) * G + g) * 2;
            sum += part[0];
            square += part[1];
        }
        float offset = sum / count;
        centre[g] = float(x[first + g * size]) + offset;
        scale[g] = rsqrtf(fmaxf(square / count - offset * offset, 0.0f) + eps);
        if (square != square) scale[g] = square;        // fmaxf(NaN, 0) is 0
        if (blockIdx.x == 0) {
            mean[blockIdx.y * G + g] = centre[g];
            rstd[blockIdx.y * G + g] = scale[g];
        }
    }
    __syncthreads();
    int stop = (blockIdx.x + 1) * rows < N ? (blockIdx.x + 1) * rows : N;
    int start = blockIdx.x * rows;
    for (index_t i = threadIdx.x; i < index_t(stop - start) * packs; i += blockDim.x) {
        int c = i % packs * PACK;
        index_t at = first + (start + i / packs) * C + c;
        Pack a = load(x + at), w = load(weight + c), b = load(bias + c);
        for (int j = 0; j < PACK; j++) {
            int g = (c + j) / size;
            float h = (float(a.v[j]) - centre[g]) * scale[g] * float(w.v[j]) + float(b.v[j]);
            a.v[j] = T(with_silu ? silu(h) : h);
        }
        store(y + at, a);
    }
}

// columns[p, (i,j,c)] = x[b, h*stride + i - top, w*stride + j - left, c], 0 outside, for the
// output pixels p = (b,h,w) from `first` on.
extern "C" __global__ void im2col(const T* x, T* columns, int H, int W, int C, int K, int L,
                                  int stride, int top, int left, int Ho, int Wo, index_t first,
                                  index_t size) {
    index_t at = (index_t(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
    if (at >= size) return;
    int c = at % C, tap = at / C % (K * L);
    index_t p = first + at / C / (K * L);
    int h = p / Wo % Ho * stride + tap / L - top, w = p % Wo * stride + tap % L - left;
    Pack pack;
    if (h >= 0 && h < H && w >= 0 && w < W) {
        pack = load(x + ((p / Wo / Ho * H + h) * W + w) * C + c);
    } else {
        for (int j = 0; j < PACK; j++) pack.v[j] = T(0.0f);
    }
    store(columns + at, pack);
}

// Softmax: one block per row of scores (rows,M). causal: row r belongs to query start + r % n.
extern "C" __global__ void softmax(const float* scores, T* weights, int M, int n, int start,
                                   int causal) {
    __shared__ float of_warp[32];
    int warps = blockDim.x / 32, lane = threadIdx.x % 32, seen = M;
    if (causal) seen = start + blockIdx.x % n + 1;
    scores += index_t(blockIdx.x) * M;
    weights += index_t(blockIdx.x) * M;
    float largest = -3.4e38f, sum = 0;
    for (int m = threadIdx.x; m < seen; m += blockDim.x) largest = fmaxf(largest, scores[m]);
    largest = warp_max(largest);
    if (lane == 0) of_warp[threadIdx.x / 32] = largest;
    __syncthreads();
    largest = warp_max(lane < warps ? of_warp[lane] : -3.4e38f);
    for (int m = threadIdx.x; m < seen; m += blockDim.x) sum += expf(scores[m] - largest);
    sum = warp_sum(sum);
    __syncthreads();                                    // all have read the maxima
    if (lane == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = warp_sum(lane < warps ? of_warp[lane] : 0.0f);
    for (int m = threadIdx.x; m < M; m += blockDim.x)
        weights[m] = T(m < seen ? expf(scores[m] - largest) / sum : 0.0f);
}
"""


def options(T, pack):
    """The options for the compiler: T is "float" or "__half", pack the numbers at a time."""
    return "-std=c++17", f"-DTINYLDM_T={T}", f"-DTINYLDM_PACK={pack}"


@functools.cache
def _module(xp, dtype, pack):
    T = {np.dtype(np.float16): "__half", np.dtype(np.float32): "float"}[dtype]
    return xp.RawModule(code=SOURCE, options=options(T, pack))


def _launch(name, x, width, arrays, numbers, grid, block=(THREADS,), shared=0):
    """Queue a kernel on contiguous arrays, in packs if these divide the last axis, of `width`.

    numbers: a Python int is passed as int, a float as float, a NumPy number with its own type.
    """
    pack = 16 // x.dtype.itemsize
    if width % pack or any(array.data.ptr % 16 for array in arrays):
        pack = 1
    numbers = [{int: np.int32, float: np.float32}.get(type(n), lambda n: n)(n) for n in numbers]
    kernel = _module(get_xp(x), x.dtype, pack).get_function(name)
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


def _activation(x, kind, F):
    y = get_xp(x).empty((*x.shape[:-1], F), x.dtype)
    _launch("activation", x, F, [*_contiguous(x), y], [np.int64(y.size), F, kind], _blocks(y.size))
    return y


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
    xp, rows = get_xp(x), dy.reshape(-1, dy.shape[-1])
    dweight = xp.zeros((math.prod(weight.shape[:3]), weight.shape[3]), np.float32)
    for first, columns in _columns(x, weight.shape, stride, padding, dy.shape[1:3]):
        dweight += columns.T @ rows[first:first + len(columns)]
    dweight = dweight.astype(xp.promote_types(x.dtype, weight.dtype), copy=False)
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
    return conv2d(dy, weight[::-1, ::-1].swapaxes(2, 3), padding=around)[0]


# ---- attention --------------------------------------------------------------------------------

def attention(q, k, v, num_heads, causal=False, mask=None):
    """Twin of ops.attention without a mask. q (B,N,C), k (B,M,C), v (B,M,C) -> y (B,N,C).

    The scores are computed for some images or some queries at a time, in float32: float16 has too
    few digits for the exponential of a large score.
    """
    xp, (B, N, C), M = get_xp(q), q.shape, k.shape[1]
    if C % num_heads or mask is not None:
        return NotImplemented
    cache, d = (q, k, v, num_heads, causal, mask), C // num_heads
    q, k, v = _contiguous(q, k, v)
    y = xp.empty_like(q)
    heads = [x.reshape(B, -1, num_heads, d).swapaxes(1, 2) for x in (q, k, v, y)]       # (B,h,N,d)
    images = max(1, SCORES // (num_heads * N * M))
    step = max(1, SCORES // (num_heads * M))            # N or more, unless one image has too many
    for some in (slice(first, first + images) for first in range(0, B, images)):
        for start in range(0, N, step):
            queries, keys, values, out = (x[some] for x in heads)
            queries, out = (x[:, :, start:start + step] for x in (queries, out))
            I, n = len(queries), queries.shape[2]
            scores = xp.empty((I, num_heads, n, M), np.float32)
            weights = scores if q.dtype == np.float32 else xp.empty_like(scores, q.dtype)
            # One call has all heads of an image or one head of all images, whichever are more.
            parts = range(I) if I < num_heads else [np.s_[:, head] for head in range(num_heads)]
            for part in parts:
                _products(queries[part], keys[part], scores[part], True, d ** -0.5)
            _launch("softmax", q, M, [scores, weights], [M, n, start, int(causal)],
                    (I * num_heads * n,), (32 * min(8, -(-M // 256)),))
            for part in parts:
                _products(weights[part], values[part], out[part], False)
    return y, cache


def _products(x, matrix, y, transposed, alpha=1):
    """y[i] = alpha * x[i] @ matrix[i], or with matrix[i].T if transposed.

    x (I,n,k), matrix (I,k,m) or (I,m,k), y (I,n,m): views whose last axis is contiguous.
    """
    xp, (I, n, m), k = get_xp(y), y.shape, x.shape[2]
    cublas, handle = xp.cuda.cublas, xp.cuda.get_cublas_handle()
    alpha, beta = np.array([alpha, 0], np.float32)[:, None]             # the call reads them
    # cuBLAS stores matrices by columns, which are our rows. So it computes y.T = matrix.T @ x.T.
    # Of each: where it lies, its type, and how far apart two rows and two matrices are, in numbers.
    places = [part for array in (matrix, x, y)
              for part in (array.data.ptr, TYPES[array.dtype], array.strides[1] // array.itemsize,
                           array.strides[0] // array.itemsize)]
    mode = cublas.getPointerMode(handle)                # others use this handle, too
    cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_HOST)      # alpha and beta lie there
    try:
        cublas.gemmStridedBatchedEx(
            handle, cublas.CUBLAS_OP_T if transposed else cublas.CUBLAS_OP_N,
            cublas.CUBLAS_OP_N, m, n, k, alpha.ctypes.data, *places[:8], beta.ctypes.data,
            *places[8:], I, cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT)
    finally:
        cublas.setPointerMode(handle, mode)
