"""Guidance's two halves in one call of the UNet."""
import numpy as np
import torch

from tests.support.models import UNETS
from tests.support.pairs import unet_pair
from tests.support.tolerance import assert_close
from tinyldm.pipelines.predictor import FunctionUNet, Predictor


def test_a_unet_computes_what_both_halves_share_only_once():
    """A function in its place still gets every latent with every context."""
    name, *_ = UNETS
    _, unet, latents, timesteps, context = unet_pair(UNETS[name], torch.float32, (8, 8))
    conditioning, rows = [{"context": -context}, {"context": context}], []

    def function(latents, timesteps, context):
        rows.append((len(latents), len(timesteps), len(context)))
        return unet(latents, timesteps, context)

    ours, theirs = (Predictor(model, conditioning, 5.0)
                    for model in (unet, FunctionUNet(function, like=unet)))
    B = len(latents)
    assert_close(ours(latents, 500), theirs(latents, 500), 1e-4, "guided noise")
    assert rows == [(2 * B,) * 3]
    assert len(ours.inputs["latents"]) == len(ours.inputs["timesteps"]) == B
    assert np.array_equal(ours.inputs["context"], np.concatenate([-context, context]))
