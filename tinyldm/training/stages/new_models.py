"""Diffusion models to train from scratch: ddpm.py asks for one by its name.

    new_pipeline    a name, classes, a schedule -> a pipeline with new weights, DDPM or DiT
"""
import numpy as np

from ...errors import TinyldmError
from ...models import DiTTransformer2DModel, UNet2DModel
from ...pipelines.ddpm import DDPM
from ...pipelines.dit import DiT
from ...pipelines.guided_ddpm import GuidedDDPM
from ..optim import initialise, initialise_dit

CREATION = 2 ** 32 - 1      # the key of the first numbers; the steps have smaller ones
GUIDANCE = 2.0              # of drawing with a new model, where classes were dropped in training
# UNets of pixels. small: for 32×32, 1.8 million numbers. cifar10: Ho et al. 2020's, 36 million;
# google/ddpm-cifar10-32 has this config.
UNETS = {
    "small": {"block_out_channels": [32, 64, 96], "layers_per_block": 1, "norm_num_groups": 8,
              "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
              "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
              "attention_head_dim": 32},
    "cifar10": {"block_out_channels": [128, 256, 256, 256], "layers_per_block": 2,
                "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D",
                                     "DownBlock2D"],
                "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
                "attention_head_dim": None, "norm_eps": 1e-6, "downsample_padding": 0,
                "flip_sin_to_cos": False, "freq_shift": 1},
}
# A DiT on latents, of 2.1 million numbers. Frequencies and norms are those of diffusers' class.
DIT = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 32, "patch_size": 2,
       "attention_bias": True, "activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero",
       "norm_elementwise_affine": False}
MODELS = (*UNETS, "dit")


def scheduler_config(beta_schedule, T, prediction_type, variance):
    """The dict of a scheduler_config.json, as diffusers reads it.

    linear: from 1e-4 to 0.02 at T = 1000; other T scale both, so that the end is as noisy, as in
    arXiv:2102.09672's code. variance: fixed_small, fixed_large or learned.
    """
    betas = {"beta_start": 0.1 / T, "beta_end": 20 / T} if beta_schedule == "linear" else {}
    if betas and betas["beta_end"] >= 1:
        raise TinyldmError(f"the linear schedule needs more than 20 timesteps, not {T}: give "
                           "--train-timesteps from 21, or --beta-schedule squaredcos_cap_v2")
    return {"_class_name": "DDPMScheduler", "num_train_timesteps": T,
            "beta_schedule": beta_schedule, **betas, "prediction_type": prediction_type,
            "variance_type": "learned_range" if variance == "learned" else variance,
            "clip_sample": True}


def new_pipeline(name, side, scheduler, *, seed=0, classes=(), dropped=False, learned=False,
                 vae=None):
    """A pipeline with new weights, float32, for pictures of side × side pixels -> DDPM,
    GuidedDDPM or DiT.

    name: of MODELS. scheduler: see scheduler_config. classes: their names; dropped: one more class
    stands for "no class", by which guidance is possible. learned: the model predicts a variance,
    too. vae: for "dit".
    Raises TinyldmError for a side that does not fit, and for a DiT without classes.
    """
    rng = np.random.default_rng([seed, CREATION])
    names = {name: i for i, name in enumerate(classes)}
    if name == "dit":
        if not classes:
            raise TinyldmError("a DiT draws by class: give --classes, or another --model")
        channels, f = vae.settings.latent_channels, vae.vae_scale_factor
        if side % (f * DIT["patch_size"]):
            raise TinyldmError(f"--resolution must be a multiple of {f * DIT['patch_size']} for "
                               f"this DiT and VAE, not {side}")
        transformer = DiTTransformer2DModel(DIT | {
            "in_channels": channels, "out_channels": channels * (1 + learned),
            "sample_size": side // f, "num_embeds_ada_norm": len(classes)})
        initialise_dit(transformer, rng)
        # DDIM leaves the variance out, as diffusers' pipeline of DiT needs it.
        own = {"_class_name": "DDIMScheduler", "clip_sample": False}
        return DiT(transformer, vae, without(scheduler, "variance_type") | own, names,
                   guidance_scale=GUIDANCE if dropped else 1.0)
    config = UNETS[name] | {"sample_size": side, "in_channels": 3,
                            "out_channels": 3 * (1 + learned)}
    if classes:
        config["num_class_embeds"] = len(classes) + dropped
    unet = UNet2DModel(config)
    pipe = (GuidedDDPM(unet, scheduler, names=names, guidance_scale=GUIDANCE)
            if classes and dropped else DDPM(unet, scheduler))
    initialise(unet, rng)
    unet.conv_out.weight.data[...] = 0                  # as Ho et al.
    return pipe


def without(entries, key):
    return {name: value for name, value in entries.items() if name != key}
