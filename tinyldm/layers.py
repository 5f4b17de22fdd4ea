"""Layers: ops with parameters, and the tape that lies between a forward and its backward.

A layer's forward leaves on the tape what its backward needs; the backward is the forward read from
the bottom up. Models (models/) are layers made of layers.
"""
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce
from operator import add

from . import ops


class _NoTape:
    """Inference: what a layer saves is dropped at once, so nothing is kept."""

    def save(self, layer, cache):
        pass


NO_TAPE = _NoTape()


class Tape:
    """The stack of what forward saved.

    Backward runs in the opposite order, so each layer finds its own on top.
    """

    def __init__(self):
        self.entries = []

    def __len__(self):
        return len(self.entries)

    def save(self, layer, cache):
        self.entries.append((layer, cache))

    def load(self, layer):
        assert self.entries, f"{type(layer).__name__} runs backward, but the tape is empty"
        owner, cache = self.entries.pop()
        assert owner is layer, (f"{type(layer).__name__} runs backward, "
                                f"but {type(owner).__name__} ran forward last")
        return cache


# The number of the shard that this thread works on, where several threads share a batch.
SHARD = ContextVar("shard", default=0)


class Parameter:
    """An array to train: data of a known shape (None until loaded), and the gradient so far.

    Threads that share a model each gather the gradient of their own shard. `grad` adds these up in
    the order of the shards, so that the sum does not depend on which thread was first.
    """

    def __init__(self, *shape):
        self.shape, self.data, self._grads = shape, None, {}

    def add_grad(self, grad):
        assert grad.shape == self.shape, f"gradient {grad.shape} for a parameter {self.shape}"
        before = self._grads.get(SHARD.get())
        self._grads[SHARD.get()] = grad if before is None else before + grad

    @property
    def grad(self):
        """The sum of all gradients added since it was last set to None, or None."""
        grads = [self._grads[shard] for shard in sorted(self._grads)]
        return reduce(add, grads) if grads else None

    @grad.setter
    def grad(self, grad):
        self._grads = {} if grad is None else {0: grad}


class Module:
    """Something with parameters, a forward and a backward.

    Attributes are named as in the public weight files.
    """

    def __call__(self, *inputs, **options):
        return self.forward(*inputs, **options)

    def named_parameters(self, prefix=""):
        """Every (name, Parameter), names joined by dots; a list's items are named by number."""
        for name, value in vars(self).items():
            yield from _named(value, prefix + name)

    def parameters(self):
        return [parameter for _, parameter in self.named_parameters()]


def _named(value, name):
    if isinstance(value, Parameter):
        yield name, value
    elif isinstance(value, Module):
        yield from value.named_parameters(name + ".")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _named(item, f"{name}.{i}")


def named_modules(owner, prefix=""):
    """Every (name, Module) inside a module, or inside what holds some; an outer one comes first."""
    for name, value in vars(owner).items():
        items = [(name, value)]
        if isinstance(value, list):
            items = [(f"{name}.{i}", item) for i, item in enumerate(value)]
        for path, item in items:
            if isinstance(item, Module):
                yield prefix + path, item
                yield from named_modules(item, f"{prefix}{path}.")


@contextmanager
def forward_hooks(layers, watch):
    """Within it every one of the (name, layer) runs watch(name, layer, its forward) as its forward.

    An attribute of the layer hides its class's forward, so what is not watched pays nothing. One
    `with` inside another watches the watched forward.
    """
    before = [(layer, vars(layer).get("forward")) for _, layer in layers]
    try:
        for name, layer in layers:
            layer.forward = watch(name, layer, layer.forward)
        yield
    finally:
        for layer, forward in before:
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward


def _data(parameter):
    return None if parameter is None else parameter.data


class Linear(Module):
    """y = x @ weight.T + bias over the last axis. weight (out, in), bias (out,) or None."""

    def __init__(self, in_features, out_features, bias=True):
        self.weight = Parameter(out_features, in_features)
        self.bias = Parameter(out_features) if bias else None

    def forward(self, x, tape=NO_TAPE):                 # (..., in) -> (..., out)
        y, cache = ops.linear(x, self.weight.data, _data(self.bias))
        tape.save(self, cache)
        return y

    def backward(self, dy, tape):                       # (..., out) -> (..., in)
        dx, dweight, dbias = ops.linear_backward(dy, tape.load(self))
        self.weight.add_grad(dweight)
        if self.bias is not None:
            self.bias.add_grad(dbias)
        return dx


class Conv2d(Module):
    """A convolution with bias. weight (K,K,C,O), in files (O,C,K,K); padding = (before, after)."""

    def __init__(self, in_channels, out_channels, kernel_size=3, stride=1, padding=None):
        self.weight = Parameter(kernel_size, kernel_size, in_channels, out_channels)
        self.bias = Parameter(out_channels)
        self.stride = stride
        self.padding = padding or (kernel_size // 2, kernel_size // 2)

    def forward(self, x, tape=NO_TAPE):                 # (B,H,W,C) -> (B,Ho,Wo,O)
        y, cache = ops.conv2d(x, self.weight.data, self.bias.data, self.stride, self.padding)
        tape.save(self, cache)
        return y

    def backward(self, dy, tape):                       # (B,Ho,Wo,O) -> (B,H,W,C)
        dx, dweight, dbias = ops.conv2d_backward(dy, tape.load(self))
        self.weight.add_grad(dweight)
        self.bias.add_grad(dbias)
        return dx


class _Norm(Module):
    """What the three norms share: weight and bias of one number a channel, and the walk back."""

    def __init__(self, channels, *options):
        self.weight, self.bias = Parameter(channels), Parameter(channels)
        self.options = options

    def forward(self, x, tape=NO_TAPE):
        y, cache = self.op(x, self.weight.data, self.bias.data, *self.options)
        tape.save(self, cache)
        return y

    def backward(self, dy, tape):
        dx, dweight, dbias = self.op_backward(dy, tape.load(self))
        self.weight.add_grad(dweight)
        self.bias.add_grad(dbias)
        return dx


class GroupNorm(_Norm):
    """GroupNorm(channels, num_groups, eps): (B,...,C) -> (B,...,C)."""

    op, op_backward = staticmethod(ops.group_norm), staticmethod(ops.group_norm_backward)


class GroupNormSiLU(_Norm):
    """GroupNormSiLU(channels, num_groups, eps): the norm with the activation behind it."""

    op, op_backward = staticmethod(ops.group_norm_silu), staticmethod(ops.group_norm_silu_backward)


class LayerNorm(_Norm):
    """LayerNorm(channels, eps): (...,C) -> (...,C)."""

    op, op_backward = staticmethod(ops.layer_norm), staticmethod(ops.layer_norm_backward)


class Embedding(Module):
    """A table of rows. weight (V,C)."""

    def __init__(self, num_embeddings, channels):
        self.weight = Parameter(num_embeddings, channels)

    def forward(self, ids, tape=NO_TAPE):               # (...) -> (...,C)
        y, cache = ops.embedding(ids, self.weight.data)
        tape.save(self, cache)
        return y

    def backward(self, dy, tape):
        self.weight.add_grad(ops.embedding_backward(dy, tape.load(self)))


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


class Upsample(Module):
    """Nearest ×2, or to a size, and no parameters."""

    def forward(self, x, size=None, tape=NO_TAPE):      # (B,H,W,C) -> (B,2H,2W,C)
        y, cache = ops.upsample_nearest(x, size)
        tape.save(self, cache)
        return y

    def backward(self, dy, tape):
        return ops.upsample_nearest_backward(dy, tape.load(self))
