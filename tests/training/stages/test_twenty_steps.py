"""Twenty steps of a UNet as PyTorch makes them: diffusers' UNet, autograd and torch.optim.AdamW."""
import numpy as np
import pytest
import torch

from tests.support.models import SMALL_UNET
from tests.support.pairs import unet_pair
from tests.support.reference import nchw, to_ours
from tests.support.tolerance import assert_allclose
from tinyldm.diffusion.schedule import Schedule
from tinyldm.layers import Tape
from tinyldm.shapes.configs import SCHEDULER
from tinyldm.training.objectives import DiffusionLoss, generators
from tinyldm.training.optim import AdamW

RATE = 1e-4


# The loss relative to theirs; the weights by their root mean square in units of the learning rate,
# by which Adam moves a weight even where its gradient is nothing but rounding.
@pytest.mark.parametrize("dtype, of_loss, of_weights", [(torch.float64, 1e-9, 1e-6),
                                                        (torch.float32, 1e-4, 0.1)])
def test_twenty_steps(dtype, of_loss, of_weights):
    reference, unet, _, _, context = unet_pair(SMALL_UNET, dtype, (8, 8))
    for parameter in unet.parameters():
        parameter.data = parameter.data.copy()
    rng, kind = np.random.default_rng(0), context.dtype
    loss_of = DiffusionLoss(Schedule.from_config(SCHEDULER))
    optimizer = AdamW(unet.named_parameters(), ema=None, decay_vectors=True)
    theirs = torch.optim.AdamW(reference.parameters(), lr=RATE)
    for step in range(20):
        latents = rng.standard_normal((2, 8, 8, unet.config["in_channels"])).astype(kind)
        x_t, timesteps, noise = loss_of.noisy(latents, generators(0, step, 2))
        a, s = loss_of.schedule.scales_like(latents, timesteps)
        tape = Tape()
        output = unet(x_t, timesteps, context, tape)
        loss, doutput, _ = loss_of(output, latents, noise, timesteps)
        unet.backward(doutput, tape)
        norm = optimizer.step(RATE)

        found = reference(nchw(x_t), torch.tensor(timesteps), torch.from_numpy(context.copy()))
        squares = ((found.sample - nchw(a * noise - s * latents)) ** 2).mean()
        theirs.zero_grad()
        squares.backward()
        their_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        theirs.step()
        assert_allclose(loss, squares.item(), rtol=of_loss)
        assert_allclose(norm, their_norm.item(), rtol=100 * of_loss)
    published = dict(reference.named_parameters())
    apart = np.concatenate([(parameter.data - to_ours(published[name])).reshape(-1)
                            for name, parameter in unet.named_parameters()])
    assert np.sqrt((apart.astype(np.float64) ** 2).mean()) <= of_weights * RATE
