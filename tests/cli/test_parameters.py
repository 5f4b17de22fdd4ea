"""Parameters as texts: pasted blocks, pictures of other programs, and our own drawn again."""
import io
import json
import re
import sys
import time
import warnings

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image, PngImagePlugin

from tests.support.pictures import hole, picture
from tinyldm.cli.draw import main
from tinyldm.cli.options import parse
from tinyldm.cli.parameters import find_lora, number, read, split_tags
from tinyldm.errors import TinyldmError

BLOCK = """a red star,
on a (white:1.2) background
Negative prompt: blue, a circle
and a square
Steps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 6.5, Seed: 5, Size: 64x48, \
Model hash: 6ce0161689, Model: "a, b", Version: v1.9.0"""


# ---- texts ----------------------------------------------------------------------------------

def test_a_block_of_a_web_interface():
    block = read(BLOCK)
    assert block.prompt == "a red star,\non a (white:1.2) background"
    assert block.negative == "blue, a circle\nand a square"
    assert block.values["Sampler"] == "Euler a" and block.values["Model"] == "a, b"
    assert len(block.values) == 9


@pytest.mark.parametrize("text, prompt, negative, values", [
    ("a cat", "a cat", "", {}),
    ("a cat\nNegative prompt: dog", "a cat", "dog", {}),
    ("a cat\nSteps: 5, Seed: 1", "a cat", "", {"Steps": "5", "Seed": "1"}),
    ("a cat\r\nNegative prompt: dog\r\nSteps: 5, Seed: 1\r\n", "a cat", "dog",
     {"Steps": "5", "Seed": "1"}),
    ("\n\na cat\n\nSteps: 5, Seed: 1\n\n", "a cat", "", {"Steps": "5", "Seed": "1"}),
    ("Steps: 5, Seed: 1", "", "", {"Steps": "5", "Seed": "1"}),
    ("Negative prompt: dog\nSteps: 5, Seed: 1", "", "dog", {"Steps": "5", "Seed": "1"}),
    ("a cat\nnegative prompt:dog\nSteps:5,Seed:1,", "a cat", "dog", {"Steps": "5", "Seed": "1"}),
    ("a cat\nSampler: Euler\nSteps: 5\nCFG: 3\nSeed: 1", "a cat", "",
     {"Sampler": "Euler", "Steps": "5", "CFG": "3", "Seed": "1"}),
    ("a cat\nSteps: 5 apples\nSteps: 5, Seed: 1", "a cat\nSteps: 5 apples", "",
     {"Steps": "5", "Seed": "1"}),
    ("a cat: cute, a dog: big, a hat: red", "a cat: cute, a dog: big, a hat: red", "", {}),
    ("a cat\nSteps: 5, Seed: 1\nTemplate: a {cat|dog}", "a cat", "",
     {"Steps": "5", "Seed": "1", "the text after them": "Template: a {cat|dog}"}),
    ("12:30, a street\nSteps: 5, Seed: 1", "12:30, a street", "", {"Steps": "5", "Seed": "1"}),
    ("a cat\nSteps: 5, Hashes: {\"model\": \"a\", \"vae\": [1, 2]}, Seed: 1", "a cat", "",
     {"Steps": "5", "Hashes": '{"model": "a", "vae": [1, 2]}', "Seed": "1"}),
    ('a cat\nSteps: 5, Lora hashes: "a: 1, b: 2", TI hashes: "\\"x\\\\", Seed: 1', "a cat", "",
     {"Steps": "5", "Lora hashes": "a: 1, b: 2", "TI hashes": '"x\\', "Seed": "1"}),
])
def test_texts(text, prompt, negative, values):
    block = read(text)
    assert (block.prompt, block.negative, block.values) == (prompt, negative, values)


@pytest.mark.parametrize("text", [
    "a" * 2_000_000, "a:" * 1_000_000, "a: 1," * 400_000, "\n" * 2_000_000, "Seed: 1\n" * 200_000,
    '"' * 1_000_000, "a: " + '"\\' * 500_000, "x: [" * 300_000, "x: " + "[" * 1_000_000,
    "Steps: 1\n\n" * 200_000, "<lora:" * 300_000, "Size: 1\n \n" * 200_000])
def test_reading_takes_time_in_proportion(text):
    started = time.process_time()
    read(text)
    split_tags(text)
    assert time.process_time() - started < 10


def test_numbers_are_exact():
    for value in (7.5, 1 / 3, 0.1, 1e-7, 123456.789, 7, 2 / 7):
        assert float(number(value)) == value
    assert number(7.5) == "7.5" and number(1 / 3) == "0.3333333333333333"


# ---- options --------------------------------------------------------------------------------

def parsed(text, *arguments, monkeypatch=None):
    """The options of a text, and the notes."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        args = parse(["--from-parameters", text + "\n", *arguments])
    return args, [str(note.message) for note in notes]


def test_options_of_a_block():
    args, notes = parsed(BLOCK)
    assert args.prompt == ["a red star,\non a (white:1.2) background"]
    assert args.negative == "blue, a circle\nand a square"
    assert (args.steps, args.sampler, args.guidance, args.seed) == (20, "euler_ancestral", 6.5, 5)
    assert (args.width, args.height) == (64, 48)
    assert notes == ["of the parameters in the text these are not used: "
                     "Model: a, b (--weights names it)"]


def test_options_in_the_command_count_more():
    args, notes = parsed(BLOCK, "a cat", "--seed", "0", "--steps=3", "--weights", "w", "--negative",
                         "", "--guidance", "7.5")
    assert args.prompt == ["a cat"] and args.negative == "" and args.seed == 0
    assert args.steps == 3 and args.guidance == 7.5 and args.height == 48 and not notes


@pytest.mark.parametrize("sampler, schedule, expected", [
    ("DPM++ 2M", "Karras", "dpmpp_2m_karras"), ("DPM++ 2M", "Automatic", "dpmpp_2m_karras"),
    ("DPM++ 2M SDE", "Karras", "dpmpp_2m_sde_karras"), ("DPM++ 2M", "Uniform", "dpmpp_2m"),
    ("Euler", "Automatic", "euler"), ("DPM++ 2M Karras", "", "dpmpp_2m_karras"),
    ("UniPC", "", "unipc"), ("DDIM", "DDIM", "ddim"), ("PLMS", "Automatic", "pndm"),
])
def test_samplers(sampler, schedule, expected):
    text = f"a cat\nSteps: 5, Sampler: {sampler}, Schedule type: {schedule}"
    args, notes = parsed(text if schedule else text.partition(", Schedule")[0])
    assert args.sampler == expected and not notes


@pytest.mark.parametrize("values, unused", [
    ("Sampler: Restart", "Sampler: Restart"),
    ("Sampler: Euler, Schedule type: Beta", "Schedule type: Beta"),
    ("Seed: many", "Seed: many"), ("Size: x", "Size: x"),
    ("Hires upscale: 2, Hires steps: 5", "Hires upscale: 2, Hires steps: 5"),
    ("Denoising strength: 0.7", "Denoising strength: 0.7"), ("VAE: a.pt", "VAE: a.pt"),
    ("Lora: \"ink:0.7\"", "Lora: ink:0.7"), ("Embeddings: \"a, b\"", "Embeddings: a, b"),
    ("Variation seed: 7", None), ("ENSD: 31337", "ENSD: 31337"), ("Version: v1.9.0", None),
    ("Model: shapes", None),
])
def test_a_note_names_what_is_not_used(values, unused):
    _, notes = parsed(f"a cat\nSteps: 5, {values}")
    assert [unused in note for note in notes] == [True] * bool(unused)


def test_a_variation_of_a_web_interface():
    args, notes = parsed("a cat\nSteps: 5, Seed: 1, Variation seed: 9, "
                         "Variation seed strength: 0.25")
    assert (args.seed, args.to_seed, args.on_the_way) == (1, 9, 0.25) and not notes
    args, _ = parsed("a cat\nSteps: 5, Variation seed: 9, Variation seed strength: 0.25",
                     "--variation", "0.5")
    assert args.to_seed is None and args.on_the_way is None


@pytest.mark.parametrize("number, expected", [(1, 0), (2, 1), (3, 2)])
def test_clip_skip_as_web_interfaces_count(number, expected):
    args, _ = parsed(f"a cat\nSteps: 5, Clip skip: {number}")
    assert args.clip_skip == expected


# ---- sources --------------------------------------------------------------------------------

def test_a_file_and_standard_input(tmp_path, monkeypatch):
    (tmp_path / "block.txt").write_bytes(b"\xef\xbb\xbf" + BLOCK.encode())
    with pytest.warns(UserWarning, match="not used: Model"):
        assert parse(["--from-parameters", str(tmp_path / "block.txt")]).seed == 5
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(BLOCK.encode())))
    with pytest.warns(UserWarning, match="in standard input these are not used: Model"):
        assert parse(["--from-parameters", "-"]).seed == 5


def comfy(**changes):
    """The nodes of ComfyUI's first workflow."""
    return {
        "3": {"class_type": "KSampler", "inputs": {
            "seed": 8, "steps": 20, "cfg": 8, "sampler_name": "dpmpp_2m", "scheduler": "karras",
            "denoise": 1, "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0],
            "latent_image": ["5", 0]}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 48,
                                                           "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "dog", "clip": ["4", 1]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0]}}} | changes


def test_a_picture_of_comfyui(tmp_path):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("prompt", json.dumps(comfy()))
    chunks.add_text("workflow", "{}")
    picture().save(tmp_path / "in.png", pnginfo=chunks)
    with pytest.warns(UserWarning, match="not used: Model: sd15.safetensors"):
        args = parse(["--like", str(tmp_path / "in.png")])
    assert args.prompt == ["a cat"] and args.negative == "dog" and args.seed == 8
    assert (args.steps, args.guidance, args.sampler) == (20, 8, "dpmpp_2m_karras")
    assert (args.width, args.height) == (64, 48)


@pytest.mark.parametrize("text", [
    "{", "{}", '{"a": 1}', "{" * 100_000, '{"a": ' * 100_000, "[" * 100_000 + "{",
    json.dumps(comfy() | {"10": comfy()["3"]}),         # two samplers
    json.dumps(comfy(**{"6": {"class_type": "Join", "inputs": {"a": ["1", 0]}}})),
    json.dumps(comfy(**{"3": {"class_type": "KSampler", "inputs": 5}})),
])
def test_json_that_is_not_simple(text):
    if text.lstrip().startswith("{"):
        with pytest.raises(TinyldmError, match="JSON, but not of one simple sampler in ComfyUI"):
            read(text)


@pytest.mark.parametrize("arguments, message", [
    (["--like", "none.png"], "cannot read none.png as a picture"),
    (["--like", "plain.png"], "plain.png does not say how it was drawn"),
    (["--like", "text.txt"], "cannot read text.txt as a picture"),
    (["--from-parameters", "none.txt"], "cannot read parameters from none.txt .No such file"),
    (["--from-parameters", "plain.png"], "cannot read parameters from plain.png .*--like reads"),
    (["--from-parameters", "."], "cannot read parameters from . .Is a directory"),
    (["--from-parameters", "empty.txt"], "empty.txt holds no parameters"),
    (["--from-parameters", " "], "--from-parameters is empty: give a file, - or a text"),
    (["--from-parameters", "~nobody-has-this/x"], "cannot read parameters from ~nobody-has-this"),
    (["--from-parameters", "https://a.org/x.txt"], "is an address, not a file on this machine"),
    (["--like", "text.txt"], "--from-parameters reads a text"),
    (["a cat", "--lora-folder", "none"], "there is no folder none: --lora-folder names one"),
    (["--from-parameters", "text.txt", "--like", "plain.png"], "leave one out"),
    (["--from-parameters", "edited.txt"], "name the picture photo.png, which is not here"),
    (["a <lora:ink>", "--lora-folder", "."], r"\. holds no LoRA ink.safetensors"),
    (["--from-parameters", "lora.txt", "--lora-folder", "."], "holds no LoRA ink.safetensors"),
    (["a <lora:ink:much>", "--lora-folder", "."], "<lora:ink:much> must be <lora:NAME:WEIGHT>"),
    (["a <lora:ink>", "b", "--lora-folder", "."], "the prompts name different LoRAs"),
])
def test_what_cannot_be_read(arguments, message, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture().save("plain.png")
    (tmp_path / "text.txt").write_text("a cat\nSteps: 5")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "edited.txt").write_text('a cat\nSteps: 5, Image: "../secret/photo.png"')
    (tmp_path / "lora.txt").write_text('a cat\nSteps: 5, Lora: "ink:1"')
    before = sorted(tmp_path.iterdir())
    assert main([*arguments, "--weights", str(weights)]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and sorted(tmp_path.iterdir()) == before
    assert re.search(message, error), error


ONE = "a cat, 16:9 Negative prompt: dog Steps: 5, Sampler: Euler, Seed: 1"
INVOKE = {"positive_prompt": "a cat", "negative_prompt": "dog", "width": 64, "height": 48,
          "seed": 7, "cfg_scale": 6.5, "steps": 5, "scheduler": "euler_a", "clip_skip": 1}
FOOOCUS = {"prompt": "a cat", "negative_prompt": "dog", "guidance_scale": 6.5, "steps": 5,
           "resolution": "(64, 48)", "sampler": "dpmpp_2m_sde_gpu", "scheduler": "karras",
           "seed": "7", "clip_skip": 2, "refiner_model": "None"}
EASY = {"prompt": "a cat", "negative_prompt": "dog", "num_inference_steps": 5, "seed": 7, "vae": "",
        "guidance_scale": 6.5, "width": 64, "height": 48, "sampler_name": "euler_a"}
SWARM = {"sui_image_params": {"prompt": "a cat", "negativeprompt": "dog", "seed": 7, "steps": 5,
                              "cfgscale": 6.5, "width": 64, "height": 48, "sampler": "euler_a"}}


@pytest.mark.parametrize("program, sampler, clip_skip", [
    (INVOKE, "euler_ancestral", 1), (EASY, "euler_ancestral", None),
    (FOOOCUS, "dpmpp_2m_sde_karras", 1), (SWARM, "euler_ancestral", None)])
def test_the_json_of_other_programs(program, sampler, clip_skip, tmp_path):
    file = tmp_path / "block.json"
    file.write_text(json.dumps(program))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # of Fooocus' refiner
        args = parse(["--from-parameters", str(file)])
    assert (args.prompt, args.negative, args.seed, args.steps) == (["a cat"], "dog", 7, 5)
    assert (args.guidance, args.width, args.height) == (6.5, 64, 48)
    assert (args.sampler, args.clip_skip) == (sampler, clip_skip)


def test_the_json_of_invokeai_in_a_picture(tmp_path):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("invokeai_metadata", json.dumps(INVOKE))
    picture().save(tmp_path / "a.png", pnginfo=chunks)
    assert parse(["--like", str(tmp_path / "a.png")]).seed == 7


@pytest.mark.parametrize("text", [
    ONE, ONE.replace(" Neg", "\nNeg"), f"Prompt: {ONE}".replace(" Steps", "\nSteps"),
    f"positive prompt:{ONE}", f"{ONE}, Hires Steps: 3".replace(" Steps", "\nSteps", 1)])
@pytest.mark.filterwarnings("ignore:of the parameters .* Hires Steps. 3")
def test_a_block_that_lost_its_line_breaks(text):
    args = parse(["--from-parameters", text])
    assert (args.prompt, args.steps, args.seed) == (["a cat, 16:9"], 5, 1)
    assert args.negative == "dog"


# ---- LoRAs by their names -------------------------------------------------------------------

@pytest.mark.parametrize("prompt, text, found", [
    ("a cat <lora:ink:0.7>", "a cat ", [("ink", 0.7)]), ("<lora:ink>", "", [("ink", 1.0)]),
    ("<LORA:a b:-0.5>x<lyco:c:1:0.5>", "x", [("a b", -0.5), ("c", 1.0)]),
    ("<lora:ink:0.7:lbw=1,0>", "", [("ink", 0.7)]), ("a < b <lora> <hypernet:x:1>",
     "a < b <lora> <hypernet:x:1>", []),
])
def test_tags(prompt, text, found):
    assert split_tags(prompt) == (text, found)


def test_finding_a_lora(tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("Ink.safetensors", "ink.safetensors", "below/Detail_v2.safetensors", "ink.txt"):
        (tmp_path / name).touch()
    assert find_lora(tmp_path, "ink").name == "ink.safetensors"
    assert find_lora(tmp_path, "INK").name == "Ink.safetensors"
    assert find_lora(tmp_path, "detail_v2").name == "Detail_v2.safetensors"
    with pytest.raises(TinyldmError, match="no LoRA detail.safetensors: near are Detail_v2"):
        find_lora(tmp_path, "detail")
    with pytest.raises(TinyldmError, match="no LoRA ../ink.safetensors"):
        find_lora(tmp_path / "below", "../ink")
    with pytest.raises(TinyldmError, match="it holds 0 .safetensors files of other names"):
        find_lora(tmp_path / "nowhere", "ink")


def write_lora(file):
    """A LoRA of one layer of the smallest pipeline."""
    layer, rng = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0", (
        np.random.default_rng(0))
    shapes = {"down": (2, 8), "up": (8, 2)}
    safetensors.numpy.save_file({f"{layer}.lora_{way}.weight": rng.standard_normal(
        shape, np.float32) for way, shape in shapes.items()}, file)


# ---- our own pictures, drawn again ----------------------------------------------------------

def drawn(arguments, folder, name):
    """Pictures of a command -> {file name: (pixels, text)}."""
    (folder / name).mkdir()
    assert main([*map(str, arguments), "--output", str(folder / name / "out.png")]) == 0
    pictures = {}
    for file in (folder / name).glob("out*.png"):
        with Image.open(file) as image:
            pictures[file] = np.asarray(image), image.text["parameters"]
    return pictures


@pytest.mark.parametrize("options", [
    [], ["--seed", 77, "--guidance", 1 / 3, "--negative", "a dog,\nNegative: \"x\"", "--steps", 3],
    ["--sampler", "dpmpp_2m_karras", "--width", 24, "--height", 32, "--noise", "numpy"],
    ["--variation", 1 / 3, "--count", 3], ["--to-seed", 9, "--count", 4],
    ["--to-prompt", 'a "dog", or: two\nlines', "--count", 4],
    ["--to-prompt", "a dog", "--to-seed", 3, "--count", 3],
    ["--image", "in.png", "--strength", 2 / 3], ["--image", "in.png", "--mask", "mask.png"],
    ["--image", "in.png", "--to-image", "to, \"it\".png", "--count", 3],
    ["--scale", 2, "--timestep-spacing", "trailing"], ["--guidance-rescale", 0.7, "--guidance", 9],
    ["--dtype", "float64"], ["--clip-skip", 1],
    ["--low-memory", "--width", 64, "--height", 64], ["--lora", "LoRA"],
], ids=lambda options: options[0] if options else "")
def test_every_picture_can_be_drawn_again(options, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture().save("in.png")
    hole().save("mask.png")
    picture(1).save('to, "it".png')
    (tmp_path / "loras").mkdir()
    write_lora(tmp_path / "loras" / "in:k, style.safetensors")
    lora = "loras/in:k, style.safetensors:0.3"
    options = [lora if option == "LoRA" else option for option in options]
    first = drawn(["a (cat:1.25), 3:4\n\"of\" [stone] 漢", "--steps", 2, "--weights", weights,
                   *options], tmp_path, "first")
    count = options[options.index("--count") + 1] if "--count" in options else 1
    again = {}
    for i, file in enumerate(file for file in first if "sheet" not in file.name):
        again |= {file.name: drawn(["--like", file, "--weights", weights, "--lora-folder", "loras"],
                                   tmp_path, f"again {i}").popitem()[1]}
        np.testing.assert_array_equal(again[file.name][0], first[file][0])
        text = again[file.name][1]
        if "--variation" in options:                    # which now is a point between two seeds
            text, _, _ = text.partition(", On the way")
        assert text == first[file][1]
    assert len(again) == count and "not used" not in capsys.readouterr().err
