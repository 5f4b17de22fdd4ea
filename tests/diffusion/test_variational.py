"""The bound and its losses: against torch's autograd, published numbers, finite differences."""
from functools import partial

import numpy as np
import pytest
import torch

from tests.support import improved_ddpm as reference
from tests.support import strict
from tests.support.arrays import read_only
from tests.support.tolerance import assert_allclose
from tinyldm.diffusion import variational
from tinyldm.diffusion.process import Process
from tinyldm.diffusion.variational import (
    LOSSES,
    VARIANCE_TYPES,
    bits_per_dimension,
    bound,
    prior_term,
    reverse,
    term,
)
from tinyldm.errors import TinyldmError

T = 100
T_OF_CASES = np.array([0, 1, 2, 50, 98, 99])
COSINE = Process.cosine(T)
LEARNED = VARIANCE_TYPES[:2]


def case(rng, variance="learned_range", process=COSINE, dtype=np.float64):
    """x_start, noise, x_t, t and a random model output (6,3,4,2 or 4)."""
    x_start = rng.integers(0, 256, (6, 3, 4, 2)) / 127.5 - 1
    x_start[:, 0, 0] = -1, 1                            # the first and the last bin
    noise = rng.normal(size=x_start.shape)
    x_t = process.add_noise(x_start, noise, T_OF_CASES)
    output = noise + 0.1 * rng.normal(size=noise.shape)
    if variance in LEARNED:
        v = rng.normal(size=noise.shape) * (1 if variance == "learned_range" else 0.3)
        output = np.concatenate([output, v], -1)
    return [read_only(x.astype(dtype)) for x in (output, x_start, noise, x_t)]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", VARIANCE_TYPES)
def test_terms_are_those_of_torch(variance, clip, rng):
    output, x_start, _, x_t = case(rng, variance)
    p = reverse(COSINE, output, x_t, T_OF_CASES, variance, clip)
    ours, _ = term(COSINE, p.mean, p.logvar, x_start, x_t, T_OF_CASES)
    theirs, guess = reference.terms(COSINE.betas, *map(torch.tensor, (output, x_start, x_t,
                                                                     T_OF_CASES)), variance, clip)
    assert_allclose(ours, theirs.numpy(), rtol=1e-12)
    assert_allclose(p.x_start, guess.numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("process", [COSINE, Process.cosine(1000).respaced(T)], ids=["", "short"])
@pytest.mark.parametrize("variance", VARIANCE_TYPES)
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_and_gradients_are_those_of_torch(kind, variance, process, rng):
    output, x_start, noise, x_t = case(rng, variance, process)
    ours, cache = variational.loss(process, output, x_start, noise, x_t, T_OF_CASES, kind, variance)
    dlosses = read_only(rng.normal(size=6))
    doutput = variational.loss_backward(dlosses, cache)
    tensor = torch.tensor(output, requires_grad=True)
    theirs = reference.losses(process.betas, tensor, *map(torch.tensor, (
        x_start, noise, x_t, T_OF_CASES)), kind, variance)
    theirs.backward(torch.tensor(dlosses))
    assert_allclose(ours, theirs.detach().numpy(), rtol=1e-12)
    expected = tensor.grad.numpy()
    for i in range(6):                                  # each timestep has its own scale
        assert_allclose(doutput[i], expected[i], rtol=1e-9, atol=1e-10 * abs(expected[i]).max())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", ["kl", "rescaled_kl"])
def test_gradient_of_the_bound_by_differences(kind, prediction, rng):
    process = Process.cosine(T, prediction_type=prediction)
    _, x_start, noise, x_t = case(rng)
    output = np.concatenate([{"sample": x_start, "epsilon": noise, "v_prediction": noise}[
        prediction] + 0.1 * rng.normal(size=noise.shape), rng.normal(size=noise.shape)], -1)
    t, dlosses = np.array([3, 9, 20, 50, 90, 98]), rng.normal(size=6)
    x_t = process.add_noise(x_start, noise, t)

    def total(output):
        return (variational.loss(process, output, x_start, noise, x_t, t, kind)[0] * dlosses).sum()
    _, cache = variational.loss(process, output, x_start, noise, x_t, t, kind)
    gradient, direction = variational.loss_backward(dlosses, cache), rng.normal(size=output.shape)
    expected = (total(output + 1e-5 * direction) - total(output - 1e-5 * direction)) / 2e-5
    assert_allclose((gradient * direction).sum(), expected, rtol=1e-5)


def test_every_prediction_describes_the_same_distribution(rng):
    """The noise, v and x_start of one and the same model."""
    _, x_start, noise, x_t = case(rng)
    a, s = COSINE.scales_like(x_t, T_OF_CASES)
    answers = {"epsilon": noise, "v_prediction": a * noise - s * x_start, "sample": x_start}
    for name, answer in answers.items():
        process = Process.cosine(T, prediction_type=name)
        p = reverse(process, answer, x_t, T_OF_CASES, "fixed_small", clip=False)
        assert_allclose(p.x_start, x_start, atol=1e-8, what=name)


# ---- what the hybrid loss stops ----------------------------------------------------------------

@pytest.mark.parametrize("kind", ["mse", "rescaled_mse"])
def test_the_noise_learns_from_the_squared_error_alone(kind, rng):
    output, x_start, noise, x_t = case(rng)
    _, cache = variational.loss(COSINE, output, x_start, noise, x_t, T_OF_CASES, kind)
    doutput = variational.loss_backward(np.ones(6), cache)
    n = x_t[0].size
    assert_allclose(doutput[..., :2], 2 * (output[..., :2] - noise) / n, rtol=0, atol=1e-17)


def test_published_gradient_of_v(rng):
    """d term / d v = d logvar (ln beta - ln beta~) / (2 n ln 2), for t > 0."""
    output, x_start, noise, x_t = case(rng)
    _, cache = variational.loss(COSINE, output, x_start, noise, x_t, T_OF_CASES, "rescaled_mse")
    dv = variational.loss_backward(np.ones(6), cache)[1:, ..., 2:]
    t, n = T_OF_CASES[1:], x_t[0].size
    low, high, c = (table[t][:, None, None, None] for table in (
        COSINE.posterior_logvar, np.log(COSINE.betas), COSINE.posterior_x_start))
    p = reverse(COSINE, output, x_t, T_OF_CASES, clip=False)
    logvar, x = p.logvar[1:], (x_start - p.x_start)[1:]
    dlogvar = 0.5 * (1 - np.exp(low - logvar) - (c * x) ** 2 * np.exp(-logvar))
    assert_allclose(dv, T / 1000 * dlogvar * 0.5 * (high - low) / (n * np.log(2)), rtol=1e-9,
                    atol=1e-15)


def test_the_weights_of_the_bound(rng):
    """One term stands for T of them; lambda is 0.001."""
    values = {kind: variational.loss(COSINE, *case(np.random.default_rng(0)), T_OF_CASES, kind)[0]
              for kind in LOSSES}
    assert_allclose(values["rescaled_kl"], T * values["kl"], rtol=1e-12)
    squared = values["mse"] - values["kl"]
    assert_allclose(values["rescaled_mse"], squared + 0.001 * values["rescaled_kl"], rtol=1e-9)


@pytest.mark.parametrize("kind", LOSSES)
def test_float32_stays_so_and_is_close(kind, rng):
    arrays = case(rng)
    exact, cache = variational.loss(COSINE, *arrays, T_OF_CASES, kind)
    gradient = variational.loss_backward(np.ones(6), cache)
    arrays = [x.astype(np.float32) for x in arrays]
    ours, cache = variational.loss(COSINE, *arrays, T_OF_CASES, kind)
    found = variational.loss_backward(np.ones(6, np.float32), cache)
    assert ours.dtype == found.dtype == np.float32
    assert_allclose(ours, exact, rtol=2e-4)
    for i in range(6):
        assert_allclose(found[i], gradient[i], atol=2e-3 * abs(gradient[i]).max())


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("variance", VARIANCE_TYPES)
def test_the_same_on_arrays_as_strict_as_a_gpus(kind, variance, rng):
    arrays = [x.astype(np.float32) for x in case(rng, variance)]
    dlosses = rng.normal(size=6).astype(np.float32)
    expected, cache = variational.loss(COSINE, *arrays, T_OF_CASES, kind, variance)
    gradient = variational.loss_backward(dlosses, cache)
    with strict.installed():
        ours, cache = variational.loss(COSINE, *map(strict.Array, arrays), T_OF_CASES, kind,
                                       variance)
        found = variational.loss_backward(strict.Array(dlosses), cache)
        assert (ours.get() == expected).all() and (found.get() == gradient).all()
        prior = prior_term(COSINE, strict.Array(arrays[1])).get()
    assert (prior == prior_term(COSINE, arrays[1])).all()


# ---- numbers of the bound ----------------------------------------------------------------------

@pytest.mark.parametrize("process, bits", [
    (Process.linear(1000), 7.28e-6), (Process.linear(4000), 7.66e-6),
    (Process.cosine(1000), 4.4e-10)])
def test_published_prior(process, bits):
    assert_allclose(prior_term(process, np.full((1, 2, 2, 3), 0.5)), [bits], rtol=5e-3)


def test_the_true_noise_and_the_posterior_variance_leave_no_divergence(rng):
    _, x_start, noise, x_t = case(rng)
    t = T_OF_CASES
    ratio = (np.log(COSINE.betas) - COSINE.posterior_logvar)[t]
    for v, expected in ((-1, np.zeros(6)), (1, ratio)):
        output = np.concatenate([noise, np.full_like(noise, v)], -1)
        p = reverse(COSINE, output, x_t, t, clip=False)
        found, _ = term(COSINE, p.mean, p.logvar, x_start, x_t, t)
        expected = 0.5 * (expected - 1 + np.exp(-expected)) / np.log(2)
        assert_allclose(found[1:], expected[1:], atol=1e-12)


def test_v_reaches_from_one_fixed_variance_to_the_other_and_beyond(rng):
    _, _, noise, x_t = case(rng)
    small, large = (reverse(COSINE, noise, x_t, T_OF_CASES, name).logvar
                    for name in ("fixed_small", "fixed_large"))
    for v, expected in ((-1, small), (1, large), (3, 2 * large - small)):
        output = np.concatenate([noise, np.full_like(noise, v)], -1)
        logvar = reverse(COSINE, output, x_t, T_OF_CASES).logvar
        assert_allclose(logvar[1:], expected[1:], rtol=1e-12)
    assert (large[0] == small[0]).all()                 # beta_0 would be too wide


def model(x_t, timesteps):
    """Some function in place of a network, of what a network gets."""
    t = timesteps.reshape(-1, 1, 1, 1) / 1000
    return np.concatenate([x_t * (0.5 + 0.5 * t), np.tanh(x_t) - t], -1)


def test_bits_per_dimension_are_the_published_loop(rng):
    """One noise for each step, from the last to the first; x_start clipped; the prior added."""
    process = Process.cosine(1000, rescale_timesteps=True).respaced("20")
    pictures = [rng.integers(0, 256, (n, 4, 4, 3)) / 127.5 - 1 for n in (3, 2)]
    noises = np.random.default_rng(5)
    expected = []
    for x_start in pictures:
        total = prior_term(process, x_start)
        for t in reversed(range(20)):
            steps = np.full(len(x_start), t)
            x_t = process.add_noise(x_start, noises.normal(size=x_start.shape), steps)
            output = model(x_t, process.timesteps[steps])
            total = total + reference.terms(process.betas, *map(torch.tensor, (
                output, x_start, x_t, steps)), clip=True)[0].numpy()
        expected += total.tolist()
    noises, seen = np.random.default_rng(5), []
    found = bits_per_dimension(model, process, pictures, lambda shape: noises.normal(size=shape),
                               progress=lambda steps: map(lambda s: seen.append(s.t) or s, steps))
    assert_allclose(found.total, np.mean(expected), rtol=1e-12)
    assert_allclose(found.total, found.prior + found.terms.sum(), rtol=1e-12)
    assert seen == 2 * list(range(19, -1, -1))
    assert found.terms.shape == found.mse.shape == found.x_start_mse.shape == (20,)


def test_a_model_that_knows_the_picture_pays_for_the_decoder_alone(rng):
    x_start = rng.integers(0, 256, (2, 4, 4, 3)) / 127.5 - 1
    process = Process.cosine(200)

    def knows(x_t, timesteps):
        a, s = process.scales_like(x_t, timesteps.astype(int))
        return (x_t - a * x_start) / s
    steps = list(bound(knows, process, x_start, lambda: rng.normal(size=x_start.shape),
                       "fixed_small"))
    assert [step.t for step in steps] == list(range(199, -1, -1))
    assert max(abs(step.bits).max() for step in steps[:-1]) < 1e-12
    assert 1 < steps[-1].bits.min() <= steps[-1].bits.max() < 3
    assert max(step.x_start_mse.max() + step.mse.max() for step in steps) < 1e-12


@pytest.mark.parametrize("T", [30, 300])
def test_the_bound_of_coin_flips_is_above_one_bit(T, rng):
    """The best prediction of pixels of -1 or 1 is known. Many small steps lose little."""
    process = Process.cosine(T, prediction_type="sample")

    def ideal(x_t, timesteps):
        a, s = process.scales_like(x_t, timesteps.astype(int))
        return np.tanh(a * x_t / s ** 2)
    pictures = rng.choice([-1.0, 1.0], (16, 8, 8, 1))
    bits = bits_per_dimension(ideal, process, [pictures], rng.standard_normal, "fixed_small")
    assert bits.total > 1
    assert_allclose(bits.terms[1:].sum(), 1, atol=5 / T + 0.05)     # 1024 flips


# ---- what is refused ---------------------------------------------------------------------------

GOOD = np.zeros((1, 2, 2, 3))


@pytest.mark.parametrize("call, message", [
    (partial(variational.loss, COSINE, np.zeros((1, 2, 2, 6)), GOOD, GOOD, GOOD, np.array([1]),
             "vlb"), "rescaled_mse"),
    (partial(variational.loss, COSINE, GOOD, GOOD, GOOD, GOOD, np.array([1])), "6 channels for 3"),
    (partial(reverse, COSINE, np.zeros((1, 2, 2, 6)), GOOD, np.array([1]), "fixed_small"),
     "3 channels for 3, not 6"),
    (partial(reverse, COSINE, GOOD, GOOD, np.array([1]), "fixed_large_log"), "variance_type"),
    (partial(reverse, COSINE, GOOD, GOOD, np.array([100]), "fixed_small"), "from 0 to 99"),
    (partial(bits_per_dimension, model, COSINE, [], None), "at least one picture"),
    (partial(bits_per_dimension, model, COSINE, [GOOD + 0.5], None), "127.5"),
    (partial(bits_per_dimension, model, COSINE, [GOOD + 127], None), "127.5"),
    (partial(bits_per_dimension, model, COSINE, [GOOD[0] - 1], None), "127.5"),
    (partial(bits_per_dimension, model, COSINE, [GOOD + np.nan], None), "127.5"),
])
def test_what_is_wrong_ends_in_one_line(call, message):
    with pytest.raises(TinyldmError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
