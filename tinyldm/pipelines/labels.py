"""Labels: the numbers of classes, and their names. What dit.py and guided_ddpm.py share."""
import difflib

from ..errors import TinyldmError
from .request import whole


def label_number(label, count, names):
    """A class's number or name -> its number. The number after the last class means "no class".

    count: how many classes there are. names: {name: number}, perhaps none.
    Raises TinyldmError for an unknown one.
    """
    last = count - 1
    if label is None:
        raise TinyldmError("this model draws pictures of a class: give a label, a class's name "
                           f"or a whole number from 0 to {last}")
    if isinstance(label, str):
        text = label.strip()
        folded = {name.casefold(): number for name, number in reversed(names.items())}
        number = names.get(text, folded.get(text.casefold()))
        if number is not None:
            return number
        if not text.isdecimal():
            raise _unknown(label, last, names)
        label = text[:9]                                # 4301 digits are no int for Python
    number = whole(int(label) if isinstance(label, str) else label)
    known = isinstance(number, int) and not isinstance(label, bool)
    if not known or not 0 <= number <= count:
        raise TinyldmError(f"a label must be a class's name, a whole number from 0 to {last}, or "
                           f"{count} for no class, not {label!r:.80}")
    return number


def _unknown(label, last, names):
    if not names:
        return TinyldmError(f"these weights have no names of classes, so {label!r:.80} is "
                            f"unknown: give a number from 0 to {last}")
    near = difflib.get_close_matches(label.strip(), names, 1, 0)
    return TinyldmError(f"there is no class {label!r:.80}: did you mean {near[0]!r} "
                        f"({names[near[0]]})? A number from 0 to {last} will do, too")


def read_names(id2label):
    """The id2label of a model_index.json, {"1": "goldfish, Carassius auratus"} -> {name: number}.

    Of two classes with one name the later one has it, as in diffusers.
    Raises TinyldmError for anything else.
    """
    names = {}
    for number, text in (id2label or {}).items():
        if not number.isdecimal() or len(number) > 9 or not isinstance(text, str):
            raise TinyldmError("model_index.json: id2label must have names by number, such as "
                               f'"1": "goldfish", not {number!r:.20}: {text!r:.60}')
        names |= {name.strip(): int(number) for name in text.split(",") if name.strip()}
    return names


def written_names(names):
    """The inverse of read_names -> {"id2label": ...}; {} without names."""
    by_number = {}
    for name, number in names.items():
        by_number[number] = [*by_number.get(number, []), name]
    if not names:
        return {}
    return {"id2label": {str(number): ", ".join(by_number[number]) for number in sorted(by_number)}}
