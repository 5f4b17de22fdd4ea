"""The toy world's language as a rule, and its tokenizer in CLIP's file format."""
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from ..text.tokenizer import MAX_LENGTH, SPECIAL_TOKENS
from .scenes import COLOURS, RELATIONS, SHAPES, SIZES

# Scene.caption as a rule, for people and for pipelines/language.py.
OBJECT = f"a {{{'|'.join(SIZES)}}} {{colour}} {{shape}}"
LANGUAGE = {"sentence": f"{OBJECT} [{{{'|'.join(RELATIONS)}}} {OBJECT}] on a {{colour}} background",
            "colour": [*COLOURS], "shape": [*SHAPES]}


def write_tokenizer(folder):
    """Write a small tokenizer in CLIP's file format: vocab.json, merges.txt and two configs.

    The ids are CLIP's: the byte alphabet, the same with the end-of-word mark, one id per merge, and
    last <|startoftext|> and <|endoftext|>. Every word of the captions is one token. Any other text
    is split into smaller pieces, down to bytes, so that no text is unknown.
    Source: Radford et al. 2021, "Learning Transferable Visual Models ...", arXiv:2103.00020.
    """
    words = " ".join(["a on background", *SIZES, *COLOURS, *SHAPES, *RELATIONS]).split()
    merges = _merges(sorted(set(words)))
    # Printable bytes stand for themselves; the others get the characters from 256 on.
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(b) for b in printing] + [chr(256 + n) for n in range(256 - len(printing))]
    start, end = SPECIAL_TOKENS["bos_token"], SPECIAL_TOKENS["eos_token"]
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *map("".join, merges), start, end]
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}

    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH,
              "do_lower_case": True, "add_prefix_space": False, "errors": "replace",
              **SPECIAL_TOKENS}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("vocab.json", ids), ("tokenizer_config.json", config),
                          ("special_tokens_map.json", SPECIAL_TOKENS)):
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _merges(words):
    """Byte-pair encoding: merge the most frequent pair until every word is one piece.

    Returns the pairs of strings, in the order of merging. Source: Sennrich et al. 2016,
    arXiv:1508.07909.
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(word) > 1 for word in pieces):
        counts = Counter(pair for word in pieces for pair in pairwise(word))
        pair = max(counts, key=lambda pair: (counts[pair], pair))    # of equals, the last by name
        merges.append(pair)
        for word in pieces:
            for i in range(len(word) - 2, -1, -1):
                if tuple(word[i:i + 2]) == pair:
                    word[i:i + 2] = ["".join(pair)]
    return merges
