"""The language of the bundled model: which prompts get a note, and what it says."""
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest

import tinyldm
from tests.support.command import run
from tests.support.small_pipelines import change_json
from tinyldm.errors import TinyldmError
from tinyldm.pipelines.language import Language
from tinyldm.pipelines.loading import load
from tinyldm.shapes.scenes import held_out_scenes
from tinyldm.shapes.vocabulary import LANGUAGE

ROOT = Path(__file__).parents[2]
STAR = "a big red star on a white background"
BOTH = "a small red circle above a big blue square"


@pytest.fixture(scope="module")
def language():
    return Language(LANGUAGE)


@pytest.fixture
def other_folder(small_folder, tmp_path):
    """A copy of a folder without a language, for a test to change."""
    return Path(shutil.copytree(small_folder, tmp_path / "other"))


@pytest.mark.parametrize("prompt, problem", [
    ("a cat", "the prompt 'a cat' has words that this model does not know (cat)"),
    ("brown", "the prompt 'brown' has words that this model does not know (brown)"),
    ("ein roter Stern", "does not know (ein, roter, stern)"),
    ("红色的星", "does not know (红色的星)"), (f"{STAR}.", "does not know (.)"),
    ("one two three four five six seven", "does not know (one, two, three, four, five and 2 more)"),
    ("", "the prompt is empty"), (" \n", "the prompt is empty"), ("()", "the prompt is empty"),
    ("a red star", "the prompt 'a red star' needs small|big after 'a', not 'red'"),
    ("a red star on a white background", "needs small|big after 'a', not 'red'"),
    (f"{BOTH} left of a big red star on a white background",
     f"needs on after '{BOTH}', not 'left'"),
    ("a big red star", "needs above|below|left of|right of or on after 'a big red star', not "
     "the end"),
    ("a big red star right a small blue ring on a white background",
     "needs above|below|left of|right of or on after 'a big red star', not 'right'"),
    ("star", "needs a, not 'star'"), (f"{STAR} background", f"the end after '{STAR}'"),
    ("a big star red on a white background", "needs colour after 'a big', not 'star'"),
])
def test_a_prompt_outside_of_the_language(language, prompt, problem):
    assert problem in language.problem(prompt)


@pytest.mark.parametrize("prompt", [
    STAR, "A Big RED star  on a\nwhite background", "a (big red:1.3) star on a [white] background",
    f"{BOTH} on a gray background"])
def test_a_prompt_of_the_language(language, prompt):
    assert language.problem(prompt) is None


@pytest.mark.parametrize("prompt", [f"{STAR} <lora:ink:0.7>", "<lora:ink>", f"{STAR}{{big}}"])
def test_what_other_programs_read_is_no_unknown_word(prompt):
    [said] = said_by(lambda: tinyldm.load()(prompt, num_inference_steps=1))
    assert "drawn as words" in said


def test_unknown_words_beside_what_other_programs_read(language):
    assert "does not know (cat)" in language.problem("a cat <lora:ink:0.7>")


def test_all_captions_of_the_toy_world_are_in_it(language):
    for caption in held_out_scenes(200, seed=3):
        assert language.problem(caption) is None


def test_sentences_are_drawn_by_the_seed(language):
    sentences = [language.sentence(seed) for seed in range(200)]
    assert sentences == [language.sentence(seed) for seed in range(200)]
    assert len(set(sentences)) > 190 and not any(map(language.problem, sentences))
    for sentence in sentences:
        colours = [word for word in sentence.split() if word in LANGUAGE["colour"]]
        assert len(colours) == len(set(colours))
    assert 50 < sum(len(sentence.split()) > 8 for sentence in sentences) < 150
    # in every version of Python
    assert sentences[3] == "a big yellow heart above a big blue square on a pink background"


def said_by(draw):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        draw()
    return [str(warning.message) for warning in said]


def test_a_note_from_python_once_per_prompt():
    pipe = tinyldm.load()
    [said] = said_by(lambda: pipe("a cat", num_inference_steps=1, num_images=2))
    assert said.startswith("the prompt 'a cat' has words that this model does not know (cat)")
    for part in [LANGUAGE["sentence"], *LANGUAGE["colour"], *LANGUAGE["shape"], "--weights",
                 "tinyldm.load", "stable-diffusion-v1-5/stable-diffusion-v1-5"]:
        assert part in said
    assert "\n" not in said
    between = tinyldm.Between("a cat", "a dog", 0.5)
    assert len(said_by(lambda: pipe(between, num_inference_steps=1))) == 2
    assert not said_by(lambda: pipe(STAR, num_inference_steps=1))
    assert not said_by(lambda: pipe(STAR, negative_prompt=STAR, num_inference_steps=1))
    [said] = said_by(lambda: pipe(STAR, negative_prompt="blurry", num_inference_steps=1))
    assert "(blurry)" in said


def test_a_note_on_the_command_line(tmp_path):
    process = run("a cat", "--steps", 1, "--count", 2, folder=tmp_path)
    assert process.returncode == 0
    notes = [line for line in process.stderr.splitlines() if "note: " in line]
    assert len(notes) == 1 and "does not know (cat)" in notes[0]


def test_only_a_folder_that_names_its_language_is_checked(small_folder, other_folder):
    assert load(small_folder).language is None
    assert not said_by(lambda: load(small_folder)("a cat", num_inference_steps=2))
    change_json(other_folder / "model_index.json", _language={"sentence": "a [small] cat"})
    pipe = load(other_folder)
    assert not said_by(lambda: pipe("a cat", num_inference_steps=2))
    [said] = said_by(lambda: pipe("a big cat", num_inference_steps=2))
    assert 'this model knows only "a [small] cat"; for anything else' in said


def test_the_language_is_saved_with_the_model(other_folder, tmp_path):
    change_json(other_folder / "model_index.json", _language=LANGUAGE)
    tinyldm.save(load(other_folder), tmp_path / "new")
    assert load(tmp_path / "new").language.rule == LANGUAGE


@pytest.mark.parametrize("rule", [
    1, "a cat", ["a cat"], {"sentence": 1}, {"colour": ["red"]}, {"sentence": "a", "colour": 1},
    {"sentence": "a", "colour": None}])
def test_a_wrong_language_is_refused(rule):
    with pytest.raises(TinyldmError, match=r"_language in model_index.json\) must be an object"):
        Language(rule)


def test_a_hostile_language_takes_no_time():
    """A pattern of many optional or equal parts would take a regular expression for ever."""
    language = Language({"sentence": "[a] " * 500 + "{a|a a|a} " * 500, "list": [1, None]})
    assert "needs" in language.problem("a " * 400) and "list: 1, None" in str(language)
    assert language.problem("a " * 600) is None


# ---- where people read of it ------------------------------------------------------------------

def words_of(text):
    return " ".join(text.replace("`", " ").split())


def test_the_bundled_folder_names_it():
    index = json.loads((ROOT / "weights" / "shapes" / "model_index.json").read_text())
    assert index["_language"] == LANGUAGE


@pytest.mark.parametrize("place", ["weights/shapes/README.md", "README.md", "--help", "tinyldm"])
def test_all_places_tell_the_same_language(place, tmp_path):
    if place == "--help":
        text = run("--help", folder=tmp_path).stdout
    else:
        text = tinyldm.__doc__ if place == "tinyldm" else (ROOT / place).read_text()
    text = words_of(text)
    assert LANGUAGE["sentence"] in text
    for name in ("colour", "shape"):
        assert ", ".join(LANGUAGE[name]) in text


def test_the_examples_people_see_are_of_the_language(language, tmp_path):
    first = (ROOT / "README.md").read_text().partition("## What is checked")[0]
    texts = [tinyldm.__doc__, run("--help", folder=tmp_path).stdout, first]
    prompts = re.findall(r'"(a (?:big|small) [^"]*)"', "\n".join(texts))
    assert len(prompts) >= 4
    for prompt in prompts:
        assert language.problem(prompt) is None
