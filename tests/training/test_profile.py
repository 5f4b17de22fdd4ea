"""--profile of a training: its tables add up, the tape's bytes are the tape's, nothing changes."""
import numpy as np
import pytest

from tests.support.tolerance import assert_allclose
from tinyldm.layers import Activation, Linear, Module, Tape
from tinyldm.training.profile import Profiled


class Net(Module):
    def __init__(self):
        self.first, self.silu, self.second = Linear(30, 40), Activation("silu"), Linear(40, 2)
        rng = np.random.default_rng(0)
        for parameter in self.parameters():
            parameter.data = rng.standard_normal(parameter.shape).astype(np.float32)

    def forward(self, x, tape):
        return self.second(self.silu(self.first(x, tape), tape), tape)

    def backward(self, dy, tape):
        return self.first.backward(self.silu.backward(self.second.backward(dy, tape), tape), tape)


@pytest.mark.parametrize("frozen", [False, True])
def test_an_update_and_its_tape(frozen, capsys):
    net, x = Net(), np.ones((50, 30), np.float32)
    for parameter in net.second.parameters():
        parameter.trainable = not frozen
    tapes = []

    def update(shape):
        tapes.append(Tape())
        y = net(x, tapes[-1])
        return net.backward(np.ones(shape, np.float32), tapes[-1]), y
    measured = Profiled(update, {"net": net})
    expected, _ = update((50, 2))
    for _ in range(3):
        assert_allclose(measured((50, 2))[0], expected, 0, 0)
    text = capsys.readouterr().err
    assert text.count("on the tape at its peak") == 1   # after the second update
    assert sum(measured.kept.values()) == tapes[-1].peak
    # Linear keeps its input: 50x30 numbers, and 50x40 where the second one is trained; SiLU 50x40.
    assert measured.kept["linear"] == 4 * 50 * (30 + 40 * (not frozen))
    rows = measured.found[1].tables["by op"]
    forward = 2 * 50 * (30 * 40 + 40 * 2)
    assert rows["linear"].flop == forward and rows["linear"].calls == 2
    assert rows["linear backward"].flop == 2 * forward - frozen * 2 * 50 * 40 * 2
    stages = measured.found[1].tables["by stage"]
    assert {"net", "net backward"} <= {*stages}
    assert sum(row.seconds for row in rows.values()) == pytest.approx(measured.found[1].seconds)
