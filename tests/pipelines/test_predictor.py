"""Guidance's two halves in one call of the UNet."""
import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import small_pipelines
from tests.support.models import UNETS
from tests.support.pairs import unet_pair
from tests.support.tolerance import assert_close
from tinyldm.models import UNet2DConditionModel
from tinyldm.pipelines.loading import load
from tinyldm.pipelines.predictor import FunctionUNet, Predictor


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("config, own, common", [
    ({}, [], []), ({"num_class_embeds": 9}, [], ["class_labels"]),
    ({"num_class_embeds": 9}, ["class_labels"], []),
    ({"time_cond_proj_dim": 6}, [], ["timestep_cond"])], ids=str)
def test_a_unet_computes_what_both_halves_share_only_once(config, own, common, dtype, tolerance):
    """Where only the contexts differ. A function in its place gets every latent with every one."""
    name, *_ = UNETS
    _, unet, latents, timesteps, context = unet_pair(UNETS[name] | config, dtype, (8, 8))
    values = {"class_labels": np.array([3]),
              "timestep_cond": np.random.default_rng(0).standard_normal((1, 6)).astype(unet.dtype)}
    conditioning, rows = [{"context": sign * context} | {name: values[name] for name in common}
                          | {name: values[name] + (sign > 0) for name in own}
                          for sign in (-1, 1)], []

    def function(*inputs, **conditions):
        rows.append([len(array) for array in (*inputs, *conditions.values())])
        return unet(*inputs, **conditions)

    ours, theirs = (Predictor(model, conditioning, 5.0)
                    for model in (unet, FunctionUNet(function, like=unet)))
    B, n = len(latents), 1 + bool(own)
    assert_close(ours(latents, 500), theirs(latents, 500), tolerance, "guided noise")
    assert {*rows[0]} == {2 * B} and len(rows) == 1
    assert len(ours.inputs["latents"]) == len(ours.inputs["timesteps"]) == n * B
    assert {len(ours.inputs[name]) for name in (*own, *common)} <= {n * B}
    assert np.array_equal(ours.inputs["context"], np.concatenate([-context, context]))


@pytest.mark.parametrize("system", [small_pipelines.upscaler, small_pipelines.cascade])
def test_levels_of_noise_are_the_same_for_both_halves(system, tmp_path):
    pipe, rows = load(system(tmp_path / "weights")), []
    whole = UNet2DConditionModel.forward

    def forward(unet, latents, timesteps, context, *more, **conditions):
        rows.append((len(latents), len(context), len(conditions.get("class_labels", latents))))
        return whole(unet, latents, timesteps, context, *more, **conditions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet2DConditionModel, "forward", forward)
        picture = {"image": Image.new("RGB", (16, 16), "red")}
        pipe("cat", num_inference_steps=2, **(picture if "upscaler" in system.__name__ else {}))
    assert rows and {*rows} == {(1, 2, 1)}
