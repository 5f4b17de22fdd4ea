"""The stage `lora`: against torch, diffusers and peft; its file; what it refuses."""
import numpy as np
import pytest
import torch

from tests.support.fine_tuning import TorchSteps, stage_of
from tests.support.tolerance import assert_allclose, within
from tinyldm.training.stages.lora import named_matrices, put_into

RATE, RANK, CLIP = 1e-3, 3, 0.1


CASES = {
    "the UNet alone": ("toy", []),
    "the text encoder, too": ("toy", ["--train-text-encoder"]),
    "v prediction": ("sd2", ["--min-snr", "5"]),
    "Stable Diffusion XL": ("sdxl", ["--train-text-encoder"]),
    "all layers, checkpoints": ("toy", ["--targets", "all", "--train-text-encoder", "--checkpoints",
                                        "--alpha", "1"]),
    "prior preservation": ("toy", ["--min-snr", "2"]),
}


@pytest.mark.parametrize("case, dtype", [
    *((case, np.float64) for case in CASES), ("the UNet alone", np.float32),
    ("Stable Diffusion XL", np.float32)])
def test_twenty_steps_as_in_torch(case, dtype, places, tmp_path, monkeypatch):
    """Losses and weights, these in units of the learning rate: Adam makes a step of about that size
    of any gradient, also where it is nothing but rounding errors."""
    weights, pictures, others = places
    name, more = CASES[case]
    exact, prior = dtype == np.float64, case.startswith("prior")
    if prior:
        more = [*more, "--prior-data", others, "--prior-prompt", "a cat", "--prior-count", "3",
                "--prior-weight", "0.7"]
    stage, batches = stage_of(
        ["lora", "--weights", weights(name), "--data", pictures, "--output", tmp_path / "out",
         "--rank", RANK, "--steps", 20, "--batch", 3, "--learning-rate", RATE, "--clip", CLIP,
         *more], monkeypatch, dtype)
    if prior:
        stage.add_prior(others, "a cat", 3)
    layers = put_into(stage.pipe, stage.options)
    reference = TorchSteps(weights(name), torch.float64 if exact else torch.float32,
                           stage.options.min_snr)
    parameters = reference.add_lora(layers, RANK, stage.options.alpha or RANK)
    stage.train(named_matrices(layers), lambda: None, [])
    losses, norms = reference.train(parameters, batches, RATE, CLIP, 0.01)
    ours = np.array([loss for _, loss in stage.loop.history])
    assert len(ours) == len(losses) == 20 and len(batches[0]) == 1 + prior
    assert max(norms) > CLIP, "clipping must matter"
    rounded = 2e-7 * (stage.options.min_snr > 0)        # torch's weights of min-SNR are float32
    if exact:
        assert_allclose(ours[0], losses[0], rtol=max(1e-13, rounded))
    assert_allclose(ours, losses, rtol=max(1e-8, rounded) if exact else 1e-5)
    errors, moved = [], 0
    for lora in layers.values():
        for letter in "AB":
            own, theirs = getattr(lora, f"lora_{letter}").weight.data, reference.lora_array(
                lora, letter)
            assert own.dtype == dtype
            errors.append((own - theirs).ravel() / RATE)
            moved += letter == "B" and abs(theirs).max() > 0.1 * RATE
    assert moved == len(layers)
    errors = np.concatenate(errors)
    within((errors ** 2).mean() ** 0.5, 1e-5 if exact else 1e-2, "weights, rms")
