"""The drawn scenes: captions, colours, extents and places as specified, and their tokenizer."""

import re
from itertools import combinations

import numpy as np
import pytest

from tinyldm.tokenizer import Tokenizer
from tinyldm.training.data import (
    COLOURS,
    HALF_EXTENTS,
    HELD_OUT,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    batch,
    crowd,
    crowds,
    draw,
    held_out_prompts,
    held_out_scenes,
    sample,
    write_tokenizer,
)

THING = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
GRAMMAR = rf"{THING}( ({'|'.join(RELATIONS)}) {THING})? on a ({'|'.join(COLOURS)}) background"


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [sample(rng) for _ in range(3000)]


def kinds(scene):
    return {(thing.colour, thing.shape) for thing in scene.things}


def one(shape, half, x=0.5, y=0.5):
    return Scene((Thing("big", "black", shape, x, y, half),), None, "white")


def test_captions_follow_the_grammar(scenes):
    assert all(re.fullmatch(GRAMMAR, scene.caption()) for scene in scenes)
    pair = Scene((Thing("big", "red", "ring", 0.3, 0.5, 0.2),
                  Thing("small", "gray", "star", 0.7, 0.5, 0.1)), "left of", "pink")
    assert pair.caption() == "a big red ring left of a small gray star on a pink background"
    assert one("heart", 0.3).caption() == "a big black heart on a white background"


def test_every_word_is_drawn_often_and_pairs_more_than_singles(scenes):
    for word in [*SIZES, *COLOURS, *SHAPES, *RELATIONS]:
        assert sum(word in scene.caption() for scene in scenes) > 100, word
    assert 0.60 < np.mean([len(scene.things) == 2 for scene in scenes]) < 0.73


def test_objects_and_background_differ_in_colour(scenes):
    for scene in scenes:
        colours = [thing.colour for thing in scene.things] + [scene.background]
        assert len(set(colours)) == len(colours)


def test_extents_lie_in_the_stated_ranges(scenes):
    assert HALF_EXTENTS == {1: {"small": (0.14, 0.18), "big": (0.30, 0.38)},
                            2: {"small": (0.10, 0.13), "big": (0.19, 0.23)}}
    for scene in scenes:
        for thing in scene.things:
            low, high = HALF_EXTENTS[len(scene.things)][thing.size]
            assert low <= thing.half <= high


def test_objects_stay_inside_apart_and_clearly_related(scenes):
    for scene in scenes:
        for thing in scene.things:
            assert all(thing.half + 0.02 <= c + 1e-9 <= 1 - thing.half for c in (thing.x, thing.y))
        for first, second in combinations(scene.things, 2):
            dx, dy = second.x - first.x, second.y - first.y
            along, across = (dx, dy) if "of" in scene.relation else (dy, dx)
            along = along if scene.relation in ("left of", "above") else -along
            assert along >= first.half + second.half + 0.04 - 1e-9
            assert abs(across) < along / 2


@pytest.mark.parametrize("shape", SHAPES)
def test_a_drawn_shape_fills_its_bounding_box(shape):
    side, half = 512, 0.23
    ink = draw(one(shape, half, x=0.4, y=0.6), side)[..., 0] < 245     # any ink: tips are thin
    ys, xs = np.nonzero(ink)
    box = np.array([xs.min(), xs.max() + 1, ys.min(), ys.max() + 1]) / side
    # The heart and the star are a little less high than wide; every shape is as wide as its box.
    assert np.abs(box[:2] - [0.4 - half, 0.4 + half]).max() < 1.5 / side
    assert np.abs((box[2] + box[3]) / 2 - 0.6) < 1.5 / side
    assert 0.9 * half < (box[3] - box[2]) / 2 < half + 1.5 / side


@pytest.mark.parametrize("shape, area", [
    ("circle", np.pi), ("square", 4), ("triangle", 2), ("diamond", 2),
    ("ring", np.pi * (1 - 0.55**2)), ("cross", 4 * (1 - 0.67**2)),
])
def test_areas(shape, area):
    ink = (245 - draw(one(shape, 0.23), 256)[..., 0].astype(float)) / 220
    assert ink.mean() == pytest.approx(area * 0.23**2, rel=0.015)


def test_pictures_hold_exactly_the_colours_named(scenes):
    for scene in scenes[:300]:
        picture = draw(scene)
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        assert (picture[[0, 0, -1, -1], [0, -1, 0, -1]] == COLOURS[scene.background]).all()
        for thing in scene.things:
            exact = (picture == COLOURS[thing.colour]).all(axis=2)
            ys, xs = np.nonzero(exact)
            assert len(xs) > 0.6 * 64**2 * thing.half**2            # a star covers 1.24 half²
            assert abs((xs + 0.5) / 64 - thing.x).max() < thing.half + 1 / 64
            assert abs((ys + 0.5) / 64 - thing.y).max() < thing.half + 1 / 64


def test_a_seed_gives_the_same_pictures():
    images, captions = batch(np.random.default_rng(7), 20)
    again, same = batch(np.random.default_rng(7), 20)
    other, _ = batch(np.random.default_rng(8), 20)
    assert captions == same and (images == again).all() and (images != other).any()
    assert images.shape == (20, 64, 64, 3) and images.dtype == np.float32
    assert -1 <= images.min() < -0.5 and 0.5 < images.max() <= 1


def test_held_out_combinations_are_never_drawn(scenes):
    assert len(HELD_OUT) == 10
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS)
    assert {shape for _, shape in HELD_OUT} == set(SHAPES)
    seen = set().union(*map(kinds, scenes))
    assert seen == {(colour, shape) for colour in COLOURS for shape in SHAPES} - HELD_OUT
    rng = np.random.default_rng(1)
    assert all(kinds(sample(rng, held_out=True)) & HELD_OUT for _ in range(500))


def test_held_out_prompts(scenes):
    prompts = held_out_prompts(300, seed=0)
    assert len(set(prompts)) == 300 and prompts == held_out_prompts(300, seed=0)
    assert prompts != held_out_prompts(300, seed=1)
    for prompt in prompts:
        assert re.fullmatch(GRAMMAR, prompt)
        assert any(f"{colour} {shape}" in prompt for colour, shape in HELD_OUT)
    assert not set(prompts) & {scene.caption() for scene in scenes}


def test_held_out_scenes_are_those_of_the_prompts():
    scenes = held_out_scenes(30, seed=4)
    assert list(scenes) == held_out_prompts(30, seed=4)
    assert all(scene.caption() == caption for caption, scene in scenes.items())


def test_a_crowd_is_many_things_apart_inside_and_of_kinds_that_are_trained():
    rng = np.random.default_rng(0)
    crowd_scenes = [crowd(rng) for _ in range(200)]
    assert {len(scene.things) for scene in crowd_scenes} == {4, 9}
    for scene in crowd_scenes:
        assert not kinds(scene) & HELD_OUT
        assert scene.background not in {thing.colour for thing in scene.things}
        for thing in scene.things:
            assert 0.003 < min(thing.x, thing.y) - thing.half
            assert max(thing.x, thing.y) + thing.half < 0.997
        for a, b in combinations(scene.things, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.half + b.half + 0.0066


def test_crowds():
    images = crowds(np.random.default_rng(0), 4)
    assert images.shape == (4, 64, 64, 3) and images.dtype == np.float32
    assert -1 <= images.min() and images.max() <= 1
    things = [len(np.unique(image.reshape(-1, 3), axis=0)) for image in images]
    assert things[0] < things[1] and things[2] < things[3]     # many colours, many edges



@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder, pytest.importorskip("transformers").CLIPTokenizer.from_pretrained(folder)


def test_every_word_of_a_caption_is_one_token(reference, scenes):
    _, tokenizer = reference
    start, end = len(tokenizer) - 2, len(tokenizer) - 1
    assert tokenizer.model_max_length == 77
    for scene in scenes[:200]:
        ids = tokenizer(scene.caption()).input_ids
        assert ids[0] == start and ids[-1] == end
        words = [token.removesuffix("</w>") for token in tokenizer.convert_ids_to_tokens(ids[1:-1])]
        assert " ".join(words) == scene.caption()


@pytest.mark.parametrize("text", ["", "a Photograph of 12 cats!", "größer, 猫 and 🙂", "reddish"])
def test_any_text_is_spelled_without_loss(reference, text):
    _, tokenizer = reference
    ids = tokenizer(text).input_ids[1:-1]
    assert tokenizer.unk_token_id not in ids
    spelled = tokenizer.decode(ids).replace(" ", "")
    assert spelled == text.lower().replace(" ", "")


def test_our_tokenizer_reads_the_files_like_transformers(reference, scenes):
    folder, theirs = reference
    ours = Tokenizer.from_folder(folder)
    texts = [scene.caption() for scene in scenes[:50]] + ["", "größer, 猫 and 🙂", "red " * 100]
    for text in texts:
        padded = theirs(text, padding="max_length", truncation=True, max_length=77).input_ids
        assert ours(text).tolist() == [padded]
