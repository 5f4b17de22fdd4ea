"""A batch split into shards, which run in worker threads and on the ranks of mpirun."""
import numpy as np

from .. import ranks
from ..backend import parallel
from ..layers import SHARD

SHARDS = 4              # the same on every machine, so that every machine computes the same sums


def split_batch(loss, batch, rng=None):
    """Run loss(*shard, rng, share) on each shard of a batch, over worker threads; sum the reports.

    So the result depends neither on which thread was first nor on the number of threads: see
    over_shards.
    """
    return sum_reports(over_shards(loss, batch, rng))


def over_shards(function, batch, rng=None):
    """Run function(*shard, rng, share) on each shard of a batch, over worker threads -> a list.

    batch: arrays or lists; a shard has the same rows of each. share: its part of the whole. Each
    shard draws from a generator of its own; without rng, function(*shard, share) draws nothing.
    Results and gradients come in the order of the shards. A loss of the whole batch takes two
    calls: lists with one entry per row give the second call the same shards.
    Each rank runs its part of the shards; there are more than SHARDS only where ranks do not divide
    it. A rank that none is left for runs the first one with share 0.
    """
    size = len(batch[0])
    count = number_of_shards(size)
    bounds = np.linspace(0, size, count + 1).astype(int)
    generators = [(child,) for child in rng.spawn(count)] if rng else [()] * count

    def run(i):
        shard = [array[bounds[i]:bounds[i + 1]] for array in batch]
        token = SHARD.set(i)
        try:
            return function(*shard, *generators[i], len(shard[0]) / size if mine else 0.0)
        finally:
            SHARD.reset(token)

    mine = ranks.share(count)
    return parallel(run, mine or [0])


def number_of_shards(size):
    """How many shards a batch of so many pictures has, over all ranks."""
    return min(-(-SHARDS // ranks.size()) * ranks.size(), size)


def sum_reports(reports):
    """[{name: number}] of all shards -> {name: sum}."""
    return {name: float(sum(report[name] for report in reports)) for name in reports[0]}
