"""The losses: of an autoencoder, of a denoiser with its text encoder, and of one of pixels.

Each runs forward and backward on one shard of a batch and leaves the gradients on the parameters.
"""
import numpy as np

from .. import ops
from ..backend import asarray, get_xp
from ..diffusion import variational
from ..diffusion.objective import sample_timesteps, target
from ..layers import NO_TAPE, Tape

L1_WEIGHT, MSE_WEIGHT, KL_WEIGHT = 0.3, 12, 1e-7


def vae_loss(vae, images, rng, share, decoder_only=False):
    """How far an autoencoder is from reconstructing images, and the gradients.

        loss = L1_WEIGHT mean |d| + MSE_WEIGHT mean d^2 + KL_WEIGHT KL(N(mean, var), N(0, 1))
        d = decode(z) - images,       z = mean + sqrt(var) noise

    |d| weighs all pixels alike, and nearly all are plain background. d^2 weighs most where d is
    largest: at corners and tips, which tell shapes apart.
    Source: Rombach et al. 2022, arXiv:2112.10752, appendix G, with d^2 in place of its perceptual
    and adversarial terms.
    images (B,H,W,3) in [-1, 1] -> {"loss", "mse", "kl"}, each times share, the shard's part of the
    batch. decoder_only: only the decoder gets gradients.
    """
    tape = Tape()
    mean, logvar = vae.encode(images, NO_TAPE if decoder_only else tape)
    std = get_xp(logvar).exp(0.5 * logvar)
    noise = asarray(rng.standard_normal(mean.shape, np.float32), like=mean)
    z = mean + std * noise
    output = vae.decode(z, tape)
    l1, l1_cache = ops.l1(output, images)
    kl, kl_cache = ops.kl_normal(mean, logvar)
    mse, mse_cache = ops.mse(output, images)

    doutput, _ = ops.l1_backward(np.float32(share * L1_WEIGHT), l1_cache)
    doutput = doutput + ops.mse_backward(np.float32(share * MSE_WEIGHT), mse_cache)[0]
    dz = vae.decode_backward(doutput, tape)
    if not decoder_only:
        dmean, dlogvar = ops.kl_normal_backward(np.float32(share * KL_WEIGHT), kl_cache)
        dmean = dmean + dz                              # z = mean + std * noise
        dlogvar = dlogvar + dz * (0.5 * std * noise)    # std' = std / 2
        vae.encode_backward(dmean, dlogvar, tape)
    loss = L1_WEIGHT * l1 + MSE_WEIGHT * mse + KL_WEIGHT * kl
    return {"loss": share * loss, "mse": share * mse, "kl": share * kl}


def diffusion_loss(text_encoder, unet, schedule, latents, ids, rng, share):
    """mean (unet(x_t, t, text_encoder(ids)) - target)^2 at random timesteps, and its gradients.

    latents (B,h,w,C) of variance 1, ids (B,77) -> {"loss"}, times share, the shard's part of the
    batch.
    """
    timesteps = sample_timesteps(rng, len(latents), schedule.num_train_timesteps)
    noise = asarray(rng.standard_normal(latents.shape, np.float32), like=latents)
    x_t = schedule.add_noise(latents, noise, timesteps)
    tape = Tape()
    context = text_encoder(ids, tape)
    model_output = unet(x_t, asarray(timesteps, like=x_t), context, tape)
    loss, cache = ops.mse(model_output, target(schedule, latents, noise, timesteps))
    doutput, _ = ops.mse_backward(np.float32(share), cache)
    _, dcontext = unet.backward(doutput, tape)
    text_encoder.backward(dcontext, tape)
    return {"loss": share * loss}


def variational_loss(unet, process, images, timesteps, weights, rng, share, kind="rescaled_mse",
                     variance_type="learned_range", **labels):
    """Improved DDPM's loss of a UNet2DModel, and its gradients.

    images (B,H,W,C) in [-1, 1]; timesteps and weights (B,), as timestep_sampling.py draws them.
    process, kind, variance_type: see diffusion/variational.py, `loss`. labels: the UNet's
    class_labels, if it has classes.
    -> {"loss"}: the weighted mean times share, the shard's part of the batch; and the losses (B,)
    without weights, which LossSecondMoment remembers.
    """
    noise = asarray(rng.standard_normal(images.shape, np.float32), like=images)
    x_t, tape = process.add_noise(images, noise, timesteps), Tape()
    output = unet(x_t, process.model_timesteps(timesteps, x_t), tape, **labels)
    losses, cache = variational.loss(process, output, images, noise, x_t, timesteps, kind,
                                     variance_type)
    weights = asarray(np.asarray(weights, losses.dtype) / len(images), like=losses)
    unet.backward(variational.loss_backward(share * weights, cache), tape)
    return {"loss": share * (weights * losses).sum()}, losses
