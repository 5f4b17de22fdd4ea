"""Inception score: is each picture of a clear class, and do all classes occur? Larger is better.

    exp(mean over the pictures x of KL(p(class | x) || p(class)))

where p(class) is the mean over the pictures. It looks at one set only, and knows no real pictures.
Source: Salimans et al. 2016, "Improved Techniques for Training GANs", arXiv:1606.03498, section 4.
"""
import numpy as np

from ..errors import TinyldmError


def inception_score(logits, splits=10):
    """Logits (N,classes), without the last layer's bias -> mean and standard deviation over the
    splits, parts of the set in its order."""
    if len(logits) < splits:
        raise TinyldmError(f"{splits} parts need at least {splits} pictures, not {len(logits)}")
    scores = []
    logits = np.asarray(logits, np.float64)
    bounds = [len(logits) * i // splits for i in range(splits + 1)]
    for start, stop in zip(bounds, bounds[1:]):
        log_p = logits[start:stop] - logits[start:stop].max(axis=1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        divergence = (p * (log_p - np.log(p.mean(axis=0)))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores)), float(np.std(scores))
