"""Stages 1 and 3: train the autoencoder to reconstruct its input from noisy latents; and later the
decoder alone, when the UNet has learned the latents and they must not change any more.

Half of the pictures are crowds of things, which have many corners and tips. A stage's log, curve
and samples lie in a folder of its name beside its state: see training/report.py.
"""
from functools import partial

import numpy as np

from ..backend import array_library, to_host
from ..errors import TinyldmError
from ..images import to_pil
from ..models import AutoencoderKL
from ..training.loop import Trainer
from ..training.objectives import vae_loss
from ..training.optim import Muon, initialise, load_ema
from ..training.report import Report
from ..training.shards import split_batch
from ..training.stages.round_trip import decoder_parameters
from . import drawing
from .configs import OPTIMIZER, VAE

BATCH = 8
SHOWN = 4                   # pictures that validation and samples look at


def train_vae(run, steps, learning_rate=1e-3, validate_every=0, sample_every=0, device="cpu"):
    """Train the VAE for `steps` batches of pictures; resume from the state in `run`."""
    vae = AutoencoderKL(VAE)
    initialise(vae, np.random.default_rng(0))
    vae.move_to(array_library(device))
    _train(vae, Trainer(run / "vae.npz", vae.named_parameters(), steps, learning_rate,
                        optimizer=partial(Muon, **OPTIMIZER),
                        report=Report(run / "vae", sample_every, validate_every)))


def train_decoder(run, steps, learning_rate=1e-3, validate_every=0, sample_every=0, device="cpu"):
    """Train the decoder of the VAE in `run` further; its encoder stays as it is."""
    vae = load_vae(run).move_to(array_library(device))
    _train(vae, Trainer(run / "decoder.npz", decoder_parameters(vae), steps, learning_rate,
                        optimizer=partial(Muon, **OPTIMIZER),
                        report=Report(run / "decoder", sample_every, validate_every)),
           decoder_only=True)


def _train(vae, trainer, decoder_only=False):
    loss = partial(vae_loss, vae, decoder_only=decoder_only)

    def batch_loss(rng):
        return split_batch(loss, [vae.xp.asarray(drawing.crowds(rng, BATCH))], rng, vae.xp)

    shown = drawing.crowds(np.random.default_rng(4), SHOWN)

    def decoded():
        return to_host(vae.decode(vae.encode(vae.xp.asarray(shown))[0]))

    def sample():                                       # each drawing beside what comes of it
        return to_pil(np.concatenate([shown, decoded()], axis=2))

    def validate():
        return {"mse": float(((decoded() - shown) ** 2).mean())}

    trainer.models = {"vae": vae}
    trainer.train(batch_loss, sample=sample, validate=validate)


def load_vae(run, scaling_factor=1.0):
    """The averaged VAE of the folder `run`, with the decoder of stage 3 if there is one.

    Raises TinyldmError where no VAE has been trained there.
    """
    vae = AutoencoderKL(VAE | {"scaling_factor": scaling_factor})
    load_ema(trained(run, "vae"), vae.named_parameters())
    if (run / "decoder.npz").exists():
        load_ema(run / "decoder.npz", decoder_parameters(vae))
    return vae


def trained(run, stage):
    """The state file of a stage in the folder `run`. Raises TinyldmError where there is none."""
    path = run / f"{stage}.npz"
    if not path.exists():
        raise TinyldmError(f"{run} holds no {path.name}: run `python -m tinyldm.shapes {stage} "
                           f"--run {run}` first")
    return path
