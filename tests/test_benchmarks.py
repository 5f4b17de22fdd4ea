"""The benchmarks time the same work on both sides, and the docs quote what they measured."""
import json
import re
import statistics

import pytest

from tests.benchmarks import figures, training

PAGE = figures.ROOT / "docs" / "performance.md"
A_FIGURE = re.compile(r"\d ?(?:ms|s|seconds|MB|GB|GFLOP/s|%|×|times)(?!\w)")


def test_both_training_steps_train_alike():
    batch = training.make_batch(6)
    training.assert_same_work(*training.our_step(batch), *training.their_step(batch))


def test_another_training_step_is_seen():
    batch = training.make_batch(2)
    other = (*batch[:3], 1.01 * batch[3])
    with pytest.raises(AssertionError, match="losses"):
        training.assert_same_work(*training.our_step(batch), *training.their_step(other))


# ---- the figures in the docs ------------------------------------------------------------------

@pytest.mark.parametrize("page", figures.pages(), ids=lambda page: page.name)
def test_quoted_figures_are_the_measured_ones(page):
    text = page.read_text("utf-8")
    assert figures.fill(text, figures.read()) == text, "run: python -m tests.benchmarks --tables"
    for line in text.splitlines():
        assert not line.startswith(("<!-- ours", "<!-- reference", "<!-- ratio")), (
            f"Markdown would take this line of {page.name} for HTML: {line}")


def test_everything_was_measured():
    assert {path.name for path in figures.MEASURED.iterdir()} == {
        *(f"{name}.json" for name in figures.AIMS), *figures.MACHINES}


@pytest.mark.parametrize("path", sorted(path for path in figures.MEASURED.rglob("*")
                                        if path.is_file()), ids=lambda path: path.name)
def test_committed_measurements(path):
    assert path.stem in figures.AIMS and path.suffix == ".json"
    content = json.loads(path.read_text("utf-8"))
    if path.stem == "where":
        assert content["calls"] >= 5 and all("by op" in text for text in content["tables"].values())
        return
    for row in content["figures"]:
        medians = [statistics.median(samples) for samples in row["samples"].values()]
        assert row["ratio"] == medians[0] / medians[1]
        once = path.stem == "steps" and row["unit"] == "GB"             # the peak of all rounds
        assert once or min(map(len, row["samples"].values())) >= 5, f"{row['what']}: too few rounds"


def test_performance_states_no_figure_of_its_own():
    prose = re.sub(r"^```.*?^```$", "", PAGE.read_text("utf-8"), flags=re.M | re.S)
    assert not A_FIGURE.findall(figures.QUOTE.sub("", prose))


@pytest.fixture
def measured(tmp_path):
    row = {"what": "2 x 8x8 latents", "unit": "s", "ratio": 0.75,
           "samples": {"tinyldm": [0.6, 9.0, 0.6], "diffusers": [0.8, 0.8, 7.0]}}
    content = {"title": "UNet", "reference": "diffusers", "figures": [row],
               "about": dict.fromkeys(figures.ABOUT, "one")}
    (tmp_path / "unet.json").write_text(json.dumps(content), "utf-8")
    return figures.read(tmp_path)


def test_quotes_are_filled_in(measured):
    quotes = ("a <!-- ratio: unet, 2 x 8x8 latents -->1.00<!-- end --> "
              "b <!-- ours: unet, 2 x 8x8 latents --><!-- end --> "
              "c <!-- ratio: vae, decoder -->5<!-- end -->")
    filled = figures.fill(quotes, measured)
    assert re.sub("<.*?>", "", filled) == "a 0.75 b 600 ms c 5"      # the VAE was not measured
    assert figures.fill(filled, measured) == filled
    table = figures.fill("<!-- table: vae unet -->\n\nold\n\n<!-- end -->", measured)
    assert "| UNet: 2 x 8x8 latents | 600 ms | 800 ms, diffusers | 0.75 | 0.9 |\n" in table
    assert "machine one" in table and "old" not in table


def test_a_table_by_op_is_filled_in(tmp_path):
    content = {"tables": {"one prompt": "by op\nlinear"}, "about": dict.fromkeys(figures.ABOUT, 1)}
    (tmp_path / "where.json").write_text(json.dumps(content), "utf-8")
    filled = figures.fill("<!-- where: one prompt -->old<!-- end -->", figures.read(tmp_path))
    assert filled == "<!-- where: one prompt -->\n\n```text\nby op\nlinear\n```\n\n<!-- end -->"


@pytest.mark.parametrize("quote", ["table: unet vea", "ratio: unte, 8x8", "ratio: unet, 8x8"])
def test_a_quote_of_nothing_is_an_error(measured, quote):
    with pytest.raises(ValueError, match="unet"):
        figures.fill(f"a <!-- {quote} -->1<!-- end -->", measured)


@pytest.mark.parametrize("value, unit, shown", [
    (1.2345, "s", "1.23 s"), (12.345, "s", "12.3 s"), (123.45, "s", "123 s"),
    (0.0123, "s", "12.3 ms"), (0.00123, "s", "1.23 ms"), (0.0968, "GB", "96.8 MB")])
def test_amounts(value, unit, shown):
    assert figures.amount(value, unit) == shown
