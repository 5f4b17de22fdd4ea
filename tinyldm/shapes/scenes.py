"""The toy world: scenes of one or two coloured shapes, and their captions.

drawing.py makes pictures of scenes, vocabulary.py the tokenizer of their captions. judge.py judges
pictures and shares no code with this file, so that a mistake made here cannot hide there.

All lengths are fractions of the picture's side, x to the right and y downwards. A half extent is
half the longer side of the shape's bounding box, so one range fits every shape.
"""
from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 90, 220),
    "yellow": (245, 205, 50), "orange": (245, 140, 40), "purple": (140, 60, 180),
    "white": (245, 245, 245), "black": (25, 25, 25), "pink": (245, 150, 190),
    "gray": (130, 130, 130),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
SIZES = ("small", "big")
RELATIONS = ("above", "below", "left of", "right of")

# The half extents of each size, by the number of objects in the picture.
HALF_EXTENTS = {
    1: {"small": (0.14, 0.18), "big": (0.30, 0.38)},
    2: {"small": (0.10, 0.13), "big": (0.19, 0.23)},
}

# Training never shows these combinations. Each colour misses one shape, and each shape one or two
# colours, so the model learns every word well, and only the combination is new.
HELD_OUT = frozenset({
    ("red", "star"), ("green", "heart"), ("blue", "cross"), ("yellow", "ring"),
    ("orange", "diamond"), ("purple", "triangle"), ("white", "square"), ("black", "circle"),
    ("pink", "star"), ("gray", "heart"),
})

SINGLE_SHARE = 1 / 3        # pairs are harder (which colour, where?), so most scenes are pairs
MARGIN = 0.02               # least distance of an object from the frame ...
GAP = 0.04                  # ... and from the other object: 2.5 of 64 pixels


@dataclass(frozen=True)
class Thing:
    """One object: three words of the caption, its centre and its half extent."""

    size: str
    colour: str
    shape: str
    x: float
    y: float
    half: float


@dataclass(frozen=True)
class Scene:
    """One or two things on a plain background. relation: of the first to the second, or None."""

    things: tuple
    relation: str | None
    background: str

    def caption(self):
        names = [f"a {thing.size} {thing.colour} {thing.shape}" for thing in self.things]
        objects = f" {self.relation} ".join(names)
        return f"{objects} on a {self.background} background"


def sample(rng, held_out=False):
    """Draw a Scene from a numpy Generator.

    held_out: False, as in training, for no combination of HELD_OUT; True for at least one.
    """
    names = list(COLOURS)
    count = 1 if rng.random() < SINGLE_SHARE else 2
    while True:
        *colours, background = (names[i] for i in rng.permutation(len(names))[:count + 1])
        shapes = [SHAPES[i] for i in rng.integers(len(SHAPES), size=count)]
        if held_out == any(kind in HELD_OUT for kind in zip(colours, shapes)):
            break
    sizes = [SIZES[i] for i in rng.integers(len(SIZES), size=count)]
    halves = [rng.uniform(*HALF_EXTENTS[count][size]) for size in sizes]
    relation = RELATIONS[rng.integers(len(RELATIONS))] if count == 2 else None
    centres = _place_pair(rng, halves, relation) if relation else [_place_alone(rng, *halves)]
    things = tuple(Thing(size, colour, shape, x, y, half) for size, colour, shape, (x, y), half
                   in zip(sizes, colours, shapes, centres, halves))
    return Scene(things, relation, background)


def crowd(rng):
    """A Scene of four or nine small things in rows, to train the autoencoder.

    Small things have the most edges and corners per pixel, and an ordinary scene has only two. No
    caption could name so many, and the autoencoder needs none. No thing is of HELD_OUT.
    """
    rows = int(rng.integers(2, 4))
    names = list(COLOURS)
    background = names[rng.integers(len(names))]
    things = []
    while len(things) < rows * rows:
        kind = names[rng.integers(len(names))], SHAPES[rng.integers(len(SHAPES))]
        if kind[0] != background and kind not in HELD_OUT:
            half = rng.uniform(0.1, 0.48 / rows)
            slack = 0.49 / rows - half
            middle = (np.array(divmod(len(things), rows)) + 0.5) / rows
            y, x = (middle + rng.uniform(-slack, slack, size=2)).tolist()
            things.append(Thing("small", *kind, x, y, half))
    return Scene(tuple(things), None, background)


def _place_alone(rng, half):
    """The centre (x, y) of a single thing: near the middle, inside the frame."""
    reach = min(0.15, 0.5 - MARGIN - half)
    return (0.5 + reach * rng.uniform(-1, 1, size=2)).tolist()


def _place_pair(rng, halves, relation):
    """The centres [(x, y), (x, y)] of two things, so that the first is `relation` the second.

    Along the relation's axis, the free room goes to the two ends and the gap between. Across it the
    centres differ by at most 0.1, less than half of their least distance along it
    (0.10 + 0.10 + GAP), so that no pair is both beside and above one another.
    """
    forward = relation in ("above", "left of")
    low, high = halves if forward else reversed(halves)
    room = 1 - 2 * MARGIN - GAP - 2 * (low + high)
    along = np.array([MARGIN + low + room / 2 * rng.random(),
                      1 - MARGIN - high - room / 2 * rng.random()])
    across = 0.5 + rng.uniform(-0.1, 0.1) + rng.uniform(-0.05, 0.05, size=2)
    along = along if forward else along[::-1]
    horizontal = relation in ("left of", "right of")
    return np.stack([along, across] if horizontal else [across, along], axis=1).tolist()


def held_out_scenes(n, seed):
    """{caption: Scene} for evaluation: n different captions with a combination of HELD_OUT each.

    So a model trained on drawing.batch has never seen a picture of any of them.
    """
    rng = np.random.default_rng(seed)
    scenes = {}                                      # a dict keeps the order
    while len(scenes) < n:
        scene = sample(rng, held_out=True)
        scenes.setdefault(scene.caption(), scene)
    return scenes
