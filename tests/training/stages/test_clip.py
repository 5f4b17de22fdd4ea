"""The command `clip`: what it writes, measures, goes on with, and refuses."""
import json
import re

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file

from tests.support import strict
from tests.support.captioned import CAPTIONS, write_captioned
from tests.support.command import assert_one_line
from tests.support.small_clip import write_clip
from tests.support.tolerance import within
from tinyldm import backend
from tinyldm.images import open_image
from tinyldm.pipelines.zero_shot import ZeroShot
from tinyldm.training.__main__ import main
from tinyldm.training.data.pictures import PictureFolder
from tinyldm.training.report import read_log
from tinyldm.training.stages.contrastive import Pairs
from tinyldm.training.stages.retrieval import Found, Retrieval

NEW = ["--resolution", "16", "--patch", "8", "--width", "32", "--layers", "1"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("weights") / "clip")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_captioned(tmp_path_factory.mktemp("pictures") / "data", 12)


@pytest.fixture
def train(pictures, tmp_path, capsys):
    """A function that runs the command -> status, standard output, standard error."""
    def run(*more, output="out", steps=2, new=True):
        status = main(["clip", "--data", str(pictures), "--steps", str(steps), "--batch", "5",
                       "--learning-rate", "1e-2", "--warmup", "0", "--schedule", "constant",
                       "--output", str(tmp_path / output), *NEW * new, *map(str, more)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err
    return run


# ---- the result ----------------------------------------------------------------------------------

def test_what_is_written_and_said(train, pictures, tmp_path):
    status, out, err = train("--held-out", 3, "--validate-every", 1, "--sample-every", 2)
    assert status == 0, err
    assert "3 pictures are held out" in out and "checked: " in out and "use it: " in out
    assert re.search(r"of 3 pictures [\d.]+% find their caption among 3, of the captions [\d.]+% "
                     r"their picture \(chance 33.3%\)", out)
    assert re.search(r"step 1: of 3 pictures", err)
    log = read_log(tmp_path / "out")
    assert [line["step"] for line in log if "accuracy" in line] == [0, 1, 2]
    assert {*log[-1]["validation"]} == {"3 pairs"}
    assert Image.open(tmp_path / "out" / "samples" / "0000002-0.png").size[0] > 300
    assert (tmp_path / "out" / "loss.png").exists() and (tmp_path / "out" / "samples.png").exists()


def test_transformers_reads_it(train, pictures, tmp_path):
    """Its model, tokenizer and image processor give our embeddings."""
    assert train()[0] == 0
    folder = tmp_path / "out" / "model"
    texts = [f"a big {CAPTIONS[0]}", "a small green ring on a white background"]
    images = [open_image(pictures / f"{i}.png") for i in range(3)]
    clip = ZeroShot.load(folder)
    model, report = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    ids = transformers.CLIPTokenizer.from_pretrained(folder)(texts, padding=True,
                                                             return_tensors="pt")
    pixels = transformers.CLIPImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")
    with torch.no_grad():
        found = model(**ids, **pixels)
    within(abs(clip.embed_texts(texts) - found.text_embeds.numpy()).max(), 1e-5)
    within(abs(clip.embed_images(images) - found.image_embeds.numpy()).max(), 1e-5)
    assert len({*clip.embed_texts(texts)[:, 0]}) == 2


def test_float16_and_the_average(train, tmp_path):
    assert train("--save-as", "float16", "--ema", "0.5", "--ema-form", "constant")[0] == 0
    half = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert {array.dtype for array in half.values()} == {np.dtype(np.float16)}
    assert train(output="plain")[0] == 0
    plain = load_file(tmp_path / "plain" / "model" / "model.safetensors")
    assert abs(plain["text_projection.weight"] - half["text_projection.weight"]).max() > 1e-3


@pytest.mark.parametrize("more", [[], ["--ema", "0.9", "--flip", "--accumulate", "2"]])
def test_two_and_two_steps_are_four(more, train, tmp_path, monkeypatch):
    """Bitwise, with another number of threads, too."""
    assert train(*more, output="whole", steps=4)[0] == 0
    assert train(*more, steps=2)[0] == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    status, _, err = train(*more, "--resume", steps=4)
    assert status == 0, err
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors")
                    for name in ("whole", "out"))
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name])


def test_a_frozen_half_stays(train, weights, tmp_path):
    before = load_file(weights / "model.safetensors")
    for half, frozen in ("text", "vis"), ("image", "text"):
        status, out, err = train("--weights", weights, "--train", half, output=half, new=False)
        assert status == 0, err
        after = load_file(tmp_path / half / "model" / "model.safetensors")
        for name, array in before.items():
            assert (array == after[name]).all() == name.startswith(frozen), name
    with np.load(tmp_path / "text" / "state.npz") as state:
        assert state["data"].size == 1 + sum(
            array.size for name, array in before.items() if name.startswith("text"))


def test_the_learning_rate_of_weights_is_lower(pictures, weights, tmp_path):
    for more, rate in (["--weights", str(weights)], 1e-5), (NEW, 1e-3):
        output = tmp_path / more[0]
        assert main(["clip", "--data", str(pictures), "--steps", "1", "--batch", "4", "--schedule",
                     "constant", "--output", str(output), *more]) == 0
        assert [line["learning_rate"] for line in read_log(output)
                if "learning_rate" in line] == [rate]


def test_on_a_device(train, weights, tmp_path):
    """On strict arrays in place of CuPy's: the same numbers, up to rounding."""
    more = ["--weights", weights, "--checkpoints", "--sample-every", 1]
    assert train(*more, output="host", new=False)[0] == 0
    with strict.installed(), backend.plain():
        status, out, err = train(*more, "--device", "cuda", output="device", new=False)
    assert status == 0 and "could not be made" not in err, err
    host, device = (load_file(tmp_path / name / "model" / "model.safetensors")
                    for name in ("host", "device"))
    for name, array in host.items():                    # in units of the learning rate, 1e-2
        within(abs(array - device[name]).max(), 1e-4, name)


@pytest.mark.parametrize("half", ["both", "text", "image"])
def test_computing_in_float16(half, train, weights, tmp_path):
    """Like float32, up to the rounding of the gradients; exact in going on, as in float32."""
    more = ["--weights", weights, "--train", half, "--held-out", 0]
    assert train(*more, output="whole", steps=4, new=False)[0] == 0
    own = [*more, "--dtype", "float16"]
    status, _, err = train(*own, output="half", steps=4, new=False)
    assert status == 0 and "float16 is slower than float32 on a CPU" in err, err
    assert train(*own, new=False)[0] == 0
    assert train(*own, "--resume", steps=4, new=False)[0] == 0
    whole, found, parts = (load_file(tmp_path / name / "model" / "model.safetensors")
                           for name in ("whole", "half", "out"))
    before, errors = load_file(weights / "model.safetensors"), []
    for name, array in whole.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], parts[name])
        assert (found[name] == before[name]).all() == (array == before[name]).all(), name
        errors.append((found[name] - array).ravel() / 1e-2)
    within((np.concatenate(errors) ** 2).mean() ** 0.5, 0.5, "in units of the learning rate")


def test_the_limit_of_the_scale_is_that_of_the_float32_weights(train, weights, tmp_path):
    clip = ZeroShot.load(weights)
    clip.model.logit_scale.data = np.float32(np.log(100) + 1)
    clip.save(tmp_path / "clip", np.float32)
    status, _, err = train("--weights", tmp_path / "clip", "--dtype", "float16", steps=1, new=False)
    assert status == 0, err
    found = load_file(tmp_path / "out" / "model" / "model.safetensors")["logit_scale"]
    assert found == np.float32(np.log(100)) != np.float16(found)


def test_float16_on_a_device(train, weights):
    with strict.installed(), backend.plain():
        status, _, err = train("--weights", weights, "--device", "cuda", "--dtype", "float16",
                               new=False)
    assert status == 0 and "slower" not in err, err


# ---- the accuracy --------------------------------------------------------------------------------

def test_it_learns(train, tmp_path):
    """Twelve pictures by heart."""
    status, out, err = train("--batch", 9, "--held-out", 0, "--validate-every", 0,
                             "--learning-rate", "3e-3", steps=60)
    assert status == 0 and "no picture is held out" in out, err
    assert float(re.search(r"of 12 pictures ([\d.]+)% find", out)[1]) > 80


class Fixed:
    """A ZeroShot whose embeddings are given."""

    def __init__(self, images, texts, classes):
        self.images, self.texts, self.classes = images, texts, classes
        self.model = type("", (), {"logit_scale": type("", (), {"data": np.log(2.0)})})

    def embed_images(self, images):
        return np.array([self.images[image.getpixel((0, 0))] for image in images])

    def embed_texts(self, texts):
        return np.array([self.texts[text] for text in texts])

    def classifier(self, names, templates):
        return np.array([self.classes[template.format(name)] for name in names
                         for template in templates])


def test_what_is_measured(tmp_path):
    """Four pictures, two with one caption; the last one finds another's."""
    folder = tmp_path / "data"
    folder.mkdir()
    colours, texts = [(250, 0, 0), (200, 0, 0), (0, 250, 0), (0, 0, 250)], ["r", "r", "g", "b"]
    for i, (colour, text) in enumerate(zip(colours, texts)):
        Image.new("RGB", (8, 8), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(text)
    axes = np.eye(3)
    clip = Fixed({colours[0]: axes[0], colours[1]: axes[0], colours[2]: axes[1],
                  colours[3]: np.array([0, 0.8, 0.6])}, dict(zip("rgb", axes)),
                 {"the r": axes[0], "the g": axes[1]})
    items = PictureFolder(folder, 8).items
    retrieval = Retrieval(clip, items, 2, (["r", "g"], [0, 0, 1, 0]), ["the {}"])
    found = retrieval.look()
    assert isinstance(found, Found) and list(found.own) == [0, 0, 1, 2]
    loss, shares = retrieval.measure()
    assert shares == {"image to text": 0.75, "text to image": 1.0, "classes": 0.75}
    pairs = [np.array([[2, 2], [2, 2.0]]), np.array([[2, 0], [1.6, 1.2]])]      # 2 cosines

    def cross_entropy(logits):
        return np.mean(np.log(np.exp(logits).sum(axis=1)) - np.diag(logits))
    expected = np.mean([(cross_entropy(p) + cross_entropy(p.T)) / 2 for p in pairs])
    assert loss == pytest.approx(expected, rel=1e-12)
    assert "75.0% find their caption among 3, of the captions 100.0% their picture (chance 33.3%" \
        in retrieval.sentence(shares)
    assert "75.0% find the name of their class among 2 (chance 50.0%)" in retrieval.sentence(shares)


def test_the_matrix_shows_each_caption_once(weights, pictures):
    clip = ZeroShot.load(weights)
    items = PictureFolder(pictures, 12).items
    matrix = Retrieval(clip, [*items[:3], items[0]], 2).matrix()
    pixels = np.asarray(matrix)
    rows = [y for y in range(74, matrix.height) if (pixels[y, 240:] != 255).any()]
    assert matrix.size == (240 + 3 * 74, 4 * 74) and rows[-1] == 74 + 3 * 74 - 3
    found = Retrieval(clip, items[:3], 2).look()
    cosines = found.images @ found.texts.T
    picture, text = np.unravel_index(cosines.argmax(), (3, 3))      # the darkest cell
    cell = pixels[(text + 1) * 74 + 3, 240 + picture * 74 + 3]
    np.testing.assert_array_equal(cell, [24, 64, 160])


def test_classes(train, tmp_path):
    folder = tmp_path / "classes"
    folder.mkdir()
    for name in "old_cat", "hat":
        write_captioned(folder / name, 6)
    status, out, err = train("--data", folder, "--classes", "folders", "--template", "a {}",
                             "--template", "{} low", "--held-out", 4)
    assert status == 0, err
    assert re.search(r"find the name of their class among 2 \(chance 50.0%\)", out)
    status, _, err = train("--data", folder, "--classes", "folders", "--template", "a", output="b")
    assert status == 2 and "a template must have {}" in err
    assert {*json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])[
        "accuracy"]} == {"image to text", "text to image", "classes"}


# ---- the pictures --------------------------------------------------------------------------------

def test_pictures_without_a_caption_are_left_out(train, tmp_path):
    folder = write_captioned(tmp_path / "some", 9)
    (folder / "3.txt").unlink()
    (folder / "4.txt").write_text("")
    status, out, err = train("--data", folder, "--held-out", 2)
    assert status == 0, err
    assert "pictures without a caption, which" in out and "3.png" in out
    assert train("--data", folder, "--held-out", 2, "--batch", 6)[0] == 2


def test_long_captions_are_cut_at_a_word(train, pictures, tmp_path):
    folder = write_captioned(tmp_path / "long", 8)
    (folder / "3.txt").write_text("red cat " * 60)
    status, out, err = train("--data", folder)
    assert status == 0, err
    assert "captions too long for the text encoder, cut at a word (1: 3.png: " in out
    assert "its end is cut" not in err


def test_same_captions_are_said(train, tmp_path):
    folder = write_captioned(tmp_path / "same", 8)
    (folder / "3.txt").write_text(CAPTIONS[4])
    status, out, err = train("--data", folder, "--held-out", 0)
    assert status == 0, err
    assert "7 different captions: a batch holds 0.36 pairs of pictures with the same caption" in out


def test_pictures_are_resized_as_by_the_processor(weights, pictures):
    """What is trained on is, cut in the middle, what the image processor gives."""
    clip = ZeroShot.load(weights)
    folder = PictureFolder(pictures, 12, filter="bicubic")
    pairs = Pairs(clip, folder, 0)
    samples = [folder.centred(i) for i in range(4)]
    expected = clip.processor([open_image(folder.items[i].path) for i in range(4)])
    found = pairs.pixels(samples)
    assert found.shape == expected.shape
    # The middle, 1.5 pixels from the left, is rounded otherwise.
    np.testing.assert_array_equal(found[:, :, :-1], expected[:, :, 1:])


REFUSED = {
    "one pair": (["--batch", 1], "--batch must be 2 or more: the loss of a single pair is always"),
    "a batch larger than the folder": (["--batch", 13], "--batch 13 needs as many pictures .* 12"),
    "all held out": (["--held-out", 12], "12 of .* 12 pictures cannot be held out"),
    "half of a new model": (["--train", "text"], "--train text freezes the other half"),
    "patches": (["--patch", 7], "--resolution must be a multiple of --patch, 7, not 16"),
    "a width": (["--width", 40], "--width must be a multiple of 32, not 40"),
    "no tokenizer": (["--tokenizer", "nowhere"], "nowhere"),
    "no classes": (["--classes", "names"], "--classes names: 12 of the pictures have no class"),
    "templates of no classes": (["--template", "a {}"], "--template is about classes"),
    "one picture held out": (["--held-out", 1], "--held-out must be 0, or 2 and more"),
    "a half that is none": (["--train", "ears"], "--train: invalid choice"),
    "no folder": (["--data", "nowhere"], "nowhere"),
    "no training": (["--resume"], "no training to go on with"),
    "no CLIP": (["--weights", "nowhere"], "--resolution is for a new model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_line_for_bad_input(case, train, tmp_path):
    more, said = REFUSED[case]
    status, _, err = train(*more)
    assert_one_line(status, err, said)
    assert not (tmp_path / "out" / "model").exists()


def test_other_pictures_that_cannot_be_trained_on(train, weights, tmp_path):
    folder = write_captioned(tmp_path / "same", 6)
    for file in folder.glob("*.txt"):
        file.write_text("a cat")
    status, _, err = train("--data", folder)
    assert status == 2 and re.search("all pictures of .* have the caption 'a cat'", err)
    for file in folder.glob("*.txt"):
        file.unlink()
    status, _, err = train("--data", folder)
    assert status == 2 and "has no captions: write a file metadata.jsonl" in err
    status, _, err = train("--weights", tmp_path / "nowhere", new=False)
    assert status == 2 and "nowhere" in err
    status, _, err = train("--weights", weights / "model.safetensors", new=False)
    assert status == 2 and "must be a folder with a CLIP" in err


def test_a_learning_rate_that_is_too_large_names_the_layer(train):
    status, _, err = train("--learning-rate", "1e30", "--clip", 0, steps=5)
    assert status == 2
    line = [line for line in err.splitlines() if line.startswith("error: ")][-1]
    assert re.search(r"not finite is clip\.\w+|weights .* are NaN or infinite", line), line
    assert "pictures " in line or "weights" in line


def test_output_that_exists_and_other_options(train, tmp_path):
    assert train()[0] == 0
    status, _, err = train()
    assert status == 2 and "model exists already" in err
    status, _, err = train("--resume", "--held-out", 2, steps=4)
    assert status == 2 and "--held-out is 2, it was 0" in err
    assert train("--resume", "changed", "--held-out", 2, steps=4)[0] == 0
