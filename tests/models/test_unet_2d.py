"""DDPM's UNet against diffusers on random weights: outputs, all gradients, names and shapes."""
import dataclasses
import inspect

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel as ReferenceUNet2D

from tests.support.arrays import read_only
from tests.support.keys import digest
from tests.support.models import CAT256, CIFAR10, PIXELS, TRACE, UNETS_2D
from tests.support.pairs import unet_2d_pair
from tests.support.reference import assert_same_gradients, nchw, nhwc
from tests.support.tolerance import assert_close
from tinyldm import backend
from tinyldm.errors import TinyldmError
from tinyldm.layers import Tape, file_shape
from tinyldm.models import UNet2DModel


def run(reference, latents, timesteps, labels):
    options = {} if labels is None else {"class_labels": labels}
    return reference(latents, torch.from_numpy(timesteps.copy()), **options).sample


@pytest.mark.parametrize("name", UNETS_2D)
def test_gradients(name):
    reference, module, latents, timesteps, labels = unet_2d_pair(UNETS_2D[name], torch.float64)
    x = nchw(latents).requires_grad_()
    their_labels = None if labels is None else torch.from_numpy(labels.copy())
    is_vector = labels is not None and labels.ndim == 2
    if is_vector:
        their_labels.requires_grad_()
    theirs = run(reference, x, timesteps, their_labels)
    tape = Tape()
    ours = module.forward(latents, timesteps, tape, class_labels=labels)
    assert_close(ours, nhwc(theirs), 1e-10, "output")

    dy = read_only(np.random.default_rng(2).standard_normal(ours.shape))
    theirs.backward(nchw(dy))
    gradients = module.backward(dy, tape)
    assert not tape.entries
    assert_same_gradients(reference, module)
    assert_close(gradients.latents, nhwc(x.grad), 1e-6, "dlatents")
    if is_vector:
        assert_close(gradients.class_labels, their_labels.grad.numpy(), 1e-6, "dclass_labels")
    else:
        assert gradients.class_labels is None
    again = module.forward(latents, timesteps, class_labels=labels)
    np.testing.assert_array_equal(ours, again)


@pytest.mark.parametrize("name", UNETS_2D)
def test_float32(name):
    reference, module, latents, timesteps, labels = unet_2d_pair(UNETS_2D[name], torch.float32)
    with torch.no_grad():
        theirs = nhwc(run(reference, nchw(latents), timesteps,
                          None if labels is None else torch.from_numpy(labels.copy())))
    assert_close(module(latents, timesteps, class_labels=labels), theirs, 1e-3, "fast")
    with backend.plain():
        assert_close(module(latents, timesteps, class_labels=labels), theirs, 1e-4, "plain")


@pytest.mark.parametrize("config, tensors, numbers, listed", [
    (CIFAR10, 328, 35_746_307, "5a35041a67ef8656"), (CAT256, 450, 113_673_219, "bf99219a0b986be8"),
    (TRACE, 400, 108_414_979, None)], ids=["cifar10", "cat-256", "trace"])
def test_names_and_shapes_are_the_published_ones(config, tensors, numbers, listed):
    """listed: the digest of the list of what the public file holds."""
    with torch.device("meta"):
        reference = ReferenceUNet2D(**config)
    theirs = {name: tuple(tensor.shape) for name, tensor in reference.named_parameters()}
    ours = {name: file_shape(parameter)
            for name, parameter in UNet2DModel(config).named_parameters()}
    assert ours == theirs
    assert len(ours) == tensors
    assert sum(int(np.prod(shape)) for shape in ours.values()) == numbers
    assert listed in (None, digest([("unet", *item) for item in ours.items()]))


def test_every_key_of_the_public_class_is_known_and_has_its_default():
    public = inspect.signature(ReferenceUNet2D.__init__).parameters
    own, fields = UNet2DModel.Settings, dataclasses.fields(UNet2DModel.Settings)
    assert public.keys() - {"self"} <= {field.name for field in fields} | own.CHANGES.keys() | (
        own.UNUSED)
    for field in fields:
        if field.name in public:
            assert field.default == public[field.name].default, field.name


def test_a_missing_head_dim_is_the_default_of_diffusers():
    """8 channels for each head; the public files of DDPM say null, one head."""
    config = {key: value for key, value in CIFAR10.items() if key != "attention_head_dim"}
    assert UNet2DModel(config).mid_block.attentions[0].num_heads == 32
    assert UNet2DModel(CIFAR10).mid_block.attentions[0].num_heads == 1


def test_head_dims_may_differ_between_the_levels():
    """As many heads at every level, as in openai's models."""
    config = PIXELS | {"attention_head_dim": [2, 4], "down_block_types": ["AttnDownBlock2D"] * 2}
    blocks = UNet2DModel(config).down_blocks
    assert [block.attentions[0].num_heads for block in blocks] == [4, 4]


def test_with_scale_shift_the_middle_attention_has_no_norm():
    config = PIXELS | {"resnet_time_scale_shift": "scale_shift"}
    names = {name for name, _ in UNet2DModel(config).named_parameters()}
    assert "mid_block.attentions.0.group_norm.weight" not in names
    assert "down_blocks.1.attentions.0.group_norm.weight" in names


@pytest.mark.parametrize("change, named", [
    ({"act_fn": "mish"}, "act_fn"),
    ({"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}, "CrossAttnDownBlock2D"),
    ({"up_block_types": ["AttnUpBlock2D"]}, "2, 2 and 1 entries"),
    ({"attention_head_dim": 3}, "3 does not divide 16"),
    ({"attention_head_dim": [4]}, "attention_head_dim has 1 entries"),
    ({"norm_num_groups": 3}, "3 does not divide 8"),
    ({"attn_norm_num_groups": 3}, "attn_norm_num_groups must divide"),
    ({"time_embedding_type": "fourier"}, "time_embedding_type"),
    ({"resnet_time_scale_shift": "spatial"}, "spatial"),
    ({"downsample_padding": 2}, "downsample_padding"),
    ({"class_embed_type": "projection"}, "class_embed_type"),
    ({"mid_block_scale_factor": 1.4}, "mid_block_scale_factor"),
])
def test_refuses_what_it_does_not_build(change, named):
    with pytest.raises(TinyldmError, match=named):
        UNet2DModel(PIXELS | change)


def test_refuses_inputs_that_do_not_fit():
    module = unet_2d_pair(PIXELS, torch.float32)[1]
    latents, t = np.zeros((1, 8, 8, 3), np.float32), np.array([5])
    with pytest.raises(AssertionError, match="multiples of 2"):
        module(latents[:, :7], t)
    with pytest.raises(AssertionError, match="timesteps must be an array"):
        module(latents, 5)
    with pytest.raises(AssertionError, match="takes no class_labels"):
        module(latents, t, class_labels=t)
