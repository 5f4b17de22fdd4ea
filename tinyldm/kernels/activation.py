"""Activations in cache-sized blocks, shared among threads: twins of those in ops/activation.py.

All are x * sigmoid(z) = (x/2) * (1 + tanh(z/2)), by NumPy's vectorised tanh. SiLU has z = x,
quick GELU z = 1.702 x, and GELU's tanh approximation a cubic of x. GELU has
z = log(Phi(x) / (1 - Phi(x))), an odd and almost linear function of x. It is approximated by x
times a polynomial in x^2, which takes fewer passes than a rational erf.

Measured against PyTorch (`python -m tests.benchmarks.kernels`): the UNet's GEGLU takes the same
time at 4096 tokens, and up to three times as long at fewer.
"""
import math

import numpy as np

from .blocks import over_blocks

# z/2 = x * polynomial(x^2), lowest power first. Fitted on |x| <= 5.5 so that the maximum error of
# gelu is smallest: 7e-8, or 6e-7 with float32's rounding. Beyond 5.5, where tanh has reached +-1,
# the polynomial keeps its value.
HALF_LOGIT = (7.97884216e-1, 3.63342835e-2, -3.31299950e-5, -5.52401585e-5, 3.96910945e-6,
              -1.33446409e-7, 1.80561643e-9)
LARGEST = 5.5
ROOT, CUBE = math.sqrt(2 / math.pi), 0.044715           # of gelu_tanh


def silu(x):
    """Twin of ops.silu. x (..., C) -> y (..., C)."""
    def block(x, y):
        half = 0.5 * x
        np.tanh(half, out=y)
        y += 1
        y *= half
    return _in_blocks(block, x, x.shape[-1]), x


def quick_gelu(x):
    """Twin of ops.quick_gelu. x (..., C) -> y (..., C)."""
    def block(x, y):
        np.multiply(x, 0.5 * 1.702, out=y)
        np.tanh(y, out=y)
        y += 1
        y *= x
        y *= 0.5
    return _in_blocks(block, x, x.shape[-1]), x


@np.errstate(over="ignore")             # of the cube: tanh is 1 or -1
def gelu_tanh(x):
    """Twin of ops.gelu_tanh. x (..., C) -> y (..., C)."""
    def block(x, y):
        np.multiply(x, x, out=y)
        y *= ROOT * CUBE
        y += ROOT
        y *= x
        np.tanh(y, out=y)
        y += 1
        y *= x
        y *= 0.5
    return _in_blocks(block, x, x.shape[-1]), x


def gelu(x):
    """Twin of ops.gelu. x (..., C) -> y (..., C), within 1e-6 of the exact GELU."""
    def block(x, y):
        _normal_cdf(x, y)
        y *= x
    return _in_blocks(block, x, x.shape[-1]), x


def geglu(x):
    """Twin of ops.geglu. x (..., 2F) = [value, gate] -> y (..., F)."""
    F = x.shape[-1] // 2

    def block(x, y):
        _normal_cdf(x[:, F:], y)
        y *= x[:, F:]
        y *= x[:, :F]
    return _in_blocks(block, x, F), x


def _in_blocks(compute, x, width):
    """y (..., width), where compute(rows of x, rows of y) writes one block after another."""
    rows = x.reshape(-1, x.shape[-1])
    y = np.empty((len(rows), width), np.float32)
    over_blocks(lambda block: compute(rows[block[1]], y[block[1]]), 1, len(y), width)
    return y.reshape(*x.shape[:-1], width)


def _normal_cdf(x, out):
    """out = Phi(x), within 1e-7."""
    square = np.clip(x, -LARGEST, LARGEST)
    square *= square
    np.multiply(square, HALF_LOGIT[-1], out=out)
    for coefficient in HALF_LOGIT[-2:0:-1]:                              # Horner's rule, in place
        out += coefficient
        out *= square
    out += HALF_LOGIT[0]
    out *= x
    np.tanh(out, out=out)
    out += 1
    out *= 0.5


@np.errstate(under="ignore")            # phi of a large gate is 0
def geglu_backward(dy, x):
    """Twin of ops.geglu_backward. dy (..., F), x (..., 2F) -> dx (..., 2F)."""
    F = x.shape[-1] // 2
    rows, drows = x.reshape(-1, 2 * F), dy.reshape(-1, F)
    dx = np.empty_like(rows)

    def block(at):
        part = at[1]
        value, gate, d = rows[part, :F], rows[part, F:], drows[part]
        cdf = np.empty_like(d)
        _normal_cdf(gate, cdf)
        slope = gate * gate
        slope *= -0.5
        np.exp(slope, out=slope)
        slope *= gate
        slope *= 1 / math.sqrt(2 * math.pi)             # gate * phi(gate)
        slope += cdf                                    # gelu'(gate)
        slope *= value
        np.multiply(slope, d, out=dx[part, F:])
        cdf *= gate                                     # gelu(gate)
        np.multiply(cdf, d, out=dx[part, :F])

    over_blocks(block, 1, *rows.shape)
    return dx.reshape(x.shape)
