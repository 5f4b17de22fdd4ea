"""Losses: the one number that training makes small.

Each backward takes dloss, the gradient of the final loss with respect to this one. The loss of
float16 arrays is float32, because a sum may overflow float16.
"""
import numpy as np

from ..backend import get_xp, widen


def mse(prediction, target):
    """Mean squared error: loss = mean((prediction - target)^2) over all entries, of equal shape."""
    difference = prediction - target
    wide = widen(difference)
    return (wide * wide).mean(), difference


def mse_backward(dloss, difference):
    """-> dprediction, dtarget:  +-2 * difference / size."""
    dprediction = difference * (2 * dloss / difference.size)
    dprediction = dprediction.astype(difference.dtype, copy=False)
    return dprediction, -dprediction


def l1(prediction, target):
    """Mean absolute error: loss = mean(|prediction - target|)."""
    difference = prediction - target
    return widen(abs(difference)).mean(), difference


def l1_backward(dloss, difference):
    """-> dprediction, dtarget:  +-sign(difference) / size, 0 where both are equal."""
    dprediction = get_xp(difference).sign(difference) * (dloss / difference.size)
    dprediction = dprediction.astype(difference.dtype, copy=False)
    return dprediction, -dprediction


def hinge(real, fake):
    """A discriminator's loss: real pictures should get more than 1, made ones less than -1.

        loss = (mean(max(0, 1 - real)) + mean(max(0, 1 + fake))) / 2

    real, fake: its answers, of any shape. What is beyond 1 or -1 counts no more.
    Source: Lim & Ye 2017, "Geometric GAN", arXiv:1705.02894, eq. 18; the half: Esser, Rombach &
    Ommer 2020, "Taming Transformers", arXiv:2012.09841, in their code.
    """
    loss = sum(widen(1 - sign * x).clip(0, None).mean() for x, sign in ((real, 1), (fake, -1)))
    return loss / 2, (real, fake)


def hinge_backward(dloss, cache):
    """-> dreal = -dloss / 2 size where real < 1, else 0;  dfake = dloss / 2 size where fake > -1.
    """
    return tuple(((sign * x < 1) * (-sign * dloss / (2 * x.size))).astype(x.dtype, copy=False)
                 for x, sign in zip(cache, (1, -1)))


def kl_normal(mean, logvar):
    """KL divergence of a diagonal Gaussian from the standard normal distribution.

        KL = 1/2 sum(mean^2 + exp(logvar) - 1 - logvar)

    mean, logvar (B,...) -> loss: the sum over each sample, averaged over the batch.
    Source: Kingma & Welling 2013, "Auto-Encoding Variational Bayes", arXiv:1312.6114, appendix B.
    """
    mean_wide, variance = widen(mean), get_xp(logvar).exp(widen(logvar))
    loss = 0.5 * (mean_wide * mean_wide + variance - 1 - logvar).sum() / mean.shape[0]
    return loss, (mean, logvar)


def kl_normal_backward(dloss, cache):
    """-> dmean = mean / B,  dlogvar = (exp(logvar) - 1) / 2B."""
    mean, logvar = cache
    scale = dloss / mean.shape[0]
    dlogvar = (get_xp(logvar).exp(widen(logvar)) - 1) * (0.5 * scale)
    return (mean * scale).astype(mean.dtype, copy=False), dlogvar.astype(logvar.dtype, copy=False)


@np.errstate(under="ignore")            # small logits have share 0
def cross_entropy(logits, labels):
    """Minus the logarithm of the probability of the right class, mean over the rows.

        loss = mean(log sum exp(logits) - logits[label])

    logits (R,V), labels (R,) integers in [0, V) -> loss.
    """
    xp = get_xp(logits)
    shifted = widen(logits) - logits.max(axis=-1, keepdims=True)
    log_sum = xp.log(xp.exp(shifted).sum(axis=-1))                       # (R,)
    rows = xp.arange(labels.shape[0])
    return (log_sum - shifted[rows, labels]).mean(), (logits, labels)


@np.errstate(under="ignore")
def cross_entropy_backward(dloss, cache):
    """-> dlogits (R,V) = (softmax(logits) - onehot(labels)) / R."""
    logits, labels = cache
    xp = get_xp(logits)
    dlogits = xp.exp(widen(logits) - logits.max(axis=-1, keepdims=True))
    dlogits /= dlogits.sum(axis=-1, keepdims=True)
    dlogits[xp.arange(labels.shape[0]), labels] -= 1
    return (dlogits * (dloss / labels.shape[0])).astype(logits.dtype, copy=False)


def contrastive(logits):
    """CLIP's loss: each image should find its own text, and each text its own image.

        loss = 1/2 (cross_entropy over the rows + cross_entropy over the columns)

    logits (N,N): row n belongs to image n, column n to its text; the right class is the diagonal.
    N = 1 gives 0, and equal logits give ln N.
    Source: Radford et al. 2021, arXiv:2103.00020, section 2.3, figure 3.
    """
    N, M = logits.shape
    assert N == M, f"{N} images and {M} texts are not pairs"
    pairs = get_xp(logits).arange(N)
    rows, row_cache = cross_entropy(logits, pairs)
    columns, column_cache = cross_entropy(logits.T, pairs)
    return (rows + columns) / 2, (row_cache, column_cache)


def contrastive_backward(dloss, cache):
    """-> dlogits (N,N) = (P - I + Q - I) / 2N, with P, Q the softmax over rows and columns."""
    rows, columns = cache
    return (cross_entropy_backward(dloss / 2, rows)
            + cross_entropy_backward(dloss / 2, columns).T)
