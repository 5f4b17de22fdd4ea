"""The terms of a diffusion model's bound, entry by entry, and their gradients."""
import numpy as np
import pytest

from tests.support.checks import check_op, shapes
from tests.support.extra import library, torch
from tests.support.tolerance import assert_allclose
from tinyldm import ops

# Of the public code in float64: x, mean, ln s -> nats.
PUBLISHED = [(-1, -1, -3, -.632258), (-1, 0, -3, -27.631021), (0, 0, -3, -2.768094),
             (.5, 0, -4, -27.631021), (1, 1, -5, -.328963), (1, -1, -6, -27.631021)]


@shapes
def test_gaussian_kl(shape, rng):
    def reference(mean_q, logvar_q, mean_p, logvar_p):
        normal = library("torch.distributions").Normal
        kl = library("torch.distributions").kl_divergence
        return kl(normal(mean_q, (0.5 * logvar_q).exp()), normal(mean_p, (0.5 * logvar_p).exp()))
    check_op(ops.gaussian_kl, ops.gaussian_kl_backward,
             [rng.normal(size=shape) for _ in range(4)], reference)


def test_equal_distributions_have_no_divergence(rng):
    mean, logvar = rng.normal(size=(2, 2, 3, 3, 2))
    assert not ops.gaussian_kl(mean, logvar, mean, logvar)[0].any()


def bins(x, mean, logvar):
    """The same formula, in torch."""
    def phi(u):
        return 0.5 * (1 + torch.tanh((2 / np.pi) ** 0.5 * (u + 0.044715 * u ** 3)))
    upper = phi((x - mean + 1 / 255) * (-0.5 * logvar).exp())
    lower = phi((x - mean - 1 / 255) * (-0.5 * logvar).exp())
    return torch.where(x < -.999, upper.clamp(min=1e-12).log(),
                       torch.where(x > .999, (1 - lower).clamp(min=1e-12).log(),
                                   (upper - lower).clamp(min=1e-12).log()))


def pixels(rng, shape):
    """On the grid, with the first and the last value among them."""
    values = rng.integers(0, 256, shape)
    values.flat[0], values.flat[-1] = 0, 255
    return values / 127.5 - 1


@shapes
@pytest.mark.parametrize("wide", [0.2, 1.0])
def test_discretized_log_likelihood(shape, wide, rng):
    x = pixels(rng, shape)
    inputs = [x, x + wide * 0.3 * rng.normal(size=shape), rng.normal(2 * np.log(wide), 0.5, shape)]
    check_op(ops.discretized_log_likelihood, ops.discretized_log_likelihood_backward, inputs, bins)


@pytest.mark.parametrize("x, mean, log_std, nats", PUBLISHED)
def test_published_likelihoods(x, mean, log_std, nats):
    found, _ = ops.discretized_log_likelihood(*np.array([[x], [mean], [2.0 * log_std]]))
    assert_allclose(found, [nats], atol=1e-6)


def test_all_256_values_together_are_certain(rng):
    x = np.arange(256) / 127.5 - 1
    found, _ = ops.discretized_log_likelihood(x, 0 * x + 0.1, 0 * x - 3)
    assert_allclose(np.exp(found).sum(), 1, rtol=1e-8)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_hopeless_pixel_has_no_gradient_and_does_not_overflow(dtype):
    """P is held at 1e-12 where the model is sure of another value."""
    inputs = [np.array([value], dtype) for value in (1, -1, -16)]
    likelihood, cache = ops.discretized_log_likelihood(*inputs)
    assert_allclose(likelihood, [np.log(1e-12)], rtol=1e-3)
    for gradient in ops.discretized_log_likelihood_backward(np.ones(1, dtype), cache):
        assert gradient.dtype == dtype and not gradient.any()
