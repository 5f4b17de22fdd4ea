"""The tape, parameters, modules and their names, forward hooks."""
import threading
import time
import weakref
from contextlib import ExitStack
from inspect import signature
from types import SimpleNamespace

import numpy as np
import pytest

from tests.support import strict
from tests.support.threads import run_threads
from tests.support.tolerance import assert_allclose
from tinyldm import backend, layers
from tinyldm.layers import (
    NO_TAPE,
    Activation,
    Conv2d,
    Embedding,
    GroupNormSiLU,
    LayerNorm,
    Linear,
    Module,
    Parameter,
    Tape,
    Upsample,
    forward_hooks,
    named_modules,
)
from tinyldm.models import blocks, clip, unet, vae


def filled(module, dtype=np.float64):
    rng = np.random.default_rng(0)
    for parameter in module.parameters():
        parameter.data = rng.normal(size=parameter.shape).astype(dtype)
        parameter.data.flags.writeable = False
    return module


class Perceptron(Module):
    """Layers in attributes, in lists and in nested lists; also None, and what is not a layer."""

    def __init__(self):
        self.config = {"width": 5}
        self.norm = LayerNorm(3, 1e-5)
        self.layers = [Linear(3, 5), None, Activation("silu"), [Linear(5, 2, bias=False)]]
        self.scale = Parameter(2)

    def forward(self, x, tape=NO_TAPE):
        first, _, act, (last,) = self.layers
        h = self.norm(x, tape)
        h = first(h, tape)
        h = act(h, tape)
        return last(h, tape)

    def backward(self, dy, tape):
        first, _, act, (last,) = self.layers
        dh = last.backward(dy, tape)
        dh = act.backward(dh, tape)
        dh = first.backward(dh, tape)
        return self.norm.backward(dh, tape)


# ---- tape -----------------------------------------------------------------------------------

def test_a_tape_gives_back_the_last_first():
    tape, a, b = Tape(), Linear(1, 1), Linear(1, 1)
    tape.save(a, "first")
    tape.save(b, "second")
    tape.save(a, "third")                               # a layer used twice has two entries
    assert len(tape.entries) == 3
    assert [tape.load(layer) for layer in (a, b, a)] == ["third", "second", "first"]
    assert not tape.entries


def test_a_tape_refuses_another_layer_than_the_last():
    tape, a, b = Tape(), Linear(1, 1), Activation("silu")
    tape.save(a, "a")
    tape.save(b, "b")
    with pytest.raises(AssertionError, match="Linear runs .* Activation ran forward last"):
        tape.load(a)


def test_a_twin_of_the_layer_is_another_layer():
    tape = Tape()
    tape.save(Linear(1, 1), "a")
    with pytest.raises(AssertionError, match="Linear"):
        tape.load(Linear(1, 1))


def test_an_empty_tape_refuses():
    with pytest.raises(AssertionError, match="Linear runs backward, but the tape is empty"):
        Tape().load(Linear(1, 1))


def test_an_empty_tape_is_not_false():
    assert Tape()                                       # `tape or NO_TAPE` must not lose it


def test_the_tape_has_the_same_place_in_every_signature():
    """Right after the required inputs; what is optional follows and is passed by keyword."""
    seen = 0
    for name, function in functions_with_a_tape():
        kinds = {parameter.name: parameter for parameter in signature(function).parameters.values()}
        after = list(kinds.values())[list(kinds).index("tape") + 1:]
        before = list(kinds.values())[:list(kinds).index("tape")]
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in after), name
        assert all(parameter.default is parameter.empty for parameter in before), name
        forward = "backward" not in name
        assert (kinds["tape"].default is NO_TAPE) == forward, name
        assert forward or not after, name
        seen += 1
    assert seen > 60


def functions_with_a_tape():
    for module in (layers, blocks, clip, unet, vae):
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, Module):
                for name, function in vars(kind).items():
                    if callable(function) and "tape" in signature(function).parameters:
                        yield f"{kind.__name__}.{name}", function


def test_backward_in_the_wrong_order_is_refused():
    module, tape = filled(Perceptron()), Tape()
    y = module(np.ones((4, 3)), tape)
    with pytest.raises(AssertionError, match="LayerNorm runs backward, but Linear"):
        module.norm.backward(y, tape)


@pytest.mark.parametrize("layer, x", [
    (Linear(3, 5), (2, 3)), (Conv2d(3, 4), (1, 5, 5, 3)),
    (GroupNormSiLU(4, 2, 1e-5), (1, 3, 3, 4)), (LayerNorm(3, 1e-5), (2, 3)),
    (Activation("gelu"), (2, 3)), (Upsample(), (1, 3, 3, 2)),
], ids=lambda value: type(value).__name__)
def test_a_layer_saves_one_entry_and_takes_it_back(layer, x):
    filled(layer)
    x, tape = np.random.default_rng(0).normal(size=x), Tape()
    y = layer(x, tape=tape)
    assert len(tape.entries) == 1
    np.testing.assert_array_equal(y, layer(x))          # the tape changes no number
    assert layer.backward(y, tape).shape == x.shape
    assert not tape.entries
    assert all(parameter.grad.shape == parameter.shape for parameter in layer.parameters())


def test_embedding_layer():
    layer, tape = filled(Embedding(7, 3)), Tape()
    y = layer(np.array([[1, 1, 4]]), tape)
    assert layer.backward(np.ones_like(y), tape) is None        # ids have no gradient
    np.testing.assert_array_equal(layer.weight.grad[:, 0], [0, 2, 0, 0, 1, 0, 0])


# ---- what is kept ---------------------------------------------------------------------------

@pytest.fixture
def outputs(monkeypatch):
    """Weak references to the memory of every layer's output."""
    references, call = [], Module.__call__

    def recording(self, *inputs, **options):
        y = call(self, *inputs, **options)
        owner = y
        while owner.base is not None:                   # a view keeps its base alive
            owner = owner.base
        references.append(weakref.ref(owner))
        return y
    monkeypatch.setattr(Module, "__call__", recording)
    return references


def alive(references):
    return sum(reference() is not None for reference in references)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_without_a_tape_nothing_is_kept(outputs, dtype):
    module, x = filled(Perceptron(), dtype), np.ones((4, 3), dtype)
    y = module(x)
    assert len(outputs) == 5 and alive(outputs) == 2    # the last layer's output is the module's
    del y
    assert alive(outputs) == 0                          # at once, without the garbage collector


def test_after_backward_nothing_is_kept_but_gradients(outputs):
    module, tape = filled(Perceptron()), Tape()
    y = module(np.ones((4, 3)), tape)
    dy = np.ones_like(y)
    del y
    assert alive(outputs) == 3                          # each is an input of the next
    module.backward(dy, tape)
    assert not tape.entries and alive(outputs) == 0


# ---- parameters -----------------------------------------------------------------------------

def test_named_parameters():
    module = Perceptron()
    named = dict(module.named_parameters())
    assert list(named) == ["norm.weight", "norm.bias", "layers.0.weight", "layers.0.bias",
                           "layers.3.0.weight", "scale"]
    assert named["layers.3.0.weight"] is module.layers[3][0].weight
    assert list(named.values()) == module.parameters()
    assert list(dict(module.named_parameters("model."))) == ["model." + name for name in named]
    assert [p.shape for p in named.values()] == [(3,), (3,), (5, 3), (5,), (2, 5), (2,)]
    assert all(p.data is None and p.grad is None for p in named.values())


def test_named_modules():
    """Finds what named_parameters finds: also layers in nested lists."""
    module = Perceptron()
    named = dict(named_modules(module))
    assert list(named) == ["norm", "layers.0", "layers.2", "layers.3.0"]
    assert named["layers.3.0"] is module.layers[3][0]
    holder = SimpleNamespace(model=module, number=3)
    assert list(dict(named_modules(holder)))[:2] == ["model", "model.norm"]


def test_dtype_is_that_of_activations():
    """Large weights may be stored in float16 while everything else is float32."""
    module = filled(Perceptron(), np.float32)
    weight = module.layers[0].weight
    weight.data = weight.data.astype(np.float16)
    assert module.dtype == module(np.ones((4, 3), np.float32)).dtype == np.float32
    for dtype in (np.float16, np.float64):
        module = filled(Perceptron(), dtype)
        assert module.dtype == module(np.ones((4, 3), dtype)).dtype == dtype


def test_xp():
    module = filled(Perceptron())
    assert module.xp is np
    with strict.installed() as cupy:
        for parameter in module.parameters():
            parameter.data = cupy.asarray(parameter.data)
        assert module.xp is cupy


def test_gradients_add_up_and_have_the_parameter_s_shape():
    parameter = Parameter(2, 3)
    first = np.ones((2, 3))
    parameter.add_grad(first)
    parameter.add_grad(np.full((2, 3), 0.5))
    np.testing.assert_array_equal(parameter.grad, np.full((2, 3), 1.5))
    np.testing.assert_array_equal(first, np.ones((2, 3)))       # the caller's array stays
    for shape in ((3,), (1, 3), (3, 2), ()):
        with pytest.raises(AssertionError, match="gradient"):
            parameter.add_grad(np.ones(shape))


def test_a_layer_used_twice_adds_its_gradients():
    layer, tape = filled(Linear(3, 3)), Tape()
    x = np.random.default_rng(1).normal(size=(4, 3))
    y = layer(layer(x, tape), tape)
    dh = layer.backward(np.ones_like(y), tape)
    second = layer.weight.grad.copy()
    layer.backward(dh, tape)
    assert_allclose(layer.weight.grad, second + dh.T @ x)


class SlowSum(np.ndarray):
    """Adds so slowly that another thread can come in between, if nothing prevents it."""

    def __add__(self, other):
        time.sleep(0.001)
        return super().__add__(other)


def test_gradients_from_several_threads_are_all_counted():
    parameter = Parameter(2, 3)

    def work():
        for _ in range(5):
            parameter.add_grad(np.ones((2, 3)).view(SlowSum))
    run_threads(work, 8)
    np.testing.assert_array_equal(parameter.grad, np.full((2, 3), 40))


# ---- forward hooks --------------------------------------------------------------------------

def adds(letter, seen):
    def hook(forward, *inputs, **options):
        seen.append(letter)
        return forward(*inputs, **options)
    return hook


def test_a_hook_runs_instead_of_the_forward():
    module, x = filled(Perceptron()), np.ones((4, 3))
    y, first = module(x), module.layers[0]
    with forward_hooks({first: lambda forward, x, tape: 2 * forward(x, tape)}):
        np.testing.assert_array_equal(first(x, NO_TAPE), 2 * first.forward(x))
        assert not np.array_equal(module(x), y)
    np.testing.assert_array_equal(module(x), y)


def test_the_last_hook_is_the_outermost():
    layer, seen = filled(Linear(1, 1)), []
    with forward_hooks({layer: adds("a", seen)}), forward_hooks({layer: adds("b", seen)}):
        layer(np.ones((1, 1)))
    assert seen == ["b", "a"]


def test_hooks_that_are_not_nested_leave_nothing():
    layer, x, seen = filled(Linear(1, 1)), np.ones((1, 1)), []
    first, second = ExitStack(), ExitStack()
    first.enter_context(forward_hooks({layer: adds("a", seen)}))
    second.enter_context(forward_hooks({layer: adds("b", seen)}))
    first.close()
    layer(x)
    assert seen == ["b"]
    second.close()
    layer(x)
    assert seen == ["b"] and "forward" not in vars(layer)


def test_hooks_of_two_threads_do_not_meet():
    """Both threads share the layer; each enters while the other is inside, and leaves first."""
    layer, x, seen, both = filled(Linear(1, 1)), np.ones((1, 1)), {}, threading.Barrier(2)

    def work():
        mine = seen[threading.get_ident()] = []
        with forward_hooks({layer: adds("a", mine)}):
            both.wait(10)
            layer(x)
            both.wait(10)
        layer(x)
    run_threads(work, 2)
    layer(x)
    assert list(seen.values()) == [["a"], ["a"]] and "forward" not in vars(layer)


def test_hooks_reach_the_workers(two_threads):
    layer, x, seen = filled(Linear(1, 1)), np.ones((1, 1)), []
    with forward_hooks({layer: adds("a", seen)}):
        backend.parallel(lambda _: layer(x), range(4))
    assert seen == ["a"] * 4
