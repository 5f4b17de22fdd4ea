"""Stage 2: train the UNet and the text transformer together to find the noise in noisy latents.

    loss = mean (noise_pred - noise)^2 / a_t,       x_t = sqrt(a_t) x_start + sqrt(1 - a_t) noise

The network predicts v = sqrt(a_t) noise - sqrt(1 - a_t) x_start. noise_pred follows from it, and
the loss above equals mean (unet(x_t, t, text_encoder(caption)) - v)^2. x_start are the latents of a
fixed pool of pictures, encoded once. One caption in ten is left out, so that the same network
learns the unconditional prediction that guidance needs.
Source: Rombach et al. 2022, arXiv:2112.10752, eq. 3; Salimans & Ho 2022, arXiv:2202.00512, section
4 (this weight is its "SNR + 1" on x_start); Ho & Salimans 2022, arXiv:2207.12598, algorithm 1.
"""
from functools import partial

import numpy as np
from tqdm import tqdm

from .. import ranks
from ..backend import array_library, asarray, parallel, to_host
from ..diffusion.schedule import Schedule
from ..models import CLIPTextModel, UNet2DConditionModel
from ..pipelines.stable_diffusion import StableDiffusion
from ..text.tokenizer import MAX_LENGTH, Tokenizer
from ..training.loop import Trainer
from ..training.objectives import DiffusionLoss, diffusion_loss
from ..training.optim import AdamW, initialise
from ..training.report import Report
from ..training.shards import SHARDS, split_batch
from ..training.state import check_writable, read_npz, unusable, write_npz
from . import drawing
from .autoencoder import SHOWN, load_vae
from .configs import GUIDANCE, OPTIMIZER, SCHEDULER, STEPS, TEXT_ENCODER, UNET
from .scenes import held_out_scenes
from .vocabulary import write_tokenizer

POOL = 32768            # pictures
BATCH = 64
NO_CAPTION = 0.1
VALIDATED = 16              # pictures of the pool, whose loss is looked at again and again


def make_pool(run, device="cpu", count=None):
    """Encode P = count (POOL) drawn pictures, once: {"mean", "std", "ids", "no_caption",
    "scaling_factor"}.

    mean, std (P,16,16,4) float16: the distribution of each picture's latents, not scaled. ids
    (P,77): the captions' tokens. scaling_factor: 1 / the standard deviation of all latents, so
    that the UNet's input has variance 1.
    """
    path = run / "pool.npz"
    ranks.first(lambda: path.exists() or encode_pool(run, path, device, count))
    pictures = None, None, None, None
    pool = read_npz(path, {"mean": pictures, "std": pictures, "ids": (None, MAX_LENGTH),
                           "no_caption": (MAX_LENGTH,), "scaling_factor": ()})
    if pool["mean"].shape != pool["std"].shape or not 0 < len(pool["ids"]) == len(pool["mean"]):
        raise unusable(path, "its arrays are of different numbers of pictures")
    return pool


def encode_pool(run, path, device="cpu", count=None):
    """Write the pool of the VAE in `run` to `path`."""
    vae = load_vae(run).move_to(array_library(device))

    def encode(images):
        return [to_host(moment) for moment in vae.encode(vae.xp.asarray(images))]

    check_writable(path)
    write_tokenizer(run / "tokenizer")
    tokenizer = Tokenizer.from_folder(run / "tokenizer")
    rng = np.random.default_rng(2)
    encoded, ids = [], []
    for _ in tqdm(range((count or POOL) // BATCH), desc="encoding the pool"):
        images, captions = drawing.batch(rng, BATCH)
        encoded += parallel(encode, np.array_split(images, SHARDS))
        ids += [tokenizer(caption)[0] for caption in captions]
    mean, logvar = (np.concatenate(part).astype(np.float16) for part in zip(*encoded))
    std = np.exp(0.5 * logvar)
    variance = mean.astype(np.float64).var() + (std.astype(np.float64) ** 2).mean()
    write_npz(path, mean=mean, std=std, ids=np.stack(ids).astype(np.int16),
              no_caption=tokenizer("")[0], scaling_factor=variance ** -0.5)


def build(pool):
    """An untrained text transformer and UNet for the pool's tokens."""
    end = int(pool["no_caption"][-1])                   # the last token of the vocabulary
    text_encoder = CLIPTextModel(TEXT_ENCODER | {"vocab_size": end + 1, "bos_token_id": end - 1,
                                                 "eos_token_id": end, "pad_token_id": end})
    return text_encoder, UNet2DConditionModel(UNET)


def named_parameters(text_encoder, unet):
    yield from text_encoder.named_parameters("text_encoder.")
    yield from unet.named_parameters("unet.")


def train_unet(run, steps, batch=BATCH, learning_rate=1e-3, validate_every=0, sample_every=0,
               device="cpu", pool=None):
    """Train for `steps` batches; resume from the state in `run`, which must hold stage 1.

    pool: the pictures to encode for it, if that was not done yet (POOL).
    """
    pool, xp = make_pool(run, device, pool), array_library(device)
    text_encoder, unet = build(pool)
    rng = np.random.default_rng(3)
    initialise(text_encoder, rng)
    initialise(unet, rng)
    text_encoder.move_to(xp)
    unet.move_to(xp)
    schedule = Schedule.from_config(SCHEDULER)
    loss, factor = partial(diffusion_loss, text_encoder, unet, schedule), pool["scaling_factor"]
    trainer = Trainer(run / "unet.npz", named_parameters(text_encoder, unet), steps, learning_rate,
                      optimizer=partial(AdamW, **OPTIMIZER),
                      report=Report(run / "unet", sample_every, validate_every))
    trainer.models = {"text_encoder": text_encoder, "unet": unet}

    def batch_loss(rng):
        chosen = rng.integers(len(pool["mean"]), size=batch)
        mean, std = (pool[name][chosen].astype(np.float32) for name in ("mean", "std"))
        latents = mean + std * rng.standard_normal(mean.shape, np.float32)
        latents *= np.float32(factor)
        ids = pool["ids"][chosen].astype(np.int64)
        ids[rng.random(batch) < NO_CAPTION] = pool["no_caption"]
        return split_batch(loss, [xp.asarray(latents), xp.asarray(ids)], rng, xp)

    def validate():
        context = text_encoder(xp.asarray(pool["ids"][:VALIDATED].astype(np.int64)))
        return DiffusionLoss(schedule).profile(
            lambda x_t, timesteps: unet(x_t, asarray(timesteps, like=x_t), context),
            xp.asarray(pool["mean"][:VALIDATED].astype(np.float32) * np.float32(factor)))

    def sample():
        pipe = StableDiffusion(Tokenizer.from_folder(run / "tokenizer"), text_encoder, unet,
                               load_vae(run, float(factor)).move_to(xp), SCHEDULER, STEPS,
                               guidance_scale=GUIDANCE)
        return [pipe(prompt, seed=seed)[0]
                for seed, prompt in enumerate(held_out_scenes(SHOWN, seed=0))]

    trainer.train(batch_loss, sample=sample, validate=validate)
