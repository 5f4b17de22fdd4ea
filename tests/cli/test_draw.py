"""python -m tinyldm, run as a user runs it: pictures, files, messages, and bad input."""
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from tests.support.command import ROOT, command, environment, run
from tests.support.pictures import hole
from tests.support.pictures import picture as make_picture
from tests.support.small_pipelines import change_json
from tests.support.tolerance import assert_same_pixels
from tinyldm import Between
from tinyldm.cli.draw import main
from tinyldm.cli.options import parse
from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.pipelines.loading import load

# ---- drawing --------------------------------------------------------------------------------

def test_a_picture_with_its_parameters(weights, out):
    process = run("a red cat", "--weights", weights, "--steps", 3, "--guidance", 4, "--seed", 9,
                  "--negative", "löw", "--width", 24, "--sampler", "pndm", folder=out)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "out.png\n"
    assert [path.name for path in out.iterdir()] == ["out.png"]
    picture = Image.open(out / "out.png")
    assert picture.text["parameters"] == (
        "a red cat\nNegative prompt: löw\nSteps: 3, Sampler: pndm, CFG scale: 4, Seed: 9, "
        f"Size: 24x16, Model: {weights.name}")
    expected, = load(weights)("a red cat", "löw", 3, 4, seed=9, width=24, sampler="pndm")
    assert np.array_equal(np.asarray(picture), np.asarray(expected))

    said = process.stderr.replace("\r", "\n")
    for stage in (r"loading: \d+\.\d s", r"reading the prompt: \d+\.\d s",
                  r"drawing: 100%\|.*\| 3/3 \[.* *\d+\.\d\ds/step\]", r"decoding: \d+\.\d s"):
        assert re.search(stage, said), said


def test_noise_of_another_kind_is_recorded(weights, out):
    assert main(["a cat", "--weights", str(weights), "--steps", "2", "--noise", "torch-cuda",
                 "--output", str(out / "out.png")]) == 0
    picture = Image.open(out / "out.png")
    assert picture.text["parameters"].endswith(f"Model: {weights.name}, Noise: torch-cuda")
    expected, = load(weights)("a cat", num_inference_steps=2, noise="torch-cuda")
    assert np.array_equal(np.asarray(picture), np.asarray(expected))


def test_timestep_spacing_and_clip_skip(weights, out, capsys):
    path = out / "out.png"
    arguments = ["a cat", "--weights", str(weights), "--steps", "2", "--output", str(path)]
    assert main([*arguments, "--timestep-spacing", "trailing", "--clip-skip", "1",
                 "--sampler", "Euler a"]) == 0
    expected, = load(weights)("a cat", num_inference_steps=2, timestep_spacing="trailing",
                              clip_skip=1, sampler="euler_ancestral")
    picture = Image.open(path)
    assert np.array_equal(np.asarray(picture), np.asarray(expected))
    assert ("Sampler: euler_ancestral, Timestep spacing: trailing, CFG scale: 7.5, Clip skip: 2, "
            in picture.text["parameters"])
    assert main([*arguments, "--timestep-spacing", "middle"]) == 2
    assert "must be leading, linspace or trailing, not 'middle'" in capsys.readouterr().err


def test_guidance_rescale_and_the_steps_of_heun(weights, out, capsys):
    path = out / "out.png"
    assert main(["a cat", "--weights", str(weights), "--steps", "3", "--guidance-rescale", "0.7",
                 "--sampler", "heun", "--output", str(path)]) == 0
    expected, = load(weights)("a cat", num_inference_steps=3, sampler="heun", guidance_rescale=0.7)
    picture = Image.open(path)
    assert np.array_equal(np.asarray(picture), np.asarray(expected))
    assert "CFG scale: 7.5, CFG rescale: 0.7, Seed: 0" in picture.text["parameters"]
    assert re.search(r"drawing: 100%\|.*\| 3/3 ", capsys.readouterr().err)       # of five calls


def test_a_lora_and_an_embedding(weights, out, tmp_path):
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
    files = [tmp_path / "in:k, style.safetensors", tmp_path / "dots.safetensors",
             tmp_path / "xq-toy.safetensors"]
    for i, file in enumerate(files[:2]):
        rng = np.random.default_rng(i)
        safetensors.numpy.save_file({
            f"{layer}.lora_{way}.weight": rng.standard_normal(shape, np.float32)
            for way, shape in [("down", (2, 8)), ("up", (8, 2))]}, file)
    safetensors.numpy.save_file({"emb_params": rng.standard_normal((3, 8), np.float32)}, files[2])
    prompt = "a red (xq-toy:1.2)"
    process = run(prompt, "--weights", weights, "--steps", 2, "--lora", f"{files[0]}:-0.75",
                  "--lora", files[1], "--embedding", files[2], folder=out)
    assert process.returncode == 0, process.stderr
    pipe = load(weights)
    plain = np.asarray(pipe(prompt, num_inference_steps=2)[0])
    pipe.load_lora(files[0], -0.75)
    pipe.load_lora(files[1])
    pipe.load_textual_inversion(files[2])
    expected = np.asarray(pipe(prompt, num_inference_steps=2)[0])
    picture = Image.open(out / "out.png")
    assert np.array_equal(np.asarray(picture), expected)
    assert not np.array_equal(expected, plain)
    assert picture.text["parameters"].endswith(
        f'Model: {weights.name}, Lora: "in:k, style:-0.75, dots:1", Embeddings: "xq-toy"')


@pytest.mark.parametrize("text, expected", [
    ("a.safetensors", ("a.safetensors", 1)), ("a.safetensors:0.8", ("a.safetensors", 0.8)),
    ("a:b.pt:-1e-1", ("a:b.pt", -0.1)), (r"C:\loras\a.safetensors", (r"C:\loras\a.safetensors", 1)),
    (r"C:\a.pt:2", (r"C:\a.pt", 2)), ("a:b", ("a:b", 1)), ("7", ("7", 1))])
def test_the_weight_of_a_lora(text, expected):
    assert parse(["a cat", "--lora", text, "--lora", "b"]).lora == [expected, ("b", 1)]


def test_a_lora_whose_name_ends_like_a_weight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "style:0.5").touch()
    parsed = parse(["a cat", "--lora", "style:0.5", "--lora", "style:0.5:-2", "--lora", "style:2"])
    assert parsed.lora == [("style:0.5", 1), ("style:0.5", -2), ("style", 2)]


def test_count_draws_consecutive_seeds(weights, out, capsys):
    assert main(["a cat", "--weights", str(weights), "--steps", "2", "--seed", "4", "--count", "3",
                 "--output", str(out / "many.png")]) == 0
    names = [f"many-{i}.png" for i in range(3)]
    assert capsys.readouterr().out.split() == [str(out / name) for name in names]
    assert sorted(path.name for path in out.iterdir()) == [*names, "many-sheet.png"]
    expected = load(weights)("a cat", num_inference_steps=2, seed=4, num_images=3)
    for i, name in enumerate(names):
        picture = Image.open(out / name)
        assert f"Seed: {4 + i}, " in picture.text["parameters"]
        assert_same_pixels(picture, expected[i])        # not drawn in one batch


def draw(weights, out, *arguments):
    """Run the command, with 2 steps, in this process -> its pictures, and the texts in them.

    Several have a sheet beside them, which is left out.
    """
    assert main([*map(str, arguments), "--weights", str(weights), "--steps", "2",
                 "--output", str(out / "out.png")]) == 0
    pictures = {path.name: Image.open(path) for path in sorted(out.glob("*.png"))}
    assert (pictures.pop("out-sheet.png", None) is not None) == (len(pictures) > 1)
    return ([np.asarray(picture) for picture in pictures.values()],
            [picture.text["parameters"] for picture in pictures.values()])


def assert_drawn(pictures, pipe, expected):
    """Each picture equals that of a call with these arguments."""
    assert len(pictures) == len(expected)
    for picture, (prompt, options) in zip(pictures, expected):
        theirs, = pipe(prompt, num_inference_steps=2, **options)
        assert np.array_equal(picture, np.asarray(theirs)), (prompt, options)


@pytest.mark.parametrize("prompts, said", [
    (["a", "red", "cat"], "note: 3 prompts of one word each are drawn: put a prompt of several"),
    (["cat", "a dog"], ""), (["cat"], "")])
def test_a_prompt_without_quotes(weights, out, prompts, said, capsys):
    draw(weights, out, *prompts)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert len(notes) == bool(said) and all(note.startswith(said) for note in notes)


def test_several_prompts(weights, out, capsys):
    pictures, said = draw(weights, out, "a cat", "a red dog", "--count", 2, "--seed", 5)
    assert [text.partition("\n")[0] for text in said] == ["a cat"] * 2 + ["a red dog"] * 2
    assert capsys.readouterr().out.split() == [str(out / f"out-{i}.png") for i in range(4)]
    assert_drawn(pictures, load(weights), [
        (prompt, {"seed": seed}) for prompt in ("a cat", "a red dog") for seed in (5, 6)])


@pytest.fixture
def files(tmp_path):
    """Two pictures and a mask."""
    names = ["in, a.png", "b.webp", "mask.png"]
    for seed, name in enumerate(names[:2]):
        make_picture(seed, (17, 23)).save(tmp_path / name, lossless=True)
    hole((17, 23)).save(tmp_path / names[2])
    return [tmp_path / name for name in names]


def test_image_to_image_and_inpainting(weights, out, files, capsys):
    one, _, mask = files
    pictures, said = draw(weights, out, "a cat", "--image", one, "--strength", 0.5)
    assert said[0].endswith(f'Size: 16x20, Model: {weights.name}, Image: "in, a.png", '
                            "Denoising strength: 0.5")
    assert re.search(r"drawing: 100%\|.*\| 1/1 ", capsys.readouterr().err)
    image, pipe = Image.open(one), load(weights)
    assert_drawn(pictures, pipe, [("a cat", {"image": image, "strength": 0.5})])
    pictures, said = draw(weights, out, "a cat", "--image", one, "--mask", mask, "--width", 20)
    assert said[0].endswith('Image: "in, a.png", Mask: "mask.png", Denoising strength: 1')
    assert_drawn(pictures, pipe, [("a cat", {"image": image, "mask": Image.open(mask),
                                             "width": 20})])


@pytest.mark.parametrize("sampler", ["pndm", "heun", "ddim"])
def test_the_bar_of_a_last_step_alone(weights, out, files, sampler, capsys):
    draw(weights, out, "a cat", "--image", files[0], "--strength", 0.5, "--sampler", sampler)
    assert re.search(r"drawing: 100%\|.*\| 1/1 ", capsys.readouterr().err)


def test_the_picture_that_is_read_is_not_replaced(weights, out, files):
    for name, count in (("x.png", 1), ("x-1.png", 2)):
        copy = Path(shutil.copy(files[0], out / name))
        process = run("a cat", "--weights", weights, "--image", copy, "--output", "x.png",
                      "--count", count, folder=out)
        assert process.returncode == 2 and process.stdout == ""
        assert f"error: --output would replace {copy}, which is read: name another" in (
            process.stderr)
        assert copy.read_bytes() == files[0].read_bytes()
        copy.unlink()


def test_a_note_on_a_large_picture(weights, out, tmp_path, capsys):
    make_picture(0, (40, 32)).save(tmp_path / "large.png")
    image = ["a cat", "--image", tmp_path / "large.png", "--strength", 0.5]
    note = "note: the image is drawn at its 40x32 pixels, 5 times as many as the 16x16 of the weig"
    draw(weights, out, *image)
    assert note in capsys.readouterr().err
    draw(weights, out, *image, "--width", 20)
    said = capsys.readouterr().err
    assert note not in said and "note: the picture has 20x32 pixels, 2.5 times as many" in said
    draw(weights, out, *image, "--width", 16, "--height", 16)
    assert "note: the picture has" not in capsys.readouterr().err


@pytest.mark.parametrize("size, many", [
    ((20, 16), "20x16 pixels, 1.2 times"), ((160, 16), "160x16 pixels, 10 times"),
    ((16, 16), None), ((12, 20), None)])
def test_a_note_on_a_size_beyond_the_weights(weights, size, many):
    """Also from Python. A picture of another shape with as many pixels is fine."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load(weights)("a cat", num_inference_steps=2, width=size[0], height=size[1])
    assert [many in str(warning.message) for warning in said] == [True] * bool(many)


def test_variations(weights, out):
    pictures, said = draw(weights, out, "a cat", "--variation", 0.25, "--count", 2, "--seed", 5)
    assert "Seed: 5, Variation seed: 7, Variation seed strength: 0.25, Size" in said[1]
    assert_drawn(pictures, load(weights), [
        ("a cat", {"seed": Between(5, seed, 0.25)}) for seed in (6, 7)])


def test_interpolation(weights, out, files):
    one, other, _ = files
    pictures, said = draw(weights, out, "a cat", "a dog", "--count", 3, "--to-prompt", "red, cat",
                          "--to-seed", 8, "--image", one, "--to-image", other, "--strength", 1,
                          "--animate", out / "film.gif")
    assert said[4].endswith('Image: "in, a.png", Denoising strength: 1, To prompt: "red, cat", '
                            'To image: "b.webp", On the way: 0.5')
    images = Image.open(one), Image.open(other)
    assert_drawn(pictures, load(weights), [
        (Between(prompt, "red, cat", weight), {"seed": Between(0, 8, weight), "strength": 1,
                                               "image": Between(*images, weight)})
        for prompt in ("a cat", "a dog") for weight in (0, 0.5, 1)])
    films = [Image.open(out / f"film-{i}.gif") for i in (0, 1)]
    assert [film.n_frames for film in films] == [3, 3]
    for film, last in zip(films, (pictures[2], pictures[5])):
        film.seek(2)
        assert abs(np.asarray(film.convert("RGB"), int) - last).mean() < 10     # 256 colours


@pytest.mark.parametrize("changes, noted", [
    ({"timestep_spacing": "trailing"}, True), ({"timestep_spacing": "leading"}, False),
    ({"timestep_spacing": "trailing", "rescale_betas_zero_snr": True,
      "prediction_type": "v_prediction"}, False)])
def test_a_note_on_what_looks_like_a_turbo_model(bad_weights, out, capsys, changes, noted):
    change_json(bad_weights / "scheduler" / "scheduler_config.json", **changes)
    arguments = ["a cat", "--weights", str(bad_weights), "--output", str(out / "out.png")]
    assert main([*arguments, "--width", "4", "--height", "4"]) == 0
    note = "note: the scheduler is that of a model made for few steps, such as Turbo: if it is"
    assert (note in capsys.readouterr().err) == noted
    assert main([*arguments, "--steps", "1"]) == 0
    assert note not in capsys.readouterr().err


def test_eight_interpolated_pictures_by_default(weights, out):
    pictures, said = draw(weights, out, "a cat", "--to-seed", 8)
    assert len(pictures) == 8 and "Variation seed strength: 0.142857" in said[1]


def test_the_averaged_weights_of_a_folder(weights, out, capsys):
    """A folder has only one set: the option is for single files and changes nothing."""
    assert_drawn(draw(weights, out, "a cat", "--ema")[0], load(weights), [("a cat", {})])
    assert "has one set of weights: those averaged apart" in capsys.readouterr().err


@pytest.mark.parametrize("suffix, image_format", [
    (".jpg", "JPEG"), (".JPEG", "JPEG"), (".webp", "WEBP"), (".bmp", "BMP"), (".tiff", "TIFF"),
    (".gif", "GIF")])
def test_formats(weights, out, suffix, image_format):
    path = out / f"picture{suffix}"
    path.write_text("an older file, which is replaced")
    arguments = ["", "--weights", str(weights), "--steps", "1", "--output", str(path)]
    assert main(arguments) == 0                         # an empty prompt works, too
    with Image.open(path) as picture:
        assert picture.format == image_format and picture.size == (16, 16)
    assert list(out.iterdir()) == [path]


def test_a_long_prompt_is_said_to_be_in_chunks_in_one_line(weights, out):
    prompt = "cat " * 75 + "\\(dog:abc)"
    process = run(prompt, "--weights", weights, "--steps", 1, "--count", 2, folder=out)
    assert process.returncode == 0, process.stderr
    notes = [line for line in process.stderr.splitlines() if "note" in line]
    assert notes == [                                   # each a line of its own
        f"note: unbalanced ) in the prompt {prompt!r:.60}: taken literally",
        f"note: ':abc' in the prompt {prompt!r:.60} is no weight: taken literally",
        f"note: the prompt {prompt!r:.60} is read in 2 chunks of at most 75 tokens, joined"]


def test_help_names_every_sampler():
    process = run("--help", folder=ROOT)
    words = re.split(r"[,;\s]+", process.stdout)
    plain = {name for name in SAMPLERS if not name.endswith(("_karras", "_exponential"))}
    assert process.returncode == 0 and plain | {"_karras", "_exponential"} <= set(words)
    assert {"--vae", "--prediction-type", "v_prediction"} <= set(words)


def test_help_waits_for_no_library():
    process = subprocess.run([sys.executable, "-X", "importtime", "-m", "tinyldm", "--help"],
                             cwd=ROOT, env=environment(), capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert "tinyldm.cli.options" in imported and not imported & {"numpy", "PIL", "tqdm"}


def test_interrupt(weights, out):
    process = subprocess.Popen(
        command("a cat", "--weights", weights, "--steps", 1000), cwd=out, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # a background shell ignores Ctrl-C and its children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    said = b""
    while not re.search(rb"drawing: +\d+%", said):     # any: a fast machine skips some
        said += (piece := os.read(process.stderr.fileno(), 1000))
        assert piece, said
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.decode().endswith("\ninterrupted\n") and b"Traceback" not in stderr
    assert stdout == b"" and list(out.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes of Unix")
@pytest.mark.parametrize("module", ["tinyldm", "tinyldm.inspect"])
@pytest.mark.parametrize("stderr", [subprocess.PIPE, subprocess.STDOUT])
def test_a_pipe_that_is_closed(module, stderr, weights, out):
    """As by head: the command ends without a message, with a shell's exit status."""
    arguments = [weights] if module == "tinyldm.inspect" else [
        "a cat", "--weights", weights, "--steps", "1"]
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run([sys.executable, "-m", module, *arguments], cwd=out, timeout=300,
                             env=environment(), stdout=writer, stderr=stderr)
    os.close(writer)
    assert process.returncode == 141
    assert stderr == subprocess.STDOUT or b"Error" not in process.stderr, process.stderr
    assert not list(out.glob(".*"))


def test_the_bundled_model(tmp_path):
    process = run("a red circle on a blue background", "--steps", 5, folder=tmp_path)
    assert process.returncode == 0, process.stderr
    picture = Image.open(tmp_path / "out.png")
    assert picture.size == (64, 64) and "Model: shapes" in picture.text["parameters"]


def test_warnings_of_other_libraries_are_safe_to_print(monkeypatch, capsys):
    monkeypatch.setattr("tinyldm.cli.draw.draw",
                        lambda args: warnings.warn("a \x1b[2J\nb", stacklevel=1))
    assert main(["a cat"]) == 0
    assert capsys.readouterr().err == "note: a ?[2J b\n"
