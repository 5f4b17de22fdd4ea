"""Pairs of a reference model and ours with the same random weights."""
import numpy as np
import torch
from diffusers import AutoencoderKL as ReferenceVAE
from diffusers import UNet2DConditionModel as ReferenceUNet
from diffusers import UNet2DModel as ReferenceUNet2D
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from transformers import CLIPModel as ReferenceWholeCLIP
from transformers import CLIPTextModel as ReferenceCLIP
from transformers import CLIPTextModelWithProjection as ReferenceCLIPWithProjection
from transformers import CLIPVisionModel as ReferenceVision
from transformers import CLIPVisionModelWithProjection as ReferenceVisionWithProjection

from tests.support.arrays import read_only
from tests.support.models import CLIPS, CONDITIONED, class_labels, vae_config
from tests.support.reference import copy_weights, randomise, widen_embeddings
from tinyldm.models import (
    AutoencoderKL,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    UNet2DConditionModel,
    UNet2DModel,
)


def unet_pair(config, dtype, size, batch=2, tokens=7):
    torch.manual_seed(0)
    reference = randomise(ReferenceUNet(**config).to(dtype)).eval()
    module = copy_weights(reference, UNet2DConditionModel(config))
    if dtype == torch.float64:
        widen_embeddings(reference)
    rng = np.random.default_rng(1)
    kind = np.float64 if dtype == torch.float64 else np.float32
    latents = read_only(rng.standard_normal((batch, *size, config["in_channels"])).astype(kind))
    D = config["cross_attention_dim"]
    context = read_only(rng.standard_normal((batch, tokens, D)).astype(kind))
    timesteps = read_only(np.array([3, 981, 500][:batch]))
    return reference, module, latents, timesteps, context


def conditioned_unet(name, dtype):
    """-> unet_pair's, and the further conditions: ours {name: array}, theirs as leaf tensors."""
    config, widths = CONDITIONED[name]
    pair = unet_pair(config, dtype, (8, 6))
    rng, kind = np.random.default_rng(3), pair[2].dtype
    more = {what: read_only(rng.standard_normal((2, width)).astype(kind))
            for what, width in widths.items()}
    if "time_ids" in more:
        more["time_ids"] = read_only(np.array([[64, 48, 0, 0, 64, 48], [32, 32, 4, 8, 16, 16]]))
    tensors = {what: torch.from_numpy(x.copy()) for what, x in more.items()}
    return pair, more, tensors


def call_conditioned(reference, latents, timesteps, context, tensors):
    added = {what: tensor for what, tensor in tensors.items() if what != "timestep_cond"}
    return reference(latents, torch.from_numpy(timesteps.copy()), context, added_cond_kwargs=added,
                     timestep_cond=tensors.get("timestep_cond")).sample


def unet_2d_pair(config, dtype):
    """-> reference, module, latents, timesteps, class_labels: two maps of 8×12."""
    reference = randomise(ReferenceUNet2D(**config).to(dtype)).eval()
    module = copy_weights(reference, UNet2DModel(config))
    kind = np.float32
    if dtype == torch.float64:
        widen_embeddings(reference)
        kind = np.float64
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((2, 8, 12, config.get("in_channels", 3))).astype(kind)
    labels = class_labels(config, rng)
    if config.get("class_embed_type") == "identity":
        labels = rng.standard_normal((2, reference.time_embedding.linear_2.out_features))
        labels = labels.astype(kind)
    return reference, module, *map(read_only, (latents, np.array([3, 981]), labels))


def vae_pair(config, dtype):
    config = vae_config(config)
    reference = randomise(ReferenceVAE(**config).to(dtype)).eval()
    return reference, copy_weights(reference, AutoencoderKL(config))


def clip_pair(config, dtype):
    reference = randomise(ReferenceCLIP(CLIPTextConfig(**config)).to(dtype)).eval()
    return reference, copy_weights(reference, CLIPTextModel(config))


def projection_pair(end, dtype, **options):
    """-> reference, module, ids (2,77), each with an end token and another one after it."""
    config = dict(CLIPS["as SD 2"], projection_dim=7, eos_token_id=end, **options)
    reference = ReferenceCLIPWithProjection(CLIPTextConfig(**config)).to(dtype)
    module = copy_weights(randomise(reference).eval(), CLIPTextModelWithProjection(config))
    ids = np.random.default_rng(1).integers(3, 97, (2, 77))
    ids[[0, 1], [9, 30]] = ids[:, 76] = 98
    return reference, module, read_only(ids)


def vision_pair(config, dtype):
    """-> reference, module, images: with a projection if the config has projection_dim."""
    theirs, ours = ((ReferenceVisionWithProjection, CLIPVisionModelWithProjection)
                    if "projection_dim" in config else (ReferenceVision, CLIPVisionModel))
    reference = randomise(theirs(CLIPVisionConfig(**config)).to(dtype)).eval()
    images = np.random.default_rng(1).standard_normal((2, *[config["image_size"]] * 2, 3))
    images = images.astype(np.float64 if dtype == torch.float64 else np.float32)
    return reference, copy_weights(reference, ours(config)), read_only(images)


def whole_clip_pair(config, dtype, count=2):
    """-> reference, module, images, ids: `count` of each; an end token is in each text."""
    reference = randomise(ReferenceWholeCLIP(CLIPConfig(**config)).to(dtype)).eval()
    size, rng = config["vision_config"]["image_size"], np.random.default_rng(1)
    images = rng.standard_normal((count, size, size, 3))
    images = images.astype(np.float64 if dtype == torch.float64 else np.float32)
    ids = rng.integers(3, 97, (count, 77))
    ids[np.arange(count), 9 + np.arange(count)] = ids[:, 76] = 98
    return reference, copy_weights(reference, CLIPModel(config)), read_only(images), read_only(ids)
