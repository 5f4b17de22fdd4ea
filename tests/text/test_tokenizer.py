"""The tokenizer against transformers' CLIPTokenizer, with three vocabularies.

A toy one without a byte alphabet, in which most signs are unknown; the bundled model's, which has
CLIP's ids of bytes; and where it is at hand CLIP's own, whose tests are deselected elsewhere.
"""
import json
import shutil

import numpy as np
import pytest

from tests.support.extra import transformers
from tests.support.words import (
    END,
    FLAGS,
    SHAPES,
    START,
    TEXTS,
    VOCABULARY,
    random_texts,
    write_json,
    write_settings,
    write_toy_vocabulary,
)
from tinyldm.errors import TinyldmError
from tinyldm.text.tokenizer import Tokenizer, engine_errors


@pytest.fixture
def toy(tmp_path):
    write_toy_vocabulary(tmp_path)
    return tmp_path


CLIP = [pytest.param((VOCABULARY, padding), id=f"CLIP {kind}", marks=pytest.mark.clip_vocabulary)
        for padding, kind in ((END, "SD1"), ("!", "SD2"))]
BUNDLED = [pytest.param((SHAPES / "tokenizer", padding), id=f"bundled {kind}")
           for padding, kind in ((END, "SD1"), ("!", "SD2"))]


def copy(files, padding, folder):
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(files / name, folder / name)
    write_settings(folder, padding)
    return folder


@pytest.fixture(scope="module", params=CLIP + BUNDLED)
def bytes_folder(request, tmp_path_factory):
    """Of vocabularies with an alphabet of bytes: no text is unknown."""
    return copy(*request.param, tmp_path_factory.mktemp("words"))


def assert_equals_transformers(folder, texts, reference=None):
    ours = Tokenizer.from_folder(folder)
    theirs = transformers.CLIPTokenizer.from_pretrained(reference or folder)
    length = ours.model_max_length
    expected = theirs(texts, padding="max_length", max_length=length, truncation=True,
                      return_tensors="np")["input_ids"]
    for text, row in zip(texts, expected):
        ids = ours(text)
        assert ids.shape == (1, length) and ids.dtype == np.int64
        np.testing.assert_array_equal(ids[0], row, err_msg=repr(text))
    return ours


def test_vocabularies_of_bytes_equal_transformers(bytes_folder):
    assert_equals_transformers(bytes_folder, TEXTS + random_texts(500))


def test_tokenizer_json_equals_transformers(bytes_folder, tmp_path):
    """The folder as newer versions of transformers write it: only tokenizer.json."""
    transformers.CLIPTokenizer.from_pretrained(bytes_folder).save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    assert_equals_transformers(tmp_path, TEXTS + random_texts(50), reference=bytes_folder)


PUBLISHED = {                               # in the tests and notebooks of other projects
    "a photo of an astronaut riding a horse on mars":
        [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407],
    "Apple CoreML developer tools on a Macbook Air are fast":
        [49406, 3055, 19622, 5780, 10929, 5771, 525, 320, 20617, 1922, 631, 1953, 49407],
    "Hello World": [49406, 3306, 1002, 49407],
    "a cat": [49406, 320, 2368, 49407],
}


@pytest.mark.parametrize("vocabulary", CLIP)
def test_published_rows(vocabulary, tmp_path):
    tokenizer = Tokenizer.from_folder(copy(*vocabulary, tmp_path))
    padding = {END: 49407, "!": 0}[vocabulary[1]]
    for text, ids in PUBLISHED.items():
        assert tokenizer(text)[0].tolist() == ids + [padding] * (77 - len(ids))
    exclamation = 256 if padding else 0        # if padding is "!", a typed "!" is that token
    assert tokenizer("Hello World!")[0, :5].tolist() == [49406, 3306, 1002, exclamation, 49407]


def test_what_is_cut_at_77(bytes_folder):
    tokenizer = Tokenizer.from_folder(bytes_folder)
    ids = json.loads((bytes_folder / "vocab.json").read_text())
    red, star = ids["red</w>"], ids["star</w>"]
    fits = " ".join(["red"] * 75)
    assert tokenizer(fits + " star")[0, -2:].tolist() == [red, ids[END]]
    assert tokenizer(fits + " star").tolist() == tokenizer(fits).tolist()
    assert tokenizer.ids(fits + ", star")[74:] == [red, tokenizer.comma, star]


@pytest.mark.parametrize("padding", [END, "!"])
def test_toy_vocabulary_equals_transformers(toy, padding):
    write_settings(toy, padding)
    tokenizer = assert_equals_transformers(toy, TEXTS + random_texts(100))
    ids = json.loads((toy / "vocab.json").read_text())
    row = tokenizer("Lower red cat")[0].tolist()
    spelled = [START, "lo", "w", "er</w>", "red</w>", "cat</w>", END]
    assert row == [ids[token] for token in spelled] + [ids[padding]] * 70


def test_a_folder_without_settings_has_those_of_sd1(toy):
    tokenizer = assert_equals_transformers(toy, TEXTS[:10])
    assert tokenizer.model_max_length == 77


def test_length_of_the_settings(toy):
    write_json(toy / "tokenizer_config.json", {"model_max_length": 16})
    assert assert_equals_transformers(toy, TEXTS).model_max_length == 16


def test_a_length_that_says_no_limit_is_77(toy):
    write_json(toy / "tokenizer_config.json", {"model_max_length": int(1e30)})
    assert Tokenizer.from_folder(toy).model_max_length == 77


def test_limits_inside_tokenizer_json_are_not_applied(toy):
    """We truncate and pad, whatever truncation or padding the file sets for the library."""
    transformers.CLIPTokenizer.from_pretrained(toy).save_pretrained(toy)
    content = json.loads((toy / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst",
                             "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_id": 1,
                          "pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "b"}
    row_before = Tokenizer.from_folder(toy)("abcdefgh")
    write_json(toy / "tokenizer.json", content)
    np.testing.assert_array_equal(Tokenizer.from_folder(toy)("abcdefgh"), row_before)


def test_tokens_declared_in_the_settings(toy):
    """added_tokens_decoder: flags of known tokens, and new tokens after the vocabulary."""
    vocabulary = json.loads((toy / "vocab.json").read_text())
    size = len(vocabulary)
    declared = {vocabulary[START]: {"content": START, **FLAGS, "special": True},
                vocabulary[END]: {"content": END, **FLAGS, "normalized": False, "special": True},
                size: {"content": "<My-Cat>", **FLAGS, "special": False},
                size + 1: {"content": "<dog>", **FLAGS, "special": False}}
    write_json(toy / "tokenizer_config.json", {
        "added_tokens_decoder": declared, "model_max_length": 77, "pad_token": "!"})
    texts = TEXTS + ["a <My-Cat> and a<dog>!", "<my-cat> <DOG>"]
    tokenizer = assert_equals_transformers(toy, texts)
    assert size in tokenizer("a <My-Cat>") and size + 1 in tokenizer("a <dog>")


def spoil(name, text):
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def spoil_settings(**settings):
    return spoil("tokenizer_config.json", json.dumps(settings))


@pytest.mark.parametrize("damage, message", [
    (lambda folder: (folder / "vocab.json").unlink(), r"vocab\.json, found none"),
    (lambda folder: (folder / "merges.txt").unlink(), r"merges\.txt is missing"),
    (lambda folder: (folder / "vocab.json").write_bytes(b'{"\xff": 1}'), r"vocab\.json is not"),
    (spoil("vocab.json", '{"a": 0,'), r"vocab\.json is not readable JSON"),
    (spoil("vocab.json", "[1, 2]"), r"vocab\.json must hold a JSON object, not a list"),
    (spoil("vocab.json", '{"a": "0"}'), r"vocab\.json must give every token a whole number"),
    (spoil("vocab.json", "{}"), r"merges\.txt is not a list of merges for vocab\.json"),
    (spoil("merges.txt", "#version: 0.2\nl o w\n"), r"merges\.txt is not a list of merges"),
    (spoil("merges.txt", "#version: 0.2\nl Q\n"), r"merges\.txt is not a list of merges"),
    (spoil("tokenizer.json", "{}"), r"tokenizer\.json is not a tokenizer"),
    (spoil("tokenizer_config.json", "no"), r"tokenizer_config\.json is not readable JSON"),
    (spoil("special_tokens_map.json", "3"), r"special_tokens_map\.json must hold a JSON object"),
    (spoil_settings(pad_token="Q"), r"lacks the special token 'Q'"),
    (spoil_settings(unk_token="Q"), r"lacks the special token 'Q'"),
    (spoil_settings(eos_token=7), r"special token must be a string"),
    (spoil_settings(model_max_length="long"), r"config\.json: model_max_length must be a number"),
    (spoil_settings(model_max_length=2), r"config\.json: .* a number of at least 3, got 2"),
    (spoil_settings(added_tokens_decoder=[1]), r"added_tokens_decoder must map ids to tokens"),
    (spoil_settings(added_tokens_decoder={"5": "a"}), r"token 'a' the id 5, the vocabulary 0"),
    (spoil_settings(added_tokens_decoder={"5": 5}), r"special token must be a string"),
])
def test_malformed_folders(toy, damage, message):
    damage(toy)
    with pytest.raises(TinyldmError, match=message) as raised:
        Tokenizer.from_folder(toy)
    assert str(toy) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("text", [None, 5, b"a cat", ["a cat"], "broken \ud800"])
def test_what_is_no_text(toy, text):
    with pytest.raises(TinyldmError, match="a prompt must be a string of valid Unicode, got"):
        Tokenizer.from_folder(toy)(text)


# ---- learned words, and files of the wild ---------------------------------------------------

def learned_by_older_transformers(toy, padding=END):
    """Its files: added_tokens.json beside the vocabulary -> the new word's id."""
    write_settings(toy, padding)
    vocabulary = json.loads((toy / "vocab.json").read_text())
    write_json(toy / "added_tokens.json", {"<frida>": len(vocabulary), END: vocabulary[END],
                                           "<My-Cat>": len(vocabulary) + 1})
    return len(vocabulary)


LEARNED = ["a photo of <frida> cat", "<FRIDA>", "a<my-cat>!", f"<My-Cat> {END}", "frida", "<frida"]


@pytest.mark.parametrize("padding", [END, "!"])
def test_added_tokens_json_equals_transformers(toy, padding):
    new = learned_by_older_transformers(toy, padding)
    tokenizer = assert_equals_transformers(toy, LEARNED + TEXTS)
    assert tokenizer.ids("<frida> <My-Cat>") == [new, new + 1]


def test_added_tokens_beside_tokenizer_json(toy):
    new = learned_by_older_transformers(toy)
    added = (toy / "added_tokens.json").read_text()
    (toy / "added_tokens.json").unlink()
    transformers.CLIPTokenizer.from_pretrained(toy).save_pretrained(toy)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        (toy / name).unlink(missing_ok=True)
    (toy / "added_tokens.json").write_text(added)
    assert assert_equals_transformers(toy, LEARNED).ids("<frida>") == [new]


def test_learned_words_inside_tokenizer_json(toy, tmp_path):
    new = learned_by_older_transformers(toy)
    transformers.CLIPTokenizer.from_pretrained(toy).save_pretrained(tmp_path / "new")
    (tmp_path / "new" / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_folder(tmp_path / "new")
    assert [tokenizer.ids(text) for text in LEARNED] == [
        Tokenizer.from_folder(toy).ids(text) for text in LEARNED]
    assert tokenizer.ids("<frida>") == [new]


@pytest.mark.parametrize("file, changes", [
    ("special_tokens_map.json", {"additional_special_tokens": ["<mask>"]}),
    ("tokenizer_config.json", {"additional_special_tokens": ["<mask>", "<b>"]}),
    ("tokenizer_config.json", {"extra_special_tokens": {"mask_token": "<mask>"}}),
    ("tokenizer_config.json", {"extra_special_tokens": ["<mask>", END]}),
    ("tokenizer_config.json", {"additional_special_tokens": ["<mask>"],
                               "added_tokens_decoder": {}})], ids=str)
def test_special_tokens_that_no_vocabulary_has_are_new_words(file, changes, toy):
    write_settings(toy, "!")
    write_json(toy / file, json.loads((toy / file).read_text()) | changes)
    tokenizer = assert_equals_transformers(toy, ["a <mask> cat", "<b><mask>", "mask"])
    assert tokenizer.ids("<mask>") == [len(json.loads((toy / "vocab.json").read_text()))]


def test_special_tokens_that_are_no_list(toy):
    write_json(toy / "tokenizer_config.json", {"additional_special_tokens": "<mask>"})
    with pytest.raises(TinyldmError, match="additional_special_tokens must be a list of tokens"):
        Tokenizer.from_folder(toy)


def test_the_map_of_special_tokens_is_older_than_the_decoder(toy):
    """With added_tokens_decoder, transformers takes the padding from tokenizer_config.json."""
    write_settings(toy, "!")
    config = json.loads((toy / "tokenizer_config.json").read_text())
    write_json(toy / "tokenizer_config.json", {**config, "added_tokens_decoder": {}})
    assert assert_equals_transformers(toy, ["a cat"]).padding == Tokenizer.from_folder(toy).end


def test_learned_words_are_saved(toy, tmp_path):
    new = learned_by_older_transformers(toy)
    Tokenizer.from_folder(toy).save(tmp_path / "saved")
    assert Tokenizer.from_folder(tmp_path / "saved").ids("<frida>") == [new]


@pytest.mark.parametrize("changes", [
    {"continuing_subword_prefix": "##########"}, {"dropout": 1.0}, {"unk_token": "no token"},
    {"end_of_word_suffix": "?"}, {"byte_fallback": True}], ids=str)
def test_other_settings_of_tokenizer_json_change_nothing(toy, changes):
    """The first one made the library panic. transformers 5 reads none of them either."""
    transformers.CLIPTokenizer.from_pretrained(toy).save_pretrained(toy)
    content = json.loads((toy / "tokenizer.json").read_text())
    expected = Tokenizer.from_folder(toy)("Lower red cat, 7!")
    content["model"].update(changes)
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a|a)*$"},
                                "behavior": "Isolated", "invert": False}
    write_json(toy / "tokenizer.json", content)
    np.testing.assert_array_equal(Tokenizer.from_folder(toy)("Lower red cat, 7!"), expected)


SURROGATE = "\ud800"


@pytest.mark.parametrize("damage, message", [
    (spoil("added_tokens.json", '{"<frida>": "x"}'), "added_tokens.json must give every token a"),
    (spoil("added_tokens.json", '{"<frida>": -1}'), "added_tokens.json: the added tokens must map"),
    (spoil("added_tokens.json", '{"<frida>": 5000}'), "the id 5000, the vocabulary"),
    (spoil("vocab.json", '{"a": -1}'), "must give every token a whole number"),
    (spoil("vocab.json", '{"a": 4294967296}'), "must give every token a whole number"),
    (spoil_settings(bos_token=SURROGATE), "special token must be a string"),
    (spoil_settings(pad_token={"content": SURROGATE}), "special token must be a string"),
    (spoil_settings(added_tokens_decoder={"9" * 5000: "a"}), "must map ids to tokens"),
    (spoil_settings(added_tokens_decoder={"0": {"content": SURROGATE}}), "must be a string"),
    (spoil_settings(model_max_length=float("nan")), "a number of at least 3, got nan"),
    (spoil("tokenizer.json", '{"model": {"vocab": [], "merges": []}}'), "not a tokenizer of"),
    (spoil("tokenizer.json", '{"model": {"vocab": {"a": 0.5}, "merges": []}}'), "whole number"),
    (spoil("tokenizer.json", '{"model": {"vocab": {}, "merges": [1]}}'), "is not a tokenizer of"),
    (spoil("tokenizer.json", '{"model": {"vocab": {}, "merges": ["a b"]}}'), "is not a tokenizer"),
    (spoil("tokenizer.json", '{"model": {"vocab": {}, "merges": []}}'), "lacks the special token"),
])
def test_hostile_folders(toy, damage, message):
    damage(toy)
    with pytest.raises(TinyldmError, match=message) as raised:
        Tokenizer.from_folder(toy)
    assert str(toy) in str(raised.value) and "\n" not in str(raised.value)


def test_a_length_of_null_is_77(toy):
    write_json(toy / "tokenizer_config.json", {"model_max_length": None})
    assert Tokenizer.from_folder(toy).model_max_length == 77


def test_what_the_library_raises_becomes_a_line(toy):
    """A panic of its Rust code is a BaseException; Ctrl-C, another one, stays what it is."""
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    for error in (panic("range end index"), OverflowError("out of range")):
        with pytest.raises(TinyldmError, match=r"^no words \((range|out).*\): take others$"):
            with engine_errors("no words", "take others"):
                raise error
    with pytest.raises(KeyboardInterrupt):
        with engine_errors("no words", "take others"):
            raise KeyboardInterrupt
    tokenizer = Tokenizer.from_folder(toy)
    assert tokenizer.ids("a\0cat")


# ---- tokens and words, both ways ---------------------------------------------------------------

def test_every_token_of_a_prompt_belongs_to_one_word(bytes_folder):
    """The words are those that the text is cut into, and cover exactly what is between the ends."""
    tokenizer = Tokenizer.from_folder(bytes_folder)
    for text in TEXTS + random_texts(200):
        ids = tokenizer.ids(text)
        words = tokenizer.words(ids)
        if not {tokenizer.start, tokenizer.end} & set(ids):     # typed ones look like a row's
            covered = [i for word in words for i in word.tokens]
            assert covered == [*range(len(ids))], text
            whole = tokenizer.backend.normalizer.normalize_str(text).replace(" ", "")
            assert "".join(word.text for word in words) == whole
        for word in words:                              # a word alone has the same tokens
            own = [ids[i] for i in word.tokens]
            assert tokenizer.words(own) == [(word.text, range(len(own)))]


def test_a_row_has_start_end_and_padding(bytes_folder):
    tokenizer = Tokenizer.from_folder(bytes_folder)
    row = tokenizer("a red circle")
    words = tokenizer.words(row)
    assert [word.text for word in words] == ["a", "red", "circle"]
    assert words[0].tokens[0] == 1 and words == tokenizer.words(row[0].tolist())
    texts, end = tokenizer.texts(row), words[-1].tokens.stop
    assert len(texts) == 77 and texts[0] == "<start>" and texts[end] == "<end>"
    assert set(texts[end + 1:]) == {"<padding>"}
    assert "".join(texts[1:end]).replace("-", "") == "aredcircle"


@pytest.mark.clip_vocabulary
def test_words_of_several_tokens():
    tokenizer = Tokenizer.from_folder(VOCABULARY)
    row = tokenizer("A supercalifragilistic caf\u00e9, \u4e2d\u6587")
    assert tokenizer.words(row) == [
        ("a", range(1, 2)), ("supercalifragilistic", range(2, 7)), ("caf\u00e9", range(7, 8)),
        (",", range(8, 9)), ("\u4e2d\u6587", range(9, 13))]
    assert tokenizer.texts(row)[:8] == ["<start>", "a", "super-", "cali-", "frag-", "ili-", "stic",
                                        "caf\u00e9"]


def test_learned_words_are_words(toy):
    write_settings(toy, "!")
    tokenizer = Tokenizer.from_folder(toy)
    new = tokenizer.learn(tokenizer.new_tokens("<frida>", 3))
    row = tokenizer("a <frida> cat! <frida>")
    assert tokenizer.words(row) == [("a", range(1, 2)), ("<frida>", range(2, 5)),
                                    ("cat", range(5, 6)), ("!", range(6, 7)),
                                    ("<frida>", range(7, 10))]
    assert tokenizer.texts(row)[:8] == ["<start>", "a", "<frida>-", "<frida>_1-", "<frida>_2",
                                        "cat", "!", "<frida>-"]
    assert tokenizer.texts(row)[10:13] == ["<end>", "<padding>", "<padding>"]
    assert len(new) == 3


def test_words_that_were_cut_off_and_ids_that_are_unknown(toy):
    write_settings(toy, END)
    tokenizer = Tokenizer.from_folder(toy)
    row = tokenizer("dog " * 25 + "dog")                # 75 of 78 tokens: d, o, g</w>
    assert tokenizer.words(row)[-1] == ("dog", range(73, 76))
    row = tokenizer("a " + "dog " * 25)                 # the last dog loses its g
    assert tokenizer.words(row)[-1] == ("do", range(74, 76))
    with pytest.raises(TinyldmError, match="none of them with the id 5000: give ids of this"):
        tokenizer.words([1, 5000])
