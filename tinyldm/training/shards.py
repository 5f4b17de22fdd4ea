"""A batch split into shards, which run in worker threads and on the ranks of mpirun.

On a GPU, which has no use for worker threads, a rank computes all of its shards as one.
"""
import numpy as np

from .. import ranks
from ..backend import parallel
from ..layers import SHARD

SHARDS = 4              # the same on every machine, so that every machine computes the same sums


def split_batch(loss, batch, rng=None, xp=np):
    """Run loss(*shard, rng, share) on each shard of a batch, over worker threads; sum the reports.

    So the result depends neither on which thread was first nor on the number of threads: see
    over_shards.
    """
    return sum_reports(over_shards(loss, batch, rng, xp))


def over_shards(function, batch, rng=None, xp=np):
    """Run function(*shard, rng, share) on each shard of a batch, over worker threads -> a list.

    batch: arrays or lists; a shard has the same rows of each. share: its part of the whole. Each
    shard draws from a generator of its own; without rng, function(*shard, share) draws nothing.
    xp: the library that computes. With CuPy there is one call for all shards of this rank, and its
    rng draws what theirs would. Results and gradients come in the order of the shards. A loss of
    the whole batch takes two calls: lists with one entry per row give the second call the same
    shards.
    Each rank runs its part of the shards; there are more than SHARDS only where ranks do not divide
    it. A rank that none is left for runs the first one with share 0.
    """
    size = len(batch[0])
    count = number_of_shards(size)
    bounds = np.linspace(0, size, count + 1).astype(int)
    generators = rng.spawn(count) if rng else None

    def run(shards):
        start, end = bounds[shards[0]], bounds[shards[-1] + 1]
        own = [array[start:end] for array in batch]
        if len(shards) > 1 and generators:
            own.append(Together([(generators[i], bounds[i + 1] - bounds[i]) for i in shards]))
        elif generators:
            own.append(generators[shards[0]])
        token = SHARD.set(shards[0])
        try:
            return function(*own, (end - start) / size if mine else 0.0)
        finally:
            SHARD.reset(token)

    mine = ranks.share(count)
    shards = mine or [0]
    return parallel(run, [[i] for i in shards] if xp is np else [shards])


class Together:
    """The generators of several shards as one: what each of them would draw for its rows.

    parts: pairs of a generator and its number of rows. Draws begin with the axis of the rows.
    """

    def __init__(self, parts):
        self.parts = parts

    def standard_normal(self, shape, dtype=np.float64):
        return np.concatenate([rng.standard_normal((rows, *shape[1:]), dtype)
                               for rng, rows in self.parts])

    def normal(self, mean, std, rows):
        return np.concatenate([rng.normal(mean, std, own) for rng, own in self.parts])


def number_of_shards(size):
    """How many shards a batch of so many pictures has, over all ranks."""
    return min(-(-SHARDS // ranks.size()) * ranks.size(), size)


def sum_reports(reports):
    """[{name: number}] of all shards -> {name: sum}."""
    return {name: float(sum(report[name] for report in reports)) for name in reports[0]}
