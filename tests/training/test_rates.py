"""Learning rates: the public schedules against diffusers', and the toy world's own."""
import pytest
import torch

from tests.support.extra import diffusers
from tinyldm.errors import TinyldmError
from tinyldm.training import rates

PEAK, WARMUP, TOTAL = 0.3, 3, 10
OPTIONS = {"cosine_with_restarts": [({"cycles": 2}, {"num_cycles": 2}), ({}, {})],
           "polynomial": [({"power": 2.0}, {"power": 2.0}), ({}, {})],
           "piecewise_constant": [({"rules": rates.parse_rules("1:10,0.1:20,0.01")},
                                   {"step_rules": "1:10,0.1:20,0.01"})]}


@pytest.mark.parametrize("name, ours, theirs", [
    (name, ours, theirs) for name in rates.SCHEDULES
    for ours, theirs in OPTIONS.get(name, [({}, {})])])
@pytest.mark.parametrize("warmup, total", [(3, 10), (0, 10), (0, 1), (5, 50), (10, 50)])
def test_a_schedule_is_that_of_diffusers(name, ours, theirs, warmup, total):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    reference = diffusers.optimization.get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total, **theirs)
    for step in range(total + 25):
        found = rates.SCHEDULES[name](step, PEAK, warmup, total, **ours)
        assert found == pytest.approx(reference.get_last_lr()[0], rel=1e-12, abs=1e-16), step
        optimizer.step()
        reference.step()


def test_the_published_table():
    """Warm-up 3 of 10 steps: what the public scripts do, to five digits."""
    def table(schedule, **options):
        return [round(schedule(step, 1.0, 3, 10, **options), 5) for step in range(11)]
    assert table(rates.cosine) == [0, .33333, .66667, 1, .95048, .81174, .61126, .38874, .18826,
                                   .04952, 0]
    assert table(rates.cosine_with_restarts, cycles=2) == [
        0, .33333, .66667, 1, .81174, .38874, .04952, .95048, .61126, .18826, 0]


@pytest.mark.parametrize("schedule", [*rates.SCHEDULES.values(), rates.half_cosine])
def test_a_rate_of_0_stays_0(schedule):
    """Except where a last rate is asked for."""
    assert schedule(0, 0.0, 0, 10) == 0


@pytest.mark.parametrize("text", ["", "x", "1:10", "1:10,0.1:5,0.01", "1:0,1", "-1:10,1", "nan",
                                  "1:2:3,1", "1,2"])
def test_rules_that_are_none(text):
    with pytest.raises(TinyldmError, match="such as 1:10,0.1:20,0.01, not"):
        rates.parse_rules(text)


def test_half_cosine():
    values = [rates.half_cosine(step, 2.0, 10, 110) for step in range(130)]
    assert values[0] == pytest.approx(0.2) and values[9] == values[10] == pytest.approx(2.0)
    assert values[60] == pytest.approx(2.0 * (0.05 + 0.95 / 2))
    assert values[110] == values[129] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(values[10:], values[11:]))
    again = [rates.half_cosine(step, 2.0, 10, 110, begun=50) for step in range(50, 70)]
    assert again[0] == pytest.approx(values[50] / 10) and again[9:] == values[59:70]
