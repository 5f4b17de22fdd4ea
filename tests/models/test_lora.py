"""LoRA layers against peft's, against finite differences, and the layers that get one."""
import numpy as np
import pytest

from tests.support.arrays import read_only
from tests.support.extra import diffusers, peft, torch
from tests.support.models import UNETS, cases, inputs, make, outputs
from tests.support.reference import nchw, nhwc, to_ours
from tests.support.tolerance import assert_allclose, within
from tinyldm.checkpoints.single_file.kinds import SD1, SD2, SDXL
from tinyldm.errors import TinyldmError
from tinyldm.layers import Conv2d, Linear, Module, Tape, file_shape, trainable_parameters
from tinyldm.models import CLIPTextModel, UNet2DConditionModel
from tinyldm.models.lora import (
    DIFFUSERS,
    KOHYA,
    TEXT_DIFFUSERS,
    TEXT_KOHYA,
    LoRA,
    add_lora,
    remove_lora,
)

RANK, ALPHA = 3, 6
LAYERS = {
    "linear": (lambda: Linear(12, 7), (2, 5, 12)),
    "linear without bias": (lambda: Linear(12, 7, bias=False), (5, 12)),
    "1x1": (lambda: Conv2d(12, 7, 1), (2, 5, 6, 12)),
    "3x3": (lambda: Conv2d(12, 7, padding=(1, 1)), (2, 5, 6, 12)),
    "3x3, half the size": (lambda: Conv2d(12, 7, stride=2, padding=(1, 1)), (2, 5, 7, 12)),
    "3x3, no padding": (lambda: Conv2d(12, 7, stride=2, padding=(0, 0)), (2, 5, 8, 12)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


class Holder(Module):
    def __init__(self, layer):
        self.layer = layer

    def forward(self, x, *tape):
        return self.layer(x, *tape)


def holder_with_lora(name, rng):
    """A layer with random numbers in all its parameters, B included, and an input."""
    make_layer, shape = LAYERS[name]
    holder = Holder(make_layer())
    for parameter in holder.parameters():
        parameter.data = rng.standard_normal(parameter.shape)
    lora = add_lora(holder, ["layer"], RANK, ALPHA, rng)["layer"]
    assert holder.layer is lora and not lora.lora_B.weight.data.any()
    for parameter in holder.parameters():
        parameter.data = read_only(rng.standard_normal(parameter.shape))
    return holder, read_only(rng.standard_normal(shape))


def in_peft(holder, x):
    """The same layer in torch with peft's LoRA, filled with our numbers; and x as its input."""
    base, bias = holder.layer.base_layer, holder.layer.bias is not None
    if isinstance(base, Linear):
        theirs = torch.nn.Linear(*base.weight.shape[::-1], bias=bias)
    else:
        theirs = torch.nn.Conv2d(*base.weight.shape[2:], base.weight.shape[:2], base.stride,
                                 base.padding[0], bias=bias)
    model = torch.nn.Module()
    model.layer = theirs
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"]), model.double())
    state = {name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."):
             torch.from_numpy(array) for name, array in holder.state_dict().items()}
    model.load_state_dict(state)
    x = nchw(x) if x.ndim == 4 else torch.from_numpy(x.copy())
    return model, x.requires_grad_()


@each_layer
def test_against_peft(name, rng):
    holder, x = holder_with_lora(name, rng)
    model, their_x = in_peft(holder, x)

    def back(tensor):
        return nhwc(tensor) if tensor.ndim == 4 else tensor.detach().numpy()
    theirs, tape = model.layer(their_x), Tape()
    y = holder(x, tape)
    assert_allclose(y, back(theirs), 1e-9, 1e-12, "y")
    dy = read_only(rng.standard_normal(y.shape))
    dx = holder.layer.backward(dy, tape)
    assert not tape.entries
    theirs.backward(nchw(dy) if dy.ndim == 4 else torch.from_numpy(dy.copy()))
    assert_allclose(dx, back(their_x.grad), 1e-9, 1e-12, "dx")
    assert holder.layer.weight.grad is None and model.layer.base_layer.weight.grad is None
    for ours, expected in ((holder.layer.lora_A, model.layer.lora_A.default),
                           (holder.layer.lora_B, model.layer.lora_B.default)):
        assert_allclose(ours.weight.grad, to_ours(expected.weight.grad), 1e-9, 1e-12, "dweight")
    remove_lora(holder, merge=True)
    model.layer.merge()
    assert_allclose(holder.layer.weight.data, to_ours(model.layer.base_layer.weight), 1e-9, 1e-12)


@each_layer
def test_finite_differences(name, rng):
    holder, x = holder_with_lora(name, rng)
    lora, tape = holder.layer, Tape()
    y = holder(x, tape)
    dy = rng.standard_normal(y.shape)
    moved = [x, lora.lora_A.weight.data, lora.lora_B.weight.data]
    gradients = [lora.backward(dy, tape), lora.lora_A.weight.grad, lora.lora_B.weight.grad]
    for i, gradient in enumerate(gradients):
        direction = rng.standard_normal(gradient.shape)

        def loss(step, i=i, direction=direction):
            x, A, B = (array + step * direction if at == i else array
                       for at, array in enumerate(moved))
            lora.lora_A.weight.data, lora.lora_B.weight.data = A, B
            return (holder(x) * dy).sum()
        found = (loss(1e-5) - loss(-1e-5)) / 2e-5
        within(abs((gradient * direction).sum() - found), 1e-8 * np.linalg.norm(gradient))


@each_layer
def test_merged_or_not_the_output_is_the_same(name, rng):
    holder, x = holder_with_lora(name, rng)
    layer, before, with_lora = holder.layer.base_layer, holder.layer.weight.data, holder(x)
    remove_lora(holder, merge=True)
    assert holder.layer is layer
    assert_allclose(holder(x), with_lora, 1e-12, 1e-12)
    assert not np.allclose(layer.weight.data, before)


def test_without_merging_the_layer_is_what_it_was(rng):
    holder, x = holder_with_lora("linear", rng)
    layer, before = holder.layer.base_layer, holder.layer.weight.data
    remove_lora(holder)
    assert holder.layer is layer and layer.weight.data is before


def test_a_half_precision_layer_has_a_lora_of_float32(rng):
    holder = Holder(Linear(12, 7))
    for parameter in holder.parameters():
        parameter.data = rng.standard_normal(parameter.shape).astype(np.float16)
    lora = add_lora(holder, ["layer"], RANK, ALPHA, rng)["layer"]
    lora.lora_B.weight.data = rng.standard_normal((7, RANK)).astype(np.float32)
    x, tape = rng.standard_normal((5, 12)).astype(np.float16), Tape()
    y = holder(x, tape)
    dx = lora.backward(y, tape)
    assert y.dtype == dx.dtype == holder.dtype == np.float16    # holder: what inputs are cast to
    assert lora.lora_A.weight.grad.dtype == lora.lora_B.weight.grad.dtype == np.float32
    remove_lora(holder, merge=True)
    assert holder.layer.weight.data.dtype == np.float16


# ---- the layers of a model --------------------------------------------------------------------

def empty(model):
    """A model of any size without any memory: all its numbers are one zero."""
    for parameter in model.parameters():
        parameter.data = np.broadcast_to(np.float16(0), parameter.shape)
    return model


@pytest.mark.parametrize("kind, targets, modules, per_rank", [
    (SD1, DIFFUSERS, 128, 199_296), (SD1, KOHYA, 192, 423_936),
    (SD2, DIFFUSERS, 128, 207_488), (SD2, KOHYA, 192, 432_128),
    (SDXL, DIFFUSERS, 560, 1_451_520), (SDXL, KOHYA, 722, 2_659_840),
    (SD1, TEXT_DIFFUSERS, 48, 73_728), (SD1, TEXT_KOHYA, 72, 165_888),
], ids=["SD 1", "SD 1, kohya", "SD 2", "SD 2, kohya", "SDXL", "SDXL, kohya", "text encoder",
        "text encoder, kohya"])
def test_the_public_counts(kind, targets, modules, per_rank, rng):
    of_text = targets in (TEXT_DIFFUSERS, TEXT_KOHYA)
    model = empty(CLIPTextModel(kind.text_encoder) if of_text else UNet2DConditionModel(kind.unet))
    names = {name for name, _ in model.named_parameters()}
    loras = add_lora(model, targets, 2, 2, rng)
    trained = trainable_parameters(model)
    assert len(loras) == modules and len(trained) == 2 * modules
    assert sum(np.prod(parameter.shape) for _, parameter in trained) == 2 * per_rank
    assert {name.rpartition(".lora_")[0] for name, _ in trained} == set(loras)
    remove_lora(model)
    assert {name for name, _ in model.named_parameters()} == names


def test_the_layers_and_their_order_are_peft_s():
    """The order matters: each draws its numbers after those before it."""
    name = next(iter(UNETS))
    theirs = diffusers.UNet2DConditionModel(**UNETS[name])
    theirs.add_adapter(peft.LoraConfig(r=2, target_modules=list(DIFFUSERS)))
    expected = [key.removesuffix(".lora_A.default.weight") for key, _ in theirs.named_parameters()
                if key.endswith("lora_A.default.weight")]
    ours = UNet2DConditionModel(UNETS[name])
    assert list(add_lora(empty(ours), DIFFUSERS, 2, 2, np.random.default_rng(0))) == expected
    names = {key.replace(".default", "") for key, _ in theirs.named_parameters()}
    assert {key for key, _ in ours.named_parameters()} == names


def test_at_first_it_changes_nothing_and_its_numbers_come_from_the_generator():
    name = next(name for name in cases() if name.startswith("UNet2DConditionModel"))
    found = []
    for seed in (0, 0, 1):
        model, arrays = make(name), inputs(name)
        expected, = outputs(model, arrays)
        loras = add_lora(model, KOHYA, 4, 1, np.random.default_rng(seed))
        np.testing.assert_array_equal(*outputs(model, arrays), expected)
        A = np.concatenate([lora.lora_A.weight.data.reshape(-1) for lora in loras.values()])
        within(abs(A.std() / (1 / 4) - 1), 0.05)
        found.append(A)
        assert all(lora.scale == 1 / 4 for lora in loras.values())
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


@pytest.mark.parametrize("targets, rank, message", [
    (["to_x"], 2, "this Holder has no layer for a LoRA: expected names that end in to_x"),
    (["layer"], 0, "must be a whole number from 1 to 7 for layer, not 0"),
    (["layer"], 8, "must be a whole number from 1 to 7 for layer, not 8"),
    (["layer"], 2.5, "must be a whole number from 1 to 7 for layer, not 2.5"),
])
def test_what_cannot_be_is_refused(targets, rank, message, rng):
    holder = Holder(Linear(12, 7))
    holder.layer.weight.data = holder.layer.bias.data = np.zeros(1)
    with pytest.raises(TinyldmError, match=message):
        add_lora(holder, targets, rank, 1, rng)
    assert holder.layer.weight.trainable


def test_a_second_lora_around_the_first_is_refused(rng):
    holder, _ = holder_with_lora("linear", rng)
    with pytest.raises(TinyldmError, match="layer has a LoRA already"):
        add_lora(holder, ["layer"], 2, 1, rng)


def test_another_layer_is_refused(rng):
    model = empty(CLIPTextModel(SD1.text_encoder))
    with pytest.raises(TinyldmError, match="token_embedding is a Embedding, but only"):
        add_lora(model, ["token_embedding"], 2, 1, rng)


def test_shapes_are_those_of_the_files():
    """Down is a convolution with the layer's kernel, up one of 1x1."""
    layer = Conv2d(12, 7, (1, 3))
    lora = LoRA(layer, RANK, ALPHA)
    assert file_shape(lora.lora_A.weight) == (RANK, 12, 1, 3)
    assert file_shape(lora.lora_B.weight) == (7, RANK, 1, 1)
