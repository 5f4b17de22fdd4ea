"""The optimisers: AdamW against torch's, Muon, averages of the weights."""
import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel

from tests.support.tolerance import assert_allclose
from tinyldm.errors import TinyldmError
from tinyldm.layers import Parameter
from tinyldm.training import optim
from tinyldm.training.optim import AdamW, Muon, clip_coefficient


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


@pytest.mark.parametrize("dtype, allowed", [(np.float64, 1e-12), (np.float32, 1e-3)])
@pytest.mark.parametrize("decay_vectors", [False, True])
def test_twenty_steps_are_torchs(dtype, allowed, decay_vectors):
    """float64 by the numbers; float32 in units of the learning rate, by which Adam moves."""
    rng, rate = np.random.default_rng(0), 1e-3
    named = parameters(rng, dtype)
    theirs = [torch.nn.Parameter(torch.from_numpy(p.data.copy())) for _, p in named]
    groups = [{"params": theirs[:1]},
              {"params": theirs[1:], "weight_decay": 0.01 if decay_vectors else 0.0}]
    reference = torch.optim.AdamW(groups, lr=rate)
    optimizer = AdamW(named, decay_vectors=decay_vectors, ema=None)
    for _ in range(20):
        for (_, parameter), tensor in zip(named, theirs):
            grad = rng.standard_normal(parameter.shape).astype(dtype)
            parameter.add_grad(grad)
            tensor.grad = torch.from_numpy(grad.copy())
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        reference.step()
        optimizer.step(rate)
    for (_, parameter), tensor in zip(named, theirs):
        difference = abs(parameter.data - tensor.detach().numpy()).max()
        assert difference <= (allowed if dtype == np.float64 else allowed * rate)
    assert "ema" not in optimizer.state()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_coefficient_of_clipping_is_torchs_to_the_bit(dtype):
    rng = np.random.default_rng(0)
    for _ in range(200):
        norm, most = 10 ** rng.uniform(-2, 3), 10 ** rng.uniform(-1, 1)
        norm = dtype(norm)
        theirs = torch.clamp(most / (torch.tensor(norm) + 1e-6), max=1.0)
        assert clip_coefficient(float(norm), most, dtype) == theirs.numpy()


def test_clipping_switched_off():
    named = parameters(np.random.default_rng(0))
    optimizer = AdamW(named, clip=0)
    for _, parameter in named:
        parameter.add_grad(np.full(parameter.shape, 100.0))
    assert optimizer.step(0.1) > 100
    assert_allclose(optimizer.m, 10.0, rtol=1e-12)      # (1 - beta1) of the whole gradient


@pytest.mark.parametrize("decay, options", [
    (optim.diffusers_decay, {}), (optim.diffusers_warmup_decay, {"use_ema_warmup": True})])
def test_the_averages_decay_as_diffusers(decay, options):
    ema = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=0.9999, **options)
    for n in (1, 2, 3, 5, 10, 100, 1000, 10 ** 6):
        assert decay(n) == pytest.approx(ema.get_decay(n), rel=1e-12), n


def test_other_averages():
    assert [optim.ldm_decay(n) for n in (1, 10)] == [2 / 11, 11 / 20]
    assert optim.ldm_decay(10 ** 6, most=0.999) == optim.constant_decay(1, most=0.999) == 0.999


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
