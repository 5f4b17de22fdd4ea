r"""What a prompt says besides its words: which of them weigh more, and where it is cut in pieces.

Where it stands: prompt -> parse -> fragments with weights -> tokenizer -> pieces of 75 tokens with
weights -> models/clip.py -> weigh -> context.

    (word)      counts 1.1 times          [word]      counts 1 / 1.1 times
    (word:1.3)  counts 1.3 times          \(          is a bracket; so are \) \[ \], and \\ is \
    ((word))    brackets multiply         BREAK       starts a new piece

The text transformer reads 75 tokens and no more. A longer prompt is cut into pieces that it reads
one by one, each with a start and an end token; their outputs, side by side, are the context.

Both are conventions of the "stable-diffusion-webui" by AUTOMATIC1111, in its mode "Original", in
which most published prompts are written. Here is one difference: there a bracket without a partner
acts up to the end of the prompt, here it is a bracket, and a warning says so.
"""
import re
from itertools import groupby

import numpy as np

from ..backend import get_xp
from ..errors import TinyldmError, note

FACTORS = {"(": 1.1, "[": 1 / 1.1}
OPENERS = {")": "(", "]": "["}
LARGEST = 100.0             # of a weight: beyond is a slip of the keyboard, or a number in the text
BACKTRACK = 20              # how far from a piece's end a comma may be to become its end

NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
TOKENS = re.compile(rf"\\([()\[\]\\])|:\s*({NUMBER})\s*\)|\bBREAK\b|.", re.DOTALL)
NO_WEIGHT = re.compile(rf"(:(?!{NUMBER}\))[^\s:()\[\]\\]+)[)\]]")       # ":abc" of "(word:abc)"


def parse(text):
    r"""Take a prompt apart -> [(fragment, weight)]; the fragment None stands for BREAK.

        parse(r"a (red [big]:1.5) cat \(tabby\)")
        [("a ", 1.0), ("red ", 1.5), ("big", 1.364), (" cat (tabby)", 1.0)]

    Neighbours of equal weight are one fragment. Warns of what looks like a bracket or a weight
    and is taken literally. Raises TinyldmError for an absurd weight.
    """
    pieces, opened, alone = [], {"(": [], "[": []}, ""
    for match in TOKENS.finditer(text):
        token, (escaped, number) = match[0], match.groups()
        opener = None if escaped else OPENERS.get(token[-1])
        if opener and opened[opener]:
            start = opened[opener].pop()
            pieces[start][0] = ""                       # the bracket did its work
            for piece in pieces[start:]:
                piece[1] *= float(number) if number else FACTORS[opener]
            continue
        if token in opened:
            opened[token].append(len(pieces))
        elif opener:
            alone += token[-1]
        pieces.append([None if token == "BREAK" else escaped or token, 1.0])

    alone += "".join(bracket for bracket, places in opened.items() if places)
    if alone:
        note(f"unbalanced {' '.join(sorted(set(alone)))} in the prompt {text!r:.60}: "
             "taken literally")
    for found in dict.fromkeys(NO_WEIGHT.findall(text)):
        note(f"{found!r:.30} in the prompt {text!r:.60} is no weight: taken literally")
    return merge(pieces)


def merge(pieces):
    """[[text, weight]] -> [(text, weight)], neighbours of equal weight joined, none empty."""
    fragments = []
    pieces = [piece for piece in pieces if piece[0] != ""]
    for (is_break, weight), group in groupby(pieces, lambda piece: (piece[0] is None, piece[1])):
        texts = [text for text, _ in group]
        if is_break:
            fragments += [(None, weight)] * len(texts)
            continue
        if not abs(weight) <= LARGEST:                  # NaN is not either
            raise TinyldmError(f"the prompt gives {''.join(texts)!r:.40} the weight {weight:g}: "
                               f"use -{LARGEST:g} to {LARGEST:g}, or \\( and \\) for brackets that "
                               "are part of the text")
        fragments.append(("".join(texts), weight))
    return fragments


def split(text, tokenizer):
    """Cut a prompt -> pieces, lists of at most model_max_length - 2 (id, weight).

    A full piece ends after a comma if there is one among its last 20 tokens. There is always a
    piece; that of an empty prompt is empty. Warns of a prompt of several pieces or without words,
    and as parse does. Raises TinyldmError for what is no text and for an absurd weight.
    """
    tokenizer.check(text)
    size = tokenizer.model_max_length - 2
    parts = [[]]
    for fragment, weight in parse(text):
        if fragment is None:
            parts.append([])
        else:
            parts[-1] += [(number, weight) for number in tokenizer.ids(fragment)]
    if not parts[-1] and len(parts) > 1:
        parts.pop()                                     # nothing follows the last BREAK
    pieces = [piece for part in parts for piece in cut(part, size, tokenizer.comma)]
    if len(pieces) > 1:
        note(f"the prompt {text!r:.60} is read in {len(pieces)} pieces of at most {size} tokens, "
             "joined")
    elif not pieces[0] and text.strip():
        note(f"the prompt {text!r:.60} has no words: drawn is an empty one")
    return pieces


def cut(tokens, size, comma):
    """A list of (id, weight) -> lists of at most size of them, behind a comma where one is near."""
    while len(tokens) > size:
        # The token behind the piece counts: a comma there does better than one before it.
        near = range(max(size - BACKTRACK, 0), size + 1)
        ends = [min(i + 1, size) for i in near if tokens[i][0] == comma]
        end = ends[-1] if ends else size
        yield tokens[:end]
        tokens = tokens[end:]
    yield tokens


def rows(pieces, tokenizer):
    """Pieces -> ids (n,77) int64 and weights (n,77), 1 for start, end and padding."""
    ids = np.concatenate([tokenizer.row([number for number, _ in piece]) for piece in pieces])
    weights = np.ones(ids.shape)
    for row, piece in zip(weights, pieces):
        row[1:1 + len(piece)] = [weight for _, weight in piece]
    return ids, weights


def weigh(context, weights):
    """Multiply every token's features by its weight, then give each piece its old mean again.

        z' = w z,    z'' = z' mean(z) / mean(z')

    context (n,77,D), weights (n,77) -> (n,77,D). The mean is over a piece's tokens and features.
    Weights of 1 change nothing, not even a last digit.
    """
    if (weights == 1).all():
        return context
    xp, dtype = get_xp(context), np.promote_types(context.dtype, np.float32)
    z = context.astype(dtype)
    weighted = z * xp.asarray(weights[..., None], dtype)                    # (n,77,1)
    means = [array.mean(axis=(1, 2), keepdims=True) for array in (z, weighted)]
    return (weighted * (means[0] / means[1])).astype(context.dtype)
