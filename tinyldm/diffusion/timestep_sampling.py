"""Which timesteps a training draws, and the weight that keeps the mean of the loss the same."""
import numpy as np

from ..errors import TinyldmError


def uniform(rng, n, T):
    """n of T timesteps, each as likely as any other -> (n,) whole numbers, (n,) weights of 1."""
    return rng.choice(T, size=n), np.ones(n)


class LossSecondMoment:
    """Draw a timestep the more often, the larger its losses were: less noise in L_vlb's gradient.

        p_t = (1 - e) sqrt(E[L_t^2]) / sum + e / T,    weight = 1 / (T p_t)

    E: over the last `history` losses of t. Until every t has so many, all are equally likely.
    e = uniform_share: then no timestep is forgotten.
    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 18. It does not help L_hybrid.
    """

    def __init__(self, T, history=10, uniform_share=0.001):
        if T < 1 or history < 1 or not 0 <= uniform_share <= 1:
            raise TinyldmError("importance sampling needs T and history from 1, and a "
                               f"uniform_share from 0 to 1, not {T}, {history}, {uniform_share}")
        self.losses, self.counts = np.zeros((T, history)), np.zeros(T, int)
        self.uniform_share = uniform_share

    def probabilities(self):
        """p (T,), of sum 1."""
        T, history = self.losses.shape
        root = (self.losses ** 2).mean(axis=1) ** 0.5
        if (self.counts < history).any() or not root.sum() > 0:
            return np.full(T, 1 / T)
        return root / root.sum() * (1 - self.uniform_share) + self.uniform_share / T

    def sample(self, rng, n):
        """-> n timesteps (n,), and the weights of their losses (n,)."""
        p = self.probabilities()
        timesteps = rng.choice(len(p), size=n, p=p)
        return timesteps, 1 / (len(p) * p[timesteps])

    def update(self, timesteps, losses):
        """Remember losses (n,) at timesteps (n,), before they are weighted."""
        for t, loss in zip(timesteps, losses):
            history = self.losses.shape[1]
            if self.counts[t] < history:
                self.losses[t, self.counts[t]] = loss
                self.counts[t] += 1
            else:
                self.losses[t, :-1] = self.losses[t, 1:].copy()     # the oldest goes
                self.losses[t, -1] = loss
