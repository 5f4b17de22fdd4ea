"""Improved precision and recall: do the drawn pictures look real, and are all kinds among them?

Around each picture of a set lies a ball that reaches to its k-th neighbour in the set. Precision is
the share of generated pictures in a ball of any real one; recall, the share of real pictures in a
ball of any generated one.
Source: Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative
Models", arXiv:1904.06991, eq. 1-2.
"""
import numpy as np

from ..errors import TinyldmError

ROWS = 1024                 # of a matrix of distances at a time


def precision_recall(real, generated, k=3):
    """Features (N,F) and (M,F) -> precision, recall."""
    if min(len(real), len(generated)) <= k:
        raise TinyldmError(f"{k} neighbours need more than {k} pictures of each kind, not "
                           f"{len(real)} and {len(generated)}")
    middle = np.mean(real, axis=0, dtype=np.float64)    # distances do not change; digits are won
    x, y = (np.asarray(a, np.float64) - middle for a in (real, generated))
    return _share_inside(y, x, k), _share_inside(x, y, k)


def _share_inside(points, centres, k):
    """The share of points (M,F) in the ball of at least one of the centres (N,F)."""
    # Of a centre's sorted distances the first is its own, 0; so the k-th neighbour is at k.
    radii = np.concatenate([np.partition(rows, k, axis=1)[:, k]
                            for rows in _squared_distances(centres, centres)])
    inside = [(rows <= radii).any(axis=1) for rows in _squared_distances(points, centres)]
    return float(np.concatenate(inside).mean())


def _squared_distances(a, b):
    """(M,F), (N,F) -> blocks of rows of |a - b|^2 (M,N)."""
    lengths = (b * b).sum(axis=1)
    for start in range(0, len(a), ROWS):
        rows = a[start:start + ROWS]
        squares = (rows * rows).sum(axis=1)[:, None] + lengths - 2 * (rows @ b.T)
        yield squares.clip(0)
