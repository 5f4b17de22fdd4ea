"""Guidance and its rescaling against diffusers."""
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from tests.support.tolerance import assert_allclose
from tinyldm.diffusion.guidance import classifier_free, rescale


def test_classifier_free_guidance():
    uncond, cond = np.float32([[1, 2]]), np.float32([[3, 2]])
    mixed = classifier_free(uncond, cond, 7.5)
    np.testing.assert_array_equal(mixed, [[16, 2]])
    assert mixed.dtype == np.float32
    np.testing.assert_array_equal(classifier_free(uncond, cond, 1.0), cond)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("guidance_rescale", [0.0, 0.3, 0.7, 1.0])
def test_guidance_rescale(dtype, guidance_rescale):
    rng = np.random.default_rng(0)
    contrasts = rng.uniform(0.5, 2, (2, 3, 1, 1, 1))
    uncond, cond = (contrasts * rng.standard_normal((2, 3, 8, 6, 4))).astype(dtype)
    noise = classifier_free(uncond, cond, 7.5)
    for array in (noise, cond):
        array.flags.writeable = False
    ours = rescale(noise, cond, guidance_rescale)
    wide = torch.tensor(noise).double(), torch.tensor(cond).double()
    theirs = rescale_noise_cfg(*wide, guidance_rescale).numpy()
    assert ours.dtype == dtype
    assert_allclose(ours, theirs, rtol=16 * np.finfo(dtype).eps)    # no term cancels another
    if guidance_rescale == 1:
        assert_allclose(ours.std(axis=(1, 2, 3)), cond.std(axis=(1, 2, 3)), rtol=1e-6)
