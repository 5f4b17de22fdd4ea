"""Kernel inception distance: the squared maximum mean discrepancy (MMD) of two sets of features.

With k(a,b) = (a.b / F + 1)^3, the unbiased estimate for two sets of m pictures is

    MMD^2 = (sum of k(x,x') + sum of k(y,y')) / (m (m - 1)) - 2 sum of k(x,y) / m^2

where x and x' are different pictures of one set. It is the mean of several random subsets. Other
than the FID it does not depend on m, on average, and it may be slightly negative.
Source: Bińkowski et al. 2018, "Demystifying MMD GANs", arXiv:1801.01401, section 4.
"""
import numpy as np

from ..errors import TinyldmError


def kid(real, generated, subsets=100, subset_size=1000, seed=2020):
    """Features (N,F) and (M,F) -> mean and standard deviation over the subsets.

    The subsets are those of torch-fidelity: drawn without replacement by RandomState(seed), first
    from one set, then from the other. Where a set has fewer pictures, subsets have as many.
    """
    size = min(subset_size, len(real), len(generated))
    if size < 2:
        raise TinyldmError(f"the KID needs at least 2 pictures of each kind, not {size}")
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x, y = (a[rng.choice(len(a), size, replace=False)] for a in (real, generated))
        values.append(mmd(x.astype(np.float64), y.astype(np.float64)))
    return float(np.mean(values)), float(np.std(values))


def mmd(x, y):
    """The formula above, for x and y (m,F) in float64."""
    (m, F), within = x.shape, 0
    for rows in (x, y):
        kernel = (rows @ rows.T / F + 1) ** 3
        within += kernel.sum() - kernel.trace()
    return within / (m * (m - 1)) - 2 * ((x @ y.T / F + 1) ** 3).mean()
