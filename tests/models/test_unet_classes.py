"""UNets with a class embedding, or whose blocks have cross-attention only, against diffusers."""
import numpy as np
import pytest
import torch

from tests.support.arrays import read_only
from tests.support.models import DOWN3, SMALL, UP3
from tests.support.pairs import unet_pair
from tests.support.reference import assert_same_gradients, nchw, nhwc
from tests.support.tolerance import assert_close
from tinyldm import backend
from tinyldm.errors import TinyldmError
from tinyldm.layers import Tape
from tinyldm.models import UNet2DConditionModel

BASE = dict(SMALL, block_out_channels=[8, 12], layers_per_block=1, attention_head_dim=2,
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], cross_attention_dim=6)
ROWS = read_only(np.array([4, 19]))
UPSCALER = dict(SMALL, in_channels=7, block_out_channels=[8, 8, 16, 16], layers_per_block=2,
                attention_head_dim=4, cross_attention_dim=10, use_linear_projection=True,
                down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
                up_block_types=["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
                only_cross_attention=[True, True, True, False], num_class_embeds=20)


def vectors(width):
    return read_only(np.random.default_rng(4).standard_normal((2, width)))


MODELS = {                  # name: (config, class labels)
    "as the x4 upscaler": (UPSCALER, ROWS),
    "only cross-attention": (dict(BASE, only_cross_attention=True, num_class_embeds=20), ROWS),
    "only cross-attention at one of several levels": (
        dict(SMALL, block_out_channels=[8, 8, 16], layers_per_block=1, down_block_types=DOWN3,
             up_block_types=UP3, attention_head_dim=2, cross_attention_dim=6,
             only_cross_attention=[False, True, False], mid_block_only_cross_attention=True,
             num_class_embeds=20), ROWS),
    "timestep": (dict(BASE, class_embed_type="timestep"), read_only(np.array([0, 250]))),
    "projection": (dict(BASE, class_embed_type="projection",
                        projection_class_embeddings_input_dim=5), vectors(5)),
    "simple_projection": (dict(BASE, class_embed_type="simple_projection",
                               projection_class_embeddings_input_dim=5), vectors(5)),
    "identity": (dict(BASE, class_embed_type="identity"), vectors(32)),
}


def pair(name, dtype):
    """-> unet_pair's, and the labels: ours, theirs as a leaf tensor."""
    config, labels = MODELS[name]
    if labels.dtype == np.float64 and dtype == torch.float32:
        labels = read_only(labels.astype(np.float32))
    return *unet_pair(config, dtype, (8, 12)), labels, torch.from_numpy(labels.copy())


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name):
    reference, module, latents, timesteps, context, labels, theirs_in = pair(name, torch.float64)
    x, c = nchw(latents).requires_grad_(), torch.from_numpy(context.copy()).requires_grad_()
    if theirs_in.is_floating_point():
        theirs_in.requires_grad_()
    theirs = reference(x, torch.from_numpy(timesteps.copy()), c, class_labels=theirs_in).sample
    tape = Tape()
    ours = module.forward(latents, timesteps, context, tape, class_labels=labels)
    assert_close(ours, nhwc(theirs), 1e-8, "output")

    dy = read_only(np.random.default_rng(2).standard_normal(ours.shape))
    theirs.backward(nchw(dy))
    gradients = module.backward(dy, tape)
    assert not tape.entries
    assert_same_gradients(reference, module)
    assert_close(gradients.latents, nhwc(x.grad), 1e-6, "dlatents")
    assert_close(gradients.context, c.grad.numpy(), 1e-6, "dcontext")
    if theirs_in.requires_grad:
        assert_close(gradients.class_labels, theirs_in.grad.numpy(), 1e-6, "dclass_labels")
    else:
        assert gradients.class_labels is None
    assert gradients.timestep_cond is None and gradients.text_embeds is None
    np.testing.assert_array_equal(
        ours, module.forward(latents, timesteps, context, class_labels=labels))


@pytest.mark.parametrize("name", MODELS)
def test_float32(name):
    reference, module, latents, timesteps, context, labels, theirs_in = pair(name, torch.float32)
    with torch.no_grad():
        theirs = nhwc(reference(nchw(latents), torch.from_numpy(timesteps.copy()),
                                torch.from_numpy(context.copy()), class_labels=theirs_in).sample)
    ours = module(latents, timesteps, context, class_labels=labels)
    assert ours.dtype == np.float32
    assert_close(ours, theirs, 1e-3, "fast")
    with backend.plain():
        ours = module(latents, timesteps, context, class_labels=labels)
    assert_close(ours, theirs, 1e-4, "plain")


def test_the_level_of_noise_changes_what_is_predicted():
    _, module, latents, timesteps, context, *_ = pair("as the x4 upscaler", torch.float64)
    one, other = (module(latents, timesteps, context, class_labels=np.full(2, level))
                  for level in (0, 19))
    assert abs(one - other).max() > 0.1 * one.std()


@pytest.mark.parametrize("change, named", [
    ({"class_embed_type": "sine"}, "class_embed_type must be .*simple_projection.*, not \"sine\""),
    ({"class_embed_type": "projection"}, "needs projection_class_embeddings_input_dim"),
    ({"class_embed_type": "simple_projection"}, "needs projection_class_embeddings_input_dim"),
    ({"class_embeddings_concat": True}, "class_embeddings_concat"),
    ({"num_class_embeds": 0}, "num_class_embeds must be a positive whole number"),
    ({"num_class_embeds": True}, "num_class_embeds must be"),
    ({"only_cross_attention": [True]}, "only_cross_attention has 1 entries, .* 2"),
    ({"only_cross_attention": 1}, "only_cross_attention must be true or false, or a list"),
    ({"only_cross_attention": [True, None]}, "only_cross_attention must be"),
])
def test_a_config_that_is_not_built_is_named(change, named):
    with pytest.raises(TinyldmError, match=named) as error:
        UNet2DConditionModel(dict(BASE, **change))
    assert "\n" not in str(error.value)


def test_labels_are_given_exactly_if_there_are_classes():
    config, labels = MODELS["timestep"]
    x, t, context = np.zeros((2, 8, 8, 4)), np.zeros(2), np.zeros((2, 3, 6))
    with pytest.raises(AssertionError, match="its forward needs class_labels"):
        UNet2DConditionModel(config)(x, t, context)
    with pytest.raises(AssertionError, match="its forward takes no class_labels"):
        UNet2DConditionModel(BASE)(x, t, context, class_labels=labels)
