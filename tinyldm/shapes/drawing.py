"""Scenes as pictures: the outlines of the shapes, and batches of training pictures."""
import numpy as np
from PIL import Image, ImageDraw

from .scenes import COLOURS, crowd, sample

SUPERSAMPLING = 4


def draw(scene, side=64):
    """Scene -> picture, uint8 (side, side, 3), drawn at four times the size for smooth edges."""
    large = side * SUPERSAMPLING
    canvas = Image.new("RGB", (large, large), COLOURS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        for outline, filled in OUTLINES[thing.shape]:
            points = (np.array([thing.x, thing.y]) + thing.half * outline) * large
            colour = COLOURS[thing.colour if filled else scene.background]
            pen.polygon((points - 0.5).ravel().tolist(), fill=colour)    # from pixel centres
    return np.asarray(canvas.reduce(SUPERSAMPLING))


def batch(rng, n):
    """n training pictures, float32 (n, 64, 64, 3) in [-1, 1], and a list of their captions."""
    scenes = [sample(rng) for _ in range(n)]
    return to_images(scenes), [scene.caption() for scene in scenes]


def crowds(rng, n):
    """n pictures for the autoencoder, as batch makes them; every second one shows a crowd."""
    return to_images([crowd(rng) if i % 2 else sample(rng) for i in range(n)])


def to_images(scenes):
    """n scenes -> their pictures, float32 (n, 64, 64, 3) in [-1, 1]."""
    return np.stack([draw(scene) for scene in scenes]).astype(np.float32) / 127.5 - 1


def _circle(radius=1.0):
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return radius * np.stack([np.cos(t), np.sin(t)], axis=1)


def _star():
    """The five-pointed star whose edges lie on a pentagram's lines (inner radius 0.382)."""
    t = np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2, np.cos(2 * np.pi / 5) / np.cos(np.pi / 5), 1)
    return _fit(np.stack([radius * np.sin(t), -radius * np.cos(t)], axis=1))


def _heart():
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    height = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return _fit(np.stack([16 * np.sin(t) ** 3, -height], axis=1))


def _fit(points):
    """Move and scale an outline: its bounding box is centred, half its longer side is 1."""
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - (low + high) / 2) / ((high - low).max() / 2)


def _cross(arm=0.33):
    quarter = np.array([[arm, -1], [arm, -arm], [1, -arm]])
    turn = np.array([[0, 1], [-1, 0]])                    # row vectors: (x, y) -> (-y, x)
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


# Outlines at half extent 1, each (points (P, 2), filled). What is not filled is cut out: a hole.
OUTLINES = {
    "circle": [(_circle(), True)],
    "square": [(np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]), True)],
    "triangle": [(np.array([[0, -1], [1, 1], [-1, 1]]), True)],
    "star": [(_star(), True)],
    "heart": [(_heart(), True)],
    "ring": [(_circle(), True), (_circle(0.55), False)],
    "cross": [(_cross(), True)],
    "diamond": [(np.array([[0, -1], [1, 0], [0, 1], [-1, 0]]), True)],
}
