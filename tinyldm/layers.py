"""Layers: ops with parameters. The tape, which links a forward to its backward, is in tape.py.

A layer's forward saves on the tape what its backward needs; the backward is the forward read from
the bottom up. A frozen layer, none of whose parameters is trained, computes no gradients of them
and saves nothing for them. Models (models/) are layers made of layers. In every signature `tape`
comes right after the required inputs; whatever is optional follows it and is passed by keyword.
"""
import math
import threading
from collections import namedtuple
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, reduce
from operator import add

import numpy as np

from . import ops
from .backend import get_xp, to_host, widen
from .errors import TinyldmError, shorten
from .tape import (  # noqa: F401
    NO_TAPE,
    EndOfTape,
    Tape,
    checkpoint,
    checkpoint_backward,
    ends_early,
)

_hooks = ContextVar("forward hooks", default=())        # {layer: hook}, one per forward_hooks


FILE_AXES = (3, 2, 0, 1)                                # (K,K,C,O) -> (O,C,K,K)
OUR_AXES = (2, 3, 1, 0)                                 # (O,C,K,K) -> (K,K,C,O)


# The number of the shard of a batch that this thread works on.
SHARD = ContextVar("shard", default=0)


class Parameter:
    """An array to train: its shape, its data (None until loaded) and the sum of its gradients.

    trainable: False freezes it. Then it gets no gradient. Change it only between a backward and the
    next forward.

    Each shard of a batch has a sum of its own, in float32 where gradients are float16. `grad` adds
    up pairs of neighbouring shards, then pairs of these sums, and so on. So the result depends
    neither on which worker thread was first, nor on whether two or four processes have each had
    their part of the shards.
    """

    _lock = threading.Lock()                            # threads may also share a shard

    def __init__(self, *shape):
        self.shape, self.data, self._grads = shape, None, {}
        self.trainable = True

    def __repr__(self):
        return f"<Parameter {self.shape}: {'not filled' if self.data is None else self.data.dtype}>"

    def add_grad(self, grad):
        if not self.trainable:
            return
        assert grad.shape == self.shape, f"gradient {grad.shape} for a parameter {self.shape}"
        with self._lock:
            before = self._grads.get(SHARD.get())
            self._grads[SHARD.get()] = grad if before is None else widen(before) + grad

    @property
    def grad(self):
        """The sum of all gradients since it was last set to None; None if there are none."""
        grads = [self._grads[shard] for shard in sorted(self._grads)]
        while len(grads) > 1:
            grads = [reduce(add, map(widen, grads[i:i + 2])) for i in range(0, len(grads), 2)]
        return grads[0] if grads else None

    @grad.setter
    def grad(self, grad):
        self._grads = {} if grad is None else {0: grad}


class Module:
    """Something with parameters, a forward and a backward.

    Its attributes have the names of the public weight files.
    """

    def __repr__(self):
        count = sum(math.prod(parameter.shape) for parameter in self.parameters())
        return f"<{type(self).__name__}: {count:,} parameters>"

    def __call__(self, *inputs, **options):
        forward = self.forward
        for hooks in _hooks.get():                      # usually none
            if self in hooks:
                forward = partial(hooks[self], forward)
        return forward(*inputs, **options)

    @property
    def dtype(self):
        """The dtype of activations: the widest of all parameters, without those of LoRAs.

        Large weights may be stored in a narrower one; they are widened when they are used.
        """
        self._filled()
        return np.result_type(*self._dtypes())

    @property
    def xp(self):
        """The library of the parameters' arrays: numpy or cupy."""
        return get_xp(next(iter(self._filled().values())))

    def named_parameters(self, prefix=""):
        """Every (name, Parameter); dots join names, and an item of a list is named by its index."""
        return ((name, item) for name, item in _walk(self, prefix) if isinstance(item, Parameter))

    def parameters(self):
        return [parameter for _, parameter in self.named_parameters()]

    def own_parameters(self):
        """The parameters in this module's own attributes, not those of the modules inside."""
        return [item for item in vars(self).values() if isinstance(item, Parameter)]

    def is_trained(self):
        """Whether one of its own parameters is trained. If not, its backward computes only dx."""
        return any(parameter.trainable for parameter in self.own_parameters())

    def freeze(self):
        """Train none of the parameters, here and in the modules inside."""
        for parameter in self.parameters():
            parameter.trainable = False

    def move_to(self, xp):
        """Move all parameters to the device of a library, numpy or cupy -> self."""
        for parameter in self.parameters():
            parameter.data = xp.asarray(parameter.data)
        return self

    def zero_grad(self):
        """Forget the gradients of all parameters."""
        for parameter in self.parameters():
            parameter.grad = None

    def state_dict(self):
        """{name: NumPy array}, copies of the parameters as the public files have them: with the
        same names, and convolutions as (O,C,K,K).

        Raises TinyldmError if a parameter was never filled.
        """
        return {name: np.array(to_file(to_host(data)), order="C")
                for name, data in self._filled().items()}

    def load_state_dict(self, arrays, strict=True):
        """Fill the parameters with copies of arrays that state_dict, or the same model in PyTorch,
        gives -> Misfits, three lists.

        arrays: {name: array of floating-point numbers}, from NumPy, PyTorch or whatever else
        np.asarray reads. They keep their dtype, so float64 arrays make a model of float64.
        strict: everything must fit. Otherwise what fits is filled, and the lists name the rest.
        Raises TinyldmError, before anything is filled, for arrays that do not fit and for what is
        no such array.
        """
        if not hasattr(arrays, "items"):
            raise TinyldmError("load_state_dict expects a dict of arrays by name, not a "
                               f"{type(arrays).__name__}: tinyldm.load_model reads a folder")
        parameters = dict(self.named_parameters())
        arrays = {name: _array(name, values) if name in parameters else values
                  for name, values in arrays.items()}
        found = misfits(parameters, arrays)
        if strict:
            check_fit(f"the arrays do not fit this {type(self).__name__}", parameters, arrays)
        for name, parameter in parameters.items():
            if name in arrays and arrays[name].shape == file_shape(parameter):
                array = arrays[name].transpose(OUR_AXES) if arrays[name].ndim == 4 else arrays[name]
                xp = np if parameter.data is None else get_xp(parameter.data)
                parameter.data = xp.asarray(np.array(array, order="C"))
        return found

    def _dtypes(self):
        """The dtypes of the parameters that say what activations are."""
        items = [item for name, value in vars(self).items() for _, item in _flat(name, value)]
        return {item.data.dtype for item in items if isinstance(item, Parameter)}.union(
            *(item._dtypes() for item in items if isinstance(item, Module)))

    def _filled(self):
        """{name: data} of all parameters. Raises TinyldmError if one was never filled."""
        found = {name: parameter.data for name, parameter in self.named_parameters()}
        if empty := [name for name, data in found.items() if data is None]:
            raise TinyldmError(f"this {type(self).__name__} has parameters that were never filled, "
                               f"{shorten(empty)}: use load_state_dict, or set their data")
        return found


class Sequence(Module):
    """Layers that run one after another, in the order of self.layers()."""

    def forward(self, h, tape=NO_TAPE):
        for layer in self.layers():
            h = layer(h, tape)
        return h

    def backward(self, dh, tape):
        for layer in reversed(self.layers()):
            dh = layer.backward(dh, tape)
        return dh


def trainable_parameters(*modules):
    """The (name, Parameter) pairs of the modules' parameters that are trained."""
    return [(name, parameter) for module in modules
            for name, parameter in module.named_parameters() if parameter.trainable]


def named_modules(owner, prefix=""):
    """Every (name, Module) inside a module or another object; an outer module comes first."""
    return ((name, item) for name, item in _walk(owner, prefix) if isinstance(item, Module))


def _walk(owner, prefix):
    """Every (name, Module or Parameter) in owner's attributes and in lists, at any depth."""
    for name, value in vars(owner).items():
        for path, item in _flat(prefix + name, value):
            if isinstance(item, (Module, Parameter)):
                yield path, item
            if isinstance(item, Module):
                yield from _walk(item, path + ".")


def _flat(name, value):
    if not isinstance(value, list):
        return [(name, value)]
    return [pair for i, item in enumerate(value) for pair in _flat(f"{name}.{i}", item)]


# ---- parameters and public files --------------------------------------------------------------

Misfits = namedtuple("Misfits", "missing unexpected wrong_shape")


def file_shape(parameter):
    """A parameter's shape in a public file: convolutions (O,C,K,K), all others as here."""
    shape = parameter.shape
    return tuple(shape[axis] for axis in FILE_AXES) if len(shape) == 4 else tuple(shape)


def to_file(array):
    """A parameter's array in the file's layout: (K,K,C,O) -> (O,C,K,K), others unchanged."""
    return array.transpose(FILE_AXES) if array.ndim == 4 else array


def misfits(parameters, tensors):
    """Why {name: tensor} does not fill {name: parameter} -> Misfits: names that are missing, names
    that are unexpected, wrong shapes. Three lists, empty if everything fits."""
    missing = [name for name in parameters if name not in tensors]
    unexpected = [name for name in tensors if name not in parameters]
    wrong = [f"{name} (expected {expected}, found {tensors[name].shape})"
             for name, expected in zip(parameters, map(file_shape, parameters.values()))
             if name in tensors and tensors[name].shape != expected]
    return Misfits(missing, unexpected, wrong)


def check_fit(misfit, parameters, tensors):
    """Raise TinyldmError, the sentence `misfit` and three lists, if tensors do not fit."""
    missing, unexpected, wrong = misfits(parameters, tensors)
    if missing or unexpected or wrong:
        raise TinyldmError(misfit, f"missing: {shorten(missing)}",
                           f"unexpected: {shorten(unexpected)}", f"wrong shape: {shorten(wrong)}")


def _array(name, values):
    """What np.asarray reads -> a NumPy array. Raises TinyldmError unless it holds floats."""
    try:
        if hasattr(values, "detach"):                   # a tensor of PyTorch that has a gradient
            values = values.detach()
        array = np.asarray(values)
    except Exception as error:                          # each library raises its own types
        raise TinyldmError(f"{name} cannot be read as a NumPy array ({error}): convert it to "
                           "float32 on the CPU") from None
    if array.dtype.kind != "f":
        raise TinyldmError(f"{name} must hold floating-point numbers, not {array.dtype}")
    return array


# ---- forward hooks ----------------------------------------------------------------------------

@contextmanager
def forward_hooks(hooks):
    """Inside the `with`, a call of a layer in {layer: hook} is hook(layer.forward, *inputs).

    The hook runs the forward it gets and returns the output. Several sets of hooks may be active;
    the set entered last is the outermost. They apply in this thread and in the workers it starts
    (`backend.parallel`), never in another thread that uses the same layers.
    """
    _hooks.set((*_hooks.get(), hooks))
    try:
        yield
    finally:                                            # perhaps not the last: find it by identity
        _hooks.set(tuple(other for other in _hooks.get() if other is not hooks))


def unobserved(tape):
    """Whether nobody sees in which order layers run: no tape and no hook."""
    return tape is NO_TAPE and not _hooks.get()


class WeightedOp(Module):
    """An op of x, a weight and a bias (or None): what Linear, Conv2d and the norms share."""

    options = ()                                        # further arguments of the op
    input_axis = -1                                     # of the weight: as long as x's last axis

    def forward(self, x, tape=NO_TAPE):
        self.check_input(x)
        bias = self.bias and self.bias.data
        y, cache = self.op(x, self.weight.data, bias, *self.options)
        tape.save(self, cache if self.is_trained() else self.input_cache(x, cache))
        return y

    def backward(self, dy, tape):
        cache = tape.load(self)
        if not self.is_trained():
            return self.input_backward(dy, cache)
        dx, dweight, dbias = self.op_backward(dy, cache)
        self.weight.add_grad(dweight)
        if self.bias:
            self.bias.add_grad(dbias)
        return dx

    def check_input(self, x):
        """Assert that the layer is filled and that x has its width, which must be the last axis."""
        for parameter in filter(None, (self.weight, self.bias)):
            check_filled(self, parameter)
        width = self.weight.shape[self.input_axis]
        first = x.ndim == 4 and x.shape[1] == width
        assert x.shape[-1] == width, (
            f"{type(self).__name__} expects {width} channels in the last axis, x is {x.shape}"
            f"{': its channels come first, so use x.transpose(0, 2, 3, 1)' if first else ''}")


def check_filled(layer, parameter):
    assert parameter.data is not None, (
        f"{type(layer).__name__} has a parameter {parameter.shape} that was never filled: use "
        "load_state_dict, or set its data")


class Linear(WeightedOp):
    """y = x @ weight.T + bias: (..., in) -> (..., out). weight (out, in), bias (out,) or None."""

    op, op_backward = staticmethod(ops.linear), staticmethod(ops.linear_backward)

    def __init__(self, in_features, out_features, bias=True):
        self.weight = Parameter(out_features, in_features)
        self.bias = Parameter(out_features) if bias else None

    def input_cache(self, x, cache):                    # what dx needs: not x
        return self.weight.data

    def input_backward(self, dy, weight):
        return ops.linear_input_backward(dy, weight)


class Conv2d(WeightedOp):
    """A convolution: (B,H,W,C) -> (B,Ho,Wo,O). weight (K,L,C,O), in files (O,C,K,L).

    kernel_size: K, or (K, L) where the kernel is not square. padding: see ops.conv2d; by default
    stride 1 keeps the size of the map if K and L are odd.
    """

    op, op_backward = staticmethod(ops.conv2d), staticmethod(ops.conv2d_backward)
    input_axis = 2

    def __init__(self, in_channels, out_channels, kernel_size=3, stride=1, padding=None, bias=True):
        K, L = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
        self.weight = Parameter(K, L, in_channels, out_channels)
        self.bias = Parameter(out_channels) if bias else None
        self.stride = stride
        same = (K // 2, K // 2) if K == L else ((K // 2, K // 2), (L // 2, L // 2))
        self.padding = padding or same
        self.options = self.stride, self.padding

    def input_cache(self, x, cache):                    # what dx needs: not x, but its shape
        return self.weight.data, x.shape

    def input_backward(self, dy, cache):
        return ops.conv2d_input_backward(dy, *cache, *self.options)


class _Norm(WeightedOp):
    def __init__(self, channels, *options):
        self.weight, self.bias = Parameter(channels), Parameter(channels)
        self.options = options

    def input_cache(self, x, cache):                    # dx needs x and its statistics, too
        return cache

    def input_backward(self, dy, cache):
        dx, *_ = self.op_backward(dy, cache, frozen=True)
        return dx


class GroupNorm(_Norm):
    """GroupNorm(channels, num_groups, eps): (B,...,C) -> (B,...,C)."""

    op, op_backward = staticmethod(ops.group_norm), staticmethod(ops.group_norm_backward)


class GroupNormSiLU(_Norm):
    """GroupNormSiLU(channels, num_groups, eps): GroupNorm, then SiLU."""

    op, op_backward = staticmethod(ops.group_norm_silu), staticmethod(ops.group_norm_silu_backward)


class AdaGroupNormSiLU(_Norm):
    """AdaGroupNormSiLU(channels, num_groups, eps): GroupNorm, a condition's scale and shift, SiLU.

    The condition (B,2C) is [scale, shift] for each sample.
    """

    def forward(self, x, condition, tape=NO_TAPE):      # (B,H,W,C), (B,2C) -> (B,H,W,C)
        self.check_input(x)
        (scale, shift), _ = ops.split(condition)
        y, cache = ops.ada_group_norm_silu(x, self.weight.data, self.bias.data, shift, scale,
                                           *self.options)
        tape.save(self, cache)
        return y

    def backward(self, dy, tape):
        dx, dweight, dbias, dshift, dscale = ops.ada_group_norm_silu_backward(dy, tape.load(self))
        self.weight.add_grad(dweight)
        self.bias.add_grad(dbias)
        return dx, ops.split_backward((dscale, dshift), None)


class LayerNorm(_Norm):
    """LayerNorm(channels, eps): (...,C) -> (...,C)."""

    op, op_backward = staticmethod(ops.layer_norm), staticmethod(ops.layer_norm_backward)


class BatchNorm(_Norm):
    """BatchNorm(channels, eps): (B,...,C) -> (B,...,C), with the statistics of the batch."""

    op, op_backward = staticmethod(ops.batch_norm), staticmethod(ops.batch_norm_backward)


class Embedding(Module):
    """A table with one row per id. weight (V,C)."""

    def __init__(self, num_embeddings, channels):
        self.weight = Parameter(num_embeddings, channels)

    def forward(self, ids, tape=NO_TAPE):               # (...) -> (...,C)
        check_filled(self, self.weight)
        y, cache = ops.embedding(ids, self.weight.data)
        tape.save(self, cache if self.is_trained() else None)
        return y

    def backward(self, dy, tape):
        cache = tape.load(self)
        if self.is_trained():
            self.weight.add_grad(ops.embedding_backward(dy, cache))


class Activation(Module):
    """An elementwise op without parameters: Activation("silu"), "gelu" or "quick_gelu"."""

    def __init__(self, name):
        self.op, self.op_backward = getattr(ops, name), getattr(ops, name + "_backward")

    def forward(self, x, tape=NO_TAPE):
        y, cache = self.op(x)
        tape.save(self, cache)
        return y

    def backward(self, dy, tape):
        return self.op_backward(dy, tape.load(self))


class Pool(Module):
    """A pooling op without parameters: Pool("max_pool" or "average_pool", K, stride, padding)."""

    def __init__(self, name, *options):
        self.op, self.op_backward = getattr(ops, name), getattr(ops, name + "_backward")
        self.options = options

    def forward(self, x, tape=NO_TAPE):                 # (B,H,W,C) -> (B,Ho,Wo,C)
        y, cache = self.op(x, *self.options)
        tape.save(self, cache)
        return y

    def backward(self, dy, tape):
        return self.op_backward(dy, tape.load(self))


class Upsample(Module):
    """Nearest-neighbour upsampling, ×2 or to size = (height, width). No parameters."""

    def forward(self, x, tape=NO_TAPE, *, size=None):   # (B,H,W,C) -> (B,2H,2W,C)
        y, cache = ops.upsample_nearest(x, size)
        tape.save(self, cache)
        return y

    def backward(self, dy, tape):
        return ops.upsample_nearest_backward(dy, tape.load(self))


class DownsampleAverage(Module):
    """Half the size: the mean of 2x2 pixels. No parameters."""

    def forward(self, x, tape=NO_TAPE):                 # (B,2H,2W,C) -> (B,H,W,C)
        y, cache = ops.downsample_average(x)
        tape.save(self, cache)
        return y

    def backward(self, dy, tape):
        return ops.downsample_average_backward(dy, tape.load(self))
