"""Weights and chunks of a prompt: published examples, and contexts made by transformers."""
import re
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from tests.support.checks import FLOAT16
from tests.support.drawing import STEPS, Reference, assert_same_drawing
from tests.support.extra import torch
from tests.support.small_pipelines import sd1, sd2
from tests.support.tolerance import assert_allclose, assert_close
from tinyldm.errors import TinyldmError
from tinyldm.images import to_pil
from tinyldm.pipelines.loading import load
from tinyldm.text.prompt import (
    apply_weights,
    note_foreign_syntax,
    parse,
    split_into_chunks,
    to_arrays,
)

# ---- weights --------------------------------------------------------------------------------

HOUSE = "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky)))."
# The doctests of stable-diffusion-webui's prompt parser, except those of unbalanced brackets.
PUBLISHED = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    HOUSE + ")": [("a ", 1.0), ("house", 1.5730000000000004), (" ", 1.1), ("on", 1.0),
                  (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1), ("sky", 1.4641000000000006),
                  (".", 1.1)],
}
MORE = {
    "": [], "()": [], "([])": [], "(:1.5)": [], " ": [(" ", 1.0)],
    r"a (red [big]:1.5) cat \(tabby\)": [("a ", 1.0), ("red ", 1.5), ("big", 1.5 * (1 / 1.1)),
                                         (" cat (tabby)", 1.0)],
    "(a: 2 )(b:+.5)(c:-1)(d:3.)": [("a", 2.0), ("b", 0.5), ("c", -1.0), ("d", 3.0)],
    "([a)b]": [("a", 1.1 * (1 / 1.1)), ("b", 1 / 1.1)],         # each kind of bracket by itself
    r"a\\b \a \[x\] c\ d": [("a\\b \\a [x] c\\ d", 1.0)],
    "a: b, 16:9 :": [("a: b, 16:9 :", 1.0)],
    "line\n(two\n)": [("line\n", 1.0), ("two\n", 1.1)],
    "a BREAK b": [("a ", 1.0), (None, 1.0), (" b", 1.0)],
    "(BREAKBREAK xBREAK break)": [("BREAKBREAK xBREAK break", 1.1)],
    "(a BREAK b:2)": [("a ", 2.0), (None, 2.0), (" b", 2.0)],
    "BREAK()BREAK": [(None, 1.0), (None, 1.0)],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text, fragments", [*PUBLISHED.items(), *MORE.items()])
def test_fragments_and_their_weights(text, fragments):
    assert parse(text) == fragments


# There they act until the end of the prompt; here they are literal, as users there ask for.
@pytest.mark.parametrize("text, brackets, fragments", [
    ("(unbalanced", "(", [("(unbalanced", 1.0)]),
    (HOUSE, "(", [("a (", 1.0), ("house", 1.3 * 1.1), (" ", 1.0), ("on", 1 / 1.1), (" a ", 1.0),
                  ("hill", 0.5), (", sun, ", 1.0), ("sky", 1.1 * 1.1 * 1.1), (".", 1.0)]),
    ("a smile :) and (b)", ")", [("a smile :) and ", 1.0), ("b", 1.1)]),
    ("b:1.3) ]] [", ") [ ]", [("b:1.3) ]] [", 1.0)]),
    ("[a (b]", "(", [("a (b", 1 / 1.1)]),
])
def test_an_unbalanced_bracket_is_literal_and_said_once(text, brackets, fragments):
    message = f"^unbalanced {re.escape(brackets)} in the prompt .*: taken literally$"
    with pytest.warns(UserWarning, match=message) as said:
        assert parse(text) == fragments
    assert len(said) == 1


@pytest.mark.parametrize("text, found, fragments", [
    ("(word:abc)", ":abc", [("word:abc", 1.1)]), ("(word:inf)", ":inf", [("word:inf", 1.1)]),
    ("(word:nan)", ":nan", [("word:nan", 1.1)]), ("(word:1e3)", ":1e3", [("word:1e3", 1.1)]),
    ("(word:1,3)", ":1,3", [("word:1,3", 1.1)]), ("(word:1.2.3)", ":1.2.3", [("word:1.2.3", 1.1)]),
    ("[word:0.5]", ":0.5", [("word:0.5", 1 / 1.1)]), ("(a:x) (a:x)", ":x", None),
])
def test_what_is_no_weight_is_literal_and_said_once(text, found, fragments):
    message = f"^'{re.escape(found)}' in the prompt .* is no weight: taken literally$"
    with pytest.warns(UserWarning, match=message) as said:
        assert parse(text) == fragments or fragments is None
    assert len(said) == 1


@pytest.mark.parametrize("text, message", [
    ("(word:101)", r"gives 'word' the weight 101: use -100 to 100, or \\\( and \\\) for brackets"),
    ("(a (word:-200) b)", "gives 'word' the weight -220"), ("(" * 60 + "x" + ")" * 60, "304.48"),
    (f"(word:{'9' * 400})", "the weight inf"), (f"((word:{'9' * 400}):0)", "the weight nan"),
])
def test_an_absurd_weight_is_refused(text, message):
    with pytest.raises(TinyldmError, match=message):
        parse(text)


@pytest.mark.parametrize("text", [None, 5, b"a cat", ["a cat"], "(broken \ud800)"])
def test_what_is_no_text(small, text):
    with pytest.raises(TinyldmError, match="a prompt must be a string of valid Unicode, got"):
        small.encode_prompt(text)


def test_a_long_and_deep_prompt_takes_no_time():
    with pytest.warns(UserWarning, match=r"unbalanced \( \["):
        assert len(parse("([: 1" * 5_000 + "1" * 50_000 + " :" * 50_000)[0][0]) == 175_000


@pytest.mark.parametrize("text, message", [
    ("(" * 40_000 + "x" + ")" * 40_000, "brackets more than 100 deep: use one weight"),
    ("[" * 90_000 + "x" + "]" * 90_000, "brackets more than 100 deep: use one weight"),
    ("[(" * 101 + "x" + ")]" * 101, "brackets more than 100 deep"),
    ("cat " * 60_000, "has 240000 characters, at most 200000 are read"),
])
def test_what_no_one_wrote_is_refused_at_once(text, message):
    begin = time.process_time()
    with pytest.raises(TinyldmError, match=message) as raised:
        parse(text)
    assert time.process_time() - begin < 1 and len(str(raised.value)) < 200


def test_a_hundred_brackets_are_read():
    assert parse("[(" * 50 + "x" + ")]" * 50)[0][1] == pytest.approx(1)


def test_many_things_that_are_no_weights_are_one_note():
    with pytest.warns(UserWarning, match=r"^':x0' in .* taken literally, and 999 more$") as said:
        parse("".join(f"(a:x{i})" for i in range(1000)))
    assert len(said) == 1


# ---- prompts of other programs --------------------------------------------------------------

@pytest.mark.parametrize("text, found, hint", [
    ("a [cat|dog]", r"\[cat\|dog\]", ""), ("a [cat:dog:0.5]", r"\[cat:dog:0.5\]", ""),
    ("[cat::10]", r"\[cat::10\]", ""), ("a cat AND a dog", "AND", "BREAK begins a new chunk"),
    ("a cat <lora:ink:0.7>", "<lora:ink:0.7>", "--lora-folder"),
    ("<LoRA:ink>", "<LoRA:ink>", "--lora-folder"), ("<hypernet:x:1>", "<hypernet:x:1>", ""),
    ("a __animal__", "__animal__", ""), ("{red|blue} cat", r"\{red\|blue\}", ""),
    ("a {cat}", r"\{cat\}", r"\(word\) gives weight"),
    ("cat\nNegative prompt: dog\nSteps: 20", "Negative prompt:", "--from-parameters"),
    ("cat\nSteps: 20, Sampler: Euler a", "Steps: 2", "--from-parameters"),
    ("cat, embedding:bad-hands", "embedding:bad-hands", "--embedding"),
    ("a cat --ar 16:9 --v 5", "--ar", "--width"),
    ("[a|b] <lora:c:1>", r"<lora:c:1>, \[a\|b\]", "--lora-folder")])
def test_what_other_programs_read_is_said_once(small, text, found, hint):
    with pytest.warns(UserWarning) as said:
        small.encode_prompt(text)
    assert len(said) == 1
    assert re.match(f"the prompt .* has {found}, which is drawn as words: .*{hint}.*BREAK$",
                    str(said[0].message))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text", ["A CAT AND A DOG", "a cat and a dog", "16:9, (red:1.2) [low]",
                                  "a snake_case word", "3 < 5 > 2", "a {", "steps: 5", "x -- y"])
def test_ordinary_prompts_have_no_note(small, text):
    small.encode_prompt(text)


def test_searches_for_foreign_signs_are_linear():
    begin = time.process_time()
    for sign in ("[", "[|", "[a|", "[a:b:1", "{", "{a", "_", "__a", "<lora:", "AND", "--", "\n "):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            note_foreign_syntax(sign * (100_000 // len(sign)))
    assert time.process_time() - begin < 3


# ---- chunks ---------------------------------------------------------------------------------

def letters(length=77):
    """A tokenizer with one token per character, except spaces."""
    return SimpleNamespace(model_max_length=length, comma=ord(","), check=lambda text: None,
                           ids=lambda text: [ord(sign) for sign in text if sign != " "])


def lengths(text, length=77):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chunks = split_into_chunks(text, letters(length))
    assert "".join(chr(number) for chunk in chunks for number, _ in chunk) == (
        text.replace(" ", "").replace("BREAK", ""))
    return [len(chunk) for chunk in chunks]


@pytest.mark.parametrize("text, expected", [
    ("", [0]), ("x" * 75, [75]), ("x" * 76, [75, 1]), ("x" * 225, [75, 75, 75]),
    ("x" * 55 + "," + "x" * 20, [56, 20]),              # 20 tokens back is near,
    ("x" * 54 + "," + "x" * 21, [75, 1]),               # 21 is not
    ("x" * 55 + "," + "x" * 19, [75]),                  # and what fits is not cut
    ("x" * 74 + "," + "x", [75, 1]), ("x" * 75 + ",", [75, 1]),
    ("x" * 60 + "," + "x" * 14 + "," + "x" * 5, [75, 6]),       # a comma begins the next chunk
    ("x" * 60 + "," + "x" * 5 + "," + "x" * 100, [67, 75, 25]),
    ("x" * 70 + ",x BREAK " + "x" * 80, [72, 75, 5]),
    ("BREAK", [0]), ("BREAK BREAK", [0, 0]), ("BREAK x", [0, 1]), ("x BREAK", [1]),
    ("x BREAK BREAK x", [1, 0, 1]), ("x" * 75 + " BREAK ", [75]),
])
def test_where_a_prompt_is_cut(text, expected):
    assert lengths(text) == expected


def test_the_number_of_chunks_is_bounded():
    assert len(lengths("x BREAK " * 99 + "x")) == 100
    with pytest.raises(TinyldmError, match="2001 chunks .*, at most 100 are read"):
        lengths("x BREAK " * 2000 + "x")


def test_the_shortest_rows():
    assert lengths("x,xx", length=3) == [1, 1, 1, 1] and lengths("x,xx", length=5) == [2, 2]


def test_rows_carry_the_weights(tokenizer):
    text = "a (red:1.5) cat BREAK [cat]"
    with pytest.warns(UserWarning, match=f"^the prompt '{re.escape(text)}' is read in 2 chunks of "
                                         "at most 75 tokens, joined$"):
        chunks = split_into_chunks(text, tokenizer)
    ids, weights = to_arrays(chunks, tokenizer)
    assert ids.shape == weights.shape == (2, 77) and ids.dtype == np.int64
    assert np.array_equal(ids[:1], tokenizer("a red cat"))
    assert np.array_equal(ids[1:], tokenizer("cat"))
    assert weights[0, :5].tolist() == [1, 1, 1.5, 1, 1] and weights[1, 1] == 1 / 1.1
    assert (weights[0, 4:] == 1).all() and (weights[1, 2:] == 1).all()


@pytest.mark.parametrize("text", ["()", "BREAK", "([ ])", "(:1.3)"])
def test_a_prompt_without_words_is_the_empty_one_and_said(small, text):
    message = f"^the prompt '{re.escape(text)}' has no words: it is read as an empty one$"
    with pytest.warns(UserWarning, match=message) as said:
        context = small.encode_prompt(text)
    assert len(said) == 1 and np.array_equal(context, small.encode_prompt(""))


# ---- the context ----------------------------------------------------------------------------

@pytest.fixture
def tokenizer(small):
    return small.tokenizer


class Chunks(Reference):
    """diffusers' pipeline of a folder, and contexts of prompts that a test parsed by hand.

    In float64: the mean is a thousandth of the standard deviation, so that float32 sums of
    different orders give quotients of means that differ by 1e-4.
    """

    def context(self, *chunks):
        """n chunks, each a list of (text, weight) -> (1,77n,D)."""
        return torch.cat([self.chunk(chunk) for chunk in chunks], dim=1)

    @torch.no_grad()
    def chunk(self, fragments):
        tokenizer = self.pipe.tokenizer
        ids, weights = [tokenizer.bos_token_id], [1.0]
        for text, weight in fragments:
            new = tokenizer(text, add_special_tokens=False).input_ids
            ids, weights = ids + new, weights + [weight] * len(new)
        ids.append(tokenizer.eos_token_id)
        ids += [tokenizer.pad_token_id] * (77 - len(ids))
        weights += [1.0] * (77 - len(weights))
        z = self.pipe.text_encoder(torch.tensor([ids]))[0]                  # (1,77,D)
        weighted = z * torch.tensor(weights, dtype=z.dtype)[None, :, None]
        return weighted * (z.mean() / weighted.mean())


@pytest.fixture(scope="module", params=[sd1, sd2], ids=["SD1", "SD2"])
def both(request, tmp_path_factory):
    folder = request.param(tmp_path_factory.mktemp(request.param.__name__))
    return load(folder), Chunks(folder)


LONG = "red " * 60 + ", " + "cat " * 138 + "!"          # 200 tokens
LONG_CHUNKS = [[("red " * 60 + ",", 1)], [("cat " * 75, 1)], [("cat " * 63 + "!", 1)]]
PROMPTS = {
    "a cat": [[("a cat", 1)]],
    "a (red:1.4) cat, [lower] ((low)).": [[
        ("a", 1), ("red", 1.4), ("cat,", 1), ("lower", 1 / 1.1), ("low", 1.21), (".", 1)]],
    "lo(wer) (cat:-0.5) (red:0)": [[("lo", 1), ("wer", 1.1), ("cat", -0.5), ("red", 0)]],
    r"a cat \(red\) (low\):1.3)": [[("a cat (red)", 1), ("low)", 1.3)]],
    "(a cat BREAK red:1.2) low": [[("a cat", 1.2)], [("red", 1.2), ("low", 1)]],
    "BREAK a cat BREAK BREAK low": [[], [("a cat", 1)], [], [("low", 1)]],
    LONG: LONG_CHUNKS,
    f"({LONG}:1.2)": [[(text, 1.2) for text, _ in chunk] for chunk in LONG_CHUNKS],
}


@pytest.mark.filterwarnings("ignore:the prompt .* is read in")
@pytest.mark.parametrize("text", PROMPTS, ids=lambda text: text[:20])
def test_contexts_equal_those_of_transformers(both, text):
    pipe, reference = both
    theirs = reference.context(*PROMPTS[text]).numpy()
    assert_close(pipe.encode_prompt(text), theirs, 1e-4, text)


def test_a_plain_prompt_and_weights_of_1_change_nothing(both):
    pipe, _ = both
    plain = pipe.text_encoder(pipe.tokenizer("a red cat, low"))
    for text in ("a red cat, low", "(a red:1) cat(, low:1.00)"):
        assert np.array_equal(pipe.encode_prompt(text), plain)


@pytest.mark.filterwarnings("ignore:the prompt .* is read in")
@pytest.mark.parametrize("text, chunks, negative, negative_chunks", [
    (LONG, LONG_CHUNKS, "", [[], [], []]),
    ("(red:1.3) cat", [[("red", 1.3), ("cat", 1)], []], "low BREAK [cat]",
     [[("low", 1)], [("cat", 1 / 1.1)]])], ids=["long", "long negative"])
def test_pictures_of_several_chunks_equal_those_of_diffusers(both, text, chunks, negative,
                                                             negative_chunks):
    pipe, reference = both
    states = [state.latents for state in pipe.stream(
        text, negative, num_inference_steps=STEPS, seed=7, num_images=2)]
    images = np.stack([np.asarray(image) for image in to_pil(pipe.decode(states[-1]))])
    contexts = [reference.context(*chunks) for chunks in (chunks, negative_chunks)]
    assert_same_drawing((states, images), reference(
        [7, 8], None, prompt_embeds=contexts[0], negative_prompt_embeds=contexts[1]))


def test_what_a_prompt_of_chunks_says(small):
    with pytest.warns(UserWarning) as said:
        states = small.stream(LONG, "(low", num_inference_steps=2)
    assert [str(warning.message) for warning in said] == [
        f"the prompt {LONG!r:.60} is read in 3 chunks of at most 75 tokens, joined",
        "unbalanced ( in the prompt '(low': taken literally"]
    assert all(warning.filename == __file__ for warning in said)
    assert len(list(states)) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small.stream("cat " * 75)
        small.stream("")


def test_float16_features_are_weighed_in_float32():
    z = np.random.default_rng(0).standard_normal((2, 77, 16)) + 0.5
    weights = np.random.default_rng(1).uniform(0.5, 2, (2, 77))
    exact = apply_weights(z, weights)
    assert_allclose(exact.mean(axis=(1, 2)), z.mean(axis=(1, 2)), rtol=1e-12)
    half = apply_weights(z.astype(np.float16), weights)
    assert half.dtype == np.float16
    assert_allclose(half, exact, rtol=FLOAT16, atol=2**-23)     # z is rounded, and the result


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_weights_that_leave_no_mean_are_to_blame(small, monkeypatch):
    norm = small.text_encoder.text_model.final_layer_norm
    for parameter in (norm.weight, norm.bias):
        monkeypatch.setattr(parameter, "data", np.zeros_like(parameter.data))
    assert not small.encode_prompt("cat").any()
    with pytest.raises(TinyldmError, match=r"for '\(cat\)': the weights in it are too far from 1"):
        small.encode_prompt("(cat)")
