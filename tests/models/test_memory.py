"""The bytes on the tape of Stable Diffusion 1.5's UNet, in float32, for one picture.

The weights are zeros, which take no memory until somebody writes into them. All that the tape keeps
is proportional to the area of the map, except the keys and values of the prompt.
Source of the numbers for latents of 64x64: counted in tinyldm and PyTorch, which keeps 1784 MiB for
all weights, 1521 for the LoRA, and 1405 for the prompt's gradient.
"""
import numpy as np
import pytest

from tests.support.tolerance import within
from tinyldm.checkpoints.single_file.kinds import SD1
from tinyldm.layers import Tape
from tinyldm.models import UNet2DConditionModel
from tinyldm.models.lora import DIFFUSERS, add_lora

OF_THE_PROMPT = 8                                       # MiB, keys and values and what has no area


def unet(trained):
    module = UNet2DConditionModel(SD1.unet)
    for parameter in module.parameters():
        parameter.data = np.zeros(parameter.shape, np.float32)
    if trained == "LoRA":
        assert len(add_lora(module, DIFFUSERS, 4, 4, np.random.default_rng(0))) == 128
    elif trained == "the prompt":
        module.freeze()
    return module


def peak(module, size, tape, backward):
    """The tape's largest size in MiB; without backward, that at the end of forward."""
    y = module(np.zeros((1, size, size, 4), np.float32), np.zeros(1, np.float32),
               np.zeros((1, 77, 768), np.float32), tape)
    kept = tape.nbytes
    if backward:
        _, dcontext = module.backward(y, tape)
        assert (dcontext is None) == tape.only_trained and not tape.entries
    assert tape.peak >= kept
    return tape.peak / 2 ** 20


@pytest.mark.parametrize("size", [16, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("trained, most", [("all", 1479.5), ("LoRA", 1020), ("the prompt", 850)])
def test_what_forward_keeps(trained, most, size):
    share = size ** 2 / 64 ** 2
    found = peak(unet(trained), size, Tape(), backward=False)
    within(found, share * (most - OF_THE_PROMPT) + OF_THE_PROMPT, "MiB")
    assert found > share * (most - 30)                  # all that dx needs is counted


@pytest.mark.parametrize("size, trained, most", [
    (16, "LoRA", 250), pytest.param(64, "LoRA", 250, marks=pytest.mark.slow),
    pytest.param(64, "all", 290, marks=pytest.mark.slow)])
def test_the_peak_with_checkpoints(trained, most, size):
    tape = Tape(checkpoints=True, only_trained=trained == "LoRA")
    found = peak(unet(trained), size, tape, backward=True)
    within(found, size ** 2 / 64 ** 2 * (most - OF_THE_PROMPT) + OF_THE_PROMPT, "MiB")
