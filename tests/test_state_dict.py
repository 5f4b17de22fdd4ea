"""Parameters by the names and in the layout of public files, in and out; mistakes with modules."""
import numpy as np
import pytest

from tests.support import strict
from tests.support.arrays import read_only
from tests.support.extra import torch
from tests.support.models import cases, inputs, make, outputs
from tests.support.tolerance import assert_allclose
from tinyldm.errors import TinyldmError
from tinyldm.layers import NO_TAPE, Conv2d, Embedding, GroupNorm, LayerNorm, Linear, Module, Tape
from tinyldm.models.blocks import Attention, ResnetBlock2D
from tinyldm.models.unet import (
    DownBlock2D,
    TimestepEmbedding,
    Transformer2DModel,
    UNet2DConditionModel,
)

SD1, SDXL, LCM = (f"UNet2DConditionModel as {kind}" for kind in ("SD 1", "SDXL", "LCM"))


class Toy(Module):
    """A convolution that is not square in any two axes, and a linear layer in a list."""

    def __init__(self):
        self.conv = Conv2d(2, 3)
        self.layers = [None, Linear(3, 4, bias=False)]


def arrays(dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = {"conv.weight": (3, 2, 3, 3), "conv.bias": (3,), "layers.1.weight": (4, 3)}
    return {name: read_only(rng.normal(size=shape).astype(dtype)) for name, shape in shapes.items()}


def filled(module, dtype=np.float64):
    rng = np.random.default_rng(0)
    for parameter in module.parameters():
        parameter.data = rng.normal(size=parameter.shape).astype(dtype)
    return module


# ---- in and out -----------------------------------------------------------------------------

def test_arrays_go_in_and_out():
    toy, given = Toy(), arrays()
    assert toy.load_state_dict(given) == ([], [], [])
    assert np.array_equal(toy.conv.weight.data, given["conv.weight"].transpose(2, 3, 1, 0))
    back = toy.state_dict()
    assert list(back) == list(given)
    for name, array in back.items():
        assert type(array) is np.ndarray and array.flags.c_contiguous and array.flags.writeable
        assert array.dtype == np.float64 and np.array_equal(array, given[name]), name


def test_both_directions_copy():
    toy, given = Toy(), {name: array.copy() for name, array in arrays().items()}
    toy.load_state_dict(given)
    given["conv.bias"][:] = toy.state_dict()["layers.1.weight"][:] = 7
    assert np.array_equal(toy.conv.bias.data, arrays()["conv.bias"])
    assert np.array_equal(toy.layers[1].weight.data, arrays()["layers.1.weight"])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_model_takes_the_dtype_of_its_arrays(dtype):
    toy = filled(Toy(), np.float32)
    toy.load_state_dict(arrays(dtype))
    assert toy.dtype == dtype


def test_a_model_stays_on_its_device():
    with strict.installed() as xp:
        toy = filled(Toy())
        for parameter in toy.parameters():
            parameter.data = strict.Array(parameter.data)
        toy.load_state_dict(arrays())
        assert all(isinstance(parameter.data, xp.ndarray) for parameter in toy.parameters())
        assert np.array_equal(toy.state_dict()["conv.weight"], arrays()["conv.weight"])


@pytest.mark.parametrize("name", cases())
def test_every_model_survives_the_way_out_and_in(name):
    model, config = cases()[name]
    ours, copy = make(name), model(config)
    copy.load_state_dict(ours.state_dict())
    for before, after in zip(outputs(ours, inputs(name)), outputs(copy, inputs(name))):
        assert np.array_equal(before, after)


def test_tensors_of_torch_also_with_gradients():
    block = torch.nn.ModuleDict({
        "conv": torch.nn.Conv2d(2, 3, 3), "layers": torch.nn.ModuleList([
            torch.nn.Identity(), torch.nn.Linear(3, 4, bias=False)])}).double()
    for given in (block.state_dict(), dict(block.named_parameters())):
        toy = Toy()
        assert toy.load_state_dict(given) == ([], [], [])
        for name, tensor in block.state_dict().items():
            assert np.array_equal(toy.state_dict()[name], tensor.numpy()), name
    with torch.no_grad():
        before = toy.conv.bias.data.copy()
        block["conv"].bias += 1                         # the model here has its own numbers
    assert np.array_equal(toy.conv.bias.data, before)
    assert block.load_state_dict({name: torch.from_numpy(array)
                                  for name, array in toy.state_dict().items()})
    assert np.array_equal(block["conv"].bias.detach().numpy(), before)


def test_what_does_not_fit_is_listed_and_nothing_is_filled():
    toy, given = Toy(), arrays()
    given["conv.weight"] = given["conv.weight"].transpose(2, 3, 1, 0)   # in our layout: wrong here
    given["conv.extra"] = given.pop("conv.bias")
    with pytest.raises(TinyldmError) as caught:
        toy.load_state_dict(given)
    assert str(caught.value).splitlines() == [
        "the arrays do not fit this Toy", "  missing: 1: conv.bias", "  unexpected: 1: conv.extra",
        "  wrong shape: 1: conv.weight (expected (3, 2, 3, 3), found (3, 3, 2, 3))"]
    assert all(parameter.data is None for parameter in toy.parameters())
    found = toy.load_state_dict(given, strict=False)
    assert found.missing == ["conv.bias"] and found.unexpected == ["conv.extra"]
    assert found.wrong_shape == ["conv.weight (expected (3, 2, 3, 3), found (3, 3, 2, 3))"]
    assert np.array_equal(toy.layers[1].weight.data, given["layers.1.weight"])
    assert toy.conv.weight.data is toy.conv.bias.data is None


@pytest.mark.parametrize("wrong, message", [
    (np.arange(3), "conv.bias must hold floating-point numbers, not int64"),
    (["a", "b", "c"], "conv.bias must hold floating-point numbers, not <U1"),
    ([[1.0], [2.0, 3.0]], r"conv.bias cannot be read as a NumPy array \(.*convert it to float32"),
    (None, "conv.bias must hold floating-point numbers, not object")])
def test_what_is_no_array_of_floats(wrong, message):
    toy = Toy()
    with pytest.raises(TinyldmError, match=message):
        toy.load_state_dict(arrays() | {"conv.bias": wrong})
    assert toy.conv.weight.data is None


def test_bfloat16_and_a_path_are_refused_in_a_line():
    with pytest.raises(TinyldmError, match="layers.1.weight cannot be read .* float32 on the CPU"):
        Toy().load_state_dict(arrays() | {
            "layers.1.weight": torch.zeros(4, 3, dtype=torch.bfloat16)})
    for wrong in ("file.safetensors", None, [1]):
        with pytest.raises(TinyldmError, match="expects a dict of arrays by name, not a"):
            Toy().load_state_dict(wrong)


def test_zero_grad_forgets_all_gradients():
    layer, tape = filled(Linear(3, 2)), Tape()
    layer(np.ones((5, 3)), tape)
    layer.backward(np.ones((5, 2)), tape)
    assert layer.weight.grad is not None
    layer.zero_grad()
    assert layer.weight.grad is layer.bias.grad is None


# ---- blocks by keywords ---------------------------------------------------------------------

def test_blocks_are_built_by_plain_keywords(rng):
    x, temb = rng.normal(size=(2, 4, 4, 8)), rng.normal(size=(2, 12))
    transformer = filled(Transformer2DModel(channels=8, num_heads=2, context_channels=6,
                                            num_groups=4, num_layers=2, linear_projection=True))
    assert transformer(x, rng.normal(size=(2, 5, 6))).shape == x.shape
    assert len(transformer.transformer_blocks) == 2
    resnet = filled(ResnetBlock2D(in_channels=8, out_channels=16, num_groups=4, eps=1e-5,
                                  temb_channels=12))
    assert resnet(x, temb=temb).shape == (2, 4, 4, 16)
    attention = filled(Attention(channels=8, context_channels=6, num_heads=2))
    assert attention(x.reshape(2, 16, 8), rng.normal(size=(2, 5, 6))).shape == (2, 16, 8)
    down = filled(DownBlock2D(in_channels=8, out_channels=16, temb_channels=12, num_groups=4,
                              eps=1e-5, num_layers=2, downsample=True,
                              transformer={"num_heads": 4, "context_channels": 6}))
    skips = []
    assert down(x, temb, rng.normal(size=(2, 5, 6)), skips).shape == (2, 2, 2, 16)
    assert len(skips) == 3


def test_a_transformers_context_is_as_wide_as_its_channels_by_default(rng):
    block = filled(Transformer2DModel(channels=32, num_heads=4))
    assert block(rng.normal(size=(1, 2, 2, 32)), rng.normal(size=(1, 3, 32))).shape == (1, 2, 2, 32)


# ---- mistakes -------------------------------------------------------------------------------

def test_channels_first_is_named():
    unet = make(SD1)
    x = inputs(SD1)
    with pytest.raises(AssertionError, match=r"Conv2d expects 4 channels in the last axis, x is "
                       r"\(2, 4, 7, 9\): its channels come first, so use x.transpose\(0, 2"):
        unet(x["latents"].transpose(0, 3, 1, 2), x["timesteps"], x["context"])


@pytest.mark.parametrize("layer", [Linear(6, 5), Conv2d(6, 5), LayerNorm(6, 1e-5),
                                   GroupNorm(6, 3, 1e-6)], ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_wrong_width_is_named(layer, dtype):
    name = type(layer).__name__
    with pytest.raises(AssertionError, match=rf"{name} expects 6 channels .* \(1, 2, 2, 7\)$"):
        filled(layer, dtype)(np.zeros((1, 2, 2, 7), dtype))


@pytest.mark.parametrize("shape", [(2, 7, 11), (1, 7, 12), (7, 12)], ids=str)
def test_a_wrong_context_is_named(shape):
    x = inputs(SD1)
    with pytest.raises(AssertionError, match=r"the context must be \(B,M,D\) = \(2,M,12\), not "):
        make(SD1)(x["latents"], x["timesteps"], np.zeros(shape))


@pytest.mark.parametrize("timesteps", [981, np.array([981.0]), np.float64(981), [3.0, 981.0]])
def test_a_wrong_number_of_timesteps_is_named(timesteps):
    x = inputs(SD1)
    with pytest.raises(AssertionError, match=r"timesteps must be an array of shape \(2,\), one"):
        make(SD1)(x["latents"], timesteps, x["context"])


@pytest.mark.parametrize("layer, x", [
    (Linear(3, 2), np.ones((1, 3))), (Conv2d(3, 2), np.ones((1, 4, 4, 3))),
    (GroupNorm(3, 1, 1e-5), np.ones((1, 4, 4, 3))), (Embedding(9, 3), np.zeros((1, 2), int))],
    ids=lambda value: type(value).__name__)
def test_a_parameter_that_was_never_filled_is_named(layer, x):
    shape = ", ".join(map(str, layer.weight.shape))
    message = rf"{type(layer).__name__} has a parameter \({shape},?\) that was never filled: use"
    with pytest.raises(AssertionError, match=message):
        layer(x)
    for use in (lambda: layer.dtype, lambda: layer.xp, layer.state_dict):
        with pytest.raises(TinyldmError, match="never filled, .: weight.*use load_state_dict"):
            use()


def test_a_bias_that_was_never_filled_is_named():
    layer = Linear(3, 2)
    layer.weight.data = np.ones((2, 3))
    with pytest.raises(AssertionError, match=r"Linear has a parameter \(2,\) that was never"):
        layer(np.ones((1, 3)))


@pytest.mark.parametrize("layer, option, name", [
    (ResnetBlock2D(4, 4, 2, 1e-5, 8), "temb_channels", "temb"),
    (TimestepEmbedding(4, 8, 3), "cond_channels", "condition")])
def test_a_condition_that_is_missing_is_named(layer, option, name):
    with pytest.raises(AssertionError, match=f"built with {option}, so its forward needs {name}"):
        layer(np.ones((1, 2, 2, 4)))


@pytest.mark.parametrize("layer, option, name", [
    (ResnetBlock2D(4, 4, 2, 1e-5), "temb_channels", "temb"),
    (TimestepEmbedding(4, 8), "cond_channels", "condition")])
def test_a_condition_that_has_no_use_is_named(layer, option, name):
    with pytest.raises(AssertionError,
                       match=f"was built without {option}, so its forward takes no {name}"):
        layer(np.ones((1, 2, 2, 4)), **{name: np.ones((1, 3))})


@pytest.mark.parametrize("kind, name, option", [
    (SDXL, "text_embeds", "addition_embed_type"), (SDXL, "time_ids", "addition_embed_type"),
    (LCM, "timestep_cond", "time_cond_proj_dim")])
def test_a_unet_names_the_condition_that_it_lacks_and_that_it_cannot_use(kind, name, option):
    x = dict(inputs(kind))
    value = x.pop(name)
    with pytest.raises(AssertionError, match=f"UNet2DConditionModel was built with {option}, so "
                       f"its forward needs {name}"):
        make(kind)(**x)
    with pytest.raises(AssertionError, match=f"without {option}, so its forward takes no {name}"):
        make(SD1)(**inputs(SD1), **{name: value})


def test_nothing_changes_for_what_fits():
    assert_allclose(make(SD1)(**inputs(SD1)), make(SD1).forward(*inputs(SD1).values(), NO_TAPE))
    assert isinstance(make(SD1), UNet2DConditionModel)
