"""What is measured of a trained system: its pictures, its likelihood, its size and its time.

    kid        the kernel distance of its pictures and true ones, by the features of the bundled VAE
    clear      the share of its pictures that show one thing which the judge can name
    asked      the share of its pictures that show the words that the system was given
    bits       per dimension, at most, where the system has a bound
    seconds    of one core for a picture, of the fastest tenth: other programs disturb the rest
"""
import time

import numpy as np

from ...backend import parallel
from ...metrics.features import bundled_vae, extract
from ...metrics.kid import kid
from ..drawing import draw, to_images
from ..judge import judge, look
from ..scenes import Scene, Thing
from .data import scenes

DRAWN, TRUE = 200, 1000     # pictures
BOUND = 16                  # pictures whose bits are measured
SCENES_SEED, TRUE_SEED = 11, 12
SUBSETS, SUBSET_SIZE = 50, 100
MOST_ERROR = 0.2            # of a clear picture


def measure(data, trained):
    """Draw a picture of each test scene, scene i with seed i -> the numbers, and the pictures."""
    tests = scenes(DRAWN, SCENES_SEED)
    drawn = parallel(lambda i: timed(trained.draw, tests[i], i), range(len(tests)))
    pictures, seconds = [np.asarray(picture) for picture, _ in drawn], [s for _, s in drawn]
    numbers = judged(data, pictures, tests, trained.words) | {
        "parameters": sum(p.data.size for model in trained.models for p in model.parameters()),
        "seconds": float(np.quantile(seconds, 0.1))}
    if trained.bits:
        numbers["bits"] = trained.bits(to_images(tests[:BOUND]))
    return numbers, pictures


def judged(data, pictures, tests, words):
    """What the pictures alone tell: {"kid", "kid_std", "clear"}, and "asked" if there are words."""
    extractor = bundled_vae(data.vae)
    true = [*map(draw, scenes(TRUE, TRUE_SEED))]
    mean, std = kid(*(extract(own, extractor) for own in (true, pictures)), SUBSETS,
                    min(SUBSET_SIZE, len(pictures)))
    numbers = {"kid": mean, "kid_std": std, "clear": float(np.mean([*map(clear, pictures)]))}
    if words:
        numbers["asked"] = float(np.mean([shows(picture, scene, words)
                                          for picture, scene in zip(pictures, tests)]))
    return numbers


def timed(function, *arguments):
    """-> what the function returns, and the seconds that this thread worked for it."""
    before = time.thread_time()
    return function(*arguments), time.thread_time() - before


def shows(picture, scene, words):
    """Whether a picture, uint8 (64,64,3), shows one thing with those words of a scene."""
    verdicts = judge(picture, scene.caption())
    return all(all(verdicts[name]) for name in ("count", *words))


def clear(picture):
    """Whether a picture, uint8 (64,64,3), shows one thing that the judge can name.

    The picture is compared with a drawing of what the judge found in it. The error counts in units
    of that which a plain ground would make:

        sum (picture - drawing)^2 / sum (ground - drawing)^2  <=  MOST_ERROR
    """
    ground, found = look(picture)
    if len(found) != 1 or found[0].colour == ground:
        return False
    thing, = found
    read = Thing("", thing.colour, thing.shape, thing.x, thing.y, thing.half)
    drawing = draw(Scene((read,), None, ground)).astype(np.float64)
    plain = drawing[:1, :1]                             # a corner
    return bool(((picture - drawing) ** 2).sum() <= MOST_ERROR * ((plain - drawing) ** 2).sum())
