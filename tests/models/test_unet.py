"""The UNet against diffusers on random weights: outputs and all gradients."""
import numpy as np
import pytest
import torch

from tests.support.arrays import read_only
from tests.support.models import TOLD, UNETS
from tests.support.pairs import told_call, told_unet, unet_pair
from tests.support.reference import assert_same_gradients, copy_weights, nchw, nhwc
from tests.support.tolerance import assert_close, within
from tinyldm import backend
from tinyldm.errors import TinyldmError
from tinyldm.layers import Tape
from tinyldm.models import UNet2DConditionModel


@pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=str)
@pytest.mark.parametrize("name", UNETS)
def test_unet_gradients(name, size):
    reference, module, latents, timesteps, context = unet_pair(UNETS[name], torch.float64, size)
    x, c = nchw(latents).requires_grad_(), torch.from_numpy(context.copy()).requires_grad_()
    theirs = reference(x, torch.from_numpy(timesteps.copy()), c).sample
    tape = Tape()
    ours = module.forward(latents, timesteps, context, tape)
    assert_close(ours, nhwc(theirs), 1e-8, "output")

    dy = read_only(np.random.default_rng(2).standard_normal(ours.shape))
    theirs.backward(nchw(dy))
    dlatents, dcontext = module.backward(dy, tape)
    assert len(tape) == 0
    assert_same_gradients(reference, module)
    assert_close(dlatents, nhwc(x.grad), 1e-6, "dlatents")
    assert_close(dcontext, c.grad.numpy(), 1e-6, "dcontext")
    np.testing.assert_array_equal(ours, module.forward(latents, timesteps, context))


@pytest.mark.parametrize("name", UNETS)
def test_unet_float32(name):
    reference, module, latents, timesteps, context = unet_pair(UNETS[name], torch.float32, (12, 8))
    with torch.no_grad():
        theirs = nhwc(reference(nchw(latents), torch.from_numpy(timesteps.copy()),
                                torch.from_numpy(context.copy())).sample)
    assert_close(module(latents, timesteps, context), theirs, 1e-3, "fast")
    with backend.plain():
        assert_close(module(latents, timesteps, context), theirs, 1e-4, "plain")


@pytest.mark.parametrize("name", TOLD)
def test_told_unet_gradients(name):
    reference, module, latents, timesteps, context, told, tensors = told_unet(name, torch.float64)
    x, c = nchw(latents).requires_grad_(), torch.from_numpy(context.copy()).requires_grad_()
    if "text_embeds" in tensors:
        tensors["text_embeds"].requires_grad_()
    theirs = told_call(reference, x, timesteps, c, tensors)
    tape = Tape()
    ours = module.forward(latents, timesteps, context, tape, **told)
    assert_close(ours, nhwc(theirs), 1e-8, "output")

    dy = read_only(np.random.default_rng(2).standard_normal(ours.shape))
    theirs.backward(nchw(dy))
    gradients = module.backward(dy, tape)
    assert len(tape) == 0
    assert_same_gradients(reference, module)
    expected = [nhwc(x.grad), c.grad.numpy()]
    expected += [tensors["text_embeds"].grad.numpy()] if "text_embeds" in tensors else []
    for i, (ours, theirs) in enumerate(zip(gradients, expected, strict=True)):
        assert_close(ours, theirs, 1e-6, f"gradient {i}")


@pytest.mark.parametrize("name", TOLD)
def test_told_unet_float32(name):
    reference, module, latents, timesteps, context, told, tensors = told_unet(name, torch.float32)
    with torch.no_grad():
        theirs = nhwc(told_call(reference, nchw(latents), timesteps,
                                torch.from_numpy(context.copy()), tensors))
    assert_close(module(latents, timesteps, context, **told), theirs, 1e-3, "fast")
    with backend.plain():
        assert_close(module(latents, timesteps, context, **told), theirs, 1e-4, "plain")


@pytest.mark.parametrize("change, named", [
    ({"act_fn": "mish"}, "mish"),
    ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "AttnDownBlock2D"),
    ({"class_embed_type": "timestep"}, "class_embed_type"),
    ({"addition_embed_type": "image"}, "image"),
    ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "mirror"),
    ({"block_out_channels": [8]}, "entries"),
])
def test_unet_refuses_what_it_does_not_build(change, named):
    with pytest.raises(TinyldmError, match=named):
        UNet2DConditionModel(dict(UNETS["attention at the bottom"], **change))


def test_float16_keeps_its_digits():
    """float16 weights and maps: norms, softmax and the timestep's waves in float32, as on a GPU."""
    reference, module, latents, timesteps, context = unet_pair(
        UNETS["as SD 1"], torch.float32, (8, 8))
    latents, context = (x.astype(np.float16).astype(np.float32) for x in (latents, context))
    copy_weights(reference.half(), module)              # both from the same rounded numbers
    with torch.no_grad():
        theirs = nhwc(reference.float()(nchw(latents), torch.from_numpy(timesteps.copy()),
                                torch.from_numpy(context.copy())).sample)
    ours = module(latents.astype(np.float16), timesteps, context.astype(np.float16))
    assert ours.dtype == np.float16
    within(np.sqrt(((ours - theirs) ** 2).mean()), 0.01 * theirs.std())
