"""The UNet against diffusers on random weights: outputs and all gradients."""
import numpy as np
import pytest
import torch

import tinyldm
from tests.support.arrays import read_only
from tests.support.models import CONDITIONED, UNETS
from tests.support.pairs import call_conditioned, conditioned_unet, unet_pair
from tests.support.reference import assert_same_gradients, copy_weights, nchw, nhwc
from tests.support.tolerance import assert_close, within
from tinyldm import backend
from tinyldm.errors import TinyldmError
from tinyldm.layers import Tape
from tinyldm.models import UNet2DConditionModel
from tinyldm.models.blocks import ResnetBlock2D


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
    assert not tape.entries
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


@pytest.mark.parametrize("name", CONDITIONED)
def test_conditioned_unet_gradients(name):
    pair, more, tensors = conditioned_unet(name, torch.float64)
    reference, module, latents, timesteps, context = pair
    x, c = nchw(latents).requires_grad_(), torch.from_numpy(context.copy()).requires_grad_()
    for tensor in tensors.values():
        if tensor.is_floating_point():                  # time_ids are integers
            tensor.requires_grad_()
    theirs = call_conditioned(reference, x, timesteps, c, tensors)
    tape = Tape()
    ours = module.forward(latents, timesteps, context, tape, **more)
    assert_close(ours, nhwc(theirs), 1e-8, "output")

    dy = read_only(np.random.default_rng(2).standard_normal(ours.shape))
    theirs.backward(nchw(dy))
    gradients = module.backward(dy, tape)
    assert not tape.entries
    assert_same_gradients(reference, module)
    dlatents, dcontext = gradients                      # whatever the config
    assert_close(dlatents, nhwc(x.grad), 1e-6, "dlatents")
    assert_close(dcontext, c.grad.numpy(), 1e-6, "dcontext")
    for what in ("timestep_cond", "text_embeds"):
        if what in tensors:
            assert_close(getattr(gradients, what), tensors[what].grad.numpy(), 1e-6, what)
        else:
            assert getattr(gradients, what) is None


@pytest.mark.parametrize("name", CONDITIONED)
def test_conditioned_unet_float32(name):
    pair, more, tensors = conditioned_unet(name, torch.float32)
    reference, module, latents, timesteps, context = pair
    with torch.no_grad():
        theirs = nhwc(call_conditioned(reference, nchw(latents), timesteps,
                                       torch.from_numpy(context.copy()), tensors))
    assert_close(module(latents, timesteps, context, **more), theirs, 1e-3, "fast")
    with backend.plain():
        assert_close(module(latents, timesteps, context, **more), theirs, 1e-4, "plain")


@pytest.mark.parametrize("change, named", [
    ({"act_fn": "mish"}, "mish"),
    ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "AttnDownBlock2D"),
    ({"class_embed_type": "sine"}, "class_embed_type"),
    ({"addition_embed_type": "image"}, "image"),
    ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "mirror"),
    ({"block_out_channels": [8]}, "entries"),
])
def test_unet_refuses_what_it_does_not_build(change, named):
    with pytest.raises(TinyldmError, match=named):
        UNet2DConditionModel(dict(UNETS["attention at the bottom"], **change))


def test_text_time_needs_its_two_sizes():
    config = dict(CONDITIONED["as SDXL"][0], addition_time_embed_dim=None)
    with pytest.raises(TinyldmError, match=r"which are \(None, 41\)"):
        UNet2DConditionModel(config)


def test_a_residual_block_takes_a_time_embedding_if_it_was_built_for_one():
    x, temb = np.ones((1, 4, 4, 4)), np.ones((1, 6))
    for channels, wrong in ((6, None), (None, temb)):
        block = ResnetBlock2D(4, 4, 2, 1e-5, channels)
        for parameter in block.parameters():
            parameter.data = np.ones(parameter.shape)
        tape = Tape()
        y = block(x, tape, temb=None if channels is None else temb)
        dx, dtemb = block.backward(y, tape)
        assert not tape.entries and (dtemb is None) == (channels is None)
        with pytest.raises(AssertionError, match="temb"):
            block(x, temb=wrong)


def test_float16_keeps_its_digits():
    """float16 weights and maps; norms, softmax and sinusoidal embedding in float32, as on a GPU."""
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


def test_a_tensor_is_no_array():
    with pytest.raises(AssertionError, match=r"must be an array, not a list: use .numpy\(\) of a"):
        tinyldm.load().unet.forward([[1.0]], np.zeros(1), np.zeros((1, 77, 128)))


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_latents_with_several_contexts_each(name, dtype, tolerance):
    """The maps before the first cross-attention are computed once; the outputs stay the same, up to
    the rounding of another batch size."""
    _, module, latents, timesteps, context = unet_pair(UNETS[name], dtype, (7, 9))
    contexts = np.concatenate([context, -context, context[::-1]])
    together = module(latents, timesteps, contexts)
    apart = [module(latents, timesteps, own) for own in np.split(contexts, 3)]
    assert_close(together, np.concatenate(apart), tolerance, "outputs")


def test_several_contexts_need_whole_batches_and_no_tape():
    _, module, latents, timesteps, context = unet_pair(UNETS["as SD 1"], torch.float32, (8, 8))
    with pytest.raises(AssertionError, match=r"must be \(B,M,D\) = \(2,M,12\), not \(3,"):
        module(latents, timesteps, np.concatenate([context, context[:1]]))
    with pytest.raises(AssertionError, match="each of the 2 latents needs one context, not 4"):
        module(latents, timesteps, np.concatenate([context, context]), Tape())
