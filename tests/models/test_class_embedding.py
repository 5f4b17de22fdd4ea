"""The public kinds of class embedding against torch: names, outputs and all gradients."""
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding

from tests.support.arrays import read_only
from tests.support.reference import assert_same_gradients, copy_weights, randomise
from tests.support.tolerance import assert_close
from tinyldm.layers import Tape
from tinyldm.models.blocks import ClassEmbedding

E, C, CLASSES = 12, 7, 5
KINDS = {                   # name: the public layer
    None: lambda: torch.nn.Embedding(CLASSES, E),
    "timestep": lambda: TimestepEmbedding(C, E),
    "projection": lambda: TimestepEmbedding(C, E),
    "simple_projection": lambda: torch.nn.Linear(C, E),
    "identity": lambda: torch.nn.Identity(E, E),
}


@pytest.mark.parametrize("kind", KINDS)
def test_class_embedding(kind):
    rng = np.random.default_rng(0)
    reference = randomise(KINDS[kind]().double())
    module = copy_weights(reference, ClassEmbedding(kind, E, num_classes=CLASSES, channels=C))
    labels = (np.array([4, 0, 4]) if kind is None else
              rng.standard_normal((3, E if kind == "identity" else C)))
    theirs_in = torch.from_numpy(labels.copy())
    if kind is not None:
        theirs_in.requires_grad_()
    theirs = reference(theirs_in)
    tape, dy = Tape(), read_only(rng.standard_normal((3, E)))
    ours = module(read_only(labels), tape)
    assert_close(ours, theirs.detach().numpy(), 1e-12, "output")

    if theirs.requires_grad:
        theirs.backward(torch.from_numpy(dy.copy()))
    dlabels = module.backward(dy, tape)
    assert not tape.entries
    assert_same_gradients(reference, module)
    if kind is None:
        assert dlabels is None
    else:
        assert_close(dlabels, theirs_in.grad.numpy(), 1e-9, "dlabels")


def test_a_model_without_classes_has_no_layer():
    assert ClassEmbedding(None, E) is None
