"""The drawn scenes: captions, colours, extents and places as specified, and their tokenizer."""
import re
from itertools import combinations

import numpy as np

from tests.support.scenes import one
from tinyldm.shapes.scenes import (
    COLOURS,
    HALF_EXTENTS,
    HELD_OUT,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    crowd,
    held_out_scenes,
    sample,
)

THING = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
GRAMMAR = rf"{THING}( ({'|'.join(RELATIONS)}) {THING})? on a ({'|'.join(COLOURS)}) background"


def kinds(scene):
    return {(thing.colour, thing.shape) for thing in scene.things}


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


def test_held_out_combinations_are_never_drawn(scenes):
    assert len(HELD_OUT) == 10
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS)
    assert {shape for _, shape in HELD_OUT} == set(SHAPES)
    seen = set().union(*map(kinds, scenes))
    assert seen == {(colour, shape) for colour in COLOURS for shape in SHAPES} - HELD_OUT
    rng = np.random.default_rng(1)
    assert all(kinds(sample(rng, held_out=True)) & HELD_OUT for _ in range(500))


def test_held_out_scenes(scenes):
    prompts = list(held_out_scenes(300, seed=0))
    assert len(set(prompts)) == 300 and prompts == list(held_out_scenes(300, seed=0))
    assert prompts != list(held_out_scenes(300, seed=1))
    for prompt in prompts:
        assert re.fullmatch(GRAMMAR, prompt)
        assert any(f"{colour} {shape}" in prompt for colour, shape in HELD_OUT)
    assert not set(prompts) & {scene.caption() for scene in scenes}


def test_a_crowd_is_many_things_apart_inside_and_of_trained_combinations():
    rng = np.random.default_rng(0)
    crowds = [crowd(rng) for _ in range(200)]
    assert {len(scene.things) for scene in crowds} == {4, 9}
    for scene in crowds:
        assert not {(thing.colour, thing.shape) for thing in scene.things} & HELD_OUT
        assert scene.background not in {thing.colour for thing in scene.things}
        for thing in scene.things:
            assert 0.003 < min(thing.x, thing.y) - thing.half
            assert max(thing.x, thing.y) + thing.half < 0.997
        for a, b in combinations(scene.things, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.half + b.half + 0.0066
