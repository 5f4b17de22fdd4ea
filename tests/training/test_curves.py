"""The reference curves: the first steps of every stage give the committed losses again."""
import json

import pytest

from tests import curves
from tests.support.tolerance import within

KEPT = json.loads(curves.FILE.read_text())


@pytest.mark.parametrize("name", curves.REFERENCE)
def test_the_first_steps(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "unet":
        curves.reference("vae", curves.SHORT)           # whose latents it learns
    found = curves.reference(name, curves.SHORT)
    assert max(found) == curves.SHORT
    for step, loss in found.items():
        if step in curves.GIVEN:
            within(abs(loss / KEPT[name][str(step)] - 1), curves.TOLERANCE, f"step {step}")


def test_the_lessons_are_what_the_page_says():
    """docs/training-curves.md tells these four apart by the loss, as a share of the expected one,
    and by the validation at the end, as a share of the first one."""
    def shares(name):
        lines = KEPT[name]
        steps = [line for line in lines if "loss" in line]
        begins, ends = (sum(line["loss"] for line in part) / sum(line["expected"] for line in part)
                        for part in (steps[:20], steps[-20:]))
        looks = [line["validation"] for line in lines if "validation" in line]
        first, end = (sum(look.values()) for look in (looks[0], looks[-1]))
        return begins, ends, end / first
    assert [*KEPT] == [*curves.REFERENCE, *curves.LESSONS]
    ((first, good, fell), (_, high, rose), (low_first, low, _), (other_first, other, _)) = map(
        shares, curves.LESSONS)
    assert good < 0.9 and fell < 0.85
    assert high > 1 and rose > 1
    assert low < good / 2 and low_first < first / 2
    assert other_first > 2 * first and other < good         # only the beginning tells
