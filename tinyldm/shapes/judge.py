"""The judge: does a picture show what its caption says?

It is made for the bundled model's captions and shares no code with the drawing of its training
pictures: the colours, the shapes' formulas and the grammar of captions are written here a second
time. `look` finds what is in one picture, `judge` compares that with a caption, `score` averages
over many. All places and lengths are fractions of the picture's side, x right, y down.

How it counts (each criterion is a tuple of verdicts, and `score` averages the verdicts):
- background: one verdict. The colour nearest to the median of the picture's frame.
- count: one verdict. The picture has as many objects as the caption names.
- colour, shape, size: one verdict per NAMED object, so two for a pair. The first-named object of a
  pair is the one at the place that the caption gives it ("left of": the left one), whatever its
  looks: colours or shapes on the wrong object are wrong twice. Where the two do not lie along the
  caption's axis, their places say nothing, and the order that fits more words is taken.
  A missing object is wrong in all three. Where there are too many, the largest count.
- relation: one verdict, for pairs. Right if the two lie along the caption's axis and exchanging
  them would not fit more of the words (a whole pair exchanged is a wrong relation).
"""

import re
from functools import cache
from typing import NamedTuple

import numpy as np

from tinyldm.errors import TinyldmError

PALETTE = {
    "black": (25, 25, 25), "blue": (50, 90, 220), "gray": (130, 130, 130),
    "green": (40, 160, 60), "orange": (245, 140, 40), "pink": (245, 150, 190),
    "purple": (140, 60, 180), "red": (220, 40, 40), "white": (245, 245, 245),
    "yellow": (245, 205, 50),
}
# Half-way between the stated ranges of small and big, alone and in a pair.
BIG_FROM = {1: 0.24, 2: 0.16}
# The two nearest colours (yellow, orange) are 66 apart: half of that separates object and ground.
LEAST_CONTRAST = 33
# The smallest object, a small star in a pair, covers 0.0124 of the picture; a speck less than half.
LEAST_AREA = 0.006


# Each shape is the set of points (x right, y down) that it covers inside the box from -1 to 1.

def _star(x, y):
    """A pentagram. The line of each edge lies cos 72° from the centre, 72° away from its tip."""
    radius, angle = np.hypot(x, y), np.arctan2(x, -y)             # 0 = up, where one tip is
    from_tip = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    fifth = 2 * np.pi / 5
    return radius * np.cos(fifth - from_tip) <= np.cos(fifth)


def _heart(x, y):
    """A classic sextic, (u² + v² - 1)³ <= u² v³, scaled into the box: its half width is 1.14."""
    u, v = 1.14 * x, 0.12 - 1.14 * y
    w = u * u + v * v - 1
    return w * w * w <= u * u * v * v * v


TEMPLATES = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) <= 1,
    "triangle": lambda x, y: (np.abs(x) <= (1 + y) / 2) & (y <= 1),
    "star": _star,
    "heart": _heart,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.775) <= 0.225,
    "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) <= 1 / 3)
    & (np.maximum(np.abs(x), np.abs(y)) <= 1),
    "diamond": lambda x, y: np.abs(x) + np.abs(y) <= 1,
}


class Found(NamedTuple):
    """One object found in a picture."""

    colour: str
    shape: str
    half: float       # half the longer side of its bounding box
    x: float          # the middle of its bounding box
    y: float


class Claim(NamedTuple):
    """What a caption says. objects: (size, colour, shape) in the order named."""

    objects: tuple
    relation: str | None
    background: str


def read_caption(caption):
    """Caption -> Claim. Raises TinyldmError for a caption outside the bundled model's grammar."""
    thing = rf"a (small|big) ({'|'.join(PALETTE)}) ({'|'.join(TEMPLATES)})"
    pair = rf"(?: (above|below|left of|right of) {thing})?"
    match = re.fullmatch(rf"{thing}{pair} on a ({'|'.join(PALETTE)}) background", caption)
    if match is None:
        raise TinyldmError("expected a caption such as 'a big red circle on a white background', "
                           f"got {caption!r}; name one or two objects and the background in this "
                           "way")
    words = match.groups()
    objects = (words[:3], words[4:7]) if words[3] else (words[:3],)
    return Claim(objects, words[3], words[7])


def look(image):
    """uint8 (H,W,3) -> the background's colour and a list of Found, the largest first."""
    ground, found = _regions(image)
    return ground, [thing for thing, _ in found]


def areas(image, caption):
    """uint8 (H,W,3) -> where the objects that the caption names are: masks (H,W), in its order.

    A mask has no pixel where an object is missing. Raises TinyldmError as read_caption does.
    """
    claim = read_caption(caption)
    _, found = _regions(image)
    shown, _ = _in_order([thing for thing, _ in found[:len(claim.objects)]], claim)
    nothing = np.zeros(image.shape[:2], bool)
    return [next((mask for thing, mask in found if thing is named), nothing) for named in shown]


def _regions(image):
    """uint8 (H,W,3) -> the background's colour and [(Found, its mask (H,W))], the largest first."""
    pixels = image.astype(np.float32)
    edge = max(1, image.shape[0] // 32)
    inner = np.zeros(image.shape[:2], bool)
    inner[edge:-edge, edge:-edge] = True
    ground = np.median(pixels[~inner], axis=0)                            # (3,)
    labels = label(_mask(pixels, ground))
    names, counts = np.unique(labels[labels > 0], return_counts=True)
    masks = [labels == name for name, count in sorted(zip(names, counts), key=lambda pair: -pair[1])
             if count >= LEAST_AREA * labels.size]
    return _nearest_colour(ground), [(_describe(pixels, mask), mask) for mask in masks]


def judge(image, caption):
    """Compare a picture, uint8 (H,W,3), with its caption.

    Returns a dict from criterion (background, count, colour, shape, size, relation) to a tuple of
    booleans, counted as the file's docstring says; relation is () for a single object.
    """
    claim = read_caption(caption)
    background, found = look(image)
    named = len(claim.objects)
    shown, along_axis = _in_order(found[:named], claim)
    fits = [_fit(thing, words, named) for thing, words in zip(shown, claim.objects)]
    colours, shapes, sizes = zip(*fits)
    in_place = along_axis and _fitting_words(shown[::-1], claim) <= _fitting_words(shown, claim)
    return {"background": (background == claim.background,), "count": (len(found) == named,),
            "colour": colours, "shape": shapes, "size": sizes,
            "relation": (in_place,) if named == 2 else ()}


def score(images, captions):
    """Accuracies over uint8 images (n,H,W,3) and their n captions.

    Returns a dict from each criterion of `judge` to the share of its verdicts that are right (nan
    without any), and "all", the share of pictures in which every verdict is right.
    """
    verdicts = [judge(image, caption) for image, caption in zip(images, captions, strict=True)]
    shares = {}
    for name in ("background", "count", "colour", "shape", "size", "relation"):
        right = [verdict for picture in verdicts for verdict in picture[name]]
        shares[name] = float(np.mean(right)) if right else float("nan")
    shares["all"] = float(np.mean([all(map(all, picture.values())) for picture in verdicts]))
    return shares


def label(mask):
    """Number the 4-connected regions of a boolean (H,W): int (H,W), 0 outside the mask.

    Every pixel starts with its own number. It takes the largest number among its neighbours, then
    the number that the pixel of that number has now, which halves the distance left to go.
    """
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        best = np.where(mask, np.maximum.reduce(_with_neighbours(labels)), 0)
        best = np.append(0, best)[best]
        if np.array_equal(best, labels):
            return labels
        labels = best


def _with_neighbours(array):
    """(H,W) -> a list of five (H,W): itself and its four neighbours, 0 outside the picture."""
    wide = np.pad(array, 1)
    return [array, wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]]


def _mask(pixels, ground):
    """Which pixels belong to objects: those at least half as far from the ground's colour as the
    farthest pixel near them.

    An edge is a mixture of two colours and may look like a third one. The outline is half-way
    across it, whatever the two colours are. "Near" reaches 2 of 64 pixels: past the edge into the
    object, but not from one object to the other.
    """
    distance = np.linalg.norm(pixels - ground, axis=2)                    # (H,W)
    (height, width), reach = distance.shape, max(1, len(distance) // 32)
    wide, shifts = np.pad(distance, reach), range(2 * reach + 1)
    rows = np.maximum.reduce([wide[k:k + height] for k in shifts])
    near = np.maximum.reduce([rows[:, k:k + width] for k in shifts])      # (H,W), of the window
    return distance > np.maximum(LEAST_CONTRAST, near / 2)


def _describe(pixels, region):
    """One region (H,W) of a picture -> Found."""
    side = region.shape[0]
    ys, xs = np.nonzero(region)
    box = np.array([xs.min(), xs.max() + 1, ys.min(), ys.max() + 1]) / side
    core = np.logical_and.reduce(_with_neighbours(region))                # no edges
    colour = np.median(pixels[core if core.any() else region], axis=0)
    left, right, top, bottom = box
    return Found(_nearest_colour(colour), _nearest_shape(region),
                 max(right - left, bottom - top) / 2, (left + right) / 2, (top + bottom) / 2)


def _nearest_colour(colour):
    return min(PALETTE, key=lambda name: np.linalg.norm(colour - np.array(PALETTE[name])))


def _nearest_shape(region):
    """The template with the largest overlap (intersection over union) with a region (H,W).

    Each is laid over the region with the same area and centre of mass. Both barely change where a
    tip is blurred or missing; a bounding box would.
    """
    ys, xs = np.nonzero(region)
    y, x = np.ogrid[:region.shape[0], :region.shape[1]]
    overlaps = {}
    for shape, inside in TEMPLATES.items():
        area, middle = _moments(shape)
        half = np.sqrt(len(xs) / area)
        template = inside((x - xs.mean()) / half, (y - ys.mean()) / half + middle)
        overlaps[shape] = (template & region).sum() / (template | region).sum()
    return max(overlaps, key=overlaps.get)


@cache
def _moments(shape):
    """A template's area, and the height of its centre of mass (all are symmetric about x = 0)."""
    points = (np.arange(400) + 0.5) / 200 - 1
    covered = TEMPLATES[shape](points[None, :], points[:, None])
    return covered.mean() * 4, points[np.nonzero(covered)[0]].mean()


def _in_order(found, claim):
    """Found objects (None if missing) in the caption's order; do they lie along its axis?."""
    named = len(claim.objects)
    if named == 1:
        return (found or [None]), True
    axis = "x" if claim.relation in ("left of", "right of") else "y"
    forward = claim.relation in ("left of", "above")
    if not found:
        return [None, None], False
    if len(found) == 1:                         # which one it is: by the half it lies in
        first = (getattr(found[0], axis) < 0.5) == forward
        return ([found[0], None] if first else [None, found[0]]), False
    order = sorted(found, key=lambda thing: getattr(thing, axis), reverse=not forward)
    dx, dy = abs(found[0].x - found[1].x), abs(found[0].y - found[1].y)
    along_axis = dx > dy if axis == "x" else dy > dx
    if not along_axis:
        order = max(order, order[::-1], key=lambda things: _fitting_words(things, claim))
    return order, along_axis


def _fit(thing, words, named):
    """Are the colour, shape and size of a Found (or None) those of words (size, colour, shape)?"""
    if thing is None:
        return False, False, False
    size = "big" if thing.half >= BIG_FROM[named] else "small"
    return thing.colour == words[1], thing.shape == words[2], size == words[0]


def _fitting_words(things, claim):
    return sum(sum(_fit(thing, words, 2)) for thing, words in zip(things, claim.objects))
