"""Fréchet inception distance: how far two clouds of features are apart, each taken as a Gaussian.

    d^2 = |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))

with the means m and the covariances S of the features of two sets of pictures. 0: the same mean and
covariance. The value grows when there are few pictures, so only values of equally many compare.
Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
Equilibrium", arXiv:1706.08500, eq. 6. The numbers are those of mseitzer/pytorch-fid.
"""
import zipfile
from typing import NamedTuple

import numpy as np

from ..errors import TinyldmError
from ..files import as_path, replacing

ROWS = 4096                 # at a time in float64
EPS = 1e-6                  # added to both diagonals where the root cannot be computed


class Statistics(NamedTuple):
    """What a set of features is to the FID."""

    mean: np.ndarray                                    # (F,) float64
    covariance: np.ndarray                              # (F,F) float64, divided by N - 1
    kind: str = ""          # how the features were made; "" where nobody says it
    count: int = 0          # pictures; 0 where nobody says it


def statistics(features, kind=""):
    """Features (N,F) of at least two pictures -> Statistics, computed in float64."""
    N, F = features.shape
    if N < 2:
        raise TinyldmError(f"a covariance needs at least 2 pictures, not {N}")
    mean = features.mean(axis=0, dtype=np.float64)
    total = np.zeros((F, F))
    for start in range(0, N, ROWS):
        rows = features[start:start + ROWS].astype(np.float64) - mean
        total += rows.T @ rows
    return Statistics(mean, total / (N - 1), kind, N)


def frechet_distance(a, b):
    """Two Statistics -> d^2, a float. Rounding may make it slightly negative."""
    if a.mean.shape != b.mean.shape:
        raise TinyldmError(f"features of {len(a.mean)} and {len(b.mean)} numbers do not compare: "
                           "make both with the same --features and --dims")
    if a.kind and b.kind and a.kind != b.kind:
        raise TinyldmError(f"the features differ: {a.kind} against {b.kind}; make both in one way")
    difference = a.mean - b.mean
    return float(difference @ difference + a.covariance.trace() + b.covariance.trace()
                 - 2 * trace_of_root(a.covariance, b.covariance))


def trace_of_root(A, B):
    """tr((A B)^(1/2)) of two covariances (F,F), which need not have full rank.

    With A = P P.T and B = Q Q.T, the eigenvalues of A B are those of (P.T Q)(P.T Q).T. So the
    eigenvalues of its root are the singular values of P.T Q, and the trace is their sum. This has
    no imaginary part to drop, and small eigenvalues keep more digits than in a root of A B.
    Where LAPACK finds no eigenvalues, EPS is added to both diagonals, as pytorch-fid does.
    """
    try:
        return _trace_of_root(A, B)
    except np.linalg.LinAlgError:
        more = EPS * np.eye(len(A))
        return _trace_of_root(A + more, B + more)


def _trace_of_root(A, B):
    P, Q = _factor(A), _factor(B)
    return np.linalg.svd(P.T @ Q, compute_uv=False).sum()


def _factor(S):
    """P (F,R) with P P.T = S, of rank R. Cholesky's needs a fifth of the time, but full rank."""
    smallest = len(S) * np.finfo(S.dtype).eps           # of what counts, to the largest
    try:
        lower = np.linalg.cholesky(S)
    except np.linalg.LinAlgError:                       # not of full rank
        pass
    else:
        pivots = lower.diagonal() ** 2
        if pivots.min() > smallest * pivots.max():
            return lower
    values, vectors = np.linalg.eigh(S)
    # With fewer pictures than features most should be 0; rounding makes them about +-1e-16.
    kept = values > smallest * values[-1]
    return vectors[:, kept] * values[kept] ** 0.5


# ---- files ------------------------------------------------------------------------------------

def write_statistics(path, found):
    """An .npz with mu and sigma, the names of pytorch-fid and of ADM; and what is known of them."""
    path = as_path("the file of statistics", path)
    if path.suffix != ".npz":
        raise TinyldmError(f"{path} must end in .npz, by which other programs know it")
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, mu=found.mean, sigma=found.covariance, kind=found.kind, count=found.count)


def read_statistics(path):
    """The Statistics in an .npz with mu (F,) and sigma (F,F). Raises TinyldmError for others."""
    arrays = read_npz(path)
    if missing := {"mu", "sigma"} - set(arrays):
        raise TinyldmError(f"{path} holds no {' and no '.join(sorted(missing))}: a file of "
                           "statistics has mu and sigma; python -m tinyldm.metrics stats writes it")
    mean, covariance = arrays["mu"], arrays["sigma"]
    if not mean.dtype.kind == covariance.dtype.kind == "f":
        raise TinyldmError(f"{path}: mu and sigma must hold floating-point numbers, not "
                           f"{mean.dtype} and {covariance.dtype}: use another file")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if mean.ndim != 1 or not mean.size or covariance.shape != 2 * mean.shape:
        raise TinyldmError(f"{path}: mu must be (F,) and sigma (F,F), not {mean.shape} and "
                           f"{covariance.shape}: use another file")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise TinyldmError(f"{path} holds NaN or infinity: make it again")
    kind, count = arrays.get("kind", np.array("")), arrays.get("count", np.array(0))
    return Statistics(mean, covariance, str(kind) if kind.dtype.kind == "U" else "",
                      int(count) if count.shape == () and count.dtype.kind in "iu" else 0)


def read_npz(path):
    """{name: array} of an .npz, in which nothing is run. Raises TinyldmError if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if not hasattr(file, "files"):
                raise ValueError("it is a single array")
            arrays = {}
            for name in file.files:
                try:
                    arrays[name] = file[name]
                except ValueError:                      # of objects: never read
                    if name in ("mu", "sigma", "arr_0"):
                        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, MemoryError) as error:
        raise TinyldmError(f"cannot read {path} as an .npz of arrays ({error}): name a folder of "
                           "pictures, or a file of statistics") from None
    return arrays
