"""The optimisers: AdamW against torch's, Muon, averages of the weights."""
import numpy as np
import pytest
import torch

from tests.support.tolerance import assert_allclose
from tinyldm.errors import TinyldmError
from tinyldm.layers import Parameter
from tinyldm.training.optim import AdamW, Muon


def parameters(rng, dtype=np.float64):
    named = [("a", Parameter(3, 4)), ("b", Parameter(5))]
    for _, parameter in named:
        parameter.data = rng.standard_normal(parameter.shape).astype(dtype)
    return named


def test_adamw_equals_torch():
    rng = np.random.default_rng(0)
    named = parameters(rng)
    theirs = [torch.nn.Parameter(torch.from_numpy(p.data.copy())) for _, p in named]
    reference = torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
    optimizer = AdamW(named, weight_decay=0.01, beta2=0.99, clip=1.0, decay_vectors=True)
    ema, steps = optimizer.data.copy(), 12
    for step in range(steps):
        scale = 10.0 ** (step % 3 - 1)                  # some steps are clipped, some are not
        for (_, parameter), tensor in zip(named, theirs):
            grad = rng.standard_normal(parameter.shape) * scale
            parameter.add_grad(grad)
            tensor.grad = torch.from_numpy(grad.copy())
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        reference.step()
        assert_allclose(optimizer.step(0.1), norm.item(), rtol=1e-9)
        decay = min(0.999, (2 + step) / (11 + step))
        ema = decay * ema + (1 - decay) * optimizer.data
    for (_, parameter), tensor in zip(named, theirs):
        assert_allclose(parameter.data, tensor.detach().numpy(), rtol=1e-9, atol=1e-12)
        assert parameter.grad is None
    assert_allclose(optimizer.ema, ema, rtol=1e-12)


def test_muon_moves_matrices_equally_far_in_all_directions_and_the_rest_as_adamw():
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 8, 16), "linear": (24, 9), "few": (1, 1, 4, 16), "bias": (16,)}
    both = []
    for kind in (Muon, AdamW):
        named = [(name, Parameter(*shape)) for name, shape in shapes.items()]
        for seed, (_, parameter) in enumerate(named):
            parameter.data = np.random.default_rng(seed).standard_normal(parameter.shape)
        both.append((kind(named, clip=1e9), dict(named)))
    for _ in range(3):
        grads = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        for optimizer, named in both:
            for name, parameter in named.items():
                parameter.add_grad(grads[name].copy())
            optimizer.step(0.1)
    (muon, ours), (_, adams) = both
    for name in ("few", "bias"):
        assert_allclose(ours[name].data, adams[name].data, rtol=1e-12)
    for name in ("conv", "linear"):
        before = ours[name].data.copy()
        for other, parameter in ours.items():
            parameter.add_grad(grads[other].copy())
        muon.step(0.1)
        move = (0.999 * before - ours[name].data).reshape(-1, before.shape[-1])
        values = np.linalg.svd(move, compute_uv=False) / (0.1 * 0.2 * np.sqrt(max(move.shape)))
        assert 0.5 < values.min() and values.max() < 1.3


def test_the_average_of_muon():
    parameter, rng = Parameter(8, 9), np.random.default_rng(0)
    parameter.data = rng.standard_normal((8, 9))
    optimizer = Muon([("a", parameter)])
    ema = optimizer.data.copy()
    for step in range(4):
        parameter.add_grad(rng.standard_normal((8, 9)))
        optimizer.step(0.1)
        decay = (2 + step) / (11 + step)
        ema = decay * ema + (1 - decay) * optimizer.data
    assert_allclose(optimizer.ema, ema, rtol=1e-12)


def test_a_parameter_without_gradient_is_named():
    named = parameters(np.random.default_rng(0))
    named[0][1].add_grad(np.zeros((3, 4)))
    with pytest.raises(AssertionError, match="b has no gradient"):
        AdamW(named).step(0.1)


def test_a_parameter_with_new_data_is_named():
    """As a move to another device or a LoRA leaves it: the update would not reach the model."""
    named = parameters(np.random.default_rng(0))
    optimizer = AdamW(named)
    for _, parameter in named:
        parameter.add_grad(np.ones(parameter.shape))
    named[1][1].data = named[1][1].data.copy()
    before = [parameter.data.copy() for _, parameter in named]
    with pytest.raises(TinyldmError, match="b got new data after the optimiser was made"):
        optimizer.step(0.1)
    for (_, parameter), data in zip(named, before):
        np.testing.assert_array_equal(parameter.data, data)
