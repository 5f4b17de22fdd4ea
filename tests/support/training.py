"""A training that takes milliseconds."""
import numpy as np

from tinyldm.layers import Parameter
from tinyldm.training.loop import Trainer
from tinyldm.training.optim import AdamW

SIZE = 6


def trainer_of(path, steps=5, optimizer=AdamW, rate=0.1):
    """A trainer of one vector towards noisy targets, and its batch_loss."""
    parameter = Parameter(SIZE)
    parameter.data = np.zeros(SIZE)
    trainer = Trainer(path, [("x", parameter)], steps, rate, warmup=2, optimizer=optimizer)

    def batch_loss(rng):
        difference = parameter.data - rng.standard_normal(SIZE)
        parameter.add_grad(difference)
        return {"loss": float((difference ** 2).sum())}
    return trainer, batch_loss
