"""The x-ray's page without a browser: what it holds, how large it is, and its command."""
import html
import re
import time

import numpy as np
import pytest

from tests.support.xray import LAYERS, WORDS, copied, facts_of, stand_in, unpack
from tinyldm.xray import page as pages
from tinyldm.xray.__main__ import main
from tinyldm.xray.page import LARGEST, page

ATTENTION = "attention/{}.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def record():
    return stand_in()


@pytest.fixture(scope="module")
def text(record):
    return page(record)


# ---- what it holds ----------------------------------------------------------------------------

def test_latents_are_exact(record, text):
    """Panel 6 computes with them."""
    found = unpack(text)
    for name in ("x_t", "uncond", "cond"):
        assert np.array_equal(found[name], record.arrays[name])
    for a, b, error in facts_of(text)["linear"]:
        assert error < 1e-5 and b < 0 < a


def test_x_start_is_linear_in_the_prediction(record, text):
    """What page.js computes from x_t, uncond and cond is the record's x_start."""
    found, facts = unpack(text), facts_of(text)
    for i, (a, b, _) in enumerate(facts["linear"]):
        guided = found["uncond"][i] + 6.5 * (found["cond"][i] - found["uncond"][i])
        assert abs(a * found["x_t"][i] + b * guided - record.arrays["x_start"][i]).max() < 1e-4


def test_an_x_start_that_is_not_linear_is_kept_itself(record):
    arrays = record.arrays | {"x_start": record.arrays["x_start"].clip(-1, 1)}
    text = page(copied(record, arrays=arrays))
    assert np.array_equal(unpack(text)["x_start"], arrays["x_start"])
    facts = facts_of(text)
    assert not facts["is_linear"] and "clips x_start" in facts["left_out"][0]


def test_pictures_are_exact(record, text):
    found = unpack(text)
    assert np.array_equal(found["images"], record.arrays["images"])
    assert np.array_equal(found["without"], record.arrays["without"])
    assert np.array_equal(found["picture"][0], np.asarray(record.image))


@pytest.mark.parametrize("layer", LAYERS)
def test_attention_within_its_quantisation(record, text, layer):
    name, facts = ATTENTION.format(layer), facts_of(text)
    found, original = unpack(text)[name], record.arrays[name]
    kinds = [reader["kind"] for reader in facts["readers"]]
    assert kinds == ["start", *["word"] * len(WORDS), "end", "padding"]
    expected = np.stack([original[..., reader["tokens"]].sum(axis=-1)
                         for reader in facts["readers"]], -1)
    half = np.array(facts["arrays"][name]["scale"]) / 2
    assert np.all(abs(found - expected) <= half * 1.001)
    assert np.all(half <= expected.max(axis=(0, 1, 2, 3)) / 255 * 0.501)


def test_all_tokens_are_read_once(text):
    tokens = [token for reader in facts_of(text)["readers"] for token in reader["tokens"]]
    assert sorted(tokens) == [*range(77)]


def test_gradients_and_activations(record, text):
    found, facts = unpack(text), facts_of(text)
    for i, block in enumerate(facts["blocks"]):
        size = np.linalg.norm(record.arrays[f"gradient/{block['name']}"], axis=-1)
        assert abs(found[f"gradient/{block['name']}"][..., 0] - size).max() < size.max() / 500
        assert np.allclose(block["gradient"], np.sqrt((size ** 2).sum(axis=(1, 2))), rtol=1e-3)
        assert np.allclose(block["mean"], record.arrays["activation_mean"][:, i], rtol=1e-3)
    norms = np.sqrt((record.arrays["word_gradient"][:, 10:] ** 2).sum(axis=1))
    assert abs(found["word_gradient"][..., -1] - norms).max() < norms.max() / 500


def test_components_are_those_of_numpy():
    """The first three columns of U S V^T are theirs, up to a sign."""
    x = np.random.default_rng(0).standard_normal((2, 4, 3, 6)) * [9, 1, 7, 1, 5, 1]
    rows = x.reshape(-1, 6) - x.reshape(-1, 6).mean(axis=0)
    u, s, _ = np.linalg.svd(rows, full_matrices=False)
    found = pages.components(x).reshape(-1, 3)
    assert np.allclose(abs(found), abs(u * s)[:, :3])


def test_skips_go_where_the_unet_pops_them():
    names = ["conv_in", "down_blocks.0.resnets.0", "down_blocks.0.attentions.0",
             "down_blocks.0.downsamplers.0", "down_blocks.1.resnets.0", "mid_block.resnets.0",
             "up_blocks.0.resnets.0", "up_blocks.0.resnets.1", "up_blocks.0.upsamplers.0",
             "up_blocks.1.resnets.0", "up_blocks.1.attentions.0", "up_blocks.1.resnets.1",
             "conv_norm_out"]
    blocks = [{"name": name} for name in names]
    pages.add_reads(blocks)
    skips = {block["name"]: block["reads"][1:] for block in blocks}
    assert {name: skip for name, skip in skips.items() if skip} == {
        "up_blocks.0.resnets.0": ["down_blocks.1.resnets.0"],
        "up_blocks.0.resnets.1": ["down_blocks.0.downsamplers.0"],
        "up_blocks.1.resnets.0": ["down_blocks.0.attentions.0"],
        "up_blocks.1.resnets.1": ["conv_in"]}


def test_places_are_where_the_code_is(text):
    facts = facts_of(text)
    places = [*facts["nodes"].values(), *sum(facts["panels"].values(), [])]
    assert len(places) > 15
    for place in places:
        line = open(place["file"], encoding="utf-8").read().splitlines()[place["line"] - 1]
        assert re.match(rf"\s*(def|class) {place['name'].split('.')[-1]}\b", line), place


# ---- one file ---------------------------------------------------------------------------------

def test_it_asks_for_nothing(text):
    addresses = r"""(src|href|url)\s*[=(]\s*["']?(?!data:|#|")[\w/:.]"""
    assert not re.search(addresses, without_data(text))
    assert "http" not in without_data(text).replace("http://www.w3.org/2000/svg", "")


def without_data(text):
    return re.sub(r'<script id="packed".*?</script>', "", text, flags=re.S)


HOSTILE = '</script><b onload="x">"quotes" & \'{{facts}}\' <!-- ä 星'


def test_any_prompt(record):
    text = page(copied(record, prompt=HOSTILE))
    assert facts_of(text)["prompt"] == HOSTILE
    assert html.escape(HOSTILE) in text and HOSTILE not in text
    assert text.count("<script") == page(record).count("<script")


def test_it_stays_small_for_any_drawing():
    """Stable Diffusion's shapes, and a prompt that fills all tokens: less is kept, and said."""
    layers = {f"down_blocks.{i}": 32 for i in range(3)}
    blocks = {"conv_in": (64, 4), "conv_out": (64, 4)}
    record = stand_in([f"w{i}" for i in range(75)], 26, layers, blocks, 64, 3)
    text = page(record)
    assert len(text.encode()) <= LARGEST
    facts = facts_of(text)
    assert facts["of_steps"] == 26 and facts["steps"][0] == 1 and facts["steps"][-1] == 26
    assert "averaged over the heads" in " ".join(facts["merged"])
    assert f"{len(facts['steps'])} of 26 steps" in facts["merged"][0]
    found = unpack(text)
    assert found["x_t"].shape[1:3] == (32, 32)
    expected = record.arrays["x_t"][0].reshape(32, 2, 32, 2, -1).mean(axis=(1, 3))
    assert np.allclose(found["x_t"][0], expected, atol=1e-6)


def test_a_drawing_without_text_and_gradients(record):
    arrays = {name: array for name, array in record.arrays.items()
              if name not in ("uncond", "context", "without", "word_gradient", "embedding_gradient",
                              "attention_share", "gradient_share", "gradient_steps")
              and not name.startswith(("attention/", "gradient/"))}
    signal, spread = (x[:, None, None, None] for x in (np.sqrt(arrays["alpha_bar"]),
                                                       np.sqrt(1 - arrays["alpha_bar"])))
    arrays["model_output"] = arrays["cond"]
    arrays["x_start"] = signal * arrays["x_t"] - spread * arrays["cond"]
    text = page(copied(record, arrays=arrays, words=[], tokens=[], boxes=[], check={}, colours={},
                       guidance_scale=None, left_out=["no text: this pipeline reads no prompt"]))
    facts = facts_of(text)
    assert facts["left_out"] == ["no text: this pipeline reads no prompt"]
    assert "encoder" not in facts["nodes"] and "sampler" in facts["nodes"]
    assert facts["readers"] == facts["layers"] == facts["boxes"] == facts["gradient_steps"] == []


# ---- the command ------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_page_is_small_and_takes_less_than_a_minute(tmp_path, monkeypatch, capsys):
    """The whole: 25 steps of the bundled model with all gradients. Processor time, as others may
    use the machine, too."""
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    assert main(["a big red star left of a small blue circle on a yellow background"]) == 0
    assert time.process_time() - start < 60
    assert capsys.readouterr().out == "xray.html\n"
    text = (tmp_path / "xray.html").read_text(encoding="utf-8")
    facts = facts_of(text)
    assert len(text.encode()) <= LARGEST and len(facts["steps"]) == 25
    assert facts["left_out"] == [] and "averaged" not in " ".join(facts["merged"])


def test_the_command_writes_a_page(tmp_path, capsys):
    path = tmp_path / "inside.html"
    assert main(["a big red star on a blue background", "--steps", "2", "--no-gradients",
                 "--output", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n" and [*tmp_path.iterdir()] == [path]
    assert facts_of(path.read_text(encoding="utf-8"))["steps"] == [1, 2]


@pytest.mark.parametrize("arguments, message", [
    (["a", "--output", "a.png"], "--output must name an .html file"),
    (["a", "--output", "nowhere/a.html"], "cannot write nowhere/a.html"),
    (["a", "--steps", "0"], "number of steps"),
    (["a", "--sead", "3"], "did you mean --seed?"),
    (["a", "--sampler", "best"], "sampler"),
    (["a", "--weights", "nowhere"], "nowhere"),
    ([], "PROMPT"),
])
def test_errors_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().split("\r")[-1].splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]
    assert [*tmp_path.iterdir()] == []
