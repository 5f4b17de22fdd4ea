"""Large weights that stay float16 in memory: the same numbers, and float32 gradients."""
import numpy as np
import pytest

import tinyldm
from tests.support.tolerance import assert_allclose, assert_same_pixels
from tinyldm import backend, load_model
from tinyldm.checkpoints import components, save_model
from tinyldm.errors import TinyldmError
from tinyldm.layers import Tape
from tinyldm.training.optim import AdamW


def test_large_float16_weights_stay_and_draw_the_same(monkeypatch):
    """The bundled model with all except its smallest matrices in float16 draws the same numbers."""
    wide = tinyldm.load(dtype="float32")
    monkeypatch.setattr(components, "LARGE", 2000)
    pipe = tinyldm.load()
    kept = {name for name, parameter in pipe.unet.named_parameters()
            if parameter.data.dtype == np.float16}
    assert len(kept) > 50 and all(name.endswith("weight") for name in kept)
    tables = [parameter.data for name, parameter in pipe.text_encoder.named_parameters()
              if "embedding" in name]
    assert [table.dtype for table in tables] == [np.float32] * 2
    options = dict(num_inference_steps=2, seed=3)
    assert_same_pixels(*(p("a red circle", **options)[0] for p in (pipe, wide)))
    with backend.plain():
        assert pipe.encode_prompt("a red circle").dtype == np.float32


def test_float16_weights_give_float32_gradients_and_are_not_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(components, "LARGE", 2000)
    pipe, wide = tinyldm.load(), tinyldm.load(dtype="float32")
    rng = np.random.default_rng(0)
    channels = pipe.unet.settings.in_channels
    latents, dy = rng.standard_normal((2, 1, 8, 8, channels), np.float32)
    context = rng.standard_normal((1, 7, 128), np.float32)
    gradients = []
    for unet in (pipe.unet, wide.unet):
        tape = Tape()
        unet(latents, np.array([500]), context, tape)
        unet.backward(1e-6 * dy, tape)
        gradients.append({name: p.grad for name, p in unet.named_parameters()})
    for name, ours in gradients[0].items():
        assert ours.dtype == np.float32
        assert_allclose(ours, gradients[1][name], rtol=1e-3,
                                   atol=1e-4 * abs(gradients[1][name]).max())
    with pytest.raises(TinyldmError, match="weight is float16, too narrow to train"):
        AdamW(pipe.unet.named_parameters())
    save_model(pipe.unet, tmp_path)
    assert (load_model(tmp_path).mid_block.resnets[0].conv1.weight.data
            == wide.unet.mid_block.resnets[0].conv1.weight.data).all()
