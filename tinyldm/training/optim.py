"""Optimisation: initial weights, averages of the weights, AdamW with clipping, Muon.

All parameters lie in one flat vector, and each Parameter's data is a view into it, so that a step
is a few passes over long arrays.
"""
import math
import re
from contextlib import contextmanager

import numpy as np

from ..backend import asarray, get_xp, is_finite, parallel, to_host, widen
from ..errors import TinyldmError
from .state import read_npz

BLOCK = 1 << 16         # numbers that a worker updates at a time: four such arrays fit into L2
# Of residual blocks, transformers, the VAE's attention, CLIP's attention and perceptron.
LAST_OF_BRANCH = re.compile(r".*(conv2|proj_out|attentions\.\d+\.to_out\.0|out_proj|fc2)\.weight")


def initialise(module, rng):
    """Fill every parameter of a module, float32, from a numpy Generator.

    Weights are normal with variance 1/fan_in, norms 1, biases 0. The last layer of every residual
    branch starts at 0, so that at first every block is the identity (as in Ho et al. 2020). Not for
    a CLIPModel: without its branches all pictures have the class token's embedding, and nothing
    would be learned. It has contrastive.initialise_clip.
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
        if LAST_OF_BRANCH.fullmatch(name):
            parameter.data[...] = 0


def initialise_dit(transformer, rng):
    """Fill a DiTTransformer2DModel, float32, from a numpy Generator: adaLN-Zero.

    Weights are uniform with Xavier's variance 2 / (fan_in + fan_out), biases 0; those of the
    timestep's perceptron and the table of labels are normal with standard deviation 0.02. The
    layers that make shift, scale and gate begin at 0, and so does the last one: every block is the
    identity, and the output is 0.
    Source: Peebles & Xie 2022, arXiv:2212.09748, section 3.2; the code's initialize_weights.
    """
    for name, parameter in transformer.named_parameters():
        shape = parameter.shape
        if len(shape) == 1 or ".norm1.linear." in name or name.startswith("proj_out"):
            parameter.data = np.zeros(shape, np.float32)
        elif ".norm1.emb." in name:
            parameter.data = rng.normal(0, 0.02, shape).astype(np.float32)
        else:                                           # (out,in); of the patches (p,p,C,D)
            most = (6 / (math.prod(shape[:-1]) + shape[-1])) ** 0.5
            parameter.data = rng.uniform(-most, most, shape).astype(np.float32)


# ---- averages of the weights ------------------------------------------------------------------
# The decay at update n, which counts from 1: average = decay average + (1 - decay) weights. The
# average begins as a copy of the first weights.

def constant_decay(n, most=0.9999):
    """The same from the start, as in DDPM and DiT."""
    return most


def ldm_decay(n, most=0.9999):
    """min(most, (1 + n) / (10 + n)), as LitEma of latent diffusion: the average forgets the first
    weights soon, because it is over about the last n / 9 updates."""
    return min(most, (1 + n) / (10 + n))


def diffusers_decay(n, most=0.9999):
    """min(most, n / (9 + n)), 0 at n = 1: EMAModel of diffusers, by default."""
    return min(most, n / (9 + n)) if n > 1 else 0.0


def diffusers_warmup_decay(n, most=0.9999, inv_gamma=1.0, power=2 / 3):
    """min(most, 1 - (1 + (n - 1) / inv_gamma)^-power): EMAModel with use_ema_warmup."""
    return min(most, 1 - (1 + (n - 1) / inv_gamma) ** -power)


# ---- updates ----------------------------------------------------------------------------------

class NotFinite(TinyldmError):
    """A gradient is NaN or infinite; the weights stayed as they were."""


class Overflow(NotFinite):
    """The same, and perhaps only because of the loss's scale, which is smaller now."""


class AdamW:
    """Adam with decoupled weight decay, global-norm clipping, and a moving average of the weights.

    named_parameters: pairs of a name and a Parameter whose data is set. `step(learning_rate)` uses
    the gradients up. weight_decay: of matrices and convolutions; with decay_vectors also of biases,
    norms and other vectors, as torch does by default. clip: the largest norm of the whole gradient;
    0 switches clipping off. ema: None, or a function of the update's number, from 1, that returns
    the decay of the average; `ema` is then the exponential moving average of the weights, flat.
    scaling: a LossScale, for float16: the parameters get float16 copies of the flat vector, which
    is float32, and their gradients are those of the loss times scaling.scale.

    The order of the operations is torch's. Source: Kingma & Ba 2014, arXiv:1412.6980, algorithm 1;
    Loshchilov & Hutter 2017, arXiv:1711.05101, algorithm 2.
    """

    def __init__(self, named_parameters, weight_decay=0.01, beta1=0.9, beta2=0.999, eps=1e-8,
                 clip=1.0, ema=ldm_decay, decay_vectors=False, scaling=None):
        named = list(named_parameters)
        self.weight_decay, self.beta1, self.beta2, self.eps = weight_decay, beta1, beta2, eps
        self.clip, self.ema_decay, self.steps = clip, ema, 0
        self.decay_vectors, self.scaling = decay_vectors, scaling
        for name, parameter in named:
            if not scaling and parameter.data.dtype == np.float16:
                raise TinyldmError(f"{name} is float16, too narrow to train: load with float32")
        xp = get_xp(named[0][1].data)
        self.data = xp.concatenate([widen(parameter.data).reshape(-1) for _, parameter in named])
        # What the parameters are views of.
        self.shown = self.data.astype(np.float16) if scaling else self.data
        self.m, self.v = (xp.zeros_like(self.data) for _ in range(2))
        self.ema = None if ema is None else self.data.copy()
        if ema is None:
            self.STATE = self.STATE[:3]
        self.places, start = [], 0                      # where each parameter lies in the vector
        for name, parameter in named:
            span = slice(start, start + math.prod(parameter.shape))
            parameter.data = self.shown[span].reshape(parameter.shape)
            self.places.append((name, parameter, span, parameter.data))
            start = span.stop

    def gradient(self, more=0):
        """The gradients on the parameters, used up, as one flat vector; `more` zeros follow them.

        Raises TinyldmError for a parameter whose data was replaced: an update would no longer reach
        the model.
        """
        size = self.data.size                           # not kept: the next forward needs the room
        grad = get_xp(self.data).empty(size + more, self.data.dtype)
        grad[size:] = 0
        for name, parameter, span, view in self.places:
            if parameter.data is not view:
                raise TinyldmError(f"{name} got new data after the optimiser was made: move the "
                                   "model and load its LoRAs first, then make the optimiser")
            own = parameter.grad
            assert own is not None, f"{name} has no gradient"
            grad[span] = own.reshape(-1)
            parameter.grad = None
        return grad

    def step(self, learning_rate, batches=1, grad=None):
        """One update from the gradients on the parameters; returns their norm before clipping.

        batches: the number of batches whose gradients were added up; their mean is used. grad: what
        `gradient` has returned, and others have added to; it is overwritten.
        Raises NotFinite for a gradient that is not finite; the weights stay as they are. With
        scaling it is an Overflow, until the scale is as small as it gets.
        """
        grad = self.gradient() if grad is None else grad
        if self.scaling:
            grad *= 1 / self.scaling.scale
            finite, last = is_finite(grad), self.scaling.scale <= self.scaling.least
            self.scaling.update(finite)
            if not finite and not last:
                raise Overflow(f"the gradient is infinite; the loss's scale is now "
                               f"{self.scaling.scale:g}")
        if batches > 1:
            grad /= batches
        norm = norm_of(grad)
        if not math.isfinite(norm):
            # None of them if only the sum of squares overflows.
            bad = [name for name, _, span, _ in self.places if not is_finite(grad[span])]
            raise NotFinite(f"the gradient of {bad[0] if bad else 'all parameters together'} is "
                            "NaN or infinite")
        if self.clip:
            grad *= clip_coefficient(norm, self.clip, self.data.dtype)
        self.steps += 1
        self._update(grad, learning_rate, self.ema_decay and self.ema_decay(self.steps))
        self.show()
        return norm

    def show(self):
        """Bring the parameters' copies up to date, if they are copies."""
        if self.shown is not self.data:
            self.shown[...] = self.data

    @contextmanager
    def averaged(self, exact=False):
        """Inside, the parameters hold the averages of the weights, if there are any.

        exact: in the flat vector's dtype, for a file; else in the one that the model computes with.
        """
        flat = self.data if self.ema is None else self.ema
        if not exact:
            flat = self.shown if self.ema is None else flat.astype(self.shown.dtype, copy=False)
        with self._views_of(flat):
            yield

    def constrain(self, change):
        """change() changes the weights in place: those of the flat vector, not their copies."""
        with self._views_of(self.data):
            change()
        self.show()

    @contextmanager
    def _views_of(self, flat):
        try:
            for _, parameter, span, _ in self.places:
                parameter.data = flat[span].reshape(parameter.shape)
            yield
        finally:
            for _, parameter, _, view in self.places:
                parameter.data = view

    def adopt_average(self):
        """At a training's end: the averages, if there are any, become the weights."""
        if self.ema is not None:
            self.data[...] = self.ema
            self.show()

    def _update(self, grad, learning_rate, ema_decay):
        xp = get_xp(self.data)
        correction1, correction2 = 1 - self.beta1 ** self.steps, 1 - self.beta2 ** self.steps

        def update(block):
            span, weight_decay = block
            p, g, m, v = self.data[span], grad[span], self.m[span], self.v[span]
            if weight_decay:
                p *= 1 - learning_rate * weight_decay
            m += (1 - self.beta1) * (g - m)
            v *= self.beta2
            v += (1 - self.beta2) * g * g
            p -= learning_rate / correction1 * (m / (xp.sqrt(v) / correction2 ** 0.5 + self.eps))
            if self.ema is not None:
                self.ema[span] += (1 - ema_decay) * (p - self.ema[span])

        parallel(update, self._blocks())

    def _blocks(self):
        """Pieces of the flat vector and their weight decay, [(slice, decay)]."""
        runs = []                                       # neighbours of the same decay as one
        for _, parameter, span, _ in self.places:
            decays = len(parameter.shape) > 1 or self.decay_vectors
            decay = self.weight_decay if decays else 0
            start = runs.pop()[0] if runs and runs[-1][2] == decay else span.start
            runs.append((start, span.stop, decay))
        # On a GPU few long passes are fast.
        size = BLOCK if get_xp(self.data) is np else self.data.size
        return [(slice(i, min(i + size, stop)), decay)
                for start, stop, decay in runs for i in range(start, stop, size)]

    STATE = ("data", "m", "v", "ema")                   # the arrays of a state file

    def not_finite(self):
        """The name of a parameter whose weight or average is not finite; None if all are."""
        if all(is_finite(getattr(self, name)) for name in self.STATE):
            return None
        return next(name for name, _, span, _ in self.places
                    if not all(is_finite(getattr(self, part)[span]) for part in self.STATE))

    def state(self):
        state = {name: to_host(getattr(self, name)) for name in self.STATE} | {"steps": self.steps}
        return state | ({"scaling": self.scaling.state()} if self.scaling else {})

    def load_state(self, state):
        for name in self.STATE:
            array = getattr(self, name)
            assert state[name].shape == array.shape, (name, state[name].shape, array.shape)
            array[...] = asarray(state[name], like=array)
        self.steps = int(state["steps"])
        if self.scaling and "scaling" in state:         # it is not in one of a float32 training
            self.scaling.load_state(state["scaling"])
        self.show()


def norm_of(grad):
    """The length of a flat vector, a float. It does not depend on the number of threads."""
    def squares(blocks):
        with np.errstate(over="ignore", invalid="ignore"):      # the caller says it
            return to_host((blocks * blocks).sum(axis=-1))

    whole = grad.size // BLOCK * BLOCK
    blocks, rest = grad[:whole].reshape(-1, BLOCK), grad[whole:]
    # On a GPU few long passes are fast.
    sums = parallel(squares, [*blocks, rest] if get_xp(grad) is np else [blocks, rest])
    return math.sqrt(sum(np.hstack(sums).tolist()))


def clip_coefficient(norm, most, dtype):
    """What a gradient of this norm is multiplied by: min(1, most / (norm + 1e-6)), in the
    gradient's dtype and with torch's rounding, which divides by multiplying with the reciprocal."""
    dtype = np.dtype(dtype).type
    return min(dtype(1), dtype(1) / (dtype(norm) + dtype(1e-6)) * dtype(most))


class Muon(AdamW):
    """AdamW, but each matrix of weights moves by an orthogonal matrix: as far in every direction.

    The momentum of a gradient is a matrix with a few large singular values. The update is the
    nearest matrix whose singular values are all about 1, so that rare directions are learned too.
    It has about the length of Adam's update, so both take the same learning rate. A convolution is
    the matrix (K*K*C,O). Vectors, and matrices with a side below 8, are left to AdamW.
    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
    kellerjordan.github.io/posts/muon; the length: Liu et al. 2025, arXiv:2502.16982, section 2.2.
    """

    MOMENTUM = 0.95

    def _update(self, grad, learning_rate, ema_decay):
        moves = [(span, self._move(grad[span], span, shape)) for span, shape in self._matrices()]
        momenta = [self.m[span].copy() for span, _ in moves]
        for span, _ in moves:                           # for these AdamW makes only the decay
            grad[span] = self.m[span] = 0
        super()._update(grad, learning_rate, ema_decay)
        for (span, move), momentum in zip(moves, momenta):
            self.data[span] -= learning_rate * move
            if self.ema is not None:
                self.ema[span] -= (1 - ema_decay) * learning_rate * move
            self.m[span] = momentum

    def _matrices(self):
        for _, parameter, span, _ in self.places:
            shape = math.prod(parameter.shape[:-1]), parameter.shape[-1]
            if len(parameter.shape) > 1 and min(shape) >= 8:
                yield span, shape

    def _move(self, grad, span, shape):
        m = self.m[span]
        m += (1 - self.MOMENTUM) * (grad - m)
        ahead = self.MOMENTUM * m + (1 - self.MOMENTUM) * grad          # Nesterov's momentum
        return 0.2 * math.sqrt(max(shape)) * orthogonal(ahead.reshape(shape)).reshape(-1)


def orthogonal(matrix, rounds=5):
    """About the nearest matrix with orthogonal columns (or rows): its singular values near 1.

    Each round turns every singular value s into 3.4445 s - 4.775 s^3 + 2.0315 s^5. Five rounds
    bring values between 0.002 and 1 to between 0.6 and 1.3. Source: as Muon.
    """
    xp = get_xp(matrix)
    tall = matrix if len(matrix) >= matrix.shape[1] else matrix.T
    tall = tall / (xp.linalg.norm(tall) + 1e-7)
    for _ in range(rounds):
        gram = tall.T @ tall
        tall = 3.4445 * tall + tall @ (2.0315 * (gram @ gram) - 4.775 * gram)
    return tall if len(matrix) >= matrix.shape[1] else tall.T


def load_ema(path, named_parameters):
    """Give parameters, in the order of their training, the averaged weights of its state file.

    Raises TinyldmError for a file that holds no whole state, or one of other parameters.
    """
    named_parameters = list(named_parameters)
    size = sum(math.prod(parameter.shape) for _, parameter in named_parameters)
    ema, start = read_npz(path, {"ema": (size,)})["ema"], 0
    for _, parameter in named_parameters:
        end = start + math.prod(parameter.shape)
        parameter.data = ema[start:end].reshape(parameter.shape)
        start = end
