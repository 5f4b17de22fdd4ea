"""Frozen parameters: the same gradients of the inputs, none of the weights, and nothing kept."""
import numpy as np
import pytest

from tests.support.arrays import read_only
from tests.support.models import backward, cases, inputs, make, outputs
from tinyldm import backend
from tinyldm.layers import (
    AdaGroupNormSiLU,
    Conv2d,
    Embedding,
    GroupNorm,
    GroupNormSiLU,
    LayerNorm,
    Linear,
    Tape,
    trainable_parameters,
)

PIXELS = 2, 12, 40, 32                                  # large enough for Winograd
LAYERS = [
    (lambda: Linear(32, 7), PIXELS, 0), (lambda: Linear(32, 7, bias=False), (5, 32), 0),
    (lambda: Conv2d(32, 40), PIXELS, 0), (lambda: Conv2d(32, 7, 1, bias=False), PIXELS, 0),
    (lambda: Conv2d(32, 7, stride=2, padding=(0, 1)), PIXELS, 0),
    (lambda: Conv2d(32, 7, (1, 5)), (1, 6, 7, 32), 0),
    (lambda: GroupNorm(32, 4, 1e-5), PIXELS, 2 * 2 * 4), (lambda: LayerNorm(32, 1e-5), PIXELS,
                                                          2 * 2 * 12 * 40),
    (lambda: GroupNormSiLU(32, 4, 1e-5), PIXELS, 2 * 2 * 4),
]
both_paths = pytest.mark.parametrize("dtype, plain", [
    (np.float64, False), (np.float32, False), (np.float32, True), (np.float16, False)])


def filled(layer, rng, dtype):
    for parameter in layer.parameters():
        parameter.data = read_only(rng.standard_normal(parameter.shape).astype(dtype))
    return layer


@both_paths
@pytest.mark.parametrize("make_layer, shape, statistics", LAYERS)
def test_a_frozen_layer_gives_the_same_dx_and_keeps_no_input_for_weights(
        make_layer, shape, statistics, dtype, plain, rng):
    layer, x = filled(make_layer(), rng, dtype), read_only(rng.standard_normal(shape).astype(dtype))
    with backend.plain(plain):
        trained, frozen = Tape(), Tape()
        y = layer(x, trained)
        dy = read_only(rng.standard_normal(y.shape).astype(dtype))
        dx = layer.backward(dy, trained)
        assert all(parameter.grad is not None for parameter in layer.parameters())
        layer.zero_grad()
        layer.freeze()
        np.testing.assert_array_equal(layer(x, frozen), y)
        norm = statistics > 0                           # its dx needs x, too
        sums = max(4, x.itemsize)
        assert frozen.nbytes == statistics * sums + norm * x.nbytes
        ours = layer.backward(dy, frozen)
    assert ours.dtype == dx.dtype
    np.testing.assert_array_equal(ours, dx)
    assert not any(parameter.grad is not None for parameter in layer.parameters())


def test_a_frozen_conditional_norm(rng):
    layer = filled(AdaGroupNormSiLU(8, 2, 1e-5), rng, np.float64)
    x, condition = rng.standard_normal((2, 3, 5, 8)), rng.standard_normal((2, 16))
    found = []
    for freeze in (False, True):
        layer.zero_grad()
        if freeze:
            layer.freeze()
        tape = Tape()
        y = layer(x, condition, tape)
        found.append(layer.backward(np.cos(y), tape))
        assert all((p.grad is None) == freeze for p in layer.parameters())
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_frozen_table_keeps_nothing(rng):
    layer, tape = filled(Embedding(7, 3), rng, np.float32), Tape()
    layer.freeze()
    y = layer(np.array([[1, 1, 4]]), tape)
    assert tape.nbytes == 0 and layer.backward(y, tape) is None and layer.weight.grad is None


def test_one_parameter_of_a_layer_may_be_frozen(rng):
    layer, x, tape = filled(Linear(5, 3), rng, np.float64), rng.standard_normal((4, 5)), Tape()
    layer.weight.trainable = False
    y = layer(x, tape)
    layer.backward(y, tape)
    assert layer.weight.grad is None
    np.testing.assert_array_equal(layer.bias.grad, y.sum(axis=0))


@pytest.mark.parametrize("before", [True, False])
def test_trainable_must_not_change_between_forward_and_backward(before, rng):
    layer, tape = filled(Linear(5, 3), rng, np.float64), Tape()
    layer.weight.trainable = layer.bias.trainable = before
    y = layer(rng.standard_normal((4, 5)), tape)
    layer.weight.trainable = not before
    layer.bias.trainable = not before
    with pytest.raises(AssertionError, match=f"Linear was {'trained' if before else 'frozen'} "):
        layer.backward(y, tape)


def test_trainable_parameters():
    first, second = Linear(5, 3), Conv2d(3, 2, 1)
    second.bias.trainable = False
    assert [name for name, _ in trainable_parameters(first, second)] == ["weight", "bias", "weight"]
    first.freeze()
    assert [parameter for _, parameter in trainable_parameters(first, second)] == [second.weight]


# ---- models -----------------------------------------------------------------------------------

def gradients(module, arrays, dys, tape):
    """{name: array}: of the inputs and of the parameters that have one."""
    module.zero_grad()
    outputs(module, arrays, tape)
    found = backward(module, arrays, dys, tape)
    assert not tape.entries
    return found, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", cases())
def test_a_frozen_model_gives_the_same_gradients_of_its_inputs(name, rng):
    """And with one layer in three trained, those have the same gradients as before, bit by bit."""
    module, arrays = make(name), inputs(name)
    dys = [rng.standard_normal(y.shape) for y in outputs(module, arrays)]
    whole = Tape()
    expected, of_weights = gradients(module, arrays, dys, whole)
    for kept in (lambda i: False, lambda i: i // 2 % 3 == 1):
        for i, parameter in enumerate(module.parameters()):
            parameter.trainable = kept(i)
        tape = Tape()
        found, trained = gradients(module, arrays, dys, tape)
        assert tape.peak < whole.peak
        assert trained.keys() == {key for key, _ in trainable_parameters(module)}
        for ours, theirs in [(found, expected), (trained, of_weights)]:
            for key in ours:
                np.testing.assert_array_equal(ours[key], theirs[key], key)
        assert found.keys() == expected.keys()
