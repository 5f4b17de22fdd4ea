"""Every model's backward against finite differences, in float64: no torch is needed.

One direction moves all inputs and all parameters at once; against autograd, parameter by parameter,
the other files here compare.
"""
import numpy as np
import pytest

from tests.support.models import backward, cases, inputs, make, outputs
from tests.support.tolerance import within
from tinyldm.layers import Tape

STEP = 1e-6


@pytest.mark.parametrize("name", cases())
def test_gradients(name, rng):
    module, arrays = make(name), inputs(name)
    dys = [rng.standard_normal(y.shape) for y in outputs(module, arrays)]
    tape = Tape()
    outputs(module, arrays, tape)
    gradients = backward(module, arrays, dys, tape)
    assert not tape.entries
    parameters = dict(module.named_parameters())
    assert all(parameter.grad is not None for parameter in parameters.values())

    slope, size, moves = 0.0, 0.0, []
    for key, gradient in [*gradients.items(), *((k, p.grad) for k, p in parameters.items())]:
        v = rng.standard_normal(gradient.shape)
        slope, size = slope + (gradient * v).sum(), size + (gradient ** 2).sum()
        moves.append((key, v))

    def loss(step):
        moved = dict(arrays)
        for key, v in moves:
            if key in gradients:
                moved[key] = arrays[key] + step * v
            else:
                parameters[key].data = start[key] + step * v
        return sum((y * dy).sum() for y, dy in zip(outputs(module, moved), dys))
    start = {key: parameter.data for key, parameter in parameters.items()}
    found = (loss(STEP) - loss(-STEP)) / (2 * STEP)
    within(abs(slope - found), 1e-6 * np.sqrt(size))
