"""Layers: ops with parameters. Module and Parameter are in module.py, the tape, which links a
forward to its backward, in tape.py.

A layer's forward saves on the tape what its backward needs; the backward is the forward read from
the bottom up. A frozen layer, none of whose parameters is trained, computes no gradients of them
and saves nothing for them. Models (models/) are layers made of layers. In every signature `tape`
comes right after the required inputs; whatever is optional follows it and is passed by keyword.
"""
from . import ops
from .module import (  # noqa: F401
    FILE_AXES,
    OUR_AXES,
    SHARD,
    Misfits,
    Module,
    Parameter,
    Sequence,
    _hooks,
    check_fit,
    file_shape,
    forward_hooks,
    misfits,
    named_modules,
    to_file,
    trainable_parameters,
    unobserved,
)
from .tape import (  # noqa: F401
    NO_TAPE,
    EndOfTape,
    Tape,
    checkpoint,
    checkpoint_backward,
    ends_early,
)


class WeightedOp(Module):
    """An op of x, a weight and a bias (or None): what Linear, Conv2d and the norms share."""

    options = ()                                        # further arguments of the op
    input_axis = -1                                     # of the weight: as long as x's last axis

    def forward(self, x, tape=NO_TAPE):
        self.check_input(x)
        bias = self.bias and self.bias.data
        y, cache = self.op(x, self.weight.data, bias, *self.options)
        self._save(x, cache, tape)
        return y

    def again(self, x, tape=NO_TAPE):                   # the cache holds no result
        self._save(x, (x, self.weight.data, *self.options), tape)

    def _save(self, x, cache, tape=NO_TAPE):
        tape.save(self, cache if self.is_trained() else self.input_cache(x, cache))

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
    again = Module.again                                # the cache holds the statistics of x

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
