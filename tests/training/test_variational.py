"""One step of training Improved DDPM: the loss and every gradient, against torch's autograd."""
import numpy as np
import pytest
import torch

from tests.support import improved_ddpm as reference_loss
from tests.support.models import PIXELS
from tests.support.pairs import unet_2d_pair
from tests.support.reference import assert_same_gradients, nchw
from tests.support.tolerance import assert_allclose
from tinyldm.diffusion.process import Process
from tinyldm.diffusion.timestep_sampling import LossSecondMoment
from tinyldm.diffusion.variational import LOSSES
from tinyldm.training.objectives import variational_loss

CONFIG = PIXELS | {"out_channels": 6, "resnet_time_scale_shift": "scale_shift"}


@pytest.mark.parametrize("classes", [None, 5])
@pytest.mark.parametrize("kind", LOSSES)
def test_one_step(kind, classes):
    config = CONFIG | ({"num_class_embeds": classes} if classes else {})
    reference, unet, latents, *_ = unet_2d_pair(config, torch.float64)
    process = Process.cosine(4000, rescale_timesteps=True)
    images = np.random.default_rng(0).integers(0, 256, latents.shape) / 127.5 - 1
    t, weights, labels = np.array([0, 2500]), np.array([0.5, 2.0]), np.array([4, 0])
    labels = {"class_labels": labels} if classes else {}
    report, losses = variational_loss(unet, process, images, t, weights, np.random.default_rng(7),
                                      0.25, kind, **labels)

    noise = np.random.default_rng(7).standard_normal(images.shape, np.float32)
    x_t = process.add_noise(images, noise, t)
    output = reference(nchw(x_t), torch.tensor(t / 4),
                       **{name: torch.from_numpy(value) for name, value in labels.items()}).sample
    theirs = reference_loss.losses(process.betas, output.movedim(1, -1), *map(torch.tensor, (
        images, noise.astype(float), x_t, t)), kind)
    total = 0.25 * (theirs * torch.tensor(weights)).mean()
    total.backward()
    assert_allclose(losses, theirs.detach().numpy(), rtol=1e-8)
    assert_allclose(report["loss"], total.item(), rtol=1e-8)
    assert_same_gradients(reference, unet)


def test_a_training_with_importance_sampling(rng):
    """An update lowers L_vlb; the sampler remembers the losses without weights."""
    unet = unet_2d_pair(CONFIG, torch.float32)[1]
    process, drawn = Process.cosine(8), LossSecondMoment(8, history=2)
    images = (rng.integers(0, 256, (8, 8, 8, 3)) / 127.5 - 1).astype(np.float32)
    totals = []
    for step in range(3):
        t, weights = (np.arange(8), np.ones(8)) if step < 2 else drawn.sample(rng, 8)
        unet.zero_grad()
        report, losses = variational_loss(unet, process, images, t, weights,
                                          np.random.default_rng(0), 1.0, "rescaled_kl")
        drawn.update(t, losses)
        totals.append(report["loss"])
        norm = sum((p.grad ** 2).sum() for p in unet.parameters()) ** 0.5
        for parameter in unet.parameters():
            parameter.data = parameter.data - 0.01 / norm * parameter.grad
    assert totals[1] < totals[0]
    assert drawn.losses.min() > 0 and np.ptp(drawn.probabilities()) > 0.01
