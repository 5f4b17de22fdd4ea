"""All ops against finite differences and torch, forward and backward, in float64."""
import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import get_timestep_embedding

from tests.support.checks import arrays_in, check_op, read_only
from tests.support.tolerance import assert_allclose
from tinyldm import ops
from tinyldm.backend import get_xp

attention_module = importlib.import_module("tinyldm.ops.attention")   # ops.attention is the op
shapes = pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 7, 3), (3, 5, 1, 9)], ids=str)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def chw(x):
    """(B,...,C) -> (B,C,...)."""
    return x.movedim(-1, 1)


def hwc(x):
    return x.movedim(1, -1)


# ---- linear, convolution, upsampling --------------------------------------------------------

@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape, out", [((3, 5), 7), ((1, 1), 1), ((2, 3, 5), 1),
                                        ((3, 5, 7, 9), 11)], ids=str)
def test_linear(shape, out, with_bias, rng):
    bias = rng.normal(size=out) if with_bias else None
    check_op(ops.linear, ops.linear_backward,
             [rng.normal(size=shape), rng.normal(size=(out, shape[-1])), bias], F.linear)


def torch_conv(stride, padding):
    def conv(x, weight, bias):
        padded = F.pad(chw(x), padding * 2)
        return hwc(F.conv2d(padded, weight.permute(3, 2, 0, 1).contiguous(), bias, stride))
    return conv


@pytest.mark.parametrize("shape, out", [((1, 5, 7, 3), 4), ((3, 9, 4, 5), 1), ((2, 3, 11, 1), 7)],
                         ids=str)
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (0, 1), (2, 1)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_conv2d(K, stride, padding, shape, out, rng):
    weight = rng.normal(size=(K, K, shape[-1], out))
    inputs = [rng.normal(size=shape), weight, rng.normal(size=out) if stride == 1 else None]
    check_op(ops.conv2d, ops.conv2d_backward, inputs, torch_conv(stride, padding),
             stride=stride, padding=padding)


def test_conv2d_of_one_pixel(rng):
    inputs = [rng.normal(size=(2, 1, 1, 3)), rng.normal(size=(3, 3, 3, 5)), rng.normal(size=5)]
    check_op(ops.conv2d, ops.conv2d_backward, inputs, torch_conv(1, (1, 1)), padding=(1, 1))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 7, 2), (2, 4, 3, 5)], ids=str)
@pytest.mark.parametrize("cut", [(0, 0), (1, 0), (0, 1), (1, 1)], ids=str)
def test_upsample_nearest(shape, cut, rng):
    size = (2 * shape[1] - cut[0], 2 * shape[2] - cut[1])
    check_op(ops.upsample_nearest, ops.upsample_nearest_backward, [rng.normal(size=shape)],
             lambda x: hwc(F.interpolate(chw(x), size=size, mode="nearest")), size=size)
    if cut == (0, 0):
        check_op(ops.upsample_nearest, ops.upsample_nearest_backward, [rng.normal(size=shape)],
                 lambda x: hwc(F.interpolate(chw(x), scale_factor=2.0, mode="nearest")))


@pytest.mark.parametrize("size", [(6, 5), (5, 9), (7, 8)], ids=str)
def test_upsample_nearest_to_another_size(size, rng):
    with pytest.raises(AssertionError):
        ops.upsample_nearest(rng.normal(size=(1, 3, 4, 2)), size)


# ---- normalisation --------------------------------------------------------------------------

def norm_inputs(rng, shape):
    """x with mean 3 and standard deviation 2, weight around 1."""
    return [rng.normal(3, 2, shape), rng.normal(1, 0.5, shape[-1]), rng.normal(size=shape[-1])]


@pytest.mark.parametrize("eps", [1e-5, 1e-1])
@pytest.mark.parametrize("shape, groups", [((1, 5, 7, 6), 3), ((3, 3, 1, 4), 4), ((2, 7, 5, 9), 1),
                                           ((3, 11, 10), 5), ((2, 1, 1, 12), 4), ((2, 6), 2)],
                         ids=str)
def test_group_norm(shape, groups, eps, rng):
    def torch_norm(x, weight, bias):
        return hwc(F.group_norm(chw(x), groups, weight, bias, eps))
    inputs = norm_inputs(rng, shape)
    check_op(ops.group_norm, ops.group_norm_backward, inputs, torch_norm,
             num_groups=groups, eps=eps)
    check_op(ops.group_norm_silu, ops.group_norm_silu_backward, inputs,
             lambda *tensors: F.silu(torch_norm(*tensors)), num_groups=groups, eps=eps)


@pytest.mark.parametrize("eps", [1e-5, 1e-1])
@pytest.mark.parametrize("shape", [(3, 5), (1, 2), (2, 7, 9), (3, 3, 5, 11)], ids=str)
def test_layer_norm(shape, eps, rng):
    check_op(ops.layer_norm, ops.layer_norm_backward, norm_inputs(rng, shape),
             lambda x, weight, bias: F.layer_norm(x, shape[-1:], weight, bias, eps), eps=eps)


def test_groups_must_divide_the_channels(rng):
    with pytest.raises(AssertionError, match="5 channels"):
        ops.group_norm(*norm_inputs(rng, (1, 3, 3, 5)), 2, 1e-5)


# ---- activations ----------------------------------------------------------------------------

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
               "softmax": lambda x: F.softmax(x, -1)}


@shapes
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name, shape, rng):
    check_op(getattr(ops, name), getattr(ops, name + "_backward"), [3 * rng.normal(size=shape)],
             ACTIVATIONS[name])


@shapes
def test_geglu(shape, rng):
    def torch_geglu(x):
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)
    x = 3 * rng.normal(size=(*shape[:-1], 2 * shape[-1]))
    check_op(ops.geglu, ops.geglu_backward, [x], torch_geglu)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_large_numbers_do_not_overflow(name):
    x = read_only([[-1e4, 0.0, 1e4], [1e4, 1e4, -1e4]])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        y, cache = getattr(ops, name)(x)
        dx = getattr(ops, name + "_backward")(np.ones_like(x), cache)
    theirs = ACTIVATIONS[name](torch.tensor(x))
    assert_allclose(y, theirs, rtol=1e-12, atol=1e-300)
    assert np.isfinite(dx).all()


# ---- attention ------------------------------------------------------------------------------

def torch_attention(num_heads, causal=False):
    def split_heads(x):
        return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    def attention(q, k, v):
        y = F.scaled_dot_product_attention(*map(split_heads, (q, k, v)), is_causal=causal)
        return y.transpose(1, 2).flatten(2)
    return attention


@pytest.mark.parametrize("rows", [512, 4, 1])
@pytest.mark.parametrize("B, N, M, C, heads, causal", [
    (1, 9, 9, 6, 2, False), (3, 5, 7, 15, 3, False), (2, 11, 3, 4, 1, False),
    (2, 1, 1, 6, 3, False), (1, 1, 5, 4, 4, False),
    (1, 9, 9, 6, 2, True), (3, 7, 7, 5, 1, True), (2, 13, 13, 12, 4, True), (2, 1, 1, 3, 1, True)])
def test_attention(B, N, M, C, heads, causal, rows, rng, monkeypatch):
    monkeypatch.setattr(attention_module, "ROWS", rows)
    inputs = [2 * rng.normal(size=(B, tokens, C)) for tokens in (N, M, M)]
    check_op(ops.attention, ops.attention_backward, inputs, torch_attention(heads, causal),
             num_heads=heads, causal=causal)


def test_attention_needs_whole_heads(rng):
    with pytest.raises(AssertionError, match="5 channels"):
        ops.attention(*rng.normal(size=(3, 1, 4, 5)), num_heads=2)


# ---- embeddings -----------------------------------------------------------------------------

@pytest.mark.parametrize("ids", [[0], [[4, 4, 1], [4, 0, 1]], [[[6], [0]], [[6], [6]]]], ids=str)
def test_embedding(ids, rng):
    """A repeated id gets the sum of its gradients; an unused id gets zeros."""
    check_op(ops.embedding, ops.embedding_backward, [np.array(ids), rng.normal(size=(7, 5))],
             lambda ids, weight: F.embedding(ids, weight))


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("B, dim", [(1, 6), (3, 7), (5, 32), (2, 5)])
def test_timestep_embedding(B, dim, shift, flip, rng):
    def sinusoids(t):                                     # diffusers' function, but in float64
        angles = t[:, None] * 10000.0 ** -(torch.arange(dim // 2).double() / (dim // 2 - shift))
        y = torch.cat([angles.cos(), angles.sin()] if flip else [angles.sin(), angles.cos()], 1)
        return F.pad(y, (0, dim % 2))
    t = rng.uniform(0, 50, B)
    check_op(ops.timestep_embedding, ops.timestep_embedding_backward, [t], sinusoids,
             dim=dim, flip_sin_to_cos=flip, freq_shift=shift)
    ours, _ = ops.timestep_embedding(t.astype(np.float32), dim, flip, shift)
    theirs = get_timestep_embedding(torch.from_numpy(t), dim, flip, shift)
    assert_allclose(ours, theirs, rtol=0, atol=2e-5)


# ---- joining and parting --------------------------------------------------------------------

@shapes
def test_concat(shape, rng):
    inputs = [rng.normal(size=shape), rng.normal(size=(*shape[:-1], 3))]
    check_op(ops.concat, ops.concat_backward, inputs, lambda a, b: torch.cat([a, b], -1))


@shapes
def test_split(shape, rng):
    x = rng.normal(size=(*shape[:-1], 2 * shape[-1]))

    def split(x):
        halves, cache = ops.split(x)
        return get_xp(x).stack(halves), cache
    check_op(split, ops.split_backward, [x], lambda x: torch.stack(x.chunk(2, -1)))


def test_split_needs_an_even_number(rng):
    with pytest.raises(AssertionError, match="5 channels"):
        ops.split(rng.normal(size=(2, 5)))


# ---- losses ---------------------------------------------------------------------------------

@shapes
@pytest.mark.parametrize("name, torch_loss", [("mse", F.mse_loss), ("l1", F.l1_loss)])
def test_distance(name, torch_loss, shape, rng):
    check_op(getattr(ops, name), getattr(ops, name + "_backward"),
             [rng.normal(size=shape), rng.normal(size=shape)], torch_loss)


def test_l1_has_no_slope_where_both_are_equal():
    x = read_only([1.0, -2.0, 3.0])
    dx, dtarget = ops.l1_backward(1.5, ops.l1(x, x)[1])
    assert not dx.any() and not dtarget.any()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 7, 2), (2, 3, 3, 4)], ids=str)
def test_kl_normal(shape, rng):
    def reference(mean, logvar):                        # sums over a sample
        return DiagonalGaussianDistribution(torch.cat([chw(mean), chw(logvar)], 1)).kl().mean()
    check_op(ops.kl_normal, ops.kl_normal_backward,
             [rng.normal(size=shape), rng.normal(size=shape)], reference)


@pytest.mark.parametrize("R, V", [(1, 1), (1, 5), (7, 3), (5, 11)])
def test_cross_entropy(R, V, rng):
    check_op(ops.cross_entropy, ops.cross_entropy_backward,
             [5 * rng.normal(size=(R, V)) + 1000, rng.integers(0, V, R)], F.cross_entropy)


# ---- what forward keeps ---------------------------------------------------------------------

B, H, C, G, T = 2, 6, 8, 4, 12                          # T tokens


@pytest.mark.parametrize("name, numbers, new, params", [
    ("linear", [(T, C), (5, C), (5,)], 0, {}),
    ("conv2d", [(B, H, H, C), (3, 3, C, 5), (5,)], 0, {"padding": (1, 1)}),
    ("upsample_nearest", [(B, H, H, C)], 0, {}),
    ("group_norm", [(B, H, H, C), (C,), (C,)], 2 * B * G, {"num_groups": G, "eps": 1e-5}),
    ("group_norm_silu", [(B, H, H, C), (C,), (C,)], 2 * B * G, {"num_groups": G, "eps": 1e-5}),
    ("layer_norm", [(T, C), (C,), (C,)], 2 * T, {"eps": 1e-5}),
    ("silu", [(T, C)], 0, {}), ("gelu", [(T, C)], 0, {}), ("quick_gelu", [(T, C)], 0, {}),
    ("geglu", [(T, C)], 0, {}),
    ("attention", [(B, T, C)] * 3, 0, {"num_heads": 2}),
    ("concat", [(T, C), (T, 3)], 0, {}),
    ("kl_normal", [(B, C), (B, C)], 0, {}),
    ("mse", [(T, C)] * 2, T * C, {}),                   # the difference instead of both
    ("l1", [(T, C)] * 2, T * C, {}),
])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])      # float32: the fast twins
def test_a_cache_holds_inputs_and_small_statistics(name, numbers, new, params, dtype, rng):
    inputs = [rng.normal(size=shape).astype(dtype) for shape in numbers]
    _, cache = getattr(ops, name)(*inputs, **params)
    kept = {id(whole(array)): whole(array).size for array in arrays_in(cache)}
    assert sum(size for key, size in kept.items() if key not in map(id, inputs)) == new


def whole(array):
    """The array that a view keeps alive."""
    return array if array.base is None else whole(array.base)
