"""Drawn scenes: extents, areas and colours as specified."""
import numpy as np
import pytest

from tests.support.scenes import one
from tinyldm.shapes.drawing import batch, crowds, draw
from tinyldm.shapes.scenes import COLOURS, SHAPES


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


def test_every_second_picture_is_a_crowd():
    images = crowds(np.random.default_rng(0), 4)
    assert images.shape == (4, 64, 64, 3) and images.dtype == np.float32
    assert -1 <= images.min() and images.max() <= 1
    colours = [len(np.unique(image.reshape(-1, 3), axis=0)) for image in images]
    assert colours[0] < colours[1] and colours[2] < colours[3]      # many things, many edges
