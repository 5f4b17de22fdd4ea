"""The text encoders against transformers on random weights: outputs and all gradients."""
import numpy as np
import pytest
import torch

from tests.support.arrays import read_only
from tests.support.models import CLIPS
from tests.support.pairs import clip_pair, projection_pair
from tests.support.reference import assert_same_gradients, reference_names
from tests.support.tolerance import assert_close, within
from tinyldm import backend
from tinyldm.layers import Tape


@pytest.mark.parametrize("name", CLIPS)
def test_clip_gradients(name):
    reference, module = clip_pair(CLIPS[name], torch.float64)
    ids = read_only(np.random.default_rng(1).integers(0, 97, (2, 77)))
    theirs = reference(torch.from_numpy(ids.copy())).last_hidden_state
    tape = Tape()
    ours = module.forward(ids, tape)
    assert_close(ours, theirs.detach().numpy(), 1e-8, "context")
    dy = read_only(np.random.default_rng(2).standard_normal(ours.shape))
    theirs.backward(torch.from_numpy(dy.copy()))
    module.backward(dy, tape)
    assert not tape.entries
    assert_same_gradients(reference, module)
    np.testing.assert_array_equal(ours, module.forward(ids))


@pytest.mark.parametrize("name", CLIPS)
def test_clip_float32(name):
    reference, module = clip_pair(CLIPS[name], torch.float32)
    ids = np.random.default_rng(1).integers(0, 97, (2, 77))
    with torch.no_grad():
        theirs = reference(torch.from_numpy(ids)).last_hidden_state.numpy()
    assert_close(module(ids), theirs, 1e-3, "fast")
    with backend.plain():
        assert_close(module(ids), theirs, 1e-4, "plain")


@pytest.mark.parametrize("end", [98, 2])
def test_clip_with_projection(end):
    reference, module, ids = projection_pair(end, torch.float64)
    theirs = reference(torch.from_numpy(ids.copy()), output_hidden_states=True)
    tape = Tape()
    ours = module.forward(ids, tape)
    expected = theirs.hidden_states[-2], theirs.text_embeds
    rng = np.random.default_rng(2)
    dys = [read_only(rng.standard_normal(y.shape)) for y in ours]
    for name, y, same in zip(("context", "text_embeds"), ours, expected):
        assert_close(y, same.detach().numpy(), 1e-8, name)
    torch.autograd.backward(expected, [torch.from_numpy(dy.copy()) for dy in dys])
    module.backward(*dys, tape)
    assert not tape.entries
    assert_same_gradients(reference, module)


@pytest.mark.parametrize("end", [98, 2])
def test_a_learned_word_and_the_pooled_token(end):
    """With eos_token_id 2 the largest id is pooled: that of a learned word, as in transformers."""
    reference, module, ids = projection_pair(end, torch.float64, vocab_size=101)
    ids = ids.copy()
    ids[:, 5] = 100                                     # added by textual inversion
    theirs = reference(torch.from_numpy(ids)).text_embeds.detach().numpy()
    assert_close(module(ids)[1], theirs, 1e-8)
    later = ids.copy()
    later[:, 7] = 3                                     # seen by the end token, not by the word
    assert np.array_equal(module(later)[1], module(ids)[1]) == (end == 2)


def test_clip_without_the_last_layer():
    """SDXL's first encoder. The last layer gets no gradient."""
    reference, module = clip_pair(CLIPS["as SD 1"], torch.float64)
    ids = read_only(np.random.default_rng(1).integers(0, 97, (2, 77)))
    theirs = reference(torch.from_numpy(ids.copy()), output_hidden_states=True).hidden_states[-2]
    tape = Tape()
    ours = module.forward(ids, tape, skip=1)
    assert_close(ours, theirs.detach().numpy(), 1e-8)
    dy = read_only(np.random.default_rng(2).standard_normal(ours.shape))
    theirs.backward(torch.from_numpy(dy.copy()))
    module.backward(dy, tape)
    assert not tape.entries
    expected = {name: same.grad for name, same in reference_names(reference)}
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None), name
        if parameter.grad is not None:
            error = abs(parameter.grad - expected[name].numpy()).max()
            within(error, 1e-6 * abs(expected[name].numpy()).max() + 1e-12, name)


@pytest.mark.parametrize("end", [98, 2])
def test_clip_with_projection_float32(end):
    reference, module, ids = projection_pair(end, torch.float32)
    with torch.no_grad():
        theirs = reference(torch.from_numpy(ids.copy()), output_hidden_states=True)
    for y, same in zip(module(ids), (theirs.hidden_states[-2], theirs.text_embeds)):
        assert_close(y, same.numpy(), 1e-3)
