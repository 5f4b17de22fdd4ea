"""Stable Diffusion 1.5's architecture with random weights, for test_sd15.py and the benchmarks.

The configs are those of single files; test_single_file.py compares them with the published ones.
"""
import math

import numpy as np

from tests.support.extra import torch
from tests.support.reference import reference_names
from tinyldm import backend
from tinyldm.checkpoints.single_file.kinds import SD1

UNET, VAE, TEXT_ENCODER, SCHEDULER = SD1.unet, SD1.vae, SD1.text_encoder, SD1.scheduler


def randomise(module, seed=0):
    """Fill a module with noise of std fan_in^-1/2: activations stay near 1 at any depth."""
    def fill(item):
        i, (name, parameter) = item
        noise = np.random.default_rng((seed, i)).standard_normal(parameter.shape, np.float32)
        if noise.ndim == 1:
            noise *= 0.2
            noise += "norm" in name and name.endswith("weight")
        else:
            fan_in = noise.shape[1] if noise.ndim == 2 else math.prod(noise.shape[:3])
            noise *= np.float32(fan_in ** -0.5)
        parameter.data = noise

    backend.keep_freed_memory()                         # as loading does
    backend.parallel(fill, enumerate(module.named_parameters()))
    return module


def share_weights(module, reference):
    """Give the reference our weights: matrices are shared, convolutions copied to torch's order."""
    ours = dict(module.named_parameters())
    names = zip(reference_names(reference), reference.named_parameters())
    state = {}
    for (published, _), (theirs, _) in names:
        tensor = torch.from_numpy(ours[published].data)
        state[theirs] = tensor.permute(3, 2, 0, 1).contiguous() if tensor.ndim == 4 else tensor
        ours[published].data.flags.writeable = False
    reference.load_state_dict(state, assign=True)
    return reference.eval()
