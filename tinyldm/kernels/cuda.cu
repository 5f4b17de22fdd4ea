// The kernels of cuda.py, whose function of a kernel's name launches it.
//
// T is float or __half. PACK numbers are read and written at once: 16 bytes, or 1 number if an array
// does not divide into such packs.

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
