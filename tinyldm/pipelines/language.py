"""The language of a small model: the sentences it was trained on, if it knows no others.

A folder names it as `_language` in model_index.json, for example

    {"sentence": "a {small|big} {colour} ball [on a {colour} box]", "colour": ["red", "blue"]}

{small|big} stands for one of these words, {colour} for one of the list of that name, and what is in
square brackets may be left out. stable_diffusion.py warns of a prompt that is not such a sentence.
"""
import random
import re

from ..errors import TinyldmError, note
from ..text.prompt import NUMBER, without_foreign_syntax

MARKUP = re.compile(rf":\s*{NUMBER}\s*\)|[()\[\]\\]|\bBREAK\b")     # see text/prompt.py
WORDS = re.compile(r"\w+|[^\w\s]+")
SHOWN = 5                   # unknown words in a note
ELSEWHERE = ("for anything else use other weights: --weights, or tinyldm.load, with a folder, a "
             "file or a name such as stable-diffusion-v1-5/stable-diffusion-v1-5")


class Language:
    """rule: the dict above. Raises TinyldmError for any other."""

    def __init__(self, rule):
        self.rule = rule
        try:
            self.lists = {name: [*map(str, words)] for name, words in rule.items()
                          if name != "sentence"}
            # [(whether the part may be left out, its slots)], a slot: (its name, its options)
            self.parts = [(i % 2 == 1, [*self._slots(piece)])
                          for i, piece in enumerate(re.split(r"[\[\]]", rule["sentence"]))]
        except (AttributeError, KeyError, TypeError):
            raise TinyldmError("the model's language (_language in model_index.json) must be an "
                               "object with a sentence and lists of words, not "
                               f"{str(rule)!r:.80}: correct or remove it") from None
        self.words = {word for _, slots in self.parts for _, options in slots
                      for option in options for word in option}

    def _slots(self, piece):
        for name, word in re.findall(r"\{([^{}]*)\}|([^\s{}]+)", piece):
            options = self.lists.get(name) or (name or word).split("|")
            yield name or word, [option.lower().split() for option in options]

    def __str__(self):
        lists = "".join(f"; {name}: {', '.join(words)}" for name, words in self.lists.items())
        return f"\"{self.rule['sentence']}\"{lists}"

    def check(self, prompt):
        """A note, with the whole language, on a prompt that is not one of its sentences."""
        if problem := self.problem(prompt):
            note(f"{problem}, so the picture may mean nothing: this model knows only {self}; "
                 f"{ELSEWHERE}")

    def problem(self, prompt):
        """Why a prompt is not a sentence of the language; None if it is one.

        What other programs read in a prompt has its own note: see text/prompt.py.
        """
        own = without_foreign_syntax(prompt)
        words = WORDS.findall(MARKUP.sub(" ", own).lower())
        if not words:
            return "the prompt is empty" if own == prompt else None
        if unknown := [word for word in dict.fromkeys(words) if word not in self.words]:
            more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
            shown = ", ".join(f"{word:.30}" for word in unknown[:SHOWN])
            return (f"the prompt {prompt!r:.60} has words that this model does not know "
                    f"({shown}{more})")
        places, expected = {0}, {}                      # where the sentence may go on; what failed
        for optional, slots in self.parts:
            before = places
            for name, options in slots:
                for place in places:
                    expected.setdefault(place, []).append(name)
                places = {place + len(option) for place in places for option in options
                          if words[place:place + len(option)] == option}
            places = places | before if optional else places
        if len(words) in places:
            return None
        place = max(expected | dict.fromkeys(places, []))
        wanted = " or ".join(dict.fromkeys(expected.get(place, ["the end"])))
        found = repr(words[place]) if place < len(words) else "the end"
        after = f" after {' '.join(words[:place])!r:.60}" if place else ""
        return f"the prompt {prompt!r:.60} needs {wanted}{after}, not {found}"

    def sentence(self, seed):
        """Draw a sentence: one seed, one sentence. It uses each word of a list only once."""
        rng = random.Random(seed)                       # random() is the same in every version
        left, words = {}, []
        for optional, slots in self.parts:
            if optional and rng.random() < 0.5:
                continue
            for name, options in slots:
                pool = left.get(name) or [*options]
                words += pool.pop(int(rng.random() * len(pool)))
                if name in self.lists:
                    left[name] = pool
        return " ".join(words)
