"""Normal numbers from a seed, equal to those of torch on the CPU or on a GPU, or of NumPy.

The latents x_T and the fresh noise of stochastic samplers come from here. To draw a picture of
another implementation again, both must start from the same numbers. So each class in GENERATORS
follows, step by step, how one library makes its numbers. Explained: docs/noise.md

"torch-cpu", Generator, equals torch on the CPU bit for bit. The Mersenne Twister MT19937 (NumPy's
is the same) gives 32-bit words; the low 24 bits of a word are a uniform number; the Box-Muller
transform turns two uniform numbers into two normal ones. torch computes 16 numbers at a time with
vector instructions: logarithm, sine and cosine are short float32 polynomials from the Cephes
library, and a*b + c is rounded once, not twice (fused multiply-add). Both affect the last bits, so
both are done here too. For fewer than 16 numbers, torch computes one at a time in float64.

"torch-cuda", CudaGenerator, follows torch on an NVIDIA GPU, but runs on the CPU. Its generator,
Philox, has no state, so that no thread waits for another: see `philox`. Thread t of T writes its
four normal numbers to the places t, t + T, t + 2T and t + 3T, and those of its next call 4T further
on. A GPU starts one thread per number, up to the T that fit on it, so GPUs differ only for more
than T numbers. (A T4, a small GPU, has T = 40,960; 512x512 pixels need 16,384 numbers.) A GPU's
sine and cosine are approximations, so the numbers agree to about 1e-6, as compared with the few
that are published.

"numpy", NumpyGenerator, is np.random.RandomState, from which many public tests draw latents.

Sources: Matsumoto & Nishimura 1998, "Mersenne Twister"; Box & Muller 1958, "A note on the
generation of random normal deviates"; Moshier's Cephes library (logf, sinf, cosf); PyTorch 2.13,
ATen/native/cpu/DistributionTemplates.h and avx_mathfun.h. The last bits are those of x86-64 with
AVX2; on other processors torch itself differs from them. Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"; curand_philox4x32_x.h and curand_normal.h of CUDA;
PyTorch, ATen/native/cuda/DistributionTemplates.h.
"""
import math
import operator

import numpy as np

from .errors import TinyldmError

F32 = np.float32
BLOCK = 16                  # torch's vector code: 8 radii and 8 angles give 16 normal numbers
A100_THREADS = 221184       # that fit on one: 108 multiprocessors with 2048 threads each


def randn(shape: int | tuple[int, ...], seed: int) -> np.ndarray:
    """Draw standard normal numbers: torch.manual_seed(seed); torch.randn(shape).

    shape: a tuple (or one length); seed: as for Generator -> float32 array of that shape.
    Raises TinyldmError for a shape that no array has, and for a seed that is none.
    """
    generator = Generator(seed)
    try:
        lengths = [operator.index(n) for n in (shape if hasattr(shape, "__len__") else [shape])]
    except TypeError:
        lengths = [-1]
    if any(n < 0 for n in lengths):
        raise TinyldmError(f"a shape is a tuple of whole numbers from 0, not {shape!r:.80}")
    return generator.randn(lengths)


class Generator:
    """A stream of random numbers: successive draws equal those of one torch.Generator.

    seed: a whole number from -2**63 to 2**64 - 1. As in torch only its low 32 bits count: 2**32 + 5
    gives the same numbers as 5. Raises TinyldmError for any other seed.
    """

    def __init__(self, seed):
        seed = _checked(seed, -2**63, 2**64)
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)
        self._spare = None              # the second number of a pair, for the next call

    def randn(self, shape):
        """Draw standard normal numbers: torch.randn(shape) -> float32 array."""
        normals = np.empty(shape, F32)
        flat = normals.reshape(-1)      # a view: torch's numbers depend on the size alone
        if flat.size < BLOCK:
            flat[:] = [self._one_normal() for _ in range(flat.size)]
            return normals
        whole = flat.size - flat.size % BLOCK
        uniforms = self.uniform(flat.size)
        flat[:whole] = box_muller(uniforms[:whole])
        if whole < flat.size:           # torch draws the last 16 again, over the block before
            flat[-BLOCK:] = box_muller(self.uniform(BLOCK))
        return normals

    def uniform(self, shape):
        """Draw from [0, 1): torch.rand(shape) -> float32 array of multiples of 2**-24."""
        words = self._words.randint(0, 2**32, shape, np.uint32)
        return (words & 0xFFFFFF).astype(F32) * F32(2**-24)

    def _one_normal(self):
        """The way for fewer than 16 numbers: a pair in float64, of which the second is kept."""
        if self._spare is not None:
            normal, self._spare = self._spare, None
            return normal
        u1, u2 = self._uniform64(), self._uniform64()
        radius, theta = math.sqrt(-2 * math.log1p(-u2)), 2 * math.pi * u1
        self._spare = radius * math.sin(theta)
        return radius * math.cos(theta)

    def _uniform64(self):
        """A float64 in [0, 1) from the low 53 bits of two words, the high word first."""
        high, low = (int(word) for word in self._words.randint(0, 2**32, 2, np.uint32))
        return ((high << 32 | low) & (2**53 - 1)) * 2**-53


class CudaGenerator:
    """The same for torch.Generator("cuda"): equal to its draws up to about 1e-6.

    seed: as for Generator, but all of its 64 bits count. threads: T of the GPU, which is its number
    of multiprocessors times the threads of each. Raises TinyldmError as Generator does.
    """

    def __init__(self, seed, threads=A100_THREADS):
        seed = _checked(seed, -2**63, 2**64)
        self._key = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
        self._threads, self._calls = threads, 0

    def randn(self, shape):
        """Draw standard normal numbers: torch.randn(shape, device="cuda") -> float32 array."""
        normals = np.empty(shape, F32)
        flat = normals.reshape(-1)      # a view: torch's numbers depend on the size alone
        threads = max(1, min(flat.size, self._threads))
        for start in range(0, flat.size, 4 * threads):
            part = flat[start:start + 4 * threads]
            part[:] = self._fours(threads)[:part.size]
        return normals

    def _fours(self, threads):
        """One call of each thread -> (4 * threads,): all first numbers, all second ones ..."""
        counter = np.zeros((4, threads), np.uint64)
        counter[0], counter[1] = self._calls & 0xFFFFFFFF, self._calls >> 32
        counter[2] = np.arange(threads)
        self._calls += 1
        words = philox(counter, self._key).astype(F32)
        radii, angles = words.reshape(2, 2, threads).swapaxes(0, 1)     # (4,T) -> twice (2,T)
        u = fma(radii, F32(2**-32), F32(2**-33))                    # in (0, 1]
        v = fma(angles, F32(2 * math.pi / 2**32), F32(math.pi / 2**32))     # in (0, 2 pi]
        radius = np.sqrt(-2 * log(u))                               # (2, threads)
        sin, cos = sin_cos(v)
        return np.stack([radius * sin, radius * cos], axis=1).reshape(-1) + F32(0)


class NumpyGenerator:
    """The same for np.random.RandomState(seed).standard_normal.

    seed: a whole number from 0 to 2**32 - 1. Raises TinyldmError for anything else.
    """

    def __init__(self, seed):
        self._state = np.random.RandomState(_checked(seed, 0, 2**32))

    def randn(self, shape):
        """Draw standard normal numbers -> float32 array, rounded from float64."""
        return np.asarray(self._state.standard_normal(shape), F32)


GENERATORS = {"torch-cpu": Generator, "torch-cuda": CudaGenerator, "numpy": NumpyGenerator}


def get_generator(name):
    """The class with a name in GENERATORS. Raises TinyldmError, with the names, for any other."""
    if not isinstance(name, str) or name not in GENERATORS:
        raise TinyldmError(f"unknown noise {name!r:.80}; known: {', '.join(GENERATORS)}")
    return GENERATORS[name]


def _checked(seed, low, high):
    """The seed as a Python int. Raises TinyldmError unless it is in [low, high)."""
    try:
        number = operator.index(seed)
    except TypeError:
        number = None
    if number is None or not low <= number < high:
        allowed = "0 to 2**32 - 1" if low == 0 else "-2**63 to 2**64 - 1"
        raise TinyldmError(f"a seed is a whole number from {allowed}, got {seed!r}: "
                           "choose one in that range")
    return number


def philox(counter, key):
    """Philox 4x32-10: four scrambled words for each counter.

    counter (4, n) uint64 below 2**32, key: two integers below 2**32 -> (4, n) uint64 below 2**32.

    A round multiplies two of the four words by constants. The high half of a product is combined
    (exclusive or) with a word that was not multiplied and with the key, which changes each round.
    The low half is kept as it is; it determines the word that was multiplied. So a round can be
    undone, and different counters give different results.

        (c0, c1, c2, c3) -> (high(M1 c2) ^ c1 ^ k0, low(M1 c2), high(M0 c0) ^ c3 ^ k1, low(M0 c0))

    Source: Salmon et al. 2011; the constants are those of its library Random123, philox.h.
    """
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product2 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (product2 >> np.uint64(32) ^ c1 ^ np.uint64(k0), product2 & low,
                          product0 >> np.uint64(32) ^ c3 ^ np.uint64(k1), product0 & low)
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32   # golden ratio, sqrt(3) - 1
    return np.stack([c0, c1, c2, c3])


def box_muller(uniforms):
    """Turn uniform numbers in [0, 1) into normal ones, in blocks of 16.

    uniforms (n,) float32, n a multiple of 16 -> (n,) float32.

        x = sqrt(-2 ln u1) cos(2 pi u2),    y = sqrt(-2 ln u1) sin(2 pi u2)

    In a block the first 8 numbers are u1 and become x, the last 8 are u2 and become y.
    """
    pairs = uniforms.reshape(-1, 2, BLOCK // 2)                     # (n) -> (blocks, 2, 8)
    u1 = 1 - pairs[:, 0]                # in (0, 1]: avoids ln 0
    radius = np.sqrt(-2 * log(u1))
    sin, cos = sin_cos(F32(2 * math.pi) * pairs[:, 1])
    points = np.stack([radius * cos, radius * sin], axis=1)
    return points.reshape(-1) + F32(0)  # torch multiplies by 1 and adds 0, which turns -0 into +0


def fma(a, b, c):
    """a * b + c, rounded to float32 once, like the processor's fused multiply-add.

    In float64 the product of two float32 numbers is exact. The sum is rounded to float64, then to
    float32. Rounding twice is wrong in one case: if the float64 sum lies exactly half-way between
    two float32 numbers, the part that the first rounding lost decides the direction. So the sum is
    moved one step in the direction of that part, which Knuth's TwoSum finds exactly.
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    half_way = total.view(np.int64) & 0x1FFFFFFF == 0x10000000      # the 29 bits float32 drops
    if half_way.any():
        rest = total - product
        lost = (product - (total - rest)) + (c - rest)
        step = np.nextafter(total, np.copysign(np.inf, lost))
        total = np.where(half_way & (lost != 0), step, total)
    return total.astype(F32)


def polynomial(x, coefficients):
    """c[0] x^n + ... + c[n] by Horner's rule, with one fma per step."""
    y = F32(coefficients[0])
    for coefficient in coefficients[1:]:
        y = fma(y, x, F32(coefficient))
    return y


def log(x):
    """Natural logarithm of float32 x in (0, 1], as in Cephes' logf.

    x = m 2^e with m in [sqrt(1/2), sqrt(2)), so ln x = ln(1 + f) + e ln 2 with f = m - 1 small:

        ln(1 + f) = f - f^2/2 + f^3 P(f),    ln 2 = 0.693359375 - 2.12194440e-4
    """
    m, e = np.frexp(x)                                              # m in [1/2, 1)
    below = m < F32(math.sqrt(0.5))
    f = np.where(below, m + m, m) - F32(1)
    e = (e - below).astype(F32)
    f2 = f * f
    y = polynomial(f, LOG) * f
    y = fma(y, f2, e * F32(-2.12194440e-4))     # e ln 2 in two parts, the small one first
    y = fma(f2, F32(-0.5), y)
    return fma(e, F32(0.693359375), f + y)


def sin_cos(x):
    """Sine and cosine of float32 x >= 0, as in Cephes' sinf and cosf.

    x = k pi/4 + r with k even and |r| <= pi/4. Polynomials give sin r and cos r. Each quarter turn
    exchanges the two, so k decides which one is the sine, and both signs.
    """
    k = (x * F32(4 / math.pi)).astype(np.int32)
    k = k + (k & 1)                                                 # if odd, the next even number
    r = x
    for part in PI_QUARTER:                     # pi/4 in three parts: subtracted without loss
        r = fma(k.astype(F32), F32(-part), r)
    r2 = r * r
    cosine = polynomial(r2, COS) * r2
    cosine = fma(cosine, r2, r2 * F32(-0.5)) + F32(1)
    sine = fma(polynomial(r2, SIN) * r2, r, r)
    exchanged = (k & 2) != 0
    sin = np.where(exchanged, cosine, sine)
    cos = np.where(exchanged, sine, cosine)
    return np.where(k & 4, -sin, sin), np.where((k + 2) & 4, -cos, cos)


LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
       -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
PI_QUARTER = (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8)
