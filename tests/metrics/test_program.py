"""python -m tinyldm.metrics with a CLIP, against transformers' classes; and Ctrl-C."""
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

from tests.support.command import environment
from tests.support.small_clip import CONFIG, pictures, write_clip
from tests.support.tolerance import assert_allclose
from tinyldm import images
from tinyldm.checkpoints.components import load_model, save_model
from tinyldm.image_processor import ImageProcessor
from tinyldm.metrics.__main__ import main
from tinyldm.metrics.cmmd import cmmd
from tinyldm.metrics.fid import frechet_distance, statistics
from tinyldm.models import CLIPVisionModel, CLIPVisionModelWithProjection

TEXTS = ["a cat", "red", "low dog", "cat.", "red cat"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def vision_half(whole, cls, folder):
    """The vision model of a whole CLIP as a folder of its own."""
    module = cls(CONFIG["vision_config"] | {"projection_dim": CONFIG["projection_dim"]})
    tensors = dict(load_model(whole).named_parameters())
    for name, parameter in module.named_parameters():
        parameter.data = tensors[name].data
    save_model(module, folder, np.float32)
    ImageProcessor.from_folder(whole).save(folder)
    return folder


@pytest.fixture(scope="module")
def vision(whole, tmp_path_factory):
    return vision_half(whole, CLIPVisionModelWithProjection, tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of 5 and 4 pictures. Those of the second are named in the order of TEXTS."""
    found = []
    for name, chosen in ("real", pictures(9)[5:]), ("drawn", pictures(5)):
        folder = tmp_path_factory.mktemp(name)
        for i, picture in enumerate(chosen):
            picture.save(folder / f"{i}.png")
        found.append(folder)
    return found


@pytest.fixture(scope="module")
def embeddings(vision):
    """The pictures of both folders through transformers."""
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(vision).double().eval()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(vision)
    with torch.no_grad():
        return [model(processor(chosen, return_tensors="pt")["pixel_values"].double()
                      ).image_embeds.numpy() for chosen in (pictures(9)[5:], pictures(5))]


@pytest.fixture
def number(capsys):
    def run(*arguments):
        assert main([*map(str, arguments)]) == 0
        name, value = capsys.readouterr().out.split()
        assert name == arguments[0]
        return float(value)
    return run


@pytest.fixture
def refused(capsys):
    def run(*arguments):
        assert main([*map(str, arguments)]) == 2
        out, error = capsys.readouterr()
        assert out == "" and error.count("error: ") == 1 and error.endswith("\n")
        return error[error.index("error: "):]
    return run


@pytest.mark.parametrize("kind", ["whole", "vision"])
def test_distances_of_clips_features(kind, folders, embeddings, number, request):
    """The numbers have six digits after the point."""
    clip = "--clip", request.getfixturevalue(kind), "--batch", 2
    expected = frechet_distance(*(statistics(features) for features in embeddings))
    assert_allclose(number("fid", *folders, "--features", "clip", *clip), expected, 1e-5, 1e-6)
    assert_allclose(number("cmmd", *folders, *clip), cmmd(*embeddings), 1e-5, 2e-6)


def test_statistics_tell_clips_apart_from_other_features(folders, whole, refused, capsys, tmp_path):
    real, drawn = folders
    assert main(["stats", str(real), str(tmp_path / "a.npz"), "--features", "clip", "--clip",
                 str(whole)]) == 0
    capsys.readouterr()
    assert "do not compare" in refused("fid", tmp_path / "a.npz", drawn, "--features", "vae")


def test_clip_score_equals_transformers(folders, whole, number, tmp_path):
    model = transformers.CLIPModel.from_pretrained(whole).double().eval()
    ids = transformers.CLIPTokenizer.from_pretrained(whole)(TEXTS, padding=True,
                                                            return_tensors="pt")
    pixels = transformers.CLIPImageProcessorPil.from_pretrained(whole)(
        pictures(5), return_tensors="pt")["pixel_values"].double()
    with torch.no_grad():
        found = model(**ids, pixel_values=pixels)
    cosines = (found.image_embeds * found.text_embeds).sum(dim=1)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    arguments = "clip-score", folders[1], "--clip", whole, "--batch", 2
    value = number(*arguments, "--texts", texts)
    assert_allclose(value, 100 * cosines.mean().item(), 1e-5, 2e-6)
    texts.write_text("\n".join(TEXTS[::-1]), encoding="utf-8")
    assert abs(number(*arguments, "--texts", texts) - value) > 0.1     # the order matters


def test_clip_score_of_recorded_prompts(folders, whole, number, refused, tmp_path):
    drawn, texts = tmp_path / "drawn", tmp_path / "texts.txt"
    drawn.mkdir()
    for i, (picture, text) in enumerate(zip(pictures(5), TEXTS)):
        images.save(picture, drawn / f"{i}.png", f"{text}\nNegative prompt: a dog\n"
                                                 "Steps: 20, Sampler: Euler a, Seed: 5")
    texts.write_text("\n".join(TEXTS), encoding="utf-8")
    assert number("clip-score", drawn, "--clip", whole) == number(
        "clip-score", folders[1], "--clip", whole, "--texts", texts)
    np.savez(tmp_path / "drawn.npz", np.zeros((2, 8, 8, 3), np.uint8))
    for place, named in (folders[1], "0.png"), (tmp_path / "drawn.npz", "drawn.npz"):
        error = refused("clip-score", place, "--clip", whole)
        assert f"{named} records no prompt: give the prompts by --texts" in error


def test_clips_that_do_not_do(folders, whole, vision, refused, tmp_path):
    plain = vision_half(whole, CLIPVisionModel, tmp_path / "plain")
    texts = tmp_path / "texts.txt"
    texts.write_text("a cat\n", encoding="utf-8")
    assert "a CLIPVisionModel has none" in refused("cmmd", *folders, "--clip", plain)
    assert "found none" in refused("cmmd", *folders, "--clip", tmp_path / "none")
    score = "clip-score", folders[1]
    assert "name its folder by --clip" in refused(*score, "--texts", texts)
    assert "1 lines for 5 pictures" in refused(*score, "--texts", texts, "--clip", whole)
    texts.write_text("a cat\n" * 5, encoding="utf-8")
    assert "vocab.json, found none" in refused(*score, "--texts", texts, "--clip", vision)


@pytest.mark.skipif(sys.platform == "win32", reason="needs the signals of Unix")
def test_interrupt(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    pictures(1)[0].save(folder / "0.png")
    for i in range(1, 1000):
        (folder / f"{i}.png").symlink_to(folder / "0.png")
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyldm.metrics", "stats", folder, tmp_path / "out.npz",
         "--features", "vae", "--batch", "1"], env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a background shell ignores Ctrl-C and its children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    said = b""
    while b"/1000 [" not in said:
        said += (piece := os.read(process.stderr.fileno(), 1000))
        assert piece, said
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.decode().endswith("\ninterrupted\n") and b"Traceback" not in stderr
    assert stdout == b"" and [path.name for path in tmp_path.iterdir()] == ["pictures"]
