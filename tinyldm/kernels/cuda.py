"""The twins for a GPU: one kernel makes one pass over memory where CuPy's own calls make many.

CuPy runs an op of a dozen array operations as a dozen kernels. Each reads and writes the whole
array, two bytes per thread. The kernels below read 16 bytes per thread and keep intermediate
results in registers. Matrix products are NVIDIA's: 2-D ones by CuPy's @, attention's stacks by
cuBLAS directly, because CuPy converts stacks of float16 matrices to float32 first. All statistics,
sums and exponentials are float32. Stored results have x's dtype, float16 or float32.

The caches are those of the plain ops, so a plain backward pass fits a forward pass from here. The
tests compile SOURCE with NVIDIA's compiler, which needs no GPU, and run it, thread by thread, on
the host.
"""
import functools
import math

import numpy as np

from ..backend import add_up, get_xp, widen
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

// The derivative of activate(x, kind).
__device__ inline float slope(float x, int kind) {
    if (kind == 1) return 0.5f * erfcf(-0.70710678f * x) + 0.39894228f * x * expf(-0.5f * x * x);
    float rate = 1, inner = x;                          // sigmoid(inner) is x's factor
    if (kind == 2) inner = (rate = 1.702f) * x;
    if (kind == 4) {
        inner = x * (1.5957691f + 0.071354816f * x * x);
        rate = 1.5957691f + 0.21406445f * x * x;
    }
    float s = 1 / (1 + expf(-inner));
    return s + x * s * (1 - s) * rate;
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

// dx[i] = dy[i] * slope(x[i]); kind 3, GEGLU: dy (rows,F), x and dx (rows,2F), size = rows * F.
extern "C" __global__ void activation_backward(const T* x, const T* dy, T* dx, index_t size, int F,
                                               int kind) {
    index_t i = (index_t(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
    if (i >= size) return;
    Pack up = load(dy + i);
    if (kind == 3) {
        index_t at = i / F * 2 * F + i % F;
        Pack a = load(x + at), gate = load(x + at + F);
        for (int j = 0; j < PACK; j++) {
            float d = float(up.v[j]), value = float(a.v[j]), g = float(gate.v[j]);
            a.v[j] = T(d * activate(g, 1));
            gate.v[j] = T(d * value * slope(g, 1));
        }
        store(dx + at, a);
        store(dx + at + F, gate);
    } else {
        Pack a = load(x + i);
        for (int j = 0; j < PACK; j++) a.v[j] = T(float(up.v[j]) * slope(float(a.v[j]), kind));
        store(dx + i, a);
    }
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

// With n the normalised x and g = weight * dy: dx = rstd * (g - mean(g) - n * mean(g * n)), the
// means over a row of x (rows,C). One warp per row, four rows per block.
extern "C" __global__ void layer_norm_backward(const T* x, const T* dy, const T* weight,
                                               const float* mean, const float* rstd, T* dx,
                                               int rows, int C) {
    int row = blockIdx.x * 4 + threadIdx.y, lane = threadIdx.x;
    bool inside = row < rows;                           // all lanes must meet in warp_sum
    index_t first = index_t(inside ? row : 0) * C;
    float centre = mean[inside ? row : 0], scale = rstd[inside ? row : 0], sum = 0, product = 0;
    for (int c = lane * PACK; c < C; c += 32 * PACK) {
        Pack a = load(x + first + c), up = load(dy + first + c), w = load(weight + c);
        for (int j = 0; j < PACK; j++) {
            float g = float(up.v[j]) * float(w.v[j]);
            sum += g;
            product += g * (float(a.v[j]) - centre) * scale;
        }
    }
    sum = warp_sum(sum) / C;
    product = warp_sum(product) / C;
    if (!inside) return;
    for (int c = lane * PACK; c < C; c += 32 * PACK) {
        Pack a = load(x + first + c), up = load(dy + first + c), w = load(weight + c);
        for (int j = 0; j < PACK; j++) {
            float n = (float(a.v[j]) - centre) * scale;
            a.v[j] = T(scale * (float(up.v[j]) * float(w.v[j]) - sum - n * product));
        }
        store(dx + first + c, a);
    }
}

// What arrives at the norm: dy, or what SiLU, which came after it, lets through.
__device__ inline float arriving(float dy, float n, float weight, float bias, int with_silu) {
    return with_silu ? dy * slope(n * weight + bias, 0) : dy;
}

// Sums over a chunk of rows of one image of x (B,N,C), per channel: of what arrives, and of that
// times the normalised x. Block (chunk, image) writes sums (B,chunks,2,C). mean, rstd: (B,G), or
// (B,N) for a layer norm, whose G is 0.
extern "C" __global__ void norm_sums(const T* x, const T* dy, const T* weight, const T* bias,
                                     const float* mean, const float* rstd, float* sums, int N,
                                     int C, int G, int rows, int with_silu) {
    extern __shared__ float by_channel[];               // (lanes,C) sums, then products
    int packs = C / PACK, lanes = packs < blockDim.x ? blockDim.x / packs : 1, size = G ? C / G : C;
    int stop = (blockIdx.x + 1) * rows < N ? (blockIdx.x + 1) * rows : N;
    float* products = by_channel + lanes * C;
    for (int item = threadIdx.x; item < lanes * packs; item += blockDim.x) {
        int lane = item / packs, c = item % packs * PACK;
        Pack w = load(weight + c), shift = load(bias + c);
        float sum[PACK], product[PACK];
        for (int j = 0; j < PACK; j++) sum[j] = product[j] = 0;
        for (int n = blockIdx.x * rows + lane; n < stop; n += lanes) {
            index_t row = index_t(blockIdx.y) * N + n;
            Pack a = load(x + row * C + c), up = load(dy + row * C + c);
            for (int j = 0; j < PACK; j++) {
                index_t at = G ? blockIdx.y * G + (c + j) / size : row;
                float hat = (float(a.v[j]) - mean[at]) * rstd[at];
                float d = arriving(float(up.v[j]), hat, float(w.v[j]), float(shift.v[j]),
                                   with_silu);
                sum[j] += d;
                product[j] += d * hat;
            }
        }
        for (int j = 0; j < PACK; j++) {
            by_channel[lane * C + c + j] = sum[j];
            products[lane * C + c + j] = product[j];
        }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        float sum = 0, product = 0;
        for (int lane = 0; lane < lanes; lane++) {
            sum += by_channel[lane * C + c];
            product += products[lane * C + c];
        }
        float* out = sums + (index_t(blockIdx.y) * gridDim.x + blockIdx.x) * 2 * C + c;
        out[0] = sum;
        out[C] = product;
    }
}

// As layer_norm_backward, the means over a group of x (B,N,C) given: means (B,2,G) of g and g * n.
extern "C" __global__ void group_norm_backward(const T* x, const T* dy, const T* weight,
                                               const T* bias, const float* mean, const float* rstd,
                                               const float* means, T* dx, int N, int C, int G,
                                               index_t size, int with_silu) {
    index_t i = (index_t(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
    if (i >= size) return;
    int c = i % C, image = i / C / N;
    Pack a = load(x + i), up = load(dy + i), w = load(weight + c), shift = load(bias + c);
    for (int j = 0; j < PACK; j++) {
        int group = (c + j) / (C / G), at = image * G + group;
        float n = (float(a.v[j]) - mean[at]) * rstd[at], factor = float(w.v[j]);
        float g = factor * arriving(float(up.v[j]), n, factor, float(shift.v[j]), with_silu);
        const float* m = means + index_t(image) * 2 * G + group;
        a.v[j] = T(rstd[at] * (g - m[0] - n * m[G]));
    }
    store(dx + i, a);
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

// dscores = factor * weights * (dweights - sum(weights * dweights)), one block per row of (rows,M).
extern "C" __global__ void softmax_backward(const T* weights, const float* dweights, T* dscores,
                                            int M, float factor) {
    __shared__ float of_warp[32];
    int warps = blockDim.x / 32, lane = threadIdx.x % 32;
    weights += index_t(blockIdx.x) * M;
    dweights += index_t(blockIdx.x) * M;
    dscores += index_t(blockIdx.x) * M;
    float sum = 0;
    for (int m = threadIdx.x; m < M; m += blockDim.x) sum += float(weights[m]) * dweights[m];
    sum = warp_sum(sum);
    if (lane == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = warp_sum(lane < warps ? of_warp[lane] : 0.0f);
    for (int m = threadIdx.x; m < M; m += blockDim.x)
        dscores[m] = T(factor * float(weights[m]) * (dweights[m] - sum));
}
"""


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
    return conv2d(dy, weight[::-1, ::-1].swapaxes(2, 3), padding=around)[0]


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
    queries, keys, values, out = (_heads(x, num_heads) for x in (q, k, v, y))
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
        _heads(x, num_heads) for x in (q, k, v, dy, dq, dk, dv))
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


def _heads(x, num_heads):
    """(B,N,C) -> a view (B,h,N,d)."""
    return x.reshape(*x.shape[:2], num_heads, -1).swapaxes(1, 2)


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
