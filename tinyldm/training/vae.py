"""Stages 1 and 3: the autoencoder, trained to give back the picture it was shown, through noisy
latents; and later its decoder alone, on latents that the UNet knows by then.

    loss = L1_WEIGHT * mean |d| + MSE_WEIGHT * mean d^2 + KL_WEIGHT * KL(N(mean, var), N(0, 1))
    d = decode(z) - image,       z = mean + sqrt(var) * noise

|d| pulls at every pixel alike, and nearly all lie on plain ground; d^2 pulls most where d is
largest, at the corners and tips that tell the shapes apart. Half of the pictures are crowds of
things, which have many.
Source: Rombach et al. 2022, arXiv:2112.10752, appendix G (without its perceptual and adversarial
terms).
"""
import numpy as np

from .. import ops
from ..backend import asarray, get_xp
from ..layers import NO_TAPE, Tape
from ..models import AutoencoderKL
from . import data
from .configs import VAE
from .loop import Trainer, split_batch, trained
from .optim import Muon, initialise, load_ema

L1_WEIGHT = 0.3
MSE_WEIGHT = 12
KL_WEIGHT = 1e-7
BATCH = 8


def vae_loss(vae, images, rng, share, decoder_only=False):
    """Loss of one shard of a batch, its gradients added to the parameters (the decoder's only).

    images (B,H,W,3) -> {"loss", "mse", "kl"}, each times share, the shard's part of the batch.
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


def train_vae(run, steps, learning_rate=1e-3):
    """Train the VAE for `steps` batches of pictures, resuming what lies in the folder `run`."""
    vae = AutoencoderKL(VAE)
    initialise(vae, np.random.default_rng(0))
    _train(vae, Trainer(run / "vae.npz", vae.named_parameters(), steps, learning_rate,
                        optimizer=Muon))


def train_decoder(run, steps, learning_rate=1e-3):
    """Train the decoder of the VAE in `run` on, as train_vae does; its encoder stays as it is."""
    vae = load_vae(run)
    _train(vae, Trainer(run / "decoder.npz", decoder_parameters(vae), steps, learning_rate,
                        optimizer=Muon), decoder_only=True)


def _train(vae, trainer, decoder_only=False):
    def batch_loss(rng):
        images = data.crowds(rng, BATCH)

        def shard(rows, rng, share):
            return vae_loss(vae, images[rows], rng, share, decoder_only)
        return split_batch(shard, BATCH, rng)

    trainer.train(batch_loss)


def decoder_parameters(vae):
    """The (name, Parameter) pairs of what lies behind the latents."""
    return [pair for pair in vae.named_parameters()
            if pair[0].startswith(("decoder.", "post_quant_conv."))]


def load_vae(run, scaling_factor=1.0):
    """The averaged VAE of the folder `run`, with the decoder that was trained on, if one was.

    Raises TinyldmError where no VAE has been trained there.
    """
    vae = AutoencoderKL(VAE | {"scaling_factor": scaling_factor})
    load_ema(trained(run, "vae"), vae.named_parameters())
    if (run / "decoder.npz").exists():
        load_ema(run / "decoder.npz", decoder_parameters(vae))
    return vae
