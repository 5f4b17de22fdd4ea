"""Stable Diffusion 1.5's architecture with random weights, for test_sd15.py and the benchmarks.

The configs hold those fields of the published config.json files that say something.
"""
import math

import numpy as np
import torch

from tinyldm import backend

from .reference import reference_names

UNET = {
    "in_channels": 4, "out_channels": 4, "sample_size": 64, "act_fn": "silu",
    "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "attention_head_dim": 8, "cross_attention_dim": 768,
    "norm_num_groups": 32, "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0,
}
VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 512, "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT_ENCODER = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False, "trained_betas": None,
}


def randomise(module, seed=0):
    """Fill a module with noise of deviation fan_in^-1/2: activations stay near 1 at any depth."""
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
    """Give the reference our weights: matrices are shared, kernels copied into torch's order."""
    ours = dict(module.named_parameters())
    names = zip(reference_names(reference), reference.named_parameters())
    state = {}
    for (published, _), (theirs, _) in names:
        tensor = torch.from_numpy(ours[published].data)
        state[theirs] = tensor.permute(3, 2, 0, 1).contiguous() if tensor.ndim == 4 else tensor
        ours[published].data.flags.writeable = False
    reference.load_state_dict(state, assign=True)
    return reference.eval()
