"""Tapes that keep less: checkpoints, and the end at the first trained layer. The gradients stay the
same to the bit, in every model."""
from itertools import product

import numpy as np
import pytest

from tests.support.models import CLIPS, UNETS, backward, cases, inputs, make, outputs
from tinyldm.layers import Linear, Module, Tape, checkpoint, checkpoint_backward, named_modules
from tinyldm.models import CLIPTextModel
from tinyldm.models.lora import DIFFUSERS, add_lora

UNET = f"UNet2DConditionModel {next(iter(UNETS))}"
TEXT = f"CLIPTextModel {next(iter(CLIPS))}"


def gradients(name, tape, trained=lambda i, key: True):
    """{name: gradient} of a model's inputs and parameters; `trained` chooses the latter."""
    module, arrays = make(name), inputs(name)
    for i, (key, parameter) in enumerate(module.named_parameters()):
        parameter.trainable = trained(i, key)
    rng = np.random.default_rng(0)
    dys = [rng.standard_normal(y.shape) for y in outputs(module, arrays, tape)]
    found = backward(module, arrays, dys, tape)
    assert not tape.entries
    return found, {key: p.grad for key, p in module.named_parameters() if p.grad is not None}


def assert_same(ours, theirs):
    for found, expected in zip(ours, theirs, strict=True):
        assert found.keys() == expected.keys()
        for key in found:
            np.testing.assert_array_equal(found[key], expected[key], key)


@pytest.mark.parametrize("name", cases())
def test_with_checkpoints_the_gradients_are_the_same(name):
    whole, short = Tape(), Tape(checkpoints=True)
    assert_same(gradients(name, short), gradients(name, whole))
    assert short.peak < whole.peak


# Each is one way to choose what is trained: one layer alone, at the beginning, in the middle, at
# the end; the second half; biases.
CHOICES = {
    "first": lambda i, count: i == 0, "middle": lambda i, count: i == count // 2,
    "last": lambda i, count: i == count - 1, "second half": lambda i, count: i > count // 2,
    "nothing": lambda i, count: False, "every fifth": lambda i, count: i % 5 == 0}


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", cases())
def test_backward_ends_at_the_first_trained_layer(name, choice, checkpoints):
    """Every parameter that is trained has the gradient of the whole backward; and so have the
    inputs, or none."""
    count = len(make(name).parameters())

    def trained(i, key):
        return CHOICES[choice](i, count)
    whole = Tape()
    expected, of_weights = gradients(name, whole, trained)
    tape = Tape(checkpoints, only_trained=True)
    found, ours = gradients(name, tape, trained)
    assert_same([ours], [of_weights])
    for key, array in found.items():
        if array is not None:
            np.testing.assert_array_equal(array, expected[key])
    assert tape.peak <= whole.peak and (choice != "nothing" or tape.peak == 0)


@pytest.mark.parametrize("name, parameter", [
    ("PriorTransformer as karlo", "positional_embedding"),
    ("PriorTransformer as karlo", "prd_embedding"), ("PriorTransformer as karlo", "clip_std"),
    ("CLIPVisionModel as L/14", "vision_model.embeddings.class_embedding"),
    ("CLIPModel as L/14", "logit_scale"),
])
def test_a_parameter_of_a_model_itself_is_not_passed_over(name, parameter):
    found = [gradients(name, tape, lambda i, key: key == parameter)[1]
             for tape in (Tape(only_trained=True), Tape())]
    assert found[0].keys() == {parameter}
    assert_same(found[:1], found[1:])


# ---- the UNet with a LoRA, and with what makes its context -------------------------------------

@pytest.mark.parametrize("checkpoints, only_trained", product([False, True], repeat=2))
@pytest.mark.parametrize("of_text", ["lora", "words", "nothing"])
@pytest.mark.parametrize("of_unet", ["lora", "nothing"])
def test_one_tape_for_the_text_encoder_and_the_unet(of_unet, of_text, checkpoints, only_trained):
    if of_unet == of_text == "nothing":
        return
    expected, whole = run(of_unet, of_text, Tape())
    tape = Tape(checkpoints, only_trained)
    found, dcontext = run(of_unet, of_text, tape)
    assert found.keys() == expected.keys() and found
    for key in found:
        np.testing.assert_array_equal(found[key], expected[key], key)
    ends_in_the_unet = only_trained and of_text == "nothing"
    assert (dcontext is None) == ends_in_the_unet
    if dcontext is not None:
        np.testing.assert_array_equal(dcontext, whole)


def run(of_unet, of_text, tape):
    """-> {name: gradient} of what is trained, and the context's."""
    rng, arrays = np.random.default_rng(0), inputs(UNET)
    D = arrays["context"].shape[2]
    unet, text = make(UNET), CLIPTextModel(dict(CLIPS["as SD 1"], hidden_size=D,
                                                num_hidden_layers=2, num_attention_heads=1))
    for parameter in text.parameters():
        parameter.data = rng.standard_normal(parameter.shape) / 5
    for module, kind, targets in (unet, of_unet, DIFFUSERS), (text, of_text, ["q_proj", "fc2"]):
        module.freeze()
        if kind == "lora":
            for lora in add_lora(module, targets, 1, 1, rng).values():
                lora.lora_B.weight.data = rng.standard_normal(lora.lora_B.weight.shape)
        if kind == "words":
            module.text_model.embeddings.token_embedding.weight.trainable = True
    ids = rng.integers(3, 97, (2, 7))
    context = text(ids, tape)
    y = unet(arrays["latents"], arrays["timesteps"], context, tape)
    _, dcontext = unet.backward(np.cos(y), tape)
    text.backward(dcontext, tape)
    assert not tape.entries
    return {f"{type(module).__name__} {key}": parameter.grad for module in (unet, text)
            for key, parameter in module.named_parameters() if parameter.grad is not None}, dcontext


@pytest.mark.parametrize("checkpoints", [False, True])
def test_nothing_before_the_first_lora_is_kept(checkpoints):
    module, arrays = make(UNET), inputs(UNET)
    first, *_ = add_lora(module, DIFFUSERS, 2, 2, np.random.default_rng(0))
    tape = Tape(checkpoints, only_trained=True)
    outputs(module, arrays, tape)
    names = {layer: name for name, layer in named_modules(module)}
    found = names[tape.entries[0][0]]
    assert first.startswith(found) if checkpoints else found == first


# ---- blocks -----------------------------------------------------------------------------------

class Block(Module):
    def __init__(self):
        self.first, self.second = Linear(3, 5), Linear(5, 3)

    def forward(self, x, *tape, scale):
        return scale * self.second(self.first(x, *tape), *tape)

    def backward(self, dy, tape):
        return self.first.backward(self.second.backward(2 * dy, tape), tape)


def test_a_checkpoint_keeps_the_inputs_alone(rng):
    block, x, tape = Block(), rng.standard_normal((7, 3)), Tape(checkpoints=True)
    for parameter in block.parameters():
        parameter.data = rng.standard_normal(parameter.shape)
    y = checkpoint(block, tape, x, scale=2)
    assert len(tape.entries) == 1 and tape.nbytes == tape.peak == x.nbytes
    checkpoint_backward(block, y, tape)
    assert tape.nbytes == 0 and tape.peak == x.nbytes + 7 * 5 * 8      # and the second one's input


def test_without_a_tape_a_checkpoint_is_a_call(rng):
    from tinyldm.layers import NO_TAPE
    block, x = Block(), rng.standard_normal((7, 3))
    for parameter in block.parameters():
        parameter.data = rng.standard_normal(parameter.shape)
    np.testing.assert_array_equal(checkpoint(block, NO_TAPE, x, scale=2), block(x, scale=2))
