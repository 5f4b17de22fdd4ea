"""LoRA: a small change of a layer's weight, trained in place of the weight.

    W' = W + alpha / rank * B A,      A (rank, in), B (out, rank)

W is frozen. A and B together have rank * (in + out) numbers instead of in * out. `add_lora` puts a
LoRA around each of a model's layers that is named, and `remove_lora` takes it off again; with
merge=True the change stays in the weights. checkpoints/addons reads and writes the files.
Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685,
section 4.1. Explained: docs/lora.md
"""
import math

import numpy as np

from ..backend import asarray, wide
from ..errors import TinyldmError
from ..layers import NO_TAPE, Conv2d, Linear, Module, file_shape, named_modules

# Layers by the ends of their names. Of the UNet: what diffusers' scripts train; and what kohya's
# do, all linear layers and 1x1 convolutions of the transformers.
DIFFUSERS = "to_q", "to_k", "to_v", "to_out.0"
KOHYA = (*DIFFUSERS, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
# The same two of a text encoder.
TEXT_DIFFUSERS = "q_proj", "k_proj", "v_proj", "out_proj"
TEXT_KOHYA = (*TEXT_DIFFUSERS, "mlp.fc1", "mlp.fc2")


class LoRA(Module):
    """A Linear or Conv2d, base_layer, and the change of its weight: lora_A to `rank` channels, then
    lora_B. Of a convolution, lora_A has the kernel, stride and padding, and lora_B is 1x1.

    Both are of the base layer's kind, without bias. scale = alpha / rank. `initialise` makes them
    float32 at least, also where the base layer is float16: the steps of an optimiser are small.
    """

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def __init__(self, base_layer, rank, alpha):
        self.base_layer, self.rank, self.scale = base_layer, rank, alpha / rank
        if isinstance(base_layer, Linear):
            O, C = base_layer.weight.shape
            self.lora_A, self.lora_B = Linear(C, rank, bias=False), Linear(rank, O, bias=False)
        else:
            *kernel, C, O = base_layer.weight.shape
            self.lora_A = Conv2d(C, rank, tuple(kernel), *base_layer.options, bias=False)
            self.lora_B = Conv2d(rank, O, 1, bias=False)

    def initialise(self, rng):
        """Fill A with normal numbers of standard deviation 1/rank, and B with zeros."""
        A, B, data = self.lora_A.weight, self.lora_B.weight, self.weight.data
        A.data = asarray(rng.normal(0, 1 / self.rank, A.shape).astype(wide(data.dtype)), like=data)
        B.data = asarray(np.zeros(B.shape, wide(data.dtype)), like=data)

    def _dtypes(self):                                  # activations stay as the base layer's
        return self.base_layer._dtypes()

    def is_trained(self):
        return self.lora_A.is_trained() or self.lora_B.is_trained()

    def forward(self, x, tape=NO_TAPE):
        y = self.base_layer(x, tape)
        u = self.scale * self.lora_A(x)                 # (...,rank)
        tape.save(self, x)                              # backward computes u again
        y += self.lora_B(u)                             # in place: nothing else uses y
        return y

    def again(self, x, tape=NO_TAPE):
        self.base_layer.again(x, tape)
        tape.save(self, x)

    def backward(self, dy, tape):
        """With u = scale * x A^T, y = x W^T + u B^T:

            dB = dy^T u,     du = dy B,     dA = scale * du^T x,     dx = dy W + scale * du A
        """
        x, A, B = tape.load(self), self.lora_A, self.lora_B
        u = self.scale * A(x)
        du, dB, _ = B.op_backward(dy, (u, B.weight.data, *B.options))
        dx, dA, _ = A.op_backward(self.scale * du, (x, A.weight.data, *A.options))
        A.weight.add_grad(dA)
        B.weight.add_grad(dB)
        dh = self.base_layer.backward(dy, tape)
        dh += dx                                        # x was used twice: add
        return dh

    def delta(self):
        """The change of the weight, scale * B A, in the weight's shape."""
        A, B = self.lora_A.weight.data, self.lora_B.weight.data
        return self.scale * (B @ A if A.ndim == 2 else A @ B[0, 0])     # (K,L,C,rank) @ (rank,O)


def add_lora(model, targets, rank, alpha, rng):
    """Put a LoRA around layers of a model, in place, and freeze all else -> {name: LoRA}.

    targets: ends of the layers' names, such as DIFFUSERS. rng: a numpy Generator; A is normal with
    standard deviation 1/rank, B is 0, so that at first nothing changes.
    Raises TinyldmError, before anything is changed, where no layer has such a name, or a layer
    cannot have a LoRA of this rank.
    """
    ends = tuple("." + target for target in targets)
    layers = {name: layer for name, layer in named_modules(model) if f".{name}".endswith(ends)}
    if not layers:
        raise TinyldmError(f"this {type(model).__name__} has no layer for a LoRA: expected names "
                           f"that end in {', '.join(targets)}")
    for name, layer in layers.items():
        check_rank(name, layer, rank)
    model.freeze()
    loras = {name: LoRA(layer, rank, alpha) for name, layer in layers.items()}
    for name, lora in loras.items():
        lora.initialise(rng)
        put(model, name, lora)
    return loras


def check_rank(name, layer, rank):
    """Raise TinyldmError for a layer that cannot have a LoRA of this rank."""
    if isinstance(layer, LoRA):
        raise TinyldmError(f"{name} has a LoRA already: take it off with remove_lora first")
    if not isinstance(layer, (Linear, Conv2d)):
        raise TinyldmError(f"{name} is a {type(layer).__name__}, but only a Linear or a Conv2d can "
                           "have a LoRA: choose other targets")
    outputs, *inputs = file_shape(layer.weight)
    if rank not in range(1, 1 + (most := min(outputs, math.prod(inputs)))):
        raise TinyldmError(f"the rank of a LoRA must be a whole number from 1 to {most} for "
                           f"{name}, not {rank}")


def remove_lora(model, merge=False):
    """Put the layers back in the place of their LoRAs. merge: with the change in their weights.

    What add_lora froze stays frozen.
    """
    for name, lora in list(named_modules(model)):
        if isinstance(lora, LoRA):
            W = lora.base_layer.weight
            if merge:
                W.data = (W.data + lora.delta()).astype(W.data.dtype)
            put(model, name, lora.base_layer)


def put(model, name, layer):
    """Set the attribute, or the item of a list, that has this name."""
    *path, last = name.split(".")
    for part in path:
        model = model[int(part)] if isinstance(model, list) else getattr(model, part)
    if isinstance(model, list):
        model[int(last)] = layer
    else:
        setattr(model, last, layer)
