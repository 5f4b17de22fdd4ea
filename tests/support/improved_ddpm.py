"""Improved DDPM's bound and losses in torch, float64, with autograd: what ours are compared with.

Written from the published formulas, arXiv:2102.09672, section 3, channels last.
"""
import math

import numpy as np
import torch


def tables(betas):
    """What the formulas need at each step, as torch tensors."""
    alpha_bar = np.cumprod(1 - betas)
    before = np.append(1.0, alpha_bar[:-1])
    variance = betas * (1 - before) / (1 - alpha_bar)
    found = {"alpha_bar": alpha_bar, "log_beta": np.log(betas),
             "low": np.log(np.append(variance[1], variance[1:])),
             "c1": betas * np.sqrt(before) / (1 - alpha_bar),
             "c2": (1 - before) * np.sqrt(1 - betas) / (1 - alpha_bar)}
    found["large"] = np.append(found["low"][0], found["log_beta"][1:])
    return {name: torch.from_numpy(table)[:, None, None, None] for name, table in found.items()}


def terms(betas, output, x_start, x_t, t, variance="learned_range", clip=False, detach=False):
    """(B,) bits per dimension: KL, or at t = 0 the decoder's -log likelihood."""
    row = {name: table[t] for name, table in tables(betas).items()}
    C = x_t.shape[-1]
    eps, v = (output[..., :C].detach() if detach else output[..., :C]), output[..., C:]
    guess = x_t / row["alpha_bar"].sqrt() - (1 / row["alpha_bar"] - 1).sqrt() * eps
    guess = guess.clamp(-1, 1) if clip else guess
    mean, true = (row["c1"] * x + row["c2"] * x_t for x in (guess, x_start))
    if variance == "learned_range":
        f = (v + 1) / 2
        logvar = f * row["log_beta"] + (1 - f) * row["low"]
    else:
        logvar = {"learned": v, "fixed_large": row["large"], "fixed_small": row["low"]}[variance]
    kl = 0.5 * (-1 + logvar - row["low"] + (row["low"] - logvar).exp()
                + (true - mean) ** 2 * (-logvar).exp())
    nats = torch.where(t[:, None, None, None] == 0, -likelihood(x_start, mean, logvar), kl)
    return nats.mean((1, 2, 3)) / math.log(2), guess


def likelihood(x, mean, logvar):
    def phi(u):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
    upper, lower = (phi((x - mean + side / 255) * (-0.5 * logvar).exp()) for side in (1, -1))
    return torch.where(x < -.999, upper.clamp(min=1e-12).log(),
                       torch.where(x > .999, (1 - lower).clamp(min=1e-12).log(),
                                   (upper - lower).clamp(min=1e-12).log()))


def losses(betas, output, x_start, noise, x_t, t, kind, variance="learned_range"):
    """(B,) by the table of loss types."""
    T, C = len(betas), x_t.shape[-1]
    bits, _ = terms(betas, output, x_start, x_t, t, variance, detach="mse" in kind)
    if kind == "kl":
        return bits
    if kind == "rescaled_kl":
        return bits * T
    mse = ((noise - output[..., :C]) ** 2).mean((1, 2, 3))
    if not variance.startswith("learned"):
        return mse
    return mse + bits * (T / 1000 if kind == "rescaled_mse" else 1)
