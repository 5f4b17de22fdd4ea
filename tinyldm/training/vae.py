"""Stage 1: the autoencoder, trained to give back the picture it was shown, through noisy latents.

    loss = mean |decode(z) - image| + KL_WEIGHT * KL(N(mean, var), N(0, 1))
    z = mean + sqrt(var) * noise

Source: Rombach et al. 2022, arXiv:2112.10752, appendix G (without its perceptual and adversarial
terms).
"""
import numpy as np

from .. import ops
from ..layers import Tape
from ..models import AutoencoderKL
from . import data
from .configs import VAE
from .loop import Trainer, split_batch
from .optim import initialise

KL_WEIGHT = 1e-7
BATCH = 16


def vae_loss(vae, images, rng, share):
    """Loss of one shard of a batch, its gradients added to the parameters.

    images (B,H,W,3) -> {"loss", "mse", "kl"}, each times share, the shard's part of the batch.
    """
    tape = Tape()
    mean, logvar = vae.encode(images, tape)
    std = np.exp(0.5 * logvar)
    noise = rng.standard_normal(mean.shape, np.float32)
    z = mean + std * noise
    output = vae.decode(z, tape)
    l1, l1_cache = ops.l1(output, images)
    kl, kl_cache = ops.kl_normal(mean, logvar)
    mse = ((output - images) ** 2).mean()

    doutput, _ = ops.l1_backward(np.float32(share), l1_cache)
    dz = vae.decode_backward(doutput, tape)
    dmean, dlogvar = ops.kl_normal_backward(np.float32(share * KL_WEIGHT), kl_cache)
    dmean = dmean + dz                                  # z = mean + std * noise
    dlogvar = dlogvar + dz * (0.5 * std * noise)        # std' = std / 2
    vae.encode_backward(dmean, dlogvar, tape)
    return {"loss": share * (l1 + KL_WEIGHT * kl), "mse": share * mse, "kl": share * kl}


def train_vae(run, steps, learning_rate=2e-3):
    """Train the VAE for `steps` batches of 16 pictures, resuming what lies in the folder `run`."""
    vae = AutoencoderKL(VAE)
    initialise(vae, np.random.default_rng(0))
    trainer = Trainer(run / "vae.npz", vae.named_parameters(), steps, learning_rate)

    def batch_loss(rng):
        images, _ = data.batch(rng, BATCH)
        return split_batch(lambda rows, rng, share: vae_loss(vae, images[rows], rng, share),
                           BATCH, rng)

    trainer.train(batch_loss)
    return vae, trainer
