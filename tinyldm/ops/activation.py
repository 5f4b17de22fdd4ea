"""Activations, applied to each number alone, and softmax over the last axis."""
import math

import numpy as np

from ..backend import fast_twin, get_xp, widen
from ..kernels import activation, cuda
from .erf import erf

ROOT, CUBE = math.sqrt(2 / math.pi), 0.044715           # of gelu_tanh


def _sigmoid(x):
    """1 / (1 + exp(-x)), written with tanh, which does not overflow. float16 x -> float32.

    For x << 0 the two terms cancel: float16 would keep no digits.
    """
    return 0.5 * get_xp(x).tanh(0.5 * widen(x)) + 0.5


@fast_twin(cpu=activation.silu, gpu=cuda.silu)
def silu(x):
    """y = x * sigmoid(x), elementwise. Also called swish.

    Source: Elfwing, Uchibe & Doya 2017, arXiv:1702.03118, eq. 7; Ramachandran et al. 2017,
    arXiv:1710.05941.
    """
    return (x * _sigmoid(x)).astype(x.dtype, copy=False), x


@fast_twin(gpu=cuda.silu_backward)
def silu_backward(dy, x):
    """dx = dy * s * (1 + x * (1 - s)),  s = sigmoid(x).  Product rule, with s' = s * (1 - s)."""
    s = _sigmoid(x)
    return (dy * s * (1 + x * (1 - s))).astype(x.dtype, copy=False)


def leaky_relu(x, slope=0.2):
    """y = x where x > 0, else slope * x, elementwise. 0 < slope < 1: no number's gradient is 0.

    Source: Maas, Hannun & Ng 2013, "Rectifier Nonlinearities Improve Neural Network Acoustic
    Models", section 2; slope 0.2: Radford, Metz & Chintala 2015, arXiv:1511.06434, section 3.
    """
    return get_xp(x).maximum(x, slope * x), (x, slope)


def leaky_relu_backward(dy, cache):
    """dx = dy where x > 0, else slope * dy."""
    x, slope = cache
    return get_xp(x).where(x > 0, dy, slope * dy)


def _normal_cdf(x):                                     # float16 x -> float32
    return 0.5 * (1 + erf(widen(x) * math.sqrt(0.5)))


@fast_twin(cpu=activation.gelu, gpu=cuda.gelu)
def gelu(x):
    """y = x * Phi(x), with Phi the cumulative distribution function of the normal distribution.

    Phi is exact: made from erf, not from the tanh approximation.

    Source: Hendrycks & Gimpel 2016, "Gaussian Error Linear Units", arXiv:1606.08415, section 2.
    """
    return (x * _normal_cdf(x)).astype(x.dtype, copy=False), x


@fast_twin(gpu=cuda.gelu_backward)
@np.errstate(under="ignore")            # phi of a large x is 0
def gelu_backward(dy, x):
    """dx = dy * (Phi(x) + x * phi(x)),  phi = exp(-x^2/2) / sqrt(2 pi), the derivative of Phi."""
    x_wide = widen(x)
    density = get_xp(x).exp(-0.5 * x_wide * x_wide) * (1 / math.sqrt(2 * math.pi))
    return (dy * (_normal_cdf(x) + x * density)).astype(x.dtype, copy=False)


@fast_twin(cpu=activation.quick_gelu, gpu=cuda.quick_gelu)
def quick_gelu(x):
    """y = x * sigmoid(1.702 x), an approximation of gelu. OpenAI's CLIP was trained with it.

    Source: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2.
    """
    return (x * _sigmoid(1.702 * widen(x))).astype(x.dtype, copy=False), x


@fast_twin(gpu=cuda.quick_gelu_backward)
def quick_gelu_backward(dy, x):
    """dx = dy * s * (1 + 1.702 x (1 - s)),  s = sigmoid(1.702 x)."""
    x_wide = 1.702 * widen(x)
    s = _sigmoid(x_wide)
    return (dy * s * (1 + x_wide * (1 - s))).astype(x.dtype, copy=False)


@fast_twin(cpu=activation.gelu_tanh, gpu=cuda.gelu_tanh)
@np.errstate(over="ignore")             # of the cube: tanh is 1 or -1
def gelu_tanh(x):
    """y = x * (1 + tanh(u)) / 2,  u = sqrt(2/pi) * (x + 0.044715 x^3), an approximation of gelu.

    DiT was trained with it. Public configs call it "gelu-approximate" or "gelu_new".
    Source: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2.
    """
    return (x * _sigmoid(2 * _tanh_argument(widen(x)))).astype(x.dtype, copy=False), x


def _tanh_argument(x):
    return x * (ROOT + ROOT * CUBE * (x * x))


@fast_twin(gpu=cuda.gelu_tanh_backward)
@np.errstate(over="ignore")
def gelu_tanh_backward(dy, x):
    """dx = dy * s * (1 + 2 x u' (1 - s)),  s = sigmoid(2u) = (1 + tanh(u)) / 2.

    u' = sqrt(2/pi) * (1 + 3 * 0.044715 x^2).
    """
    x_wide = widen(x)
    s = _sigmoid(2 * _tanh_argument(x_wide))
    slope = ROOT + 3 * ROOT * CUBE * (x_wide * x_wide)                   # u'
    return (dy * s * (1 + 2 * x_wide * slope * (1 - s))).astype(x.dtype, copy=False)


@fast_twin(cpu=activation.geglu, gpu=cuda.geglu)
def geglu(x):
    """One half of the channels gates the other:  y = value * gelu(gate).

    x (..., 2F) = [value, gate] -> y (..., F).
    Source: Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202, eq. 5.
    """
    F = x.shape[-1] // 2
    return x[..., :F] * gelu(x[..., F:])[0], x


@fast_twin(cpu=activation.geglu_backward, gpu=cuda.geglu_backward)
def geglu_backward(dy, x):
    """dy (..., F) -> dx (..., 2F):  dvalue = dy * gelu(gate),  dgate = dy * value * gelu'(gate)."""
    F = x.shape[-1] // 2
    value, gate = x[..., :F], x[..., F:]
    dgate = gelu_backward(dy * value, gate)
    return get_xp(x).concatenate([dy * gelu(gate)[0], dgate], axis=-1)


@np.errstate(under="ignore")            # small scores have share 0
def softmax(x):
    """y = exp(x) / sum(exp(x)) over the last axis.

    The maximum of the row is subtracted first, so that nothing overflows.
    """
    y = widen(x) - x.max(axis=-1, keepdims=True)
    get_xp(x).exp(y, out=y)
    y /= y.sum(axis=-1, keepdims=True)
    y = y.astype(x.dtype, copy=False)
    return y, y


@np.errstate(under="ignore")
def softmax_backward(dy, y):
    """dx = y * (dy - sum(y * dy)).  The sum: a larger score makes all other shares smaller."""
    y_wide = widen(y)
    dx = y_wide * (dy - (y_wide * dy).sum(axis=-1, keepdims=True))
    return dx.astype(y.dtype, copy=False)
