r"""A prompt's syntax: weights of words, and the chunks into which a long prompt is cut.

    (word)      weight 1.1                [word]      weight 1 / 1.1
    (word:1.3)  weight 1.3                \(          a literal bracket; also \) \[ \], and \\ for \
    ((word))    weights multiply          BREAK       starts a new chunk

prompt -> parse -> fragments with weights -> tokenizer -> chunks of at most 75 tokens with weights
-> text encoder -> apply_weights -> context. The text encoder reads at most 75 tokens besides a
start and an end token. Longer prompts are encoded in chunks, each with a start and an end token;
the outputs, side by side, are the context.

Both conventions come from AUTOMATIC1111's "stable-diffusion-webui" (its mode "Original"), in which
most published prompts are written. One difference: there an opening bracket without a partner acts
until the end of the prompt; here it is literal, and a warning says so.
"""
import re
from itertools import groupby

import numpy as np

from ..backend import get_xp, widen
from ..errors import TinyldmError, note

BRACKET_WEIGHTS = {"(": 1.1, "[": 1 / 1.1}
OPENERS = {")": "(", "]": "["}
LARGEST = 100.0             # weight; a larger one is a typing error, or a number in the text
COMMA_RANGE = 20            # a chunk ends at a comma if there is one in its last 20 tokens

NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
TOKENS = re.compile(rf"\\([()\[\]\\])|:\s*({NUMBER})\s*\)|\bBREAK\b|.", re.DOTALL)
NO_WEIGHT = re.compile(rf"(:(?!{NUMBER}\))[^\s:()\[\]\\]+)[)\]]")       # ":abc" of "(word:abc)"


def parse(text):
    r"""Find the weights in a prompt -> [(fragment, weight)]; BREAK becomes the fragment None.

        parse(r"a (red [big]:1.5) cat \(tabby\)")
        [("a ", 1.0), ("red ", 1.5), ("big", 1.364), (" cat (tabby)", 1.0)]

    Neighbours of equal weight are joined. Warns if it takes a bracket or something like a weight
    literally. Raises TinyldmError for a weight beyond LARGEST.
    """
    fragments, opened, alone = [], {"(": [], "[": []}, ""
    for match in TOKENS.finditer(text):
        token, (escaped, number) = match[0], match.groups()
        opener = None if escaped else OPENERS.get(token[-1])
        if opener and opened[opener]:
            start = opened[opener].pop()
            fragments[start][0] = ""                    # the opening bracket itself
            for fragment in fragments[start:]:
                fragment[1] *= float(number) if number else BRACKET_WEIGHTS[opener]
            continue
        if token in opened:
            opened[token].append(len(fragments))
        elif opener:
            alone += token[-1]
        fragments.append([None if token == "BREAK" else escaped or token, 1.0])

    alone += "".join(bracket for bracket, places in opened.items() if places)
    if alone:
        note(f"unbalanced {' '.join(sorted(set(alone)))} in the prompt {text!r:.60}: "
             "taken literally")
    for found in dict.fromkeys(NO_WEIGHT.findall(text)):
        note(f"{found!r:.30} in the prompt {text!r:.60} is no weight: taken literally")
    return join(fragments)


def join(fragments):
    """[[text, weight]] -> [(text, weight)], neighbours of equal weight joined, no empty text."""
    joined = []
    fragments = [fragment for fragment in fragments if fragment[0] != ""]
    for (is_break, weight), group in groupby(fragments, lambda item: (item[0] is None, item[1])):
        texts = [text for text, _ in group]
        if is_break:
            joined += [(None, weight)] * len(texts)
            continue
        if not abs(weight) <= LARGEST:                  # also true for NaN
            raise TinyldmError(f"the prompt gives {''.join(texts)!r:.40} the weight {weight:g}: "
                               f"use -{LARGEST:g} to {LARGEST:g}, or \\( and \\) for brackets that "
                               "are part of the text")
        joined.append(("".join(texts), weight))
    return joined


def split_into_chunks(text, tokenizer):
    """A prompt -> chunks, lists of at most model_max_length - 2 (token id, weight).

    There is always a chunk; an empty prompt has one empty chunk. Warns if there are several chunks,
    or no words at all, and as parse does. Raises TinyldmError for what is not a text, and as parse
    does.
    """
    tokenizer.check(text)
    size = tokenizer.model_max_length - 2
    parts = [[]]                                        # between BREAKs
    for fragment, weight in parse(text):
        if fragment is None:
            parts.append([])
        else:
            parts[-1] += [(token, weight) for token in tokenizer.ids(fragment)]
    if not parts[-1] and len(parts) > 1:
        parts.pop()                                     # nothing follows the last BREAK
    chunks = [chunk for part in parts for chunk in cut(part, size, tokenizer.comma)]
    if len(chunks) > 1:
        note(f"the prompt {text!r:.60} is read in {len(chunks)} chunks of at most {size} tokens, "
             "joined")
    elif not chunks[0] and text.strip():
        note(f"the prompt {text!r:.60} has no words: it is read as an empty one")
    return chunks


def cut(tokens, size, comma):
    """[(token id, weight)] -> lists of at most `size` of them; a list ends at a comma if one is in
    range."""
    while len(tokens) > size:
        # If the first token after a full chunk is a comma, the chunk stays full.
        near = range(max(size - COMMA_RANGE, 0), size + 1)
        ends = [min(i + 1, size) for i in near if tokens[i][0] == comma]
        end = ends[-1] if ends else size
        yield tokens[:end]
        tokens = tokens[end:]
    yield tokens


def to_arrays(chunks, tokenizer):
    """n chunks -> token ids (n,77) int64, weights (n,77); start, end and padding have weight 1."""
    ids = np.concatenate([tokenizer.row([token for token, _ in chunk]) for chunk in chunks])
    weights = np.ones(ids.shape)
    for row, chunk in zip(weights, chunks):
        row[1:1 + len(chunk)] = [weight for _, weight in chunk]
    return ids, weights


def apply_weights(context, weights):
    """Multiply each token's features by its weight, then restore the mean of each chunk.

        z' = w z,    z'' = z' mean(z) / mean(z')

    context (n,77,D), weights (n,77) -> (n,77,D). The mean is over a chunk's tokens and features.
    If all weights are 1, the context is returned as it is.
    """
    if (weights == 1).all():
        return context
    z = widen(context)
    weighted = z * get_xp(context).asarray(weights[..., None], z.dtype)     # (n,77,1)
    means = [array.mean(axis=(1, 2), keepdims=True) for array in (z, weighted)]
    return (weighted * (means[0] / means[1])).astype(context.dtype)
