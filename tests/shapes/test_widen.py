"""More latent channels for a trained model."""
import numpy as np
import pytest

from tests.support.models import SMALL_UNET, SMALL_VAE
from tests.support.tolerance import assert_allclose
from tinyldm.models import AutoencoderKL, UNet2DConditionModel
from tinyldm.shapes import drawing
from tinyldm.shapes.widen import widen
from tinyldm.training.optim import initialise


@pytest.mark.parametrize("channels", [6, 8])
def test_more_latent_channels_change_nothing_at_first(channels):
    rng, few = np.random.default_rng(0), {"in_channels": 4, "out_channels": 4}
    vae = AutoencoderKL(SMALL_VAE | {"latent_channels": 4})
    unet = UNet2DConditionModel(SMALL_UNET | few)
    for model in (vae, unet):
        initialise(model, rng)
        assert widen(model, 4) is model
    wide, images = widen(vae, channels), drawing.batch(rng, 2)[0]
    noise = rng.standard_normal((2, 16, 16, channels), np.float32)
    (mean, logvar), (wide_mean, wide_logvar) = vae.encode(images), wide.encode(images)
    assert_allclose(wide_mean[..., :4], mean, atol=1e-5)
    assert_allclose(wide_logvar[..., :4], logvar, atol=1e-5)
    assert (wide_logvar[..., 4:] == -6).all() and wide_mean[..., 4:].std() > 0.1
    assert_allclose(wide.decode(noise), vae.decode(noise[..., :4]), atol=1e-5)
    context, t = rng.standard_normal((2, 77, 16), np.float32), np.array([5, 900])
    assert_allclose(widen(unet, channels).forward(noise, t, context)[..., :4],
                    unet.forward(noise[..., :4], t, context), atol=1e-5)
