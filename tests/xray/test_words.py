"""What a word does: the boxes, the shares in them, and the pictures without it."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import tinyldm
from tests.support.models import CLIPS
from tests.support.pairs import clip_pair
from tests.support.tolerance import assert_close
from tinyldm.layers import forward_hooks
from tinyldm.shapes.drawing import draw
from tinyldm.shapes.scenes import COLOURS, Scene, Thing
from tinyldm.text.tokenizer import Word
from tinyldm.xray.drawing import pooled
from tinyldm.xray.record import Record
from tinyldm.xray.words import Box, context_without, find_boxes, record_shares, shares

TALL = Scene((Thing("small", "red", "circle", x=0.5, y=0.25, half=0.12),
              Thing("big", "blue", "square", x=0.4, y=0.7, half=0.2)), "above", "white")


def words_of(prompt):
    return [Word(text, range(i + 1, i + 2)) for i, text in enumerate(prompt.split())]


def test_boxes_are_what_was_drawn():
    prompt, picture = TALL.caption(), draw(TALL)
    record = SimpleNamespace(image=Image.fromarray(picture), prompt=prompt, words=words_of(prompt))
    boxes = find_boxes(record, SimpleNamespace(language=True))
    assert [box.what for box in boxes] == ["the circle", "the square", "the ground"]
    assert [[prompt.split()[i] for i in box.words] for box in boxes] == [
        ["small", "red", "circle"], ["big", "blue", "square"], ["white", "background"]]
    np.testing.assert_array_equal(sum(box.mask.astype(int) for box in boxes), 1)    # a partition
    for box, colour in zip(boxes, ("red", "blue", "white")):
        own = np.linalg.norm(picture.astype(float) - COLOURS[colour], axis=2) < 20
        assert (own & box.mask).sum() > 0.98 * own.sum() > 0    # all but the mixed edges
    assert find_boxes(record, SimpleNamespace(language=None)) == []
    record.prompt = "something else"
    assert find_boxes(record, SimpleNamespace(language=True)) == []


def test_an_object_that_is_missing_has_an_empty_box():
    prompt = TALL.caption().replace("circle", "ring")
    empty = Image.fromarray(draw(TALL) * 0 + np.uint8(245))
    record = SimpleNamespace(image=empty, prompt=prompt, words=words_of(prompt))
    boxes = find_boxes(record, SimpleNamespace(language=True))
    assert [box.mask.mean() for box in boxes] == [0, 0, 1]


def test_shares_sum_to_one_and_say_where():
    left = np.zeros((12, 12), bool)
    left[:, :5] = True
    boxes = [Box("left", [0], left), Box("right", [1], ~left)]
    maps = np.zeros((3, 4, 4))
    maps[0, 1, 0], maps[1, :, 3], maps[2] = 7, 2, 1     # on the left, on the right, everywhere
    found = shares(maps, boxes)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(found, [[1, 0], [0, 1], [5 / 12, 7 / 12]], rtol=1e-6)


def test_the_shares_of_a_record_are_those_of_its_arrays():
    rng = np.random.default_rng(0)
    top = np.zeros((16, 16), bool)
    top[:8] = True
    record = Record("", 0, "", None, "", "", words=[Word("a", range(1, 2)), Word("b", range(2, 4))],
                    boxes=[Box("top", [0], top), Box("bottom", [1], ~top)])
    record.arrays = {"attention/x": rng.uniform(size=(2, 3, 8, 8, 5)).astype(np.float32),
                     "embedding_gradient": rng.uniform(size=(2, 5, 8, 8)).astype(np.float32)}
    record_shares(record)
    attention = record["attention/x"].mean(axis=(0, 1))[..., 2:4].sum(axis=-1)      # of "b"
    gradient = record["embedding_gradient"].mean(axis=0)[2:4].sum(axis=0)
    for name, own in ("attention_share", attention), ("gradient_share", gradient):
        np.testing.assert_allclose(record[name].sum(axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(record[name][1, 0], own[:4].sum() / own.sum(), rtol=1e-5)


def test_boxes_without_maps_have_no_shares():
    """So it is where a function is in the UNet's place."""
    record = Record("", 0, "", None, "", "", boxes=[Box("all", [], np.ones((4, 4), bool))])
    record_shares(record)
    assert record.arrays == {}


@pytest.mark.parametrize("size", [(3, 2), (5, 7), (9, 7)])
def test_pooled_is_the_mean_of_each_part(size):
    maps = np.random.default_rng(1).standard_normal((2, 9, 7, 3))
    found = pooled(maps, *size)
    rows, columns = (np.arange(n) * m // n for n, m in zip((9, 7), size))
    part = maps[:, rows == size[0] - 1][:, :, columns == 1]
    np.testing.assert_allclose(found[:, -1, 1], part.mean(axis=(1, 2)), atol=1e-6)
    assert found.shape == (2, *size, 3) and found.dtype == np.float32


@pytest.mark.parametrize("tokens", [range(3, 4), range(2, 5)], ids=str)
def test_the_context_without_a_word_keeps_positions(tokens):
    """transformers takes positions: those of the tokens that stay are what they were."""
    torch.manual_seed(0)
    reference, module = clip_pair(CLIPS["as SD 1"], torch.float64)
    ids = np.random.default_rng(2).integers(0, module.settings.vocab_size, (1, 9))
    kept = [i for i in range(9) if i not in tokens]
    with torch.no_grad():
        theirs = reference(torch.from_numpy(ids[:, kept]), position_ids=torch.tensor([kept]))
    theirs = theirs.last_hidden_state.numpy()
    ours = context_without(module, ids, Word("x", tokens))
    assert ours.shape == (1, 9, module.settings.hidden_size)
    assert_close(ours[:, :len(kept)], theirs, 1e-8, "context")
    for row in range(len(kept), 9):
        np.testing.assert_array_equal(ours[:, row], ours[:, len(kept) - 1])
    before = tokens[0]
    np.testing.assert_allclose(ours[:, :before], module(ids)[:, :before], rtol=1e-9, atol=1e-12)


def test_each_picture_without_is_drawn_with_that_context(small):
    prompt, options = "a red cat", {"num_inference_steps": 2, "sampler": "ddim", "seed": 3}
    record = tinyldm.xray(small, prompt, negative_prompt="dog", **options)
    assert record["without"].shape == (3, *np.asarray(record.image).shape)
    ids = small.tokenizer(prompt)
    for word, picture in zip(record.words, record["without"]):
        context = context_without(small.text_encoder, ids, word)

        def call(forward, own=context, **inputs):
            return forward(**inputs | {"context": np.stack([inputs["context"][0], own[0]])})

        with forward_hooks({small.unet: call}):
            image, = small(prompt, negative_prompt="dog", **options)
        assert abs(np.asarray(image).astype(int) - picture).max() <= 1      # one batch or alone
    assert (record["without"][0] != record["without"][1]).any()
