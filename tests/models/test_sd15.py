"""The models at Stable Diffusion 1.5's real size against diffusers and transformers.

The small models of support/models.py cannot show what only size brings: the kernels for large maps,
rounding over 860 million weights. The weights are random; one set of arrays serves both sides.
"""
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as ReferenceVAE
from diffusers import UNet2DConditionModel as ReferenceUNet
from transformers import CLIPTextConfig
from transformers import CLIPTextModel as ReferenceCLIP

from tests.support import sd15
from tests.support.reference import nchw, nhwc
from tests.support.tolerance import assert_close
from tinyldm import backend
from tinyldm.models import AutoencoderKL, CLIPTextModel, UNet2DConditionModel

pytestmark = pytest.mark.slow


def normal(*shape, seed=1):
    array = np.random.default_rng(seed).standard_normal(shape, np.float32)
    array.flags.writeable = False
    return array


def assert_both_paths_close(run, theirs):
    assert 1e-3 < theirs.std() < 1e3, f"the reference's std is {theirs.std()}"   # False for NaN
    errors = {"fast": assert_close(run(), theirs, 1e-3, "fast")}
    with backend.plain():
        errors["plain"] = assert_close(run(), theirs, 1e-4, "plain")
    print(", ".join(f"{path}: {error:.1e} of the std" for path, error in errors.items()))


@torch.no_grad()
def test_unet():
    module = sd15.randomise(UNet2DConditionModel(sd15.UNET))
    with torch.device("meta"):                          # shapes alone: the arrays come from ours
        reference = ReferenceUNet(**sd15.UNET)
    sd15.share_weights(module, reference)
    latents, context = normal(1, 64, 64, 4), normal(1, 77, 768, seed=2)
    theirs = reference(nchw(latents), 501, torch.from_numpy(context.copy())).sample
    assert_both_paths_close(lambda: module(latents, np.array([501]), context), nhwc(theirs))


@torch.no_grad()
def test_vae_decoder():
    module = sd15.randomise(AutoencoderKL(sd15.VAE))
    with torch.device("meta"):
        reference = ReferenceVAE(**sd15.VAE)
    sd15.share_weights(module, reference)
    z = normal(1, 32, 32, 4)                            # a picture of 256x256
    assert_both_paths_close(lambda: module.decode(z), nhwc(reference.decode(nchw(z)).sample))


@torch.no_grad()
def test_text_encoder():
    module = sd15.randomise(CLIPTextModel(sd15.TEXT_ENCODER))
    reference = sd15.share_weights(module, ReferenceCLIP(CLIPTextConfig(**sd15.TEXT_ENCODER)))
    ids = np.random.default_rng(1).integers(0, 49408, (2, 77))
    theirs = reference(torch.from_numpy(ids)).last_hidden_state.numpy()
    assert_both_paths_close(lambda: module(ids), theirs)
