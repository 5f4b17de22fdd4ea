"""Loss scaling: what keeps small gradients alive where a model computes in float16.

    backward begins with scale * dloss ─→ float16 gradients, scale times as large
    ─float32, / scale→ finite? the update, and now and then a larger scale
                       not finite? no update: the same batches again, with half the scale

float16 has no numbers between 0 and 6e-8, and many gradients of a UNet are smaller than that. The
gradient is linear in dloss, so a scale shifts all of them into float16's range. optim.AdamW keeps
the weights in float32, and the model has copies in float16.
Source: Micikevicius et al. 2017, "Mixed Precision Training", arXiv:1710.03740, sections 3.1 and
3.2; torch.amp.GradScaler, whose rules and defaults these are.
"""
import math

import numpy as np

FIRST = 2.0 ** 16
LEAST = 1.0             # a gradient that is infinite with this scale is not so because of it


class LossScale:
    """The scale of a loss, which finds its size itself.

    scale: the first one. growth, backoff: what it is multiplied by, after `interval` updates in a
    row, and where a gradient is not finite. A power of 2 rounds nothing. terms: a loss that is the
    sum of so many numbers, not their mean, begins and ends with scales that much smaller.
    skipped: how many gradients were not finite.
    """

    def __init__(self, scale=FIRST, growth=2.0, backoff=0.5, interval=2000, terms=1):
        mean = 2.0 ** -round(math.log2(terms))
        self.scale, self.least = scale * mean, LEAST * mean
        self.growth, self.backoff, self.interval = growth, backoff, interval
        self.good = self.skipped = 0                    # good: updates since the last change

    def update(self, finite):
        """Tell whether a gradient was finite. float32's largest number ends the growth."""
        if not finite:
            self.scale, self.good, self.skipped = self.scale * self.backoff, 0, self.skipped + 1
            return
        self.good += 1
        if self.good == self.interval:
            grown, self.good = self.scale * self.growth, 0
            if grown <= float(np.finfo(np.float32).max):
                self.scale = grown

    def state(self):
        """Three numbers for a state file."""
        return np.array([self.scale, self.good, self.skipped])

    def load_state(self, state):
        self.scale, self.good, self.skipped = float(state[0]), int(state[1]), int(state[2])
