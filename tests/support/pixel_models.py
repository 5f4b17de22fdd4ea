"""Folders of small diffusion models for the stage `ddpm`, and pictures with classes."""
import numpy as np
from PIL import Image

import tinyldm
from tests.support.models import PIXELS, random_weights
from tests.support.small_pipelines import make_vae
from tinyldm.models import AutoencoderKL, DiTTransformer2DModel, UNet2DModel
from tinyldm.pipelines.ddpm import DDPM
from tinyldm.pipelines.dit import DiT
from tinyldm.pipelines.guided_ddpm import GuidedDDPM
from tinyldm.training.stages.new_models import scheduler_config

SIDE, CLASSES = 16, ("cat", "dog", "emu")
DIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2}


def write_classes(folder, count=9):
    """cat_0.png, dog_1.png, emu_2.png, ...: coarse pictures of 20x16 pixels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3)).astype(np.uint8))
        coarse.resize((20, 16)).save(folder / f"{CLASSES[i % 3]}_{i}.png")
    return folder


def filled(model):
    model.load_state_dict(random_weights(model, 1))
    return model


def write_model(folder, kind, variance="fixed_large", prediction_type="epsilon", T=1000,
                beta_schedule="linear"):
    """A pipeline with random weights as a folder. kind: plain, rescaled, named, guided or dit."""
    scheduler = scheduler_config(beta_schedule, T, prediction_type, variance)
    channels = 3 * (1 + (variance == "learned"))
    if kind == "dit":
        vae, config, tensors = make_vae((8, 16, 16))
        vae = vae(config)
        vae.load_state_dict(tensors)
        assert isinstance(vae, AutoencoderKL)
        transformer = filled(DiTTransformer2DModel(DIT | {
            "in_channels": 4, "out_channels": 4 * channels // 3, "sample_size": SIDE // 4,
            "num_embeds_ada_norm": 3}))
        pipe = DiT(transformer, vae, {**scheduler, "_class_name": "DDIMScheduler"})
    else:
        config = PIXELS | {"sample_size": SIDE, "in_channels": 3, "out_channels": channels}
        guided = kind in ("guided", "named")
        names = {"emu": 0, "cat": 1, "dog": 2} if kind == "named" else None
        unet = filled(UNet2DModel(config | ({"num_class_embeds": 4} if guided else {})))
        pipe = (GuidedDDPM(unet, scheduler, names=names) if guided else
                DDPM(unet, scheduler, rescale_timesteps=kind == "rescaled"))
    tinyldm.save(pipe, folder)
    return folder
