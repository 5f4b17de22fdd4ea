"""The systems of the comparison: each is built, trained, and handed back with a way to draw.

A function takes the data, a folder for the training's state and a number of steps, and returns a
Trained. A folder that holds the state of all steps is only read. All diffusion models have the
bundled model's noise schedule and predict v, except the prior, which predicts the embedding itself.
Those in latents use the bundled model's VAE as it is; its training is not part of any budget.
"""
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ... import ops
from ...diffusion.process import Process
from ...diffusion.schedule import Schedule
from ...diffusion.variational import bits_per_dimension
from ...images import to_pil
from ...layers import Tape, trainable_parameters
from ...models import (
    AutoencoderKL,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    DiTTransformer2DModel,
    PriorTransformer,
    StableUnCLIPImageNormalizer,
    UNet2DConditionModel,
    UNet2DModel,
)
from ...models.clip import end_tokens
from ...noise import randn
from ...pipelines.cascade import Cascade
from ...pipelines.ddpm import DDPM
from ...pipelines.dit import DiT
from ...pipelines.prior import TextPrior
from ...pipelines.stable_diffusion import StableDiffusion
from ...pipelines.unclip import UnCLIP
from ...training.loop import Trainer
from ...training.objectives import DiffusionLoss, HybridLoss, drop_captions
from ...training.optim import AdamW, initialise, initialise_dit, load_ema
from ...training.report import Report
from ...training.shards import split_batch
from ...training.stages.contrastive import initialise_clip
from ...training.stages.round_trip import RoundTrip, latent_shape
from ..configs import OPTIMIZER, SCHEDULER, TEXT_ENCODER, UNET
from ..drawing import draw, to_images
from .data import CLASSES, SEED, label_of, normal

RATE, WARMUP = 2e-3, 100
BATCH, FULL_SIZE_BATCH = 16, 8      # of latents and small pictures, and of 64x64 pixels
NO_CAPTION = 0.1            # share of the captions and labels that are left out in training
STEPS, GUIDANCE = 20, 3.0   # of drawing
PIXEL_STEPS = 50            # of drawing in pixels by DDPM, whose variance plays a part
BOUND_STEPS = "250"         # of the chain whose bits per dimension are measured
# Zero branches, as initialise has them, would hide picture and text from CLIP's embeddings.
INITIALISE = {CLIPModel: initialise_clip, DiTTransformer2DModel: initialise_dit}
WORDS = "size", "colour", "shape", "background"
# In pixels v is mostly the flat ground's colour. Its gradient, alike in all pixels, drowns that of
# the noise: after 1,150 steps of 8 pictures the network took away no noise at all.
NOISE_SCHEDULER = SCHEDULER | {"prediction_type": "epsilon"}
PIXEL_SCHEDULER = NOISE_SCHEDULER | {"thresholding": True}


class Trained(NamedTuple):
    """A trained system."""

    models: list                    # whose parameters count
    words: tuple                    # of WORDS, those that it is given
    draw: Callable                  # (scene, seed) -> a PIL image
    bits: Any = None                # images (B,64,64,3) -> bits per dimension, at most
    pipe: Any = None                # the pipeline that draws


def train(data, folder, steps, batch, models, loss):
    """Train {name: Module} from noise, and give them the average of their weights.

    loss(rows, rngs, share): of some rows of the pool, see training.shards.split_batch. The log
    has the seconds that the processor worked for each step, by which budgets are compared.
    """
    rng = np.random.default_rng(SEED)
    for model in models.values():
        INITIALISE.get(type(model), initialise)(model, rng)
    named = trainable_parameters(*models.values())
    loop = Trainer(folder / "state.npz", named, steps, RATE, WARMUP,
                   partial(AdamW, **OPTIMIZER), report=Report(folder))
    loop.models, before = models, time.process_time()

    def batch_loss(rng):                                # not used: each picture has its own
        nonlocal before
        report = split_batch(loss, data.batch(loop.batch, batch))
        before, then = time.process_time(), before
        return report | {"cpu": before - then}

    loop.train(batch_loss)
    load_ema(loop.path, named)


def objective_of(scheduler):
    """The loss of all diffusion models except those in pixels alone, whose bound is measured.

    Timesteps in the middle are drawn more often, as in the bundled model's recipe. After 200 steps
    of 16 latents the DiT's error was smaller at all timesteps but the noisiest.
    """
    return DiffusionLoss(Schedule.from_config(scheduler), timesteps="logit-normal")


# ---- what nothing can beat ----------------------------------------------------------------------

def true(data, folder, steps):
    """The drawings themselves."""
    return Trained([], WORDS, lambda scene, seed: Image.fromarray(draw(scene)))


def round_trip(data, folder, steps):
    """The drawings after the VAE's round trip: the best that its latents allow."""
    def through(scene, seed):
        mean, _ = data.vae.encode(to_images([scene]))
        return to_pil(data.vae.decode(mean))[0]
    return Trained([], WORDS, through)


# ---- without text -----------------------------------------------------------------------------

VAE = {"block_out_channels": [8, 16, 32, 64, 96, 128, 128], "latent_channels": 32,
       "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 64}


def vae(data, folder, steps, batch=FULL_SIZE_BATCH):
    """A VAE alone: 64x64 pixels become 32 numbers, and 32 normal numbers become a picture.

        loss = (1/2 ln(2 pi e mean d^2) + KL(N(mean, var), N(0, 1)) / D) / ln 2 + log2(127.5)
        d = decode(z) - images,      z = mean + sqrt(var) noise

    It is the bound, in bits per dimension, of a decoder N(decode(z), sigma^2) of D numbers, with
    the sigma that fits best; so no weight has to be chosen. log2(127.5): pixels lie 1/127.5 apart.
    Source: Kingma & Welling 2013, arXiv:1312.6114, eq. 10; Rybkin et al. 2020, "Simple and
    Effective VAE Training with Calibrated Decoders", arXiv:2006.13202, section 3.
    """
    model = AutoencoderKL(VAE)

    def loss(rows, rngs, share):
        images = data.images(rows)
        trip = RoundTrip(model, images, normal(rngs, latent_shape(model, images)))
        mse, cache = ops.mse(trip.output, images)
        bits, D = share / math.log(2), images[0].size
        doutput, _ = ops.mse_backward(float(bits * 0.5 / mse), cache)
        trip.backward(doutput, bits / D)
        kl = float(trip.kl)
        nats = 0.5 * math.log(2 * math.pi * math.e * mse) + kl / D
        return {"loss": bits * nats + share * math.log2(127.5), "mse": share * float(mse),
                "kl": share * kl}

    train(data, folder, steps, batch, {"vae": model}, loss)
    side = 64 // model.vae_scale_factor
    shape = 1, side, side, VAE["latent_channels"]
    return Trained([model], (), lambda scene, seed: to_pil(model.decode(randn(shape, seed)))[0],
                   partial(vae_bits, model))


def vae_bits(model, images):
    """The bound of a VAE, one z drawn for each picture, a pixel being one of 256 values."""
    mean, logvar = model.encode(images)
    noise = np.random.default_rng(SEED).standard_normal(mean.shape, np.float32)
    output = model.decode(mean + np.exp(0.5 * logvar) * noise)
    sigma2 = ops.mse(output, images)[0]
    likelihood, _ = ops.discretized_log_likelihood(images, output,
                                                   np.full_like(output, math.log(sigma2)))
    kl, _ = ops.kl_normal(mean, logvar)
    return float((kl / images[0].size - likelihood.mean()) / math.log(2))


PIXELS = {"sample_size": 64, "block_out_channels": [16, 32, 64, 64, 64], "layers_per_block": 1,
          "norm_num_groups": 8, "attention_head_dim": 16,
          "down_block_types": ["DownBlock2D"] * 3 + ["AttnDownBlock2D"] * 2,
          "up_block_types": ["AttnUpBlock2D"] * 2 + ["UpBlock2D"] * 3}


def pixels(data, folder, steps, batch=FULL_SIZE_BATCH, learned=False):
    """DDPM in pixels. learned: with the variance of Improved DDPM, trained by L_hybrid.

    Source: Ho et al. 2020, arXiv:2006.11239; Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 16.
    """
    unet = UNet2DModel(PIXELS | {"out_channels": 6 if learned else 3})
    schedule = Schedule.from_config(NOISE_SCHEDULER)
    objective = DiffusionLoss(schedule)
    if learned:
        objective = HybridLoss(objective)

    def loss(rows, rngs, share):
        images, tape = data.images(rows), Tape()
        x_t, timesteps, noise = objective.noisy(images, rngs)
        output = unet(x_t, timesteps, tape)
        value, doutput, expected = objective(output, images, noise, timesteps, share)
        unet.backward(doutput, tape)
        return {"loss": value, "expected": expected}

    train(data, folder, steps, batch, {"unet": unet}, loss)
    variance = "learned_range" if learned else "fixed_large"
    pipe = DDPM(unet, NOISE_SCHEDULER | {"_class_name": "DDPMScheduler", "variance_type": variance},
                PIXEL_STEPS)

    def bits(images):
        process, rng = Process.of(schedule).respaced(BOUND_STEPS), np.random.default_rng(SEED)
        return bits_per_dimension(unet, process, [images],
                                  partial(rng.standard_normal, dtype=np.float32), variance).total

    return Trained([unet], (), lambda scene, seed: pipe(seed=seed)[0], bits, pipe)


DIT = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 8,
       "out_channels": 8, "patch_size": 2, "sample_size": 16, "num_embeds_ada_norm": CLASSES}


def dit(data, folder, steps, batch=BATCH):
    """DiT in latents, by class: a colour and a shape.

    Source: Peebles & Xie 2022, arXiv:2212.09748.
    """
    transformer = DiTTransformer2DModel(DIT)
    objective = objective_of(SCHEDULER)

    def loss(rows, rngs, share):
        latents, tape = data.latents(rows, rngs), Tape()
        x_t, timesteps, noise = objective.noisy(latents, rngs)
        labels = np.array(drop_captions(data.labels[rows], NO_CAPTION, rngs, CLASSES))
        output = transformer(x_t, timesteps, labels, tape)
        value, doutput, expected = objective(output, latents, noise, timesteps, share)
        transformer.backward(doutput, tape)
        return {"loss": value, "expected": expected}

    train(data, folder, steps, batch, {"transformer": transformer}, loss)
    pipe = DiT(transformer, data.vae, SCHEDULER, None, STEPS, GUIDANCE)
    return Trained([transformer], ("colour", "shape"),
                   lambda scene, seed: pipe(label_of(scene), seed=seed)[0], pipe=pipe)


# ---- with text --------------------------------------------------------------------------------

TEXT = 64, 2                # channels and layers of a text encoder
WIDTHS = 32, 48, 64         # of a UNet of latents


def text_config(data, width, layers):
    end = data.tokenizer.end                            # the last token of the vocabulary
    return TEXT_ENCODER | {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "projection_dim": width, "vocab_size": end + 1, "eos_token_id": end}


def unet_config(widths, context, **changes):
    return UNET | {"block_out_channels": [*widths], "cross_attention_dim": context} | changes


def captions(data, rows, rngs):
    """The captions' ids (B,77), some of them replaced by the empty one's."""
    return data.ids(drop_captions([data.captions[row] for row in rows], NO_CAPTION, rngs))


def latent(data, folder, steps, batch=BATCH, text=TEXT, widths=WIDTHS):
    """Latent diffusion, as the bundled model: text encoder and UNet are trained together.

    Source: Rombach et al. 2022, arXiv:2112.10752, eq. 3.
    """
    encoder = CLIPTextModel(text_config(data, *text))
    unet = UNet2DConditionModel(unet_config(widths, text[0]))
    objective = objective_of(SCHEDULER)

    def loss(rows, rngs, share):
        latents, tape = data.latents(rows, rngs), Tape()
        x_t, timesteps, noise = objective.noisy(latents, rngs)
        context = encoder(captions(data, rows, rngs), tape)
        output = unet(x_t, timesteps, context, tape)
        value, doutput, expected = objective(output, latents, noise, timesteps, share)
        encoder.backward(unet.backward(doutput, tape).context, tape)
        return {"loss": value, "expected": expected}

    train(data, folder, steps, batch, {"text_encoder": encoder, "unet": unet}, loss)
    pipe = StableDiffusion(data.tokenizer, encoder, unet, data.vae, SCHEDULER, STEPS,
                           guidance_scale=GUIDANCE)
    return Trained([encoder, unet], WORDS,
                   lambda scene, seed: pipe(scene.caption(), seed=seed)[0], pipe=pipe)


BASE = {"in_channels": 3, "out_channels": 3, "sample_size": 16,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}
BASE_WIDTHS = 32, 64
SUPER_RES = {"in_channels": 6, "out_channels": 3, "sample_size": 64, "class_embed_type": "timestep",
             "down_block_types": ["DownBlock2D"] * 3 + ["CrossAttnDownBlock2D"],
             "up_block_types": ["CrossAttnUpBlock2D"] + ["UpBlock2D"] * 3}
SUPER_RES_WIDTHS = 16, 24, 48, 64
LARGE = 4                   # one picture in so many is also trained in its full size


def cascade(data, folder, steps, batch=BATCH):
    """A small Imagen: 16x16 pixels from the text, then 64x64 from these and the text.

    Noise of a random level is added to the small picture, and the second UNet gets the level.
    Source: Ho et al. 2021, arXiv:2106.15282; Saharia et al. 2022, arXiv:2205.11487, section 2.4.
    """
    encoder = CLIPTextModel(text_config(data, *TEXT))
    unet = UNet2DConditionModel(unet_config(BASE_WIDTHS, TEXT[0], **BASE))
    super_res = UNet2DConditionModel(unet_config(SUPER_RES_WIDTHS, TEXT[0], **SUPER_RES))
    objective = objective_of(PIXEL_SCHEDULER)

    def loss(rows, rngs, share):
        images, tape = data.images(rows), Tape()
        small, _ = ops.average_pool(images, 4, 4)                       # (B,16,16,3)
        context = encoder(captions(data, rows, rngs), tape)
        x_t, timesteps, noise = objective.noisy(small, rngs)
        output = unet(x_t, timesteps, context, tape)
        value, doutput, expected = objective(output, small, noise, timesteps, share)

        n = -(-len(rows) // LARGE)
        large, rngs, size = images[:n], rngs[:n], images.shape[1:]
        x_t, large_timesteps, large_noise = objective.noisy(large, rngs)
        levels = np.array([rng.integers(objective.schedule.num_train_timesteps) for rng in rngs])
        enlarged, _ = ops.upsample_bilinear(small[:n], size[:2])
        low = objective.schedule.add_noise(enlarged, normal(rngs, size), levels)
        output = super_res(np.concatenate([x_t, low], axis=-1), large_timesteps, context[:n], tape,
                           class_labels=levels)
        large_value, dlarge, _ = objective(output, large, large_noise, large_timesteps, share)
        dlarge_context = super_res.backward(dlarge, tape).context
        dcontext = unet.backward(doutput, tape).context
        dcontext[:n] += dlarge_context                  # both UNets read it
        encoder.backward(dcontext, tape)
        return {"loss": value + large_value, "expected": 2 * expected, "small": value}

    train(data, folder, steps, batch,
          {"text_encoder": encoder, "unet": unet, "super_res": super_res}, loss)
    pipe = Cascade(data.tokenizer, encoder, unet, super_res, PIXEL_SCHEDULER, PIXEL_SCHEDULER,
                   PIXEL_SCHEDULER, STEPS, GUIDANCE)
    return Trained([encoder, unet, super_res], WORDS,
                   lambda scene, seed: pipe(scene.caption(), seed=seed)[0], pipe=pipe)


VISION = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
          "num_attention_heads": 4, "image_size": 64, "patch_size": 8}
PRIOR = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 3,
         "num_embeddings": 77}
# karlo's, see diffusion/samplers.
PRIOR_SCHEDULER = {"_class_name": "UnCLIPScheduler", "prediction_type": "sample",
                   "clip_sample_range": 5, "variance_type": "fixed_small_log"}
NOISING_SCHEDULER = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}
PRIOR_STEPS, PRIOR_GUIDANCE = 25, 2.0
NOISE_LEVELS = 200          # of embeddings in training; drawing adds none
CLIP_BATCH, CLIP_SHARE = 128, 0.125


def prior(data, folder, steps, batch=BATCH):
    """unCLIP: a CLIP, then a prior of its image embeddings and a decoder that draws from them.

    The CLIP is trained first, then prior and decoder at once; CLIP's text half reads for both.
    Source: Ramesh et al. 2022, arXiv:2204.06125, section 2; Stable unCLIP for the decoder.
    """
    clip = contrastive_model(data, folder / "clip", max(1, int(CLIP_SHARE * steps)))
    config, width = text_config(data, *TEXT), TEXT[0]
    reader, projecting = CLIPTextModel(config), CLIPTextModelWithProjection(config)
    reader.text_model = projecting.text_model = clip.text_model
    projecting.text_projection = clip.text_projection
    unet = UNet2DConditionModel(unet_config(
        WIDTHS, width, class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * width))
    model = PriorTransformer(PRIOR | {"embedding_dim": width})
    normalizer = StableUnCLIPImageNormalizer({"embedding_dim": width})
    embeds = np.concatenate(data.each(lambda rows: clip.encode_image(data.images(rows))))
    mean, std = embeds.mean(axis=0, keepdims=True), embeds.std(axis=0, keepdims=True)
    normalizer.mean.data, normalizer.std.data = mean, std
    model.clip_mean.trainable = model.clip_std.trainable = False
    pipe = UnCLIP(data.tokenizer, reader, unet, data.vae, SCHEDULER, normalizer,
                  NOISING_SCHEDULER,
                  text_prior=TextPrior(data.tokenizer, projecting, model, PRIOR_SCHEDULER),
                  num_inference_steps=STEPS, guidance_scale=GUIDANCE)
    of_prior, of_decoder = objective_of(PRIOR_SCHEDULER), objective_of(SCHEDULER)

    def loss(rows, rngs, share):
        ids, tape = captions(data, rows, rngs), Tape()
        context = clip.text_model(ids)                  # frozen
        text_embeds = clip.text_projection(context[end_tokens(ids, clip.end)])
        mask = np.arange(ids.shape[1]) <= (ids == clip.end).argmax(axis=1)[:, None]
        clean = normalizer.scale(embeds[rows])
        x_t, timesteps, noise = of_prior.noisy(clean, rngs)
        output = model(x_t, timesteps, text_embeds, context, tape, mask=mask)
        value, doutput, _ = of_prior(output, clean, noise, timesteps, share)
        model.backward(doutput, tape)

        latents = data.latents(rows, rngs)
        levels = np.array([rng.integers(NOISE_LEVELS) for rng in rngs])
        labels = pipe.noise_embeds(embeds[rows], levels, normal(rngs, (width,)))
        labels[ids[:, 1] == clip.end] = 0               # no caption: guidance moves away from it
        x_t, timesteps, noise = of_decoder.noisy(latents, rngs)
        output = unet(x_t, timesteps, context, tape, class_labels=labels)
        decoder, doutput, _ = of_decoder(output, latents, noise, timesteps, share)
        unet.backward(doutput, tape)
        return {"loss": value + decoder, "prior": value}

    train(data, folder / "prior", steps, batch, {"prior": model, "unet": unet}, loss)
    model.clip_mean.data, model.clip_std.data = mean, std
    return Trained([clip, model, unet], WORDS, lambda scene, seed: pipe(
        scene.caption(), seed=seed, prior_guidance_scale=PRIOR_GUIDANCE,
        prior_num_inference_steps=PRIOR_STEPS)[0], pipe=pipe)


def contrastive_model(data, folder, steps):
    """A CLIP of the pool's pictures and captions. Each shard of a batch is contrasted in itself."""
    clip = CLIPModel({"text_config": text_config(data, *TEXT), "vision_config": VISION,
                      "projection_dim": TEXT[0]})

    def loss(rows, rngs, share):
        tape = Tape()
        ids = data.ids([data.captions[row] for row in rows])
        logits = clip(data.images(rows), ids, tape)
        value, cache = ops.contrastive(logits)
        clip.backward(ops.contrastive_backward(share, cache), tape)
        return {"loss": share * float(value)}

    train(data, folder, steps, CLIP_BATCH, {"clip": clip}, loss)
    return clip
