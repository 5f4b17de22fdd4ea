"""Configs, the JSON objects beside weights: every value is checked when the file is read.

A config is a frozen dataclass with one field for each key that the package uses. The field's type
and the range beside it say which values are allowed. Two tables hold the other keys that public
files have: CHANGES, those that would change numbers, with the only values that are built here; and
UNUSED, those that change nothing here.

    @dataclass(frozen=True)
    class VAEConfig(Config):
        CHANGES = {"act_fn": ("silu",)}
        UNUSED = {"force_upcast"}

        block_out_channels: list[int] = within(1, 65536)
        scaling_factor: float = within(0, 1e4, 0.18215)
        sample_size: int | list[int] | None = within(1, 65536, 32, lengths=(2,))
"""
import json
import numbers
from dataclasses import MISSING, field, fields
from types import NoneType
from typing import get_args, get_origin

from .errors import TinyldmError

SHOWN = 60                      # characters of a wrong value in a message
LENGTHS = range(1, 9)           # of a list with one item per level; Stable Diffusion has 3 or 4


def within(low, high, default=MISSING, lengths=LENGTHS, ends=False):
    """A field of numbers, or of lists of them: whole ones from low to high, others between them.

    lengths: how many items a list may have. ends: others may also be low and high themselves.
    """
    return field(default=default, metadata={"low": low, "high": high, "lengths": lengths,
                                            "ends": ends})


def one_of(*values, default=MISSING, lengths=LENGTHS):
    """A field of texts, or of lists of them, each one of the values; without values, any text."""
    return field(default=default, metadata={"values": values, "lengths": lengths})


class Config:
    """What is read of one kind of config file; see above."""

    CHANGES = {}
    UNUSED = frozenset()

    @classmethod
    def read(cls, config):
        """The dict of a file -> the dataclass. An absent key has the field's default.

        Raises TinyldmError for a missing key without a default, for a value outside its field's
        type and range, and for a key of CHANGES with another value.
        """
        for key, values in cls.CHANGES.items():
            if key in config and not _is_built(config[key], values):
                raise TinyldmError(f"{key} = {show(config[key])} is not supported, only "
                                   f"{' or '.join(map(show, values))}")
        given = {}
        for item in fields(cls):
            if item.name in config:
                given[item.name] = value = config[item.name]
                if not any(_fits(value, kind, item.metadata) for kind in _kinds(item.type)):
                    raise TinyldmError(f"{item.name} must be {_allowed(item)}, not {show(value)}")
        if missing := [item.name for item in fields(cls)
                       if item.default is MISSING and item.name not in given]:
            raise TinyldmError(f"it lacks {', '.join(missing)}: get the whole file again")
        return cls(**given)

    @classmethod
    def unknown(cls, config):
        """The keys of a config that are in no table, of newer files perhaps, and switched on.

        A pipeline's part that is left out is [null, null].
        A key that begins with an underscore says where the file comes from.
        """
        known = {item.name for item in fields(cls)} | cls.CHANGES.keys() | cls.UNUSED
        return [key for key, value in config.items() if not key.startswith("_")
                and key not in known and value not in ([None, None], None)
                and value is not False]


def sides(size):
    """A config's size, a number or [height, width] -> (height, width)."""
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def show(value):
    """A value as JSON writes it, cut to a length for messages."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _is_built(value, values):
    """Whether a value, or each item of a list with one item per level, is one of the values."""
    if any(value == built and isinstance(value, bool) == isinstance(built, bool)
           for built in values):
        return True
    return isinstance(value, (list, tuple)) and value and all(
        not isinstance(item, (list, tuple)) and _is_built(item, values) for item in value)


def _kinds(kind):
    """int | list[int] | None -> int, list[int], NoneType."""
    return get_args(kind) if get_origin(kind) is not list and get_args(kind) else (kind,)


def _fits(value, kind, limits):
    """Whether a value has a type, and is in the range of its field's metadata."""
    if get_origin(kind) is list:
        return (isinstance(value, (list, tuple)) and len(value) in limits.get("lengths", LENGTHS)
                and all(_fits(item, get_args(kind)[0], limits) for item in value))
    if kind in (int, float):
        if isinstance(value, bool):
            return False
        low, high = limits["low"], limits["high"]
        if kind is int:
            return isinstance(value, numbers.Integral) and low <= value <= high
        return isinstance(value, numbers.Real) and (        # also false for NaN
            low < value < high or limits["ends"] and value in (low, high))
    known = limits.get("values")
    return isinstance(value, kind or NoneType) and (kind is not str or not known or value in known)


def _allowed(item):
    """The words for what a field allows: "a number between 0 and 9, or a list of 2 such, or null".
    """
    words = []
    for kind in _kinds(item.type):
        if get_origin(kind) is not list:
            words.append(_words(kind, item.metadata))
            continue
        lengths = item.metadata.get("lengths", LENGTHS)
        count = " to ".join(map(str, dict.fromkeys([lengths[0], lengths[-1]])))
        inner = "such" if words else f"items, each {_words(get_args(kind)[0], item.metadata)}"
        words.append(f"a list of {count} {inner}")
    return ", or ".join(words)


def _words(kind, limits):
    low, high = limits.get("low"), limits.get("high")
    if kind is int:
        return (f"a positive whole number up to {high}" if low == 1 else
                f"a whole number from {low} to {high}")
    if kind is float:
        return f"a number between {low:g} and {high:g}"
    if kind is str:
        return " or ".join(map(show, limits.get("values", ()))) or "a text"
    return {bool: "true or false", dict: "an object"}.get(kind, "null")
