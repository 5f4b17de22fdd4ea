"""More latent channels for a trained model, whose outputs stay the same at first.

In a new channel the encoder mixes its features at random, and nothing reads it yet; training finds
a use for it.
"""
import numpy as np

from ..training.optim import initialise

UNSURE = -6             # the log-variance of a new channel at first: noise of std 0.05


def widen(model, channels):
    """A VAE or UNet with `channels` latent channels that computes what `model` does.

    If the model has as many already, it is returned as it is.
    """
    is_vae = hasattr(model, "quant_conv")
    names = ["latent_channels"] if is_vae else ["in_channels", "out_channels"]
    few = model.config[names[0]]
    if few == channels:
        return model
    wide = type(model)(model.config | dict.fromkeys(names, channels))
    initialise(wide, np.random.default_rng(5))
    moments = np.r_[:few, channels:channels + few]      # a mean and a log-variance each
    if is_vae:
        wide.quant_conv.weight.data[..., channels:] = 0
        wide.quant_conv.bias.data[channels:] = UNSURE
    for (_, new), (_, old) in zip(wide.named_parameters(), model.named_parameters(), strict=True):
        at = [range(size) if size == before else moments if before == 2 * few else range(before)
              for size, before in zip(new.shape, old.shape)]
        new.data[..., at[-1]] = 0                       # the old channels ignore the new ones
        new.data[np.ix_(*at)] = old.data
    return wide
