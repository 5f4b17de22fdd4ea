"""DDPM by class with guidance, against diffusers' UNet and scheduler; names; its folder."""
import diffusers
import numpy as np
import pytest
import torch

import tinyldm
from tests.support.models import PIXELS
from tests.support.pixel_models import filled, write_model
from tests.support.reference import float32_noise, widen_embeddings
from tests.support.tolerance import assert_allclose
from tinyldm.errors import TinyldmError
from tinyldm.models import UNet2DModel
from tinyldm.pipelines.guided_ddpm import GuidedDDPM

NAMES = {"cat": 0, "dog": 1, "tabby": 0}


@pytest.mark.parametrize("variance", ["fixed_large", "learned"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_drawing(variance, guidance, tmp_path):
    """Guidance moves the noise alone: a learned variance is the class's own."""
    write_model(tmp_path / "model", "guided", variance)
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "model" / "unet").double()
    widen_embeddings(unet)
    scheduler = diffusers.DDPMScheduler.from_pretrained(tmp_path / "model" / "scheduler")
    scheduler.set_timesteps(5)
    generator, (label, no_class) = torch.Generator().manual_seed(4), torch.tensor([[1], [3]])
    with float32_noise(), torch.no_grad():
        x = torch.randn((1, 3, 16, 16), generator=generator).double()
        for t in scheduler.timesteps:
            cond, uncond = unet(x, t, label).sample, unet(x, t, no_class).sample
            noise = uncond[:, :3] + guidance * (cond[:, :3] - uncond[:, :3])
            x = scheduler.step(torch.cat([noise, cond[:, 3:]], 1), t, x,
                               generator=generator).prev_sample
    pipe = tinyldm.load(tmp_path / "model")
    *_, state = pipe.stream(label=1, seed=4, num_inference_steps=5, guidance_scale=guidance)
    assert_allclose(state.latents[0], x[0].permute(1, 2, 0).numpy(), atol=2e-4)


def test_names_and_numbers(tmp_path):
    unet = filled(UNet2DModel(PIXELS | {"sample_size": 8, "num_class_embeds": 3}))
    pipe = GuidedDDPM(unet, {"_class_name": "DDPMScheduler"}, 2, names=NAMES, guidance_scale=3.0)
    tinyldm.save(pipe, tmp_path / "saved")
    again = tinyldm.load(tmp_path / "saved")
    assert again.names == NAMES and again.guidance_scale == 3.0 and again.num_inference_steps == 2
    expected = [np.asarray(pipe(label=i, guidance_scale=3.0)[0]) for i in (0, 1)]
    for label, i in (("Tabby", 0), ("cat", 0), ("dog", 1), ("1", 1), (1, 1)):
        np.testing.assert_array_equal(again(label=label)[0], expected[i])
    assert (expected[0] != expected[1]).any()
    np.testing.assert_array_equal(again(label=2)[0], again(label=2, guidance_scale=1)[0])
    assert (np.asarray(again(label=1, guidance_scale=1)[0]) != expected[1]).any()


@pytest.mark.parametrize("options, message", [
    ({}, "a class's name or a whole number from 0 to 1"),
    ({"label": "dogs"}, "no class 'dogs': did you mean 'dog' .1.?"),
    ({"label": 3}, "a whole number from 0 to 1, or 2 for no class, not 3"),
    ({"label": True}, "label"),
    ({"label": 1, "guidance_scale": float("nan")}, "guidance_scale")])
def test_wrong_options(options, message):
    unet = filled(UNet2DModel(PIXELS | {"sample_size": 8, "num_class_embeds": 3}))
    pipe = GuidedDDPM(unet, {"_class_name": "DDPMScheduler"}, 2, names=NAMES)
    with pytest.raises(TinyldmError, match=message):
        pipe(**options)


def test_a_unet_without_classes():
    unet = UNet2DModel(PIXELS | {"sample_size": 8})
    with pytest.raises(TinyldmError, match="num_class_embeds from 2"):
        GuidedDDPM(unet, {"_class_name": "DDPMScheduler"})
