"""The Inception network against a reference in torch's functions, with random weights."""
import numpy as np
import pytest

from tests.support import strict
from tests.support.arrays import read_only
from tests.support.extra import torch
from tests.support.inception_reference import block, inception
from tests.support.keys import digest
from tests.support.models import inception_weights
from tests.support.reference import assert_same_gradients, nchw, nhwc
from tests.support.tolerance import assert_close
from tinyldm import backend
from tinyldm.layers import Tape, file_shape, forward_hooks, named_modules
from tinyldm.models.inception import CLASSES, FEATURES, BasicConv2d, InceptionV3

# Of (name, shape) of every tensor in pt_inception-2015-12-05-6726825d.pth that is a weight.
PUBLIC = "77370713de667a2b"


def filled(module):
    module.load_state_dict(inception_weights(module))
    return module


def of_dtype(network, dtype, *parts):
    """A copy of the network, or of those parts of it, in another dtype."""
    module = InceptionV3()
    module.load_state_dict({name: array.astype(dtype) for name, array in
                            network.state_dict().items() if name.startswith(parts or "")},
                           strict=not parts)
    return module


def tensors(module):
    """The module's weights as torch has them, {name: tensor that has a gradient}."""
    return {name: torch.from_numpy(array).requires_grad_()
            for name, array in module.state_dict().items()}


@pytest.fixture(scope="module")
def network():
    return filled(InceptionV3())


def images(size, dtype=np.float64, batch=1):
    return read_only(np.random.default_rng(1).uniform(-1, 1, (batch, *size, 3)).astype(dtype))


def assert_every_gradient(module, weights):
    """Of each parameter: as autograd's."""
    class Reference:
        named_parameters = staticmethod(weights.items)
    assert_same_gradients(Reference, module)


@pytest.mark.parametrize("name", ["Mixed_5b", "Mixed_6a", "Mixed_6b", "Mixed_7a", "Mixed_7c"])
def test_blocks(name):
    """One block on a small map: its output, and the gradients of its input and its weights."""
    module = filled(getattr(InceptionV3(), name))
    channels = module.parts[0].steps[0].conv.weight.shape[2]
    x = read_only(np.random.default_rng(2).standard_normal((2, 5, 4, channels)))
    tape, theirs, weights = Tape(), nchw(x).requires_grad_(), tensors(module)
    y = module(x, tape)
    expected = block({f"{name}.{key}": tensor for key, tensor in weights.items()}, name, theirs)
    assert_close(y, nhwc(expected), 1e-10, "output")
    dy = read_only(np.random.default_rng(3).standard_normal(y.shape))
    dx = module.backward(dy, tape)
    expected.backward(nchw(dy))
    assert not tape.entries
    assert_close(dx, nhwc(theirs.grad), 1e-6, "dx")
    assert_every_gradient(module, weights)
    np.testing.assert_array_equal(module(x), y)


@pytest.mark.parametrize("features", FEATURES)
def test_features(features, network):
    x = images((79, 75))
    with torch.no_grad():
        theirs = inception(tensors(network), nchw(x), features).numpy()
    ours = network(x, features=features)
    assert ours.shape == (1, features)
    assert_close(ours, theirs, 1e-10)


def test_gradients_of_the_whole(network):
    x = images((75, 75))
    tape, theirs, weights = Tape(), nchw(x).requires_grad_(), tensors(network)
    y = network(x, tape, features=CLASSES)
    expected = inception(weights, theirs, CLASSES)
    assert_close(y, expected.detach().numpy(), 1e-10, "logits")
    dy = read_only(np.random.default_rng(3).standard_normal(y.shape))
    dx = network.backward(dy, tape)
    expected.backward(torch.from_numpy(dy.copy()))
    assert not tape.entries
    assert_close(dx, nhwc(theirs.grad), 1e-6, "dimages")
    assert_every_gradient(network, weights)
    network.zero_grad()


def test_float32(network):
    module, x = of_dtype(network, np.float32), images((131, 139), np.float32)
    with torch.no_grad():
        theirs = inception(tensors(module), nchw(x)).numpy()
    assert_close(module(x), theirs, 1e-3, "fast")
    with backend.plain():
        assert_close(module(x), theirs, 1e-4, "plain")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_images_and_the_branches(threads, network, monkeypatch):
    """Every image is computed once, in its order; with forward hooks, the layers in theirs."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    monkeypatch.setattr("tinyldm.models.inception.SHARE", 2)
    x = images((75, 75), batch=5)
    expected = np.concatenate([network(x[i:i + 1], Tape()) for i in range(len(x))])
    assert_close(network(x), expected, 1e-10)
    assert_close(network(x[:1]), expected[:1], 1e-10)
    convolutions = [layer for _, layer in named_modules(network) if isinstance(layer, BasicConv2d)]
    seen = []

    def hook(layer):
        def run(forward, *inputs, **options):
            seen.append(layer)
            return forward(*inputs, **options)
        return run
    with forward_hooks({layer: hook(layer) for layer in convolutions}):
        network(x[:1])
    assert seen == convolutions


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_on_strict_arrays(dtype, network):
    """What CuPy would refuse is refused; in float16 the numbers are near. Up to the first pool."""
    x, stem = images((19, 17), dtype), ("Conv2d_1", "Conv2d_2")
    expected = of_dtype(network, dtype, *stem)(x.astype(np.float32), features=64)
    module = of_dtype(network, dtype, *stem)
    with strict.installed() as xp, backend.plain():
        for name, parameter in module.named_parameters():
            if name.startswith(stem):
                parameter.data = strict.Array(parameter.data)
        tape = Tape()
        y = module(strict.Array(x), tape, features=64)
        assert y.dtype == dtype
        assert_close(y.get().astype(np.float32), expected, 0.03 if dtype == np.float16 else 1e-4)
        assert isinstance(module.backward(y, tape), xp.ndarray)


def test_names_are_those_of_the_public_file():
    found = InceptionV3().named_parameters()
    assert digest((name, file_shape(parameter)) for name, parameter in found) == PUBLIC
