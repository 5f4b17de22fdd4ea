"""The bundled model's world: simple scenes, their captions, their pictures and their tokenizer.

Training starts here: `batch` samples scenes and draws them, `write_tokenizer` makes the vocabulary
that reads their captions. `metrics/judge.py` measures such pictures and shares no code with this
file, so that a mistake made here cannot hide there.

All lengths of a scene are fractions of the picture's side, x to the right and y downwards. A half
extent is half the longer side of the shape's bounding box, so one range fits every shape.
"""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

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

# Never drawn in training: each colour misses one shape and each shape one or two colours, so every
# word is known well and only the combination is new.
HELD_OUT = frozenset({
    ("red", "star"), ("green", "heart"), ("blue", "cross"), ("yellow", "ring"),
    ("orange", "diamond"), ("purple", "triangle"), ("white", "square"), ("black", "circle"),
    ("pink", "star"), ("gray", "heart"),
})

SINGLE_SHARE = 1 / 3        # pairs are harder (which colour, where?) and get the larger share
MARGIN = 0.02               # least distance of an object from the frame ...
GAP = 0.04                  # ... and from the other object: 2.5 of 64 pixels
SUPERSAMPLING = 4
MAX_LENGTH = 77             # tokens of a prompt, as in CLIP


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
    """One or two things on a plain ground. relation: where the first is, or None for one thing."""

    things: tuple
    relation: str | None
    background: str

    def caption(self):
        names = [f"a {thing.size} {thing.colour} {thing.shape}" for thing in self.things]
        objects = f" {self.relation} ".join(names)
        return f"{objects} on a {self.background} background"


def sample(rng, held_out=False):
    """Draw a Scene from a numpy Generator.

    held_out False: no thing is a combination of HELD_OUT, as in training. True: at least one is.
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
    things = tuple(
        Thing(size, colour, shape, x, y, half)
        for size, colour, shape, (x, y), half in zip(sizes, colours, shapes, centres, halves)
    )
    return Scene(things, relation, background)


def crowd(rng):
    """A Scene of four or nine things in rows: what the autoencoder finds hardest, many at a time.

    Small things have the most edges and corners a pixel, and a true picture has two of them at
    most. No caption could name so many, and the autoencoder needs none. No thing is of HELD_OUT.
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
    """The centre (x, y) of a single thing: anywhere near the middle, inside the frame."""
    reach = min(0.15, 0.5 - MARGIN - half)
    return (0.5 + reach * rng.uniform(-1, 1, size=2)).tolist()


def _place_pair(rng, halves, relation):
    """The centres [(x, y), (x, y)] of two things, the first one `relation` the second.

    Along the relation's axis the room left over is shared by the two ends and the gap between.
    Across it the two differ by at most 0.1, less than half of their least distance along it
    (0.10 + 0.10 + GAP), so that no pair is both beside and above one another.
    """
    forward = relation in ("above", "left of")
    low, high = halves if forward else reversed(halves)
    room = 1 - 2 * MARGIN - GAP - 2 * (low + high)
    along = np.array([
        MARGIN + low + room / 2 * rng.random(),
        1 - MARGIN - high - room / 2 * rng.random(),
    ])
    across = 0.5 + rng.uniform(-0.1, 0.1) + rng.uniform(-0.05, 0.05, size=2)
    along = along if forward else along[::-1]
    horizontal = relation in ("left of", "right of")
    return np.stack([along, across] if horizontal else [across, along], axis=1).tolist()


def held_out_prompts(n, seed):
    """n different captions for evaluation, each with at least one combination of HELD_OUT.

    A model trained on `batch` has therefore never seen a picture of any of them.
    """
    return list(held_out_scenes(n, seed))


def held_out_scenes(n, seed):
    """{caption: Scene} of held_out_prompts."""
    rng = np.random.default_rng(seed)
    scenes = {}                                      # a dict keeps the order, a set would not
    while len(scenes) < n:
        scene = sample(rng, held_out=True)
        scenes.setdefault(scene.caption(), scene)
    return scenes


def draw(scene, side=64):
    """Scene -> picture, uint8 (side, side, 3), edges smoothed by drawing it four times as large."""
    large = side * SUPERSAMPLING
    canvas = Image.new("RGB", (large, large), COLOURS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        for outline, filled in OUTLINES[thing.shape]:
            points = (np.array([thing.x, thing.y]) + thing.half * outline) * large
            colour = COLOURS[thing.colour if filled else scene.background]
            pen.polygon((points - 0.5).ravel().tolist(), fill=colour)    # Pillow: pixel centres
    return np.asarray(canvas.reduce(SUPERSAMPLING))


def batch(rng, n):
    """n training pictures: images (n, 64, 64, 3) float32 in [-1, 1], and their captions."""
    scenes = [sample(rng) for _ in range(n)]
    return _images(scenes), [scene.caption() for scene in scenes]


def crowds(rng, n):
    """n pictures for the autoencoder, (n, 64, 64, 3) as of `batch`: every other one of a crowd."""
    return _images([crowd(rng) if i % 2 else sample(rng) for i in range(n)])


def _images(scenes):
    return np.stack([draw(scene) for scene in scenes]).astype(np.float32) / 127.5 - 1


def _circle(radius=1.0):
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return radius * np.stack([np.cos(t), np.sin(t)], axis=1)


def _star():
    """The five-pointed star whose edges lie on the pentagram's lines (inner radius 0.382)."""
    t = np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2, np.cos(2 * np.pi / 5) / np.cos(np.pi / 5), 1)
    return _fit(np.stack([radius * np.sin(t), -radius * np.cos(t)], axis=1))


def _heart():
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    height = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return _fit(np.stack([16 * np.sin(t) ** 3, -height], axis=1))


def _fit(points):
    """Move and scale an outline so that its bounding box is centred and its longer half is 1."""
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - (low + high) / 2) / ((high - low).max() / 2)


def _cross(arm=0.33):
    quarter = np.array([[arm, -1], [arm, -arm], [1, -arm]])
    turn = np.array([[0, 1], [-1, 0]])                    # row vectors: (x, y) -> (-y, x)
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


# Outlines at half extent 1, each (points (P, 2), filled). Not filled: cut out again, a hole.
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


def write_tokenizer(folder):
    """Write a small tokenizer in CLIP's file format: vocab.json, merges.txt and two configs.

    Ids: CLIP's byte alphabet, the same with the end-of-word mark, one for each merge, and last
    <|startoftext|> and <|endoftext|>. Every word of the captions is one token; any other text
    falls apart into bytes and pieces, and is never unknown.
    Source: Radford et al. 2021, "Learning Transferable Visual Models ...", arXiv:2103.00020.
    """
    words = " ".join(["a on background", *SIZES, *COLOURS, *SHAPES, *RELATIONS]).split()
    merges = _merges(sorted(set(words)))
    # Bytes that print stand for themselves, the others get letters from 256 on.
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(b) for b in printing] + [chr(256 + n) for n in range(256 - len(printing))]
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *map("".join, merges), start, end]
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}

    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    config = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH,
        "do_lower_case": True, "add_prefix_space": False, "errors": "replace", **special,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {
        "vocab.json": ids, "tokenizer_config.json": config, "special_tokens_map.json": special,
    }.items():
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _merges(words):
    """Byte-pair encoding: merge the commonest neighbours until every word is one piece.

    Returns pairs of strings, the earliest first. Source: Sennrich et al. 2016, arXiv:1508.07909.
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(word) > 1 for word in pieces):
        counts = Counter(pair for word in pieces for pair in pairwise(word))
        pair = max(counts, key=lambda pair: (counts[pair], pair))    # ties: the same everywhere
        merges.append(pair)
        for word in pieces:
            for i in range(len(word) - 2, -1, -1):
                if tuple(word[i:i + 2]) == pair:
                    word[i:i + 2] = ["".join(pair)]
    return merges
