"""Ideas for speed, used or not, each timed against the alternative.

    python -m tests.benchmarks.leads [--only TEXT] [--rounds 9] [--json PATH]

Each case is a function that returns the two: as tinyldm does it, and otherwise. The shapes are of
Stable Diffusion 1.5 at 512x512 with guidance. docs/performance.md says what was expected.
"""
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
from threadpoolctl import threadpool_limits

from tests.benchmarks import timing
from tinyldm import backend, ops
from tinyldm.backend import parallel
from tinyldm.kernels import conv, half, im2col, product, winograd

F32 = np.float32
CASES = {}


def case(name):
    def register(function):
        CASES[name] = function
        return function
    return register


def normal(*shape, dtype=F32, scale=1.0):
    values = np.random.default_rng(0).standard_normal(shape, F32)
    values *= F32(scale)
    return values.astype(dtype, copy=False)


def halves(B, H, C):
    """A batch of two, as guidance has, and the same as two batches of one."""
    x = normal(B, H, H, C)
    return x, np.split(x, B)


@contextmanager
def replaced(module, **attributes):
    before = {name: getattr(module, name) for name in attributes}
    for name, value in attributes.items():
        setattr(module, name, value)
    yield
    for name, value in before.items():
        setattr(module, name, value)


# ---- convolution ----------------------------------------------------------------------------

def convolution(H, C, O):
    x, weight, bias = normal(2, H, H, C), normal(3, 3, C, O, scale=(9 * C) ** -0.5), normal(O)
    return x, weight, lambda: winograd.conv3x3(x, weight, bias)


@case("Winograd, not im2col, 64x64 map")
def winograd_large():
    x, weight, ours = convolution(64, 320, 320)
    return ours, lambda: im2col.conv2d(x, weight, None, 1, (1, 1))


@case("Winograd, not im2col, 16x16 map")
def winograd_small():
    x, weight, ours = convolution(16, 1280, 1280)
    return ours, lambda: im2col.conv2d(x, weight, None, 1, (1, 1))


@case("tiles of 2x2, not 4x4, 16x16 map")
def small_tiles():
    _, _, ours = convolution(16, 1280, 1280)

    def large():
        with replaced(winograd, _points=lambda *sizes: winograd.LARGE):
            ours()
    return ours, large


def weights_kept(H, C, O):
    """Without the transform: the most that keeping its result, at four times the memory, saves."""
    _, _, ours = convolution(H, C, O)

    def kept():
        with replaced(winograd, _transform_weight=lambda weight, points, turned: np.empty(
                (points.count, *weight.shape[2:]), F32)):
            ours()
    return ours, kept


@case("transformed weights made anew, not kept, 64x64 map")
def weights_kept_large():
    return weights_kept(64, 320, 320)


@case("transformed weights made anew, not kept, 32x32 map")
def weights_kept_small():
    return weights_kept(32, 640, 640)


@case("two or four tiles transformed by one product, not each by its own, VAE")
def tiles_side_by_side():
    x, weight = normal(1, 256, 256, 128), normal(3, 3, 128, 128, scale=0.03)
    with replaced(winograd, WIDTH=1):
        single = winograd.Points(2 / 3, 3 / 2)

    def one_by_one():
        with replaced(winograd, LARGE=single):
            winograd.conv3x3(x, weight, None)
    return lambda: winograd.conv3x3(x, weight, None), one_by_one


@case("dx without a copy of the weight, 16x16 map")
def weight_as_it_is():
    return turned_weight(16, 1280)


@case("dx without a copy of the weight, 64x64 map")
def weight_as_it_is_large():
    return turned_weight(64, 320)


def turned_weight(H, C):
    dy, weight = normal(1, H, H, C), normal(3, 3, C, C, scale=(9 * C) ** -0.5)

    def ours():
        conv.conv2d_input_backward(dy, weight, dy.shape, 1, (1, 1))

    def copied():
        with replaced(conv, LARGE=1 << 40):
            ours()
    return ours, copied


# ---- matrix products ------------------------------------------------------------------------

@case("q, k and v as three products, not one, 64x64 map")
def merged_large():
    return merged(8192, 320)


@case("q, k and v as three products, not one, 16x16 map")
def merged_small():
    return merged(512, 1280)


def merged(rows, C):
    x, weight = normal(rows, C), normal(3 * C, C)
    parts = np.split(weight, 3)
    return (lambda: [product.product(x, part.T) for part in parts],
            lambda: product.product(x, weight.T))


@case("products over our threads, not BLAS's, beside other kernels")
def our_threads():
    x, weight = normal(2, 1024, 640), normal(5120, 640)

    def blas():
        for _ in range(8):
            ops.geglu((x.reshape(-1, 640) @ weight.T).reshape(2, 1024, -1))

    def ours():
        for _ in range(8):
            ops.geglu(ops.linear(x, weight)[0])
    return ours, blas


@case("products with 77 rows over BLAS's threads, not ours")
def few_rows():
    x, matrices = normal(77, 768), [normal(3072, 768).T for _ in range(8)]

    def ours():
        for matrix in matrices:
            product.product(x, matrix)

    def own_threads():
        with replaced(product, FEW=()):
            ours()
    return ours, own_threads


@case("weights float16, not float32, widened when used, 32x32 map")
def narrow_large():
    return narrow(2048, 640, 5120)


@case("weights float16, not float32, widened when used, 8x8 map")
def narrow_small():
    return narrow(128, 1280, 10240)


def narrow(rows, C, O):
    x, weight = normal(rows, C), normal(O, C, dtype=np.float16)
    wide = weight.astype(F32)
    return lambda: product.product(x, weight.T), lambda: product.product(x, wide.T)


@case("float16 widened by integer operations, not by NumPy")
def widening():
    x, out = normal(1280, 1280, dtype=np.float16), normal(1280, 1280)

    def ours():
        with replaced(backend, free_threads=lambda: 1):     # as NumPy
            half.widen(x, out)
    return ours, lambda: np.copyto(out, x)


# ---- attention ------------------------------------------------------------------------------

@case("attention in blocks over threads, not plain, 4096 tokens")
def blocked_attention():
    q, k, v = (normal(2, 4096, 320) for _ in range(3))

    def plain():
        with backend.plain():
            ops.attention(q, k, v, 8)
    return lambda: ops.attention(q, k, v, 8), plain


@case("attention's backward by heads, not plain, 4096 tokens")
def backward_by_heads():
    q, k, v, dy = (normal(1, 4096, 320) for _ in range(4))
    cache = q, k, v, 8, False, None

    def plain():
        with backend.plain():
            ops.attention_backward(dy, cache)
    return lambda: ops.attention_backward(dy, cache), plain


@case("attention of 64 heads with 64 tokens together, not plain, forward and backward")
def heads_together():
    q, k, v, dy = (normal(16, 64, 96) for _ in range(4))

    def ours():
        ops.attention(q, k, v, 4)
        ops.attention_backward(dy, (q, k, v, 4, False, None))

    def plain():
        with backend.plain():
            ours()
    return ours, plain


@case("sums of weights by a product with ones, not a column of ones in v")
def column_of_ones():
    scores, v, ones = normal(1024, 256), normal(256, 40), np.ones(256, F32)
    with_ones = np.column_stack([v, ones])

    def ours():
        parallel(lambda _: (scores @ v, scores @ ones), range(64))
    return ours, lambda: parallel(lambda _: scores @ with_ones, range(64))


@case("keys and values of the prompt at every step, not once a picture")
def context_once():
    """The part of a transformer block that attends to the prompt, with and without k and v."""
    x, context = normal(2, 4096, 320), normal(2, 77, 768)
    to_q, to_k, to_v, to_out = (normal(320, n, scale=0.05) for n in (320, 768, 768, 320))
    k, v = ops.linear(context, to_k)[0], ops.linear(context, to_v)[0]

    def attend(k, v):
        ops.linear(ops.attention(ops.linear(x, to_q)[0], k, v, 8)[0], to_out)
    return (lambda: attend(ops.linear(context, to_k)[0], ops.linear(context, to_v)[0]),
            lambda: attend(k, v))


@case("guidance's two halves as one batch, not two, 16x16 map")
def one_batch():
    x, parts = halves(2, 16, 1280)
    weight = normal(3, 3, 1280, 1280, scale=0.01)

    def block(x):
        ops.conv2d(x, weight, None, 1, (1, 1))
        ops.linear(x, weight[0, 0])
    return lambda: block(x), lambda: [block(part) for part in parts]


# ---- memory ---------------------------------------------------------------------------------

RUN = """
import numpy as np, sys, time
from tests.support import sd15
from tinyldm import backend
from tinyldm.models import AutoencoderKL
if sys.argv[1] == "given back":
    backend.keep_freed_memory = lambda: None
vae = sd15.randomise(AutoencoderKL(sd15.VAE))
z = np.zeros((1, 48, 48, 4), np.float32)
vae.decode(z)
start = time.perf_counter()
vae.decode(z)
print(time.perf_counter() - start)
"""


@case("freed memory kept, not given back, a picture decoded")
def kept_memory():
    """Each in its own process, which prints the seconds."""
    def run(how):
        command = [sys.executable, "-c", RUN, how]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return lambda: run("kept"), lambda: run("given back")


def measure(function):
    """The seconds that the function returns, otherwise those that it takes."""
    def both():
        both.result = function()
    seconds = timing.seconds(both)
    return both.result if isinstance(both.result, float) else seconds


def main():
    parser = timing.arguments("Ideas for speed, each against the other way", rounds=9)
    parser.add_argument("--only", default="", help="only names that contain this text")
    args = parser.parse_args()
    backend.keep_freed_memory()
    rows = ((name, "s", timing.in_turns(dict(zip(("tinyldm", "otherwise"), make())), args.rounds,
                                        measure=measure))
            for name, make in CASES.items() if args.only in name)
    with threadpool_limits(backend.num_threads(), "blas"):
        timing.report("Ideas", rows, "otherwise", args.json)


if __name__ == "__main__":
    main()
