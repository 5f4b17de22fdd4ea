"""The options of the command line: spellings, hints, and what is drawn in which file."""
import io
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import tinyldm
from tests.support.command import ROOT, command, environment, run
from tinyldm.cli import options
from tinyldm.cli.draw import LARGEST_SIDE, SHEET, main, thumbnail
from tinyldm.cli.options import ALIASES, parse
from tinyldm.errors import TinyldmError
from tinyldm.pipelines.language import Language
from tinyldm.pipelines.request import SYNONYMS
from tinyldm.shapes.vocabulary import LANGUAGE

PROMPT = "a big red star on a white background"


# ---- names ------------------------------------------------------------------------------------

@pytest.mark.parametrize("spelled, name, value", [
    (["--num-inference-steps", "3"], "steps", 3), (["--num_inference_steps=3"], "steps", 3),
    (["--guidance-scale", "4"], "guidance", 4.0), (["--guidance_scale=4"], "guidance", 4.0),
    (["--cfg", "4"], "guidance", 4.0), (["--cfg-scale", "4"], "guidance", 4.0),
    (["--negative-prompt", "blurry"], "negative", "blurry"), (["--num_images", "2"], "count", 2),
    (["--low_memory"], "low_memory", True), (["--model", "x"], "weights", "x")])
def test_other_names_of_an_option(spelled, name, value):
    assert getattr(parse(["a cat", *spelled]), name) == value


def test_all_names_of_python_are_options(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    known = {*re.findall("--[a-z-]+", capsys.readouterr().out)}
    for name in SYNONYMS.keys() - {"sampler_name"}:      # that one gets a hint, see below
        dashed = f"--{name.replace('_', '-')}"
        assert ALIASES.get(dashed, dashed) in known, name


def test_aliases_are_no_options_and_name_one():
    names = {*re.findall(r"--[\w-]+", run("--help", folder=ROOT).stdout)}
    assert not names & {*ALIASES} and {*ALIASES.values()} <= names


@pytest.mark.parametrize("arguments, said", [
    (["--stepz", "5", "a cat"], "unrecognized arguments: --stepz: did you mean --steps?"),
    (["a cat", "--step", "5"], "did you mean --steps?"),                # no abbreviations
    (["a cat", "--sampler-name=euler"], "did you mean --sampler?"),
    (["a cat", "--negativ-prompt", "x"], "did you mean --negative-prompt?"),
    (["a cat", "--to", "x"], "did you mean --to-prompt or --to-seed or --to-image?"),
    (["a cat", "--colour", "red"], "unrecognized arguments: --colour red (--help lists"),
    (["-cat"], 'begins with a dash stands last, after -- (-- "-cat")'),
    (["a dog", "-cat"], 'begins with a dash stands last, after -- (-- "-cat")'),
    (["a cat", "--negative", "-blurry"], 'and such a value after = (--negative="-...")'),
    (["a", "--steps", "5", "cat"], "cat is left over: arguments without -- stand together"),
    (["a cat", "--seed", "x"], "a seed is a whole number, or random, not 'x'"),
    (["--random", "a cat"], "--random draws a prompt of its own"),
    (["--steps", "5"], "the following arguments are required: prompt")])
def test_hints(arguments, said):
    with pytest.raises(TinyldmError) as error:
        parse(arguments)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("arguments, prompts", [
    (["--", "-cat"], ["-cat"]), (["--steps", "5", "--", "-cat", "--steps"], ["-cat", "--steps"]),
    (["- a list of cats"], ["- a list of cats"]), (["--seed", "-1", "a cat"], ["a cat"]),
    (["a cat", "--guidance", "-1.5"], ["a cat"]), (["-1"], ["-1"]),
    (["a cat", "--guidance", "-1e-4"], ["a cat"]), (["a cat", "--guidance", "-.5E+1"], ["a cat"])])
def test_prompts_and_numbers_with_a_dash(arguments, prompts):
    assert parse(arguments).prompt == prompts


@pytest.mark.parametrize("module, said", [
    ("tinyldm.shapes", "did you mean --steps?"), ("tinyldm.inspect", "unrecognized arguments")])
def test_hints_of_other_programs(module, said, tmp_path):
    arguments = ["vae", "--step", "5"] if module == "tinyldm.shapes" else ["x", "--stepz"]
    process = subprocess.run([sys.executable, "-m", module, *arguments], cwd=tmp_path,
                             env=environment(), capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == "" and said in process.stderr
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1


def test_an_unknown_sampler_names_the_nearest(tmp_path):
    process = run("a cat", "--sampler", "dpm_2m", "--weights", "owner/name", folder=tmp_path)
    assert process.returncode == 2 and "unknown sampler 'dpm_2m'" in process.stderr
    assert "did you mean dpmpp_2m?" in process.stderr


def test_version(tmp_path):
    process = run("--version", folder=tmp_path)
    assert process.returncode == 0 and process.stdout == f"tinyldm {tinyldm.__version__}\n"


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_help_fits_the_terminal(columns, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = run("--help", folder=tmp_path).stdout
    own = text[text.index("what to draw:"):]
    assert max(map(len, own.splitlines())) < min(columns, 100)
    assert max(map(len, text.splitlines())) < 100       # the examples are longer than 60
    assert "out-sheet.png" in text and text.isascii()
    examples = re.findall(r"^  python -m tinyldm (.*)$", text, re.M)
    assert len(examples) == 3
    for example in examples:
        parse([word.strip('"') for word in re.findall(r'"[^"]*"|\S+', example)])


# ---- what is wrong is found before anything is loaded -----------------------------------------

@pytest.mark.parametrize("arguments, said", [
    (["--steps", "0"], "from 1 to 1000, not 0"), (["--steps", "1001"], "from 1 to 1000, not 1001"),
    (["--guidance", "nan"], "finite"), (["--guidance", "inf"], "finite"),
    (["--guidance-rescale", "-1"], "guidance_rescale must be from 0 to 1, not -1"),
    (["--strength", "2"], "needs an image"), (["--image", "in.png", "--strength", "2"],
                                              "strength must be from 0 to 1, not 2"),
    (["--image", "in.png", "--strength", "nan"], "strength must be a finite number"),
    (["--mask", "in.png"], "a mask or a strength needs an image"),
    (["--sampler", "foo"], "unknown sampler 'foo'"), (["--noise", "foo"], "unknown noise 'foo'"),
    (["--width", "0"], "width must be from 1 to 8192 pixels, not 0"),
    (["--height", "-8"], "height must be from 1 to 8192 pixels, not -8"),
    (["--width", "100000"], "width must be from 1 to 8192 pixels, not 100000"),
    (["--count", "0"], "--count must be at least 1"),
    (["--count", "1000000000"], "at most 10000 pictures, not 1000000000"),
    (["--to-seed", "1", "--count", "1000000000"], "at most 10000 pictures, not 1000000000"),
    (["--scale", "0"], "--scale must be from 1 to 64, not 0"),
    (["--scale", "1000"], "--scale must be from 1 to 64, not 1000"),
    (["--seed", str(2 ** 64)], "a seed is a whole number"),
    (["--timestep-spacing", "foo"], "timestep_spacing must be"),
    (["--output", "none/out.png"], "there is no folder none"), (["--output", "x.doc"], "must end"),
    (["--lora", "a.pt:nan"], "weight must be a finite number, not nan"),
    (["--prediction-type", "foo"], "prediction_type"),
    (["--preview", "0"], "--preview must be at least 1 step"),
    (["--animate", "x.png"], "--animate must name a .gif or .webp file"),
    (["--device", "tpu"], "device must be cpu or cuda"), (["--dtype", "int8"], "dtype must be")])
def test_nothing_is_loaded_for_wrong_options(arguments, said, tmp_path, monkeypatch, capsys):
    def resolve(*_):
        raise AssertionError("the weights are asked for")
    monkeypatch.setattr("tinyldm.checkpoints.resolve", resolve)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("in.png")
    assert main(["a cat", "--weights", "owner/name", *arguments]) == 2
    message = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert message.startswith("error: ") and said in message
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


def test_random_is_refused_for_weights_that_have_no_language(weights, tmp_path, capsys):
    out = ["--random", "--output", str(tmp_path / "out.png")]
    assert main([*out, "--weights", "owner/name"]) == 2
    assert "--random is for a model with a little language of its own" in capsys.readouterr().err
    assert main([*out, "--weights", str(weights)]) == 2
    assert "--random needs a model that names its language" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- random prompts and seeds, prompts on standard input --------------------------------------

def recorded(path):
    prompt, values = Image.open(path).text["parameters"].split("\n")
    return prompt, int(re.search(r"Seed: (\d+)", values)[1])


def test_random_prompts_come_from_the_seed(tmp_path, capsys):
    out = tmp_path / "out.png"
    assert main(["--random", "--seed", "5", "--count", "2", "--steps", "1", "--output",
                 str(out)]) == 0
    said = capsys.readouterr().err
    for i, seed in enumerate((5, 6)):
        prompt = Language(LANGUAGE).sentence(seed)
        assert recorded(tmp_path / f"out-{i}.png") == (prompt, seed)
        assert f"prompt: {prompt}\n" in said
    assert "note" not in said
    assert main(["--random", "--seed", "6", "--steps", "1", "--output", str(out)]) == 0
    assert out.read_bytes() == (tmp_path / "out-1.png").read_bytes()


def test_a_random_seed_is_told_and_recorded(tmp_path, capsys):
    seeds = set()
    for i in range(2):
        out = tmp_path / f"{i}.png"
        assert main([PROMPT, "--seed", "random", "--steps", "1", "--output", str(out)]) == 0
        seed = int(re.search(r"^seed: (\d+)$", capsys.readouterr().err, re.M)[1])
        assert recorded(out) == (PROMPT, seed)
        seeds.add(seed)
    assert len(seeds) == 2


@pytest.mark.parametrize("given, prompts", [
    (b"a cat\n\n  \n a dog \r\n", ["a cat", "a dog"]), ("\ufeffa caf\u00e9".encode(), ["a café"])])
def test_prompts_on_standard_input(given, prompts, weights, tmp_path):
    process = subprocess.run(command("-", "--weights", weights, "--steps", 1), cwd=tmp_path,
                             env=environment(), capture_output=True, input=given)
    assert process.returncode == 0, process.stderr
    names = process.stdout.decode().split()
    assert [recorded(tmp_path / name)[0] for name in names] == prompts
    assert b"one word each" not in process.stderr


@pytest.mark.parametrize("given, said", [
    (b"", "standard input holds no prompt"), (b"\n \n", "standard input holds no prompt"),
    (b"caf\xe9", "cannot read prompts from standard input"),
    (b"x" * (1 << 22) + b"x", "standard input has more than 4 MiB"),
    (b"x\n" * 20_000, "at most 10000 pictures, not 20000"), (None, "cannot read prompts from")])
def test_standard_input_without_prompts(given, said, tmp_path, monkeypatch, capsys):
    stdin = None if given is None else io.TextIOWrapper(io.BytesIO(given))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["-", "--output", str(tmp_path / "out.png")]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_standard_input_is_read_once(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a cat\nSteps: 1, Seed: 4")))
    assert main(["-", "--from-parameters", "-"]) == 2
    assert "cannot hold both the prompts and the parameters" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["-"]) == 2
    assert "cannot read prompts from standard input (it is closed)" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["Random", " RANDOM"])
def test_random_in_capitals(text):
    assert 0 <= parse(["a cat", "--seed", text]).seed < 2**31


def test_films_of_prompts_on_standard_input(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a cat\na dog\n")))
    assert main(["-", "--weights", str(weights), "--to-prompt", "a cow", "--count", "2", "--steps",
                 "1", "--output", str(tmp_path / "out.png"), "--animate",
                 str(tmp_path / "way.gif")]) == 0
    assert {"way-0.gif", "way-1.gif"} <= {path.name for path in tmp_path.iterdir()}


# ---- sizes and sheets -------------------------------------------------------------------------

def test_scale(tmp_path):
    for name, scale in (("one", 1), ("three", 3)):
        assert main([PROMPT, "--steps", "2", "--scale", str(scale), "--preview", "1", "--animate",
                     str(tmp_path / f"{name}.gif"), "--output", str(tmp_path / f"{name}.png")]) == 0
    for name in ("", "-step1"):
        one, three = (np.asarray(Image.open(tmp_path / f"{stem}{name}.png"))
                      for stem in ("one", "three"))
        np.testing.assert_array_equal(three, one.repeat(3, axis=0).repeat(3, axis=1))
    assert Image.open(tmp_path / "three.gif").size == (192, 192)
    texts = [Image.open(tmp_path / f"{name}.png").text["parameters"] for name in ("one", "three")]
    assert "Size: 64x64, Model" in texts[0] and "Size: 64x64, Scale: 3, Model" in texts[1]


def test_a_picture_is_not_enlarged_beyond_measure(weights, tmp_path, capsys):
    assert main(["a cat", "--weights", str(weights), "--width", "1024", "--scale", "17",
                 "--output", str(tmp_path / "out.png")]) == 2
    assert f"larger than {LARGEST_SIDE} pixels: take at most 16" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count, rows, columns", [(2, 1, 2), (4, 2, 2), (5, 2, 3)])
def test_a_sheet_has_all_pictures(count, rows, columns, weights, tmp_path, capsys):
    assert main(["a cat", "--weights", str(weights), "--steps", "1", "--scale", "2", "--count",
                 str(count), "--output", str(tmp_path / "x.bmp")]) == 0
    printed = capsys.readouterr()
    assert f"all on one sheet: {tmp_path / 'x-sheet.bmp'}\n" in printed.err
    assert "x-sheet" not in printed.out
    sheet = np.asarray(Image.open(tmp_path / "x-sheet.bmp"))
    assert sheet.shape == (rows * 34 - 2, columns * 34 - 2, 3)
    for i in range(count):
        y, x = i // columns * 34, i % columns * 34
        picture = np.asarray(Image.open(tmp_path / f"x-{i}.bmp"))
        np.testing.assert_array_equal(sheet[y:y + 32, x:x + 32], picture)


@pytest.mark.parametrize("count", [4, 16, 100, 10_000])
def test_a_sheet_is_never_large(count):
    small = thumbnail(Image.new("RGB", (1024, 512)), count)
    side = int(count ** 0.5)
    assert small.width * side <= SHEET and small.height == max(small.width // 2, 1)
    assert count > 4 or small.width == 1024


def test_a_sheet_replaces_nothing_that_is_read(weights, tmp_path, capsys):
    Image.new("RGB", (16, 16)).save(tmp_path / "out-sheet.png")
    options = ["a cat", "--weights", str(weights), "--count", "2", "--output",
               str(tmp_path / "out.png")]
    assert main([*options, "--image", str(tmp_path / "out-sheet.png")]) == 2
    assert "out-sheet.png, which is read: name another" in capsys.readouterr().err
    (tmp_path / "out-sheet.png").unlink()
    (tmp_path / "out-sheet.png").mkdir()
    assert main(options) == 2 and "it is a folder" in capsys.readouterr().err


def test_random_seeds_leave_room_for_the_others():
    assert options.RANDOM_SEEDS + options.MOST_PICTURES < 2 ** 32


# ---- what README's lines write ----------------------------------------------------------------

@pytest.mark.parametrize("name", ["out.png", "out-0.png", "out-sheet.png", "out-step5.png",
                                  "ring.png", "mine/model_index.json", "film.gif", "way.gif"])
def test_git_ignores_what_the_readme_writes(name):
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    assert subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT).returncode == 0
