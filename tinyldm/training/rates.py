"""Learning rates: how the rate of an update follows from its number.

Each schedule is a function (step, peak, warmup, total) -> rate. step counts the updates from 0,
`warmup` of them lead up to the rate `peak`, and `total` is the length of the training. The seven of
SCHEDULES have the names and the numbers of diffusers' optimization.py; with a warm-up, their first
update has the rate 0. half_cosine is the toy world's.
"""
import math

from ..errors import TinyldmError


def constant(step, peak, warmup, total):
    """Always the peak, without a warm-up."""
    return peak


def constant_with_warmup(step, peak, warmup, total):
    """A straight line up from 0, then the peak."""
    return _after_warmup(step, peak, warmup, peak)


def linear(step, peak, warmup, total):
    """A straight line up from 0, then one down to 0 at `total`."""
    down = (total - step) / max(1, total - warmup)
    return _after_warmup(step, peak, warmup, peak * max(0.0, down))


def cosine(step, peak, warmup, total):
    """A straight line up from 0, then half a cosine down to 0 at `total`; it rises again after it.

    Source: Loshchilov & Hutter 2016, arXiv:1608.03983, eq. 5, without a restart.
    """
    progress = (step - warmup) / max(1, total - warmup)
    return _after_warmup(step, peak, warmup, peak * 0.5 * (1 + math.cos(math.pi * progress)))


def cosine_with_restarts(step, peak, warmup, total, cycles=1):
    """A straight line up from 0, then `cycles` times half a cosine down from the peak to 0.

    Source: as cosine, with restarts after equal numbers of steps.
    """
    progress = (step - warmup) / max(1, total - warmup)
    down = 0.5 * (1 + math.cos(math.pi * (cycles * progress % 1.0)))
    return _after_warmup(step, peak, warmup, peak * down if progress < 1 else 0.0)


def polynomial(step, peak, warmup, total, power=1.0, end=1e-7):
    """A straight line up from 0, then down to the rate `end` as a power of the share that is left.
    """
    left = min(1.0, max(0, total - step) / max(1, total - warmup))
    return _after_warmup(step, peak, warmup, (peak - end) * left ** power + end)


def piecewise_constant(step, peak, warmup, total, rules=((0, 1.0),)):
    """The peak times a factor. rules: pairs (first step, factor), by rising steps from 0."""
    return peak * [factor for first, factor in rules if first <= step][-1]


def half_cosine(step, peak, warmup, total, begun=0):
    """A half cosine from `peak` at step `warmup` down to a twentieth of it at `total`.

    It is multiplied with a straight line up from 0 over `warmup` steps from `begun`, the step at
    which the optimiser's averages began.
    """
    progress = min(1.0, max(0, step - warmup) / max(1, total - warmup))
    down = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * min(1.0, (step - begun + 1) / max(1, warmup)) * down


SCHEDULES = {schedule.__name__: schedule for schedule in (
    constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial,
    piecewise_constant)}


def _after_warmup(step, peak, warmup, rate):
    return peak * step / max(1, warmup) if step < warmup else rate


def parse_rules(text):
    """The rules of piecewise_constant from their public spelling, such as "1:10,0.1:20,0.01".

    That is: factor 1 before step 10, 0.1 before step 20, then 0.01. Raises TinyldmError.
    """
    rules, first = [], 0
    try:
        *parts, last = text.split(",")
        for part in parts:
            factor, until = part.split(":")
            rules.append((first, _factor(factor)))
            if int(until) <= first:
                raise ValueError
            first = int(until)
        return (*rules, (first, _factor(last)))
    except ValueError:
        raise TinyldmError("the rules of piecewise_constant are factors and the rising steps up to "
                           f"which they count, such as 1:10,0.1:20,0.01, not {text!r}") from None


def _factor(text):
    factor = float(text)
    if not 0 <= factor < math.inf:
        raise ValueError
    return factor
