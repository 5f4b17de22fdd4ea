"""More latent channels for a model that is trained already: it goes on giving what it gave.

The encoder mixes its features at random into a new channel, and nothing that was there listens to
it yet; training finds a use for it.
"""
import numpy as np

from .optim import initialise

UNSURE = -6             # a new channel's log-variance at first: noise a twentieth wide


def widen(model, channels):
    """The VAE or UNet with more latent channels that does what `model` does.

    Where it has as many already, it is the model itself.
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
        new.data[..., at[-1]] = 0                       # what is old hears of nothing new
        new.data[np.ix_(*at)] = old.data
    return wide
