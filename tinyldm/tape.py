"""The tape, which links a forward to its backward, and checkpoints, which shorten it.

A layer's forward saves on the tape what its backward needs. Backward runs in the opposite order, so
each layer finds its own cache on top. layers.py imports all names from here.
Explained: docs/tape.md
"""
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import wraps

_observer = ContextVar("what sees the entries where a tape is longest", default=None)


class _NoTape:
    """For inference: nothing is saved, so every cache is freed at once."""

    checkpoints = False

    def save(self, layer, cache, trained=False):
        pass


NO_TAPE = _NoTape()


class EndOfTape(Exception):
    """load asks for what was never saved, because no parameter up to there is trained.

    Nothing that ran earlier needs a gradient, so a model's backward ends here.
    """


def ends_early(nothing=None):
    """Decorator of a model's backward: where EndOfTape comes, it returns `nothing`."""
    def decorate(backward):
        @wraps(backward)
        def until_the_end(*args):
            with suppress(EndOfTape):
                return backward(*args)
            return nothing
        return until_the_end
    return decorate


class Tape:
    """A stack of what the forward saved: `entries`, (layer, cache) each, the last one on top.

    checkpoints: blocks that run by `checkpoint` save only their inputs, and run again in backward.
    only_trained: what runs before the first trained layer saves nothing, and backward ends there;
        gradients further up are then None. Without it, a model whose parameters are all frozen
        still gives the gradients of its inputs.
    nbytes: of all arrays that the tape keeps alive. peak: the largest nbytes so far, with those of
        a checkpoint's block while it runs backward.
    """

    def __init__(self, checkpoints=False, only_trained=False):
        self.entries, self._trained, self._peak = [], [], 0
        self.checkpoints, self.only_trained = checkpoints, only_trained
        self._begun = not only_trained                  # whether what is saved is kept
        self._skipped, self._forward = False, True

    def save(self, layer, cache, trained=False):
        """trained: whether the cache is for parameters that are trained, besides the layer's own.
        """
        own, self._forward = layer.is_trained(), True
        self._begun = self._begun or own or trained
        if self._begun:
            self.entries.append((layer, cache))
            self._trained.append(own)
        else:
            self._skipped = True

    def load(self, layer):
        if self._forward:                               # backward begins: nothing more is added
            self._forward = False
            self._note(self.entries)
        name = type(layer).__name__
        if not self.entries and self._skipped:
            raise EndOfTape(f"{name} runs backward, but nothing up to its forward is trained")
        assert self.entries, f"{name} runs backward, but the tape is empty"
        owner, cache = self.entries.pop()
        assert owner is layer, (f"{name} runs backward, "
                                f"but {type(owner).__name__} ran forward last")
        assert self._trained.pop() == layer.is_trained(), (
            f"{name} was {'frozen' if layer.is_trained() else 'trained'} when it ran forward: "
            "change `trainable` only before forward or after backward")
        return cache

    def _note(self, entries):
        """The tape holds these entries, and gets shorter now."""
        self._peak = max(self._peak, _nbytes(entries))
        if observe := _observer.get():
            observe(entries)

    @property
    def nbytes(self):
        return _nbytes(self.entries)

    @property
    def peak(self):
        return max(self._peak, self.nbytes)


def checkpoint(block, tape, *inputs, **options):
    """block(*inputs, tape, **options). A tape with checkpoints keeps the inputs and nothing else.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
    """
    if not tape.checkpoints:
        return block(*inputs, tape, **options)
    trained = any(parameter.trainable for parameter in block.parameters())
    tape.save(block, (inputs, options), trained)
    return block(*inputs, **options)


def checkpoint_backward(block, dy, tape):
    """block.backward(dy, tape). With checkpoints, the block first runs forward again, only
    to fill a tape."""
    if not tape.checkpoints:
        return block.backward(dy, tape)
    inputs, options = tape.load(block)
    # The lowest entry is the first trained one: inside its block, too, backward may end early.
    inner = Tape(only_trained=tape.only_trained and not tape.entries)
    block.again(*inputs, inner, **options)
    tape._note(tape.entries + inner.entries)
    return block.backward(dy, inner)


@contextmanager
def observed(observe):
    """Inside, observe(entries) is called with what a tape holds before it gets shorter: at the end
    of forward, and with checkpoints before each block's backward. Also in worker threads."""
    token = _observer.set(observe)
    try:
        yield
    finally:
        _observer.reset(token)


def nbytes_of(entries):
    """[(layer, bytes)] of the arrays in each layer's cache, without the layers' weights.

    An array counts once, for the first layer that keeps it; a view counts as what it keeps alive.
    """
    seen = {id(_base(parameter.data)) for layer, _ in entries
            for parameter in layer.own_parameters()}
    found = []
    for layer, cache in entries:
        own = {id(array): array.nbytes for array in _arrays(cache) if id(array) not in seen}
        seen |= own.keys()
        found.append((layer, sum(own.values())))
    return found


def _nbytes(entries):
    return sum(size for _, size in nbytes_of(entries))


def _arrays(cache):
    """Every array in nested tuples, lists and dicts; of a view the array that it keeps alive."""
    if hasattr(cache, "nbytes"):
        yield _base(cache)
    elif isinstance(cache, (tuple, list, dict)):
        for item in cache.values() if isinstance(cache, dict) else cache:
            yield from _arrays(item)


def _base(array):
    while hasattr(getattr(array, "base", None), "nbytes"):      # at the end may be a file's bytes
        array = array.base
    return array
