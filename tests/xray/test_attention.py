"""Attention by word: the weights against diffusers, the maps against the record."""
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention as ReferenceAttention
from diffusers.models.attention_processor import AttnProcessor

import tinyldm
from tests.support.models import UNETS
from tests.support.pairs import unet_pair
from tests.support.pixel_models import write_model
from tests.support.reference import nchw
from tests.support.small_pipelines import upscaler_unet
from tests.support.tolerance import assert_close
from tinyldm.errors import TinyldmError
from tinyldm.layers import forward_hooks
from tinyldm.xray.attention import cross_attention_hooks, cross_attentions, host_map, mean_maps


@pytest.mark.parametrize("name", ["as SD 1", "as SD 2", "deep transformers"])
def test_weights_equal_those_of_diffusers(name, monkeypatch):
    reference, module, latents, timesteps, context = unet_pair(UNETS[name], torch.float64, (7, 9))
    layers = {layer: path for path, layer in reference.named_modules()
              if isinstance(layer, ReferenceAttention) and layer.is_cross_attention}
    theirs, scores = {}, ReferenceAttention.get_attention_scores

    def see(self, *arguments):
        weights = scores(self, *arguments)              # (B*h,N,M)
        if self in layers:
            theirs[layers[self]] = weights.unflatten(0, (len(latents), -1))[-1].numpy()
        return weights

    monkeypatch.setattr(ReferenceAttention, "get_attention_scores", see)
    reference.set_attn_processor(AttnProcessor())       # the one that stores its scores
    with torch.no_grad():
        reference(nchw(latents), torch.from_numpy(timesteps.copy()),
                  torch.from_numpy(context.copy()))
    ours = {}
    with forward_hooks(cross_attention_hooks(module, ours.__setitem__)):
        module(latents, timesteps, context)
    assert ours.keys() == theirs.keys() and len(ours) > 3
    for layer, weights in ours.items():
        np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-12)
        assert_close(weights, theirs[layer], 1e-8, layer)


def test_both_attentions_of_a_block_may_read_the_context():
    kind, config, _ = upscaler_unet((16, 16, 32), 24, "nyy")
    names = [*cross_attentions(kind(config))]
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn1" in names
    assert "down_blocks.2.attentions.0.transformer_blocks.0.attn1" not in names
    assert "down_blocks.2.attentions.0.transformer_blocks.0.attn2" in names


def test_a_map_has_the_shape_of_the_latents():
    weights = np.arange(2 * 15 * 3.).reshape(2, 15, 3)
    found = host_map(weights, 9, 5)                     # 9x5 halved, rounded up
    assert found.shape == (2, 5, 3, 3) and found.dtype == np.float32
    np.testing.assert_array_equal(found[1, 4, 2], weights[1, 14])
    with pytest.raises(AssertionError, match="no map"):
        host_map(weights, 8, 8)


def test_mean_maps_takes_the_size_nearest_to_eight():
    maps = {"fine": np.ones((2, 3, 16, 16, 5)), "first": np.zeros((2, 3, 8, 8, 5)),
            "second": np.full((2, 3, 8, 8, 5), 4.), "coarse": np.ones((2, 3, 4, 4, 5))}
    np.testing.assert_array_equal(mean_maps(maps), np.full((8, 8, 5), 2.))


def test_attention_maps_are_the_means_of_the_record(small):
    prompt = "a red cat, a red dog"                     # the toy vocabulary: red, cat and letters
    options = {"num_inference_steps": 3, "seed": 2}
    maps = tinyldm.attention_maps(small, prompt, **options)
    assert [*maps] == ["a", "red", "cat", ",", "a (2)", "red (2)", "dog"]
    record = tinyldm.xray(small, prompt, gradients=False, **options)
    means = mean_maps({name: array for name, array in record.arrays.items()
                       if name.startswith("attention/")})
    np.testing.assert_allclose(maps["cat"], means[..., 3], rtol=1e-5)
    assert len(record.words[-1].tokens) == 3            # d, o, g</w>
    np.testing.assert_allclose(maps["dog"], means[..., 7:10].sum(axis=-1), rtol=1e-5)
    assert not np.allclose(maps["red"], maps["red (2)"], rtol=1e-3)


def test_no_words_no_maps(tmp_path, small):
    pipe = tinyldm.load(write_model(tmp_path / "model", "plain"))
    with pytest.raises(TinyldmError, match="DDPM has no cross-attention here"):
        tinyldm.attention_maps(pipe, "", num_inference_steps=2)
    small.unet = lambda latents, timesteps, context: latents
    with pytest.raises(TinyldmError, match="no cross-attention here"):
        tinyldm.attention_maps(small, "a cat", num_inference_steps=2)
