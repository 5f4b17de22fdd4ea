"""The judge: it finds what was drawn, and each criterion falls when that alone is wrong."""

import ast
import inspect
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tinyldm.errors import TinyldmError
from tinyldm.shapes import judge as module
from tinyldm.shapes.drawing import draw
from tinyldm.shapes.judge import PALETTE, TEMPLATES, judge, label, look, read_caption, score
from tinyldm.shapes.scenes import COLOURS, RELATIONS, SHAPES, Scene, Thing, sample

CRITERIA = ("background", "count", "colour", "shape", "size", "relation")


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [sample(rng, held_out=i % 4 == 0) for i in range(500)]


@pytest.fixture(scope="module")
def pictures(scenes):
    return np.stack([draw(scene) for scene in scenes])


@pytest.fixture(scope="module")
def pairs(scenes, pictures):
    chosen = [i for i, scene in enumerate(scenes) if scene.relation][:80]
    return [scenes[i] for i in chosen], pictures[chosen]


def scored(pictures, scenes, change):
    """Judge pictures by the captions of scenes that were changed after drawing."""
    return score(pictures, [change(scene).caption() for scene in scenes])


def each_thing(change):
    """Change every thing of a scene: change(thing) returns the fields to replace."""
    def changed(scene):
        return replace(scene, things=tuple(replace(t, **change(t)) for t in scene.things))
    return changed


def test_it_knows_the_same_world_and_shares_no_code():
    assert PALETTE == COLOURS and set(TEMPLATES) == set(SHAPES)
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported == {"re", "functools", "typing", "numpy", "tinyldm.errors"}


def test_true_pictures(scenes, pictures):
    shares = score(pictures, [scene.caption() for scene in scenes])
    assert min(shares[name] for name in CRITERIA) >= 0.99, shares


def test_true_pictures_blurred_and_noisy(scenes, pictures):
    rng = np.random.default_rng(1)
    soft = np.stack([
        np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.7)))
        for picture in pictures
    ])
    noisy = (soft + rng.normal(0, 8, soft.shape)).round().clip(0, 255).astype(np.uint8)
    shares = score(noisy, [scene.caption() for scene in scenes])
    assert min(shares[name] for name in CRITERIA) >= 0.97, shares


def unused_colour(scene):
    used = {scene.background, *(thing.colour for thing in scene.things)}
    return next(colour for colour in COLOURS if colour not in used)


def test_another_background(scenes, pictures):
    shares = scored(pictures[:80], scenes[:80],
                    lambda scene: replace(scene, background=unused_colour(scene)))
    assert shares["background"] == shares["all"] == 0
    assert all(shares[name] == 1 for name in CRITERIA[1:])


def test_other_colours(scenes, pictures):
    shares = scored(pictures[:80], scenes[:80], lambda scene: each_thing(
        lambda thing: {"colour": unused_colour(scene)})(scene))
    assert shares["colour"] == 0
    assert all(shares[name] == 1 for name in ("background", "count", "shape", "size"))


def test_other_shapes(scenes, pictures):
    shares = scored(pictures[:80], scenes[:80], each_thing(
        lambda thing: {"shape": SHAPES[(SHAPES.index(thing.shape) + 1) % 8]}))
    assert shares["shape"] <= 0.01
    assert all(shares[name] == 1 for name in ("background", "count", "colour", "size"))


def test_other_sizes(scenes, pictures):
    shares = scored(pictures[:80], scenes[:80], each_thing(
        lambda thing: {"size": "big" if thing.size == "small" else "small"}))
    assert shares["size"] == 0
    assert all(shares[name] == 1 for name in ("background", "count", "colour", "shape"))


def test_other_relations(pairs):
    opposite = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
    crossing = {"above": "left of", "below": "right of", "left of": "above", "right of": "below"}
    scenes, pictures = pairs
    for other in (opposite, crossing):
        shares = scored(pictures, scenes, lambda scene, other=other: replace(
            scene, relation=other[scene.relation]))
        assert shares["relation"] == 0 and shares["background"] == shares["count"] == 1
        # Opposite: each place holds the other object. Crossing: no place to go by, looks decide.
        assert shares["colour"] == (0 if other is opposite else 1)


def test_colours_on_the_wrong_object_are_wrong(pairs):
    def exchanged(scene):
        first, second = scene.things
        return replace(scene, things=(replace(first, colour=second.colour),
                                      replace(second, colour=first.colour)))

    scenes, pictures = pairs
    shares = scored(pictures, scenes, exchanged)
    assert shares["colour"] == 0
    assert all(shares[name] == 1 for name in ("background", "count", "shape", "size"))


def test_shapes_on_the_wrong_object_are_wrong(pairs):
    def exchanged(scene):
        first, second = scene.things
        return replace(scene, things=(replace(first, shape=second.shape),
                                      replace(second, shape=first.shape)))

    different = [i for i, scene in enumerate(pairs[0])
                 if scene.things[0].shape != scene.things[1].shape]
    shares = scored(pairs[1][different], [pairs[0][i] for i in different], exchanged)
    assert shares["shape"] == 0
    assert all(shares[name] == 1 for name in ("background", "count", "colour", "size", "relation"))


PAIR = Scene((Thing("big", "red", "ring", 0.27, 0.5, 0.2),
              Thing("small", "blue", "star", 0.75, 0.5, 0.12)), "left of", "white")


@pytest.mark.parametrize("kept", [0, 1])
def test_a_missing_object_is_wrong_and_the_other_is_not(kept):
    picture = draw(replace(PAIR, things=PAIR.things[kept:kept + 1]))
    verdicts = judge(picture, PAIR.caption())
    assert verdicts["background"] == (True,)
    assert verdicts["count"] == verdicts["relation"] == (False,)
    expected = (True, False) if kept == 0 else (False, True)
    assert verdicts["colour"] == verdicts["shape"] == verdicts["size"] == expected


def test_an_empty_picture():
    verdicts = judge(draw(replace(PAIR, things=())), PAIR.caption())
    assert verdicts["background"] == (True,) and verdicts["relation"] == (False,)
    assert verdicts["colour"] == verdicts["shape"] == verdicts["size"] == (False, False)


def test_an_object_too_many_is_counted():
    third = Thing("small", "green", "star", 0.5, 0.85, 0.1)            # the smallest of the three
    verdicts = judge(draw(replace(PAIR, things=(*PAIR.things, third))), PAIR.caption())
    assert verdicts["count"] == (False,) and verdicts["colour"] == (True, True)


def test_edges_make_no_third_colour():
    # Half-way from white to black is gray, from red to yellow orange.
    for ground, colour in (("white", "black"), ("red", "yellow"), ("yellow", "red")):
        for shape in SHAPES:
            scene = Scene((Thing("small", colour, shape, 0.5, 0.5, 0.14),), None, ground)
            background, found = look(draw(scene))
            assert background == ground
            assert [(thing.colour, thing.shape) for thing in found] == [(colour, shape)]


def test_places_and_extents_of_other_picture_sizes():
    for side in (64, 128, 200):
        _, found = look(draw(PAIR, side))
        for seen, drawn in zip(found, PAIR.things, strict=True):
            assert [seen.x, seen.half] == pytest.approx([drawn.x, drawn.half], abs=0.02)


def test_label_against_flood_fill():
    mask = np.random.default_rng(0).random((31, 47)) < 0.6
    expected, regions = np.zeros(mask.shape, int), 0
    for start in zip(*np.nonzero(mask), strict=True):
        regions += expected[start] == 0
        todo = [start] if expected[start] == 0 else []
        while todo:
            y, x = todo.pop()
            if 0 <= y < 31 and 0 <= x < 47 and mask[y, x] and not expected[y, x]:
                expected[y, x] = regions
                todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    labels = label(mask)
    assert ((labels > 0) == mask).all()
    together = set(zip(labels[mask].tolist(), expected[mask].tolist(), strict=True))
    assert len(together) == regions == len(np.unique(labels[mask]))


def test_captions():
    claim = read_caption(PAIR.caption())
    assert claim.objects == (("big", "red", "ring"), ("small", "blue", "star"))
    assert (claim.relation, claim.background) == ("left of", "white")
    for relation in RELATIONS:
        assert read_caption(replace(PAIR, relation=relation).caption()).relation == relation
    for bad in ("", "a red ring", "a big red ring on a mauve background", PAIR.caption() + "."):
        with pytest.raises(TinyldmError, match="expected a caption"):
            read_caption(bad)
