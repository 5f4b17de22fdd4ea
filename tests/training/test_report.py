"""What a training tells: its log, curve and samples, and that nothing of it ends the training."""
import json

import numpy as np
import pytest
from PIL import Image

from tests.support.training import SIZE
from tinyldm.layers import Parameter
from tinyldm.training import report
from tinyldm.training.loop import Trainer
from tinyldm.training.report import Report, read_log


def train(folder, steps, sample=None, validate=None, **options):
    parameter = Parameter(SIZE)
    parameter.data = np.zeros(SIZE)
    trainer = Trainer(folder / "state.npz", [("x", parameter)], steps, 0.1, save_every=3,
                      report=Report(folder, sample_every=2, validate_every=2), **options)

    def batch_loss(rng):
        difference = parameter.data - rng.standard_normal(SIZE)
        parameter.add_grad(difference)
        return {"loss": float((difference ** 2).sum()), "expected": float(SIZE)}
    trainer.train(batch_loss, sample=sample, validate=validate)
    return trainer


def picture():
    return [Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")]


def test_the_files_of_a_training(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    trainer = train(tmp_path, 5, picture, lambda: {"t 1": 0.5, "t 9": 0.25})
    lines = read_log(tmp_path)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert [(line["step"], line["loss"]) for line in steps] == trainer.history
    assert {"step", "loss", "expected", "gradient", "learning_rate", "seconds"} == set(steps[0])
    looks = [line for line in lines if "validation" in line]
    assert [line["step"] for line in looks] == [0, 2, 4, 5]
    assert Image.open(tmp_path / "loss.png").size == (1000, 400)
    assert len(list((tmp_path / "samples").iterdir())) == 2 * 4
    assert Image.open(tmp_path / "samples.png").size[1] > 4 * 256       # a row for each
    said = capsys.readouterr().err
    assert "of an uninformed answer's)" in said
    assert "step 2: validation loss 0.3750, 1.000 of the" in said


def test_a_log_goes_on_where_the_state_does(tmp_path):
    """Steps that a kill lost are made again: they stand in the log once."""
    train(tmp_path, 4)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "loss": 1e9}) + '\n{"step": 6, "lo')
    train(tmp_path, 7)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert max(line["loss"] for line in read_log(tmp_path)) < 1e9


def test_tensorboard_reads_its_file(tmp_path):
    """The same numbers as the log's; steps that a kill lost are forgotten."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read():
        found = reader.EventAccumulator(str(tmp_path)).Reload()
        return {tag: [(event.step, event.value) for event in found.Scalars(tag)]
                for tag in found.Tags()["scalars"]}
    train(tmp_path, 4, validate=lambda: {"t 1": 0.5, "t 9": 0.25})
    tags = ["expected", "gradient", "learning_rate", "loss", "validation/t 1", "validation/t 9"]
    assert sorted(read()) == tags
    lost = report._event_writer(tmp_path, 4)
    report._write_event(lost, 5, {"loss": 1e9})
    lost.close()
    assert read()["loss"][-1] == (5, pytest.approx(1e9))
    train(tmp_path, 7, validate=lambda: {"t 1": 0.5, "t 9": 0.25})
    found, log = read(), read_log(tmp_path)
    for name in ("loss", "gradient", "learning_rate"):
        assert found[name] == [(line["step"], pytest.approx(line[name], rel=1e-6))
                               for line in log if name in line]
    assert [step for step, _ in found["validation/t 9"]] == [0, 2, 4, 6, 7]


def test_what_goes_wrong_is_a_note(tmp_path):
    def broken():
        raise RuntimeError("out of memory")
    with pytest.warns(UserWarning, match="the samples could not be made .out of memory.; the trai"):
        assert train(tmp_path, 3, sample=broken).step == 3


@pytest.mark.parametrize("size, filled", [((8, 8), 256), ((130, 130), 256), ((100, 64), 256),
                                          ((300, 20), 256), ((256, 256), 256)])
def test_samples_fill_their_places_in_the_sheet(size, filled, tmp_path):
    """Small ones are enlarged by whole numbers, and shrunk where that is too much."""
    Image.new("RGB", size, "red").save(tmp_path / "0000001-0.png")
    sheet = np.asarray(report.sample_sheet(tmp_path, 1))
    width = (sheet[:256] == (255, 0, 0)).all(axis=-1).any(axis=0).sum()
    assert 0.75 * filled < width <= filled
