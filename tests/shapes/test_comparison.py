"""The comparison: every training and drawing in a few steps, the numbers, the page."""
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.support.tolerance import assert_allclose
from tinyldm.errors import TinyldmError
from tinyldm.pipelines.loading import load
from tinyldm.shapes.comparison import command, data, measure, models, table
from tinyldm.shapes.drawing import draw
from tinyldm.shapes.scenes import Scene
from tinyldm.training.optim import initialise
from tinyldm.training.report import read_log

DOCS = Path(__file__).parents[2] / "docs"
SMALL = {"VAE": models.VAE | {"block_out_channels": [8] * 7, "latent_channels": 4},
         "PIXELS": models.PIXELS | {"block_out_channels": [8] * 5, "attention_head_dim": 8},
         "DIT": models.DIT | {"num_layers": 1, "attention_head_dim": 4}, "TEXT": (8, 1),
         "WIDTHS": (8, 8, 8), "BASE_WIDTHS": (8, 8), "SUPER_RES_WIDTHS": (8, 8, 8, 8),
         "VISION": models.VISION | {"hidden_size": 8, "intermediate_size": 8, "patch_size": 32},
         "PRIOR": models.PRIOR | {"attention_head_dim": 4, "num_layers": 1}, "CLIP_BATCH": 8,
         "STEPS": 2, "PIXEL_STEPS": 2, "PRIOR_STEPS": 2, "BOUND_STEPS": "2"}
TRAININGS = {
    "vae": models.vae, "ddpm": models.pixels, "improved": partial(models.pixels, learned=True),
    "latent": partial(models.latent, text=(8, 1), widths=(8, 8, 8)), "dit": models.dit,
    "cascade": models.cascade, "prior": models.prior}
PIPELINES = {"latent": "StableDiffusion", "dit": "DiT", "cascade": "Cascade", "prior": "UnCLIP"}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "POOL", 16)
        yield data.Data(tmp_path_factory.mktemp("pool"))


@pytest.fixture
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(models, name, value)
    for name, value in {"DRAWN": 3, "TRUE": 4, "BOUND": 2}.items():
        monkeypatch.setattr(measure, name, value)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_system_trains_draws_and_is_measured(name, pool, small, tmp_path):
    train = partial(TRAININGS[name], batch=5)           # shards of different sizes
    command.one(pool, tmp_path, train, 2)
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["steps"] == 2 and numbers["training"] > 0 and numbers["parameters"] > 1000
    assert ("bits" in numbers) == (name in ("vae", "ddpm", "improved"))
    assert ("asked" in numbers) == (name in ("latent", "dit", "cascade", "prior"))
    assert all(np.isfinite(value) for value in numbers.values())
    logs = [*map(read_log, (log.parent for log in tmp_path.rglob("log.jsonl")))]
    assert len(logs) == (2 if name == "prior" else 1)
    assert all(line["gradient"] > 0.01 for log in logs for line in log)
    assert Image.open(tmp_path / "samples.png").size == (3 * 64 + 9 * command.GAP + 7 * 64, 64)

    if name != "vae":
        assert type(load(tmp_path / "weights")).__name__ == PIPELINES.get(name, "DDPM")

    command.one(pool, tmp_path, train, 2)               # only reads what is trained
    again = json.loads((tmp_path / "numbers.json").read_text())
    assert again | {"seconds": 0} == numbers | {"seconds": 0}


@pytest.mark.parametrize("name", [name for name in TRAININGS if name != "improved"])
def test_the_gradients_of_each_loss(name, pool, small, tmp_path, monkeypatch):
    """Along the gradient g, the loss changes by |g|^2. In improved one path is cut on purpose."""
    checked = []

    def check(pool, folder, steps, batch, modules, loss):
        for module in modules.values():
            models.INITIALISE.get(type(module), initialise)(module, np.random.default_rng(0))
            for parameter in module.parameters():       # no branch is 0: all get a gradient
                if parameter.trainable:
                    noise = np.random.default_rng(1).standard_normal(parameter.shape)
                    parameter.data = parameter.data + 0.02 * noise      # float64

        def run():
            rows, rngs = pool.batch(0, 8)
            return loss(rows, rngs, 0.5)["loss"]
        run()
        parameters = [p for module in modules.values() for p in module.parameters() if p.trainable]
        grads = [p.grad for p in parameters]
        squares = sum(float((grad * grad).sum()) for grad in grads)
        losses = []
        for step in (1e-5, -1e-5):
            for p, grad in zip(parameters, grads):
                p.data = p.data + step / squares ** 0.5 * grad
            losses.append(run())
            for p, grad in zip(parameters, grads):
                p.data = p.data - step / squares ** 0.5 * grad
        assert_allclose((losses[0] - losses[1]) / 2e-5, squares ** 0.5, rtol=1e-6, what=name)
        for module in modules.values():
            module.zero_grad()
        checked.append(folder)

    monkeypatch.setattr(models, "train", check)
    for part in ("images", "latents"):                  # float64, as the weights above
        of_pool = getattr(pool, part)
        monkeypatch.setattr(pool, part, lambda *arguments, of_pool=of_pool: of_pool(
            *arguments).astype(np.float64))
    TRAININGS[name](pool, tmp_path, 2)
    assert len(checked) == (2 if name == "prior" else 1)


def test_scenes_show_one_thing_and_a_label_tells_its_colour_and_shape():
    found = data.scenes(200, 0)
    assert all(len(scene.things) == 1 and scene.relation is None for scene in found)
    labels = {}
    for scene in found:
        thing, = scene.things
        labels.setdefault(data.label_of(scene), set()).add((thing.colour, thing.shape))
    assert all(len(kinds) == 1 for kinds in labels.values()) and len(labels) > 50
    assert max(labels) < data.CLASSES


def test_the_pool_is_the_same_again(pool, monkeypatch):
    """Also its latents, which a second run reads from the file."""
    monkeypatch.setattr(data, "POOL", 16)
    again = data.Data(pool.run)
    np.testing.assert_array_equal(again.pictures, pool.pictures)
    rows, rngs = pool.batch(3, 6)
    assert len(set(rows.tolist())) > 1
    own_rows, own_rngs = again.batch(3, 6)
    np.testing.assert_array_equal(own_rows, rows)
    np.testing.assert_array_equal(again.latents(rows, own_rngs), pool.latents(rows, rngs))
    z = pool.vae.to_z(pool.latents(rows, rngs))
    assert abs(pool.vae.decode(z) - pool.images(rows)).mean() < 0.05


# ---- what is measured -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def drawings():
    found = data.scenes(60, 5)
    return found, [*map(draw, found)]


def test_true_drawings_are_clear_and_as_asked(drawings):
    for scene, picture in zip(*drawings):
        assert measure.shows(picture, scene, models.WORDS)
    assert np.mean([*map(measure.clear, drawings[1])]) > 0.95


def test_blurred_noisy_empty_and_double_pictures_are_not_clear(drawings):
    scenes, pictures = drawings
    for spoil, most in [(lambda p: np.asarray(Image.fromarray(p).filter(
            ImageFilter.GaussianBlur(6))), 0.3),
            (lambda p: (p + np.random.default_rng(0).normal(0, 40, p.shape)).clip(0, 255).astype(
                np.uint8), 0.05),
            (lambda p: np.broadcast_to(p[:1, :1], p.shape), 0),
            (lambda p: np.concatenate([p[::2], p[::2]]), 0.05)]:
        assert np.mean([measure.clear(spoil(picture)) for picture in pictures]) <= most


def test_only_the_words_that_were_given_count(drawings):
    scene, picture = drawings[0][0], drawings[1][0]
    thing, = scene.things
    names = {"red", "blue", "black"} - {thing.colour, scene.background}
    other = Scene(scene.things, None, min(names))       # the same thing on another ground
    assert not measure.shows(draw(other), scene, models.WORDS)
    assert measure.shows(draw(other), scene, ("colour", "shape"))
    assert measure.shows(picture, scene, ())


# ---- the page ---------------------------------------------------------------------------------

NUMBERS = {"kid": 0.1234, "kid_std": 0.011, "clear": 0.5, "asked": 0.25, "parameters": 1_234_567,
           "seconds": 0.123, "steps": 10, "training": 90.0}


def test_the_table_fills_the_page_with_what_is_measured(tmp_path):
    run, docs = tmp_path / "run", tmp_path / "docs"
    with pytest.raises(TinyldmError, match="holds no results: run `python -m tinyldm.shapes comp"):
        command.compare("table", run, docs)
    for name in ("dit", "vae", "sizes/base", "sizes/unet-16", "sizes/text-16"):
        (run / name).mkdir(parents=True)
        (run / name / "numbers.json").write_text(json.dumps(NUMBERS))
        Image.new("RGB", (40, 8)).save(run / name / "samples.png")
    docs.mkdir()
    quotes = [f"<!-- comparison: {kind} -->old<!-- end -->" for kind in ("systems", "sizes")]
    (docs / "comparison.md").write_text("# A\n" + "\n".join(quotes) + "\nb")
    command.compare("table", run, docs)
    text = (docs / "comparison.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "# A" and lines[-1] == "b" and "old" not in text
    dit, = (line for line in lines if "DiT" in line)
    assert dit == ("| DiT, in latents | colour and shape | 123 ± 11 | 50% | 25% |  | 1.23 M "
                   "| 0.12 s | 1.5 min |")
    assert lines.index(dit) == 1 + next(i for i, line in enumerate(lines) if "VAE alone" in line)
    assert "| base | 1.23 M | 123 ± 11 | 50% | 25% | 1.5 min |" in lines
    content = json.loads((docs / "trained" / "comparison.json").read_text())
    assert content["systems"]["dit"] == NUMBERS and len(content["sizes"]) == 3
    figure = Image.open(docs / "trained" / "comparison.png")
    assert figure.size == (table.LABELS + 40, 2 * 8 + 6)
    assert table.fill(text, content) == text            # filling again changes nothing


def test_the_page_shows_what_was_measured():
    page, content = DOCS / "comparison.md", DOCS / "trained" / "comparison.json"
    text = page.read_text(encoding="utf-8")
    assert table.fill(text, json.loads(content.read_text())) == text


@pytest.mark.parametrize("arguments, message", [
    (["nothing"], "nothing"), ([], "name"),
    (["table", "--run", "none"], "none holds no results: run `python -m tinyldm.shapes com"),
    (["true", "--run", "file"], "cannot write file"),
])
def test_what_cannot_be_compared_is_said_in_a_line(arguments, message, tmp_path):
    (tmp_path / "file").touch()
    done = subprocess.run([sys.executable, "-m", "tinyldm.shapes", "compare", *arguments],
                          cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()},
                          capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]
