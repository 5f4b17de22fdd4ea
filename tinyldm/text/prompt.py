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
# No prompt that somebody wrote is near these; they bound time and memory.
LONGEST = 200_000           # characters
DEEPEST = 100               # brackets around brackets
MOST_CHUNKS = 100

NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
TOKENS = re.compile(rf"\\([()\[\]\\])|:\s*({NUMBER})\s*\)|\bBREAK\b|[^\\:()\[\]B]+|.",
                    re.DOTALL)
NO_WEIGHT = re.compile(rf"(:(?!{NUMBER}\))[^\s:()\[\]\\]+)[)\]]")       # ":abc" of "(word:abc)"

# What other programs read in a prompt, and the option that helps here, if there is one. In every
# pattern each part ends before the next begins, so that no search is slower than linear.
EDITING = r"\[[^\[\]:|]*:[^\[\]:|]*:\s*[\d.]+\s*\]"          # [from:to:when]
FOREIGN = [(re.compile(pattern, re.MULTILINE), hint) for pattern, hint in [
    (r"(?i:<(?:lora|lyco):[^<>]*>)", "--lora FILE or --lora-folder FOLDER adds LoRAs"),
    (r"(?i:<hypernet:[^<>]*>)", None),
    (r"\bembedding:[\w.-]+", "--embedding FILE adds a learned word, which is then written alone"),
    (r"^[ \t]*(?:Negative prompt:|Steps: *\d)", "--from-parameters reads a whole pasted block"),
    (r"(?<!\S)--(?:ar|v|q|s|no|niji|stylize|chaos|aspect)(?!\S)",
     "options such as --width stand outside of the quoted prompt"),
    (r"\[[^\[\]|]*\|[^\[\]]*\]", None), (EDITING, None),           # [a|b]
    (r"\{[^{}|]*\|[^{}]*\}", None), (r"\{[^{}|]+\}", "(word) gives weight to a word"),
    (r"__[\w/*.-]{1,60}?__", None), (r"\bAND\b", "BREAK begins a new chunk")]]


def parse(text):
    r"""Find the weights in a prompt -> [(fragment, weight)]; BREAK becomes the fragment None.

        parse(r"a (red [big]:1.5) cat \(tabby\)")
        [("a ", 1.0), ("red ", 1.5), ("big", 1.364), (" cat (tabby)", 1.0)]

    Neighbours of equal weight are joined. Warns if it takes a bracket or something like a weight
    literally. Raises TinyldmError for a weight beyond LARGEST, and for a text that is longer than
    LONGEST or nested deeper than DEEPEST.
    """
    if len(text) > LONGEST:
        raise TinyldmError(f"the prompt {text:.40}... has {len(text)} characters, at most "
                           f"{LONGEST} are read: shorten it")
    fragments, opened, alone = [], {"(": [], "[": []}, ""
    for match in TOKENS.finditer(text):
        token, (escaped, number) = match[0], match.groups()
        opener = None if escaped else OPENERS.get(token[-1])
        if opener and opened[opener]:
            start = opened[opener].pop()
            fragments[start][0] = ""                    # the opening bracket itself
            for fragment in fragments[start:]:
                fragment[1] *= float(number) if number else BRACKET_WEIGHTS[opener]
                fragment[2] += 1
                if fragment[2] > DEEPEST:               # also bounds the time that this loop takes
                    raise TinyldmError(f"the prompt {text:.40}... has brackets more than {DEEPEST} "
                                       "deep: use one weight, as in (word:1.3)")
            continue
        if token in opened:
            opened[token].append(len(fragments))
        elif opener:
            alone += token[-1]
        fragments.append([None if token == "BREAK" else escaped or token, 1.0, 0])

    alone += "".join(bracket for bracket, places in opened.items() if places)
    if alone:
        note(f"unbalanced {' '.join(sorted(set(alone)))} in the prompt {text!r:.60}: "
             "taken literally")
    if found := list(dict.fromkeys(NO_WEIGHT.findall(re.sub(EDITING, "", text)))):
        note(f"{found[0]!r:.30} in the prompt {text!r:.60} is no weight: taken literally"
             + f", and {len(found) - 1} more" * (len(found) > 1))
    return join(fragment[:2] for fragment in fragments if fragment[0] != "")


def note_foreign_syntax(text):
    """Say once what in a prompt other programs read, but is drawn as words here."""
    found, hints = [], []
    for pattern, hint in _foreign(text):
        found.append(pattern.search(text)[0].strip())
        hints.append(hint)
    if found:
        hints = [*dict.fromkeys(filter(None, hints)), "prompts have (word:1.3), [word], BREAK"]
        note(f"the prompt {text!r:.60} has {', '.join(f'{word:.40}' for word in found)}, which is "
             f"drawn as words: {'; '.join(hints)}")


def without_foreign_syntax(text):
    """The text without what note_foreign_syntax notes, for checks that would note it again."""
    for pattern, _ in _foreign(text):
        text = pattern.sub(" ", text)
    return text


def _foreign(text):
    """Those of FOREIGN that the text has. In capitals, AND is an ordinary word."""
    return [(pattern, hint) for pattern, hint in FOREIGN if (match := pattern.search(text))
            and not (match[0] == "AND" and text == text.upper())]


def join(fragments):
    """[[text, weight]] -> [(text, weight)], neighbours of equal weight joined."""
    joined = []
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
    if len(chunks) > MOST_CHUNKS:
        raise TinyldmError(f"the prompt {text!r:.60} makes {len(chunks)} chunks of at most {size} "
                           f"tokens, at most {MOST_CHUNKS} are read: shorten it")
    if len(chunks) > 1:
        note(f"the prompt {text!r:.60} is read in {len(chunks)} chunks of at most {size} tokens, "
             "joined")
    elif not chunks[0] and text.strip():
        note(f"the prompt {text!r:.60} has no words: it is read as an empty one")
    return chunks


def cut(tokens, size, comma):
    """[(token id, weight)] -> lists of at most `size` of them; a list ends at a comma if one is in
    range."""
    start = 0
    while len(tokens) - start > size:
        # If the first token after a full chunk is a comma, the chunk stays full.
        near = range(max(size - COMMA_RANGE, 0), size + 1)
        ends = [min(i + 1, size) for i in near if tokens[start + i][0] == comma]
        end = start + (ends[-1] if ends else size)
        yield tokens[start:end]
        start = end
    yield tokens[start:]


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
