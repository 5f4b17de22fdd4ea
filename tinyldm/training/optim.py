"""Optimisation: initial weights, AdamW with clipping, a learning-rate schedule, averaged weights.

All parameters lie in one flat vector and each Parameter's data is a view into it, so that a step is
a few passes over long arrays.
"""
import math

import numpy as np

from ..backend import asarray, get_xp, parallel, to_host
from ..errors import TinyldmError
from ..models.blocks import Attention, ResnetBlock2D
from ..models.clip import CLIPMLP, CLIPAttention
from ..models.unet import Transformer2DModel

BLOCK = 1 << 16         # numbers a worker updates at a time: four arrays of it stay in the L2 cache


def initialise(module, rng):
    """Fill every parameter of a module, float32, from a numpy Generator.

    Weights are normal with variance 1/fan_in, norms 1, biases 0; what is added onto a stream that
    is carried through starts at 0, so that at first every block is the identity (Ho et al. 2020 do
    the same).
    """
    for name, parameter in module.named_parameters():
        shape = parameter.shape
        if len(shape) == 1:
            is_norm = "norm" in name and name.endswith("weight")
            parameter.data = np.full(shape, float(is_norm), np.float32)
        else:
            fan_in = math.prod(shape[:-1]) if len(shape) == 4 else shape[-1]
            std = 0.5 if name.endswith("embedding.weight") else fan_in ** -0.5
            parameter.data = rng.normal(0, std, shape).astype(np.float32)
    for part in modules(module):
        for last in _last_layers(part):
            last.weight.data[...] = 0


def modules(module):
    """A module and every module in it."""
    yield module
    for value in vars(module).values():
        for item in value if isinstance(value, list) else [value]:
            if hasattr(item, "named_parameters"):
                yield from modules(item)


def _last_layers(part):
    if isinstance(part, ResnetBlock2D):
        yield part.conv2
    elif isinstance(part, Transformer2DModel):
        yield part.proj_out
    elif isinstance(part, Attention) and hasattr(part, "group_norm"):
        yield part.to_out[0]
    elif isinstance(part, CLIPAttention):
        yield part.out_proj
    elif isinstance(part, CLIPMLP):
        yield part.fc2


class AdamW:
    """Adam with decoupled weight decay, global-norm clipping, and a moving average of the weights.

    named_parameters: pairs of a name and a Parameter whose data is set. After `step(learning_rate)`
    the gradients are gone. `ema` holds the exponential moving average of the weights, flat.
    Source: Kingma & Ba 2014, arXiv:1412.6980, algorithm 1; Loshchilov & Hutter 2017,
    arXiv:1711.05101, algorithm 2.
    """

    def __init__(self, named_parameters, weight_decay=0.01, beta1=0.9, beta2=0.99, eps=1e-8,
                 clip=1.0, ema_decay=0.999):
        self.named = list(named_parameters)
        self.weight_decay, self.beta1, self.beta2, self.eps = weight_decay, beta1, beta2, eps
        self.clip, self.ema_decay, self.steps = clip, ema_decay, 0
        for name, parameter in self.named:
            if isinstance(parameter.data, np.ndarray) and parameter.data.dtype == np.float16:
                raise TinyldmError(f"{name} is float16, too narrow to train: load with float32")
        xp = get_xp(self.named[0][1].data)
        self.data = xp.concatenate([parameter.data.reshape(-1) for _, parameter in self.named])
        self.grad, self.m, self.v = (xp.zeros_like(self.data) for _ in range(3))
        self.ema = self.data.copy()
        self.spans, start = [], 0                       # where each parameter lies in the vector
        for _, parameter in self.named:
            span = slice(start, start + math.prod(parameter.shape))
            parameter.data = self.data[span].reshape(parameter.shape)
            self.spans.append(span)
            start = span.stop

    def step(self, learning_rate):
        """One update from the gradients on the parameters; returns their norm before clipping."""
        norm = self._gather()
        self._update(learning_rate, min(1.0, self.clip / (norm + 1e-6)))
        return norm

    def _gather(self):
        """The gradients into one vector; returns their norm."""
        for (name, parameter), span in zip(self.named, self.spans):
            assert parameter.grad is not None, f"{name} has no gradient"
            self.grad[span] = parameter.grad.reshape(-1)
            parameter.grad = None
        return math.sqrt(float(get_xp(self.data).dot(self.grad, self.grad)))

    def _update(self, learning_rate, scale):
        xp = get_xp(self.data)
        self.steps += 1
        # An average over the first few steps only would remember the random start: begin short.
        ema_decay = min(self.ema_decay, (1 + self.steps) / (10 + self.steps))
        block = BLOCK if xp is np else self.data.size   # a GPU wants few long passes

        def update(start):
            span = slice(start, start + block)
            p, g, ema = self.data[span], self.grad[span], self.ema[span]
            m, v = self.m[span], self.v[span]
            g *= scale
            m += (1 - self.beta1) * (g - m)
            v += (1 - self.beta2) * (g * g - v)
            m_hat = m * (1 / (1 - self.beta1 ** self.steps))
            v_hat = v * (1 / (1 - self.beta2 ** self.steps))
            p -= learning_rate * (m_hat / (xp.sqrt(v_hat) + self.eps) + self.weight_decay * p)
            ema += (1 - ema_decay) * (p - ema)

        parallel(update, range(0, self.data.size, block))

    STATE = ("data", "m", "v", "ema")

    def state(self):
        return {name: to_host(getattr(self, name)) for name in self.STATE} | {"steps": self.steps}

    def load_state(self, state):
        for name in self.STATE:
            array = getattr(self, name)
            array[...] = asarray(state[name], like=array)
        self.steps = int(state["steps"])


class Muon(AdamW):
    """AdamW that moves each matrix of weights by an orthogonal one: every direction alike.

    A gradient's momentum is a matrix with a few large singular values; the update is the nearest
    one whose singular values are all about 1, and so it also learns what is rare. It is as long as
    Adam's usual one, so that one learning rate serves both. A convolution counts as the matrix
    (K*K*C,O); vectors and matrices with a side below 8 are left to AdamW.
    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
    kellerjordan.github.io/posts/muon; the length: Liu et al. 2025, arXiv:2502.16982, section 2.2.
    """

    MOMENTUM = 0.95

    def _update(self, learning_rate, scale):
        self.grad *= scale
        moves = [(span, self._move(span, shape)) for span, shape in self._matrices()]
        momenta = [self.m[span].copy() for span, _ in moves]
        for span, _ in moves:                           # AdamW is to do no more than decay these
            self.grad[span] = self.m[span] = 0
        super()._update(learning_rate, 1.0)
        ema_decay = min(self.ema_decay, (1 + self.steps) / (10 + self.steps))
        for (span, move), momentum in zip(moves, momenta):
            self.data[span] -= learning_rate * move
            self.ema[span] -= (1 - ema_decay) * learning_rate * move
            self.m[span] = momentum

    def _matrices(self):
        for (_, parameter), span in zip(self.named, self.spans):
            shape = math.prod(parameter.shape[:-1]), parameter.shape[-1]
            if len(parameter.shape) > 1 and min(shape) >= 8:
                yield span, shape

    def _move(self, span, shape):
        g, m = self.grad[span], self.m[span]
        m += (1 - self.MOMENTUM) * (g - m)
        looked_ahead = self.MOMENTUM * m + (1 - self.MOMENTUM) * g      # Nesterov's
        return 0.2 * math.sqrt(max(shape)) * orthogonal(looked_ahead.reshape(shape)).reshape(-1)


def orthogonal(matrix, rounds=5):
    """About the nearest matrix with orthogonal columns (or rows): its singular values near 1.

    Each round takes every singular value s to 3.4445 s - 4.775 s^3 + 2.0315 s^5, which in five
    brings what lies between 0.002 and 1 to between 0.6 and 1.3. Source: as Muon.
    """
    xp = get_xp(matrix)
    tall = matrix if len(matrix) >= matrix.shape[1] else matrix.T
    tall = tall / (xp.linalg.norm(tall) + 1e-7)
    for _ in range(rounds):
        gram = tall.T @ tall
        tall = 3.4445 * tall + tall @ (2.0315 * (gram @ gram) - 4.775 * gram)
    return tall if len(matrix) >= matrix.shape[1] else tall.T


def load_ema(path, named_parameters):
    """The averaged weights of a training's state file into parameters named as in that training."""
    with np.load(path) as state:
        ema, start = state["ema"], 0
    for _, parameter in named_parameters:
        end = start + math.prod(parameter.shape)
        parameter.data = ema[start:end].reshape(parameter.shape)
        start = end
    assert start == ema.size, f"{path} holds {ema.size} numbers, the parameters {start}"


def learning_rate(step, peak, warmup, total, begun=0):
    """A straight line up over `warmup` steps from `begun`, where the optimiser's averages began,
    times a half cosine from step `warmup` down to a twentieth at `total`.
    """
    progress = min(1.0, max(0, step - warmup) / max(1, total - warmup))
    cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * min(1.0, (step - begun + 1) / warmup) * cosine
