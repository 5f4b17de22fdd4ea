"""Parameters, and modules, which own them: what every layer and model is.

A module's attributes have the names of the public weight files; from them follow the names of its
parameters, and how arrays from a file fill them. layers.py has the layers, and imports all names
from here.
"""
import math
import threading
from collections import namedtuple
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, reduce
from operator import add

import numpy as np

from .backend import get_xp, to_host, widen
from .errors import TinyldmError, shorten
from .tape import NO_TAPE

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

    def again(self, *inputs, **options):
        """Run forward again for the tape alone, as a checkpoint's backward does.

        Nothing is returned. So a module whose last layer fills the tape without computing anything
        (Linear, Conv2d) calls that layer's `again`, too.
        """
        self(*inputs, **options)

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

    def again(self, h, tape=NO_TAPE):
        *layers, last = self.layers()
        for layer in layers:
            h = layer(h, tape)
        last.again(h, tape)

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
