"""Winograd's points: the matrices that lead to a polynomial's values there and back.

Part of winograd.py, whose head says what they are for. `evaluate` does by sums of whole rows what a
product with B.T does, in fewer operations.
"""
import numpy as np

from .blocks import scratch


class Points:
    """0, the given numbers and their negatives, and infinity: n points, for t = n - 2 by t tiles.

    The Kronecker squares A_T (t*t,n*n), G (n*n,9), B_T (n*n,n*n). Rows of A and G take a
    polynomial's values at the points, the row of infinity its highest coefficient. B holds the
    polynomials that vanish at all points but one; dividing by their value there is left to G.
    """

    def __init__(self, *positive):
        points = np.array([0, *(sign * p for p in positive for sign in (1, -1))])
        n = len(points) + 1
        self.size, self.tile, self.count = n, n - 2, n * n
        others = [np.delete(points, i) for i in range(n - 1)]
        values = np.array([np.prod(p - rest) for p, rest in zip(points, others)])
        A = np.vstack([points[:, None] ** np.arange(n - 2), np.eye(n - 2)[-1]])          # (n,t)
        G = np.vstack([points[:, None] ** np.arange(3) / values[:, None], np.eye(3)[-1]])
        B = np.zeros((n, n))                                                             # rows: B.T
        for i, roots in enumerate([*others, points]):
            B[i, :len(roots) + 1] = np.poly(roots)[::-1]
        self.A_T, self.G, self.B_T = (np.kron(m, m).astype(np.float32) for m in (A.T, G, B))
        # B.T's rows of a and -a differ in the sign of the odd columns: their even, their odd part.
        plus, minus = B[1:-1:2].copy(), B[2:-1:2].copy()
        B[1:-1:2], B[2:-1:2] = (plus + minus) / 2, (plus - minus) / 2
        self.parts = B.astype(np.float32)

    def evaluate(self, planes, out):
        """out[i] = sum_j B.T[i,j] planes[j], n each; the points a and -a share both their parts."""
        spare = scratch("spare", *out[0].shape)
        _sum(self.parts[0], planes, out[0], spare)
        for i in range(1, self.size - 1, 2):
            _sum(self.parts[i], planes, out[i], spare)
            _sum(self.parts[i + 1], planes, spare, out[i + 1])
            np.subtract(out[i], spare, out=out[i + 1])
            out[i] += spare
        _sum(self.parts[-1], planes, out[-1], spare)


def _sum(coefficients, planes, out, spare):
    """out = sum of coefficient * plane; zeros are left out and ones not multiplied."""
    terms = [(c, plane) for c, plane in zip(coefficients, planes) if abs(c) > 1e-6]
    terms.sort(key=lambda term: abs(term[0] - 1) < 1e-6)
    (c, first), *rest = terms
    np.multiply(first, c, out=out)
    for c, plane in rest:
        out += plane if abs(c - 1) < 1e-6 else np.multiply(plane, c, out=spare)
