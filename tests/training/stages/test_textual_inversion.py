"""The stage `textual-inversion`: against torch, its file, what it refuses."""
import numpy as np
import pytest
import torch

from tests.support.fine_tuning import TorchSteps, stage_of
from tests.support.tolerance import assert_allclose, within
from tinyldm.training.stages.textual_inversion import TEMPLATES, Word

RATE = 5e-4


@pytest.mark.parametrize("name, dtype", [("toy", np.float64), ("toy", np.float32),
                                         ("sdxl", np.float64)])
def test_twenty_steps_as_in_torch(name, dtype, places, tmp_path, monkeypatch):
    """Also the weight decay, and that no other row moves: there torch puts them back."""
    weights, pictures, _ = places
    exact, count = dtype == np.float64, 2
    captions = [text.format("<s>") for text in TEMPLATES["object"]]
    stage, batches = stage_of(
        ["textual-inversion", "--weights", weights(name), "--data", pictures, "--output",
         tmp_path / "out", "--token", "<s>", "--initializer", "cat", "--vectors", count, "--steps",
         20, "--batch", 3, "--learning-rate", RATE], monkeypatch, dtype, captions)
    assert stage.options.clip == 0
    word = Word(stage.pipe, "<s>", "cat", count)
    tables = {part: layer.weight.data.copy() for part, layer in word.layers.items()}
    reference = TorchSteps(weights(name), torch.float64 if exact else torch.float32)
    parameters = reference.add_rows([*word.rows().values()])
    stage.train(word.named(), lambda: None, [])
    losses, _ = reference.train(parameters, batches, RATE, 0, 0.01)
    ours = np.array([loss for _, loss in stage.loop.history])
    assert len(ours) == len(losses) == 20
    if exact:
        assert_allclose(ours[0], losses[0], rtol=1e-13)
    assert_allclose(ours, losses, rtol=1e-8 if exact else 1e-5)
    for (part, rows), table in zip(word.rows().items(), parameters, strict=True):
        theirs = table.detach().numpy()[-count:]
        assert rows.dtype == dtype and rows.shape == theirs.shape
        assert abs(theirs - tables[part][stage.pipe.tokenizer.ids("cat")]).max() > RATE
        within((((rows - theirs) / RATE) ** 2).mean() ** 0.5, 1e-6 if exact else 1e-2, "rows, rms")
        np.testing.assert_array_equal(word.layers[part].weight.data, tables[part])
