"""The drawn pictures of the comparison, and what a model can be conditioned on.

A picture shows one thing on a plain background: 2 sizes, 10 colours, 8 shapes, 9 backgrounds. All
models train on the same pool of pictures, and all are measured on the same scenes outside of it.
"""
from functools import cached_property

import numpy as np

from ...backend import parallel
from ...pipelines.loading import load
from ...training.objectives import generators
from ...training.state import read_npz, write_npz
from ..drawing import draw
from ..scenes import COLOURS, SHAPES, sample

POOL = 4096                 # pictures to train on
AT_ONCE = 32                # pictures that a network reads at a time, where nothing is trained
SEED = 1                    # of the trainings
POOL_SEED = 10


def scenes(n, seed):
    """n scenes of one thing each."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < n:
        scene = sample(rng)
        if scene.relation is None:
            found.append(scene)
    return found


def label_of(scene):
    """The class of a scene: its thing's colour and shape as one number from 0 to 79."""
    thing, = scene.things
    return [*COLOURS].index(thing.colour) * len(SHAPES) + SHAPES.index(thing.shape)


CLASSES = len(COLOURS) * len(SHAPES)


def normal(rngs, shape):
    """Normal numbers (B,*shape), float32, one row from each generator."""
    return np.stack([rng.standard_normal(shape, np.float32) for rng in rngs])


class Data:
    """The pool. Its latents are those of the bundled model's VAE, and kept in the folder `run`."""

    def __init__(self, run):
        bundled = load(dtype=np.float32)
        self.run, self.tokenizer, self.vae = run, bundled.tokenizer, bundled.vae
        self.scenes = scenes(POOL, POOL_SEED)
        self.pictures = np.stack([*map(draw, self.scenes)])             # uint8 (POOL,64,64,3)
        self.known = {}                                 # {caption: its tokens}
        self.captions = [scene.caption() for scene in self.scenes]
        self.labels = np.array([*map(label_of, self.scenes)])

    def batch(self, number, size):
        """The batch of this number: rows of the pool, and a generator for each."""
        rngs = generators(SEED, number, size)
        return np.array([rng.integers(len(self.scenes)) for rng in rngs]), rngs

    def ids(self, captions):
        """The tokens (B,77) of captions."""
        for caption in captions:
            if caption not in self.known:
                self.known[caption], = self.tokenizer(caption)
        return np.stack([self.known[caption] for caption in captions])

    def images(self, rows):
        """-> float32 (B,64,64,3) in [-1, 1]."""
        return self.pictures[rows].astype(np.float32) / 127.5 - 1

    def latents(self, rows, rngs):
        """Draw latents (B,16,16,8) of the pictures, as the UNet sees them."""
        mean, std = (part[rows].astype(np.float32) for part in self._encoded)
        return self.vae.to_latents(mean + std * normal(rngs, mean.shape[1:]))

    @cached_property
    def _encoded(self):
        """The mean and the std (POOL,16,16,8) of each picture's latents."""
        path, shape = self.run / "latents.npz", (len(self.scenes), None, None, None)
        if not path.exists():
            mean, logvar = zip(*self.each(lambda rows: self.vae.encode(self.images(rows))))
            mean, std = np.concatenate(mean), np.exp(0.5 * np.concatenate(logvar))
            write_npz(path, mean=mean.astype(np.float16), std=std.astype(np.float16))
        stored = read_npz(path, {"mean": shape, "std": shape})
        return stored["mean"], stored["std"]

    def each(self, function):
        """[function(rows)] for all rows of the pool, AT_ONCE at a time."""
        return parallel(function, np.array_split(np.arange(len(self.scenes)),
                                                 -(-len(self.scenes) // AT_ONCE)))
