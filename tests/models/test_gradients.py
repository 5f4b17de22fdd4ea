"""Every model's backward against finite differences, in float64: no torch is needed.

One direction moves all inputs and all parameters at once; against autograd, parameter by parameter,
the other files here compare.
"""
import numpy as np
import pytest

from tests.support.models import cases, inputs, make, outputs
from tests.support.tolerance import within
from tinyldm.layers import Tape
from tinyldm.models import AutoencoderKL, UNet2DConditionModel

STEP = 1e-6


def backward(module, arrays, dys):
    """Run forward and backward -> {input: its gradient}; the parameters get theirs."""
    tape = Tape()
    outputs(module, arrays, tape)
    if isinstance(module, AutoencoderKL):
        found = {"z": module.decode_backward(dys[2], tape),
                 "images": module.encode_backward(*dys[:2], tape)}
    else:
        found = module.backward(*dys, tape)
    if isinstance(module, UNet2DConditionModel):
        names = ("latents", "context", "timestep_cond", "text_embeds")
        found = {name: getattr(found, name) for name in names if name in arrays}
    assert not tape.entries
    return found or {}


@pytest.mark.parametrize("name", cases())
def test_gradients(name, rng):
    module, arrays = make(name), inputs(name)
    dys = [rng.standard_normal(y.shape) for y in outputs(module, arrays)]
    gradients = backward(module, arrays, dys)
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
