"""The bundled model's architecture, in the keys of the public config.json files.

It is small enough to train on two cores: the VAE downsamples by 4 only, not by 8.
"""
from functools import partial

from ..training.optim import ldm_decay

LATENT_CHANNELS = 8

VAE = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": 3, "out_channels": 3,
    "block_out_channels": [24, 48, 96], "layers_per_block": 1,
    "latent_channels": LATENT_CHANNELS,
    "norm_num_groups": 8,
    "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
    "sample_size": 64, "scaling_factor": 1.0,       # measured once the VAE is trained
}

TEXT_ENCODER = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 128,
    "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "hidden_act": "quick_gelu", "max_position_embeddings": 77, "layer_norm_eps": 1e-5,
    "projection_dim": 128,
}                                                   # vocabulary and end token: the tokenizer's

UNET = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu",
    "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS,
    "block_out_channels": [64, 96, 128], "layers_per_block": 1,
    "norm_num_groups": 8, "norm_eps": 1e-5,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3, "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    "attention_head_dim": 4, "cross_attention_dim": 128, "flip_sin_to_cos": True, "freq_shift": 0,
    "center_input_sample": False, "downsample_padding": 1, "mid_block_scale_factor": 1,
    "sample_size": 16,
}

# The noise schedule of Ho et al. 2020. Stable Diffusion's schedule leaves enough of the latents'
# mean at the last timestep to give the background colour away in training; at inference that hint
# is missing. And v-prediction, as in Stable Diffusion 2.1: from t = 800 on, x_start is less than a
# 25th of x_t. A small network that predicts the noise is too coarse to leave so little over.
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
    "num_train_timesteps": 1000, "prediction_type": "v_prediction",
    "solver_order": 2, "algorithm_type": "dpmsolver++",
    "timestep_spacing": "trailing", "steps_offset": 1,
    "lower_order_final": True, "final_sigmas_type": "zero",
}

STEPS = 25                  # that this model needs per picture
GUIDANCE = 6.5              # at 3 shapes are less sure, at 8 colours

# How the recipe trains: squares of gradients are averaged over the last 100 updates only, and
# biases and norms decay as all weights do.
OPTIMIZER = {"beta2": 0.99, "decay_vectors": True, "ema": partial(ldm_decay, most=0.999)}
