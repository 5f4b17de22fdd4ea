"""Texts to read, a toy vocabulary, and the settings of a published tokenizer."""
import json
import os
import random
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "weights" / "shapes"
# CLIP's vocab.json and merges.txt, where somebody has them: tests with this marker are deselected
# elsewhere.
VOCABULARY = Path(os.environ.get("TINYLDM_CLIP_VOCABULARY",
                                 ROOT.parent / "shared" / "clip-vocabulary"))
START, END = "<|startoftext|>", "<|endoftext|>"
FLAGS = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


TEXTS = [
    "", " ", " \t\n ", "a photo of an astronaut riding a horse on mars", "Hello World!", "a cat",
    "  many   spaces\tand\nlines  ", "it's we're I'LL they've he'd don't I'm",
    "in 1984, 3.14 or ½",
    "UPPER lower MiXeD", "café cafe\u0301 naïve Ångström", "ΟΔΥΣΣΕΥΣ ςσ", "straße ſ's İstanbul",
    "中文字 日本語 한국어", "🦊 👩‍👩‍👧 👍🏽", "!!! ?! ... --- a!b",
    "a\x00b\x1c c\x1f d\u200be\u3000f",
    "word " * 200, "🦊" * 60, "pneumonoultramicroscopicsilicovolcanoconiosis " * 12,
    f"{START}a cat{END}", f"{END} {END}!!{END}!! x{START}y",
    f"a {END.upper()} b <|StartOfText|> c",
    "<|endoftext| > <|end oftext|>", "'", "' s 'S 'Re", "a" * 500,
]
SNIPPETS = [*"abcXYZ 019'!?.,<|>éüßΣσς中日本🦊👍\u0301\n\t\x00\x1c\u200d\u3000",
            " the ", " cat", "ing", " RED", "'ll", END, START, END.upper(), " two words "]


def random_texts(count, seed=0):
    draw = random.Random(seed)
    return ["".join(draw.choices(SNIPPETS, k=draw.randrange(80))) for _ in range(count)]


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def write_settings(folder, padding):
    """The two files as in the published folders of Stable Diffusion 1 and 2."""
    special = {"bos_token": {"content": START, **FLAGS}, "eos_token": {"content": END, **FLAGS},
               "unk_token": {"content": END, **FLAGS}, "pad_token": padding}
    write_json(folder / "special_tokens_map.json", special)
    config = {name: {"__type": "AddedToken", **token} for name, token in special.items()
              if name != "pad_token"}
    write_json(folder / "tokenizer_config.json", {
        **config, "pad_token": END, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"})


def write_toy_vocabulary(folder):
    """32 characters, each also with </w>; seven merges; the special tokens in the middle."""
    merges = ["l o", "lo w</w>", "e r</w>", "c a", "ca t</w>", "r e", "re d</w>"]
    signs = [*"abcdefghijklmnopqrstuvwxyz!?.,'|"]
    tokens = [*signs, START, END, *(sign + "</w>" for sign in signs),
              *(merge.replace(" ", "") for merge in merges)]
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
