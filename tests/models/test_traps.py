"""Mistakes that other implementations of Stable Diffusion made at least once, one section for each.

Two more are tested where files are read: the VAE's old attention names and the text encoder's
position_ids, in checkpoints/test_folders.py. All schedules against diffusers: test_samplers.py.
"""
import diffusers
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig
from transformers import CLIPTextModel as ReferenceCLIP

from tests.support.sd15 import TEXT_ENCODER, UNET, VAE
from tests.support.tolerance import assert_allclose
from tinyldm import ops
from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.diffusion.schedule import Schedule
from tinyldm.layers import Conv2d, GroupNorm, GroupNormSiLU, LayerNorm, named_modules
from tinyldm.models import AutoencoderKL, CLIPTextModel, UNet2DConditionModel, unet
from tinyldm.models.blocks import Attention, Downsample2D, ResnetBlock2D

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
             "num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1,
             "skip_prk_steps": True, "clip_sample": False}


def of_kind(module, kind):
    return {name: part for name, part in named_modules(module) if isinstance(part, kind)}


def epsilons(module):
    return {name: norm.options[-1]
            for name, norm in of_kind(module, (GroupNorm, GroupNormSiLU, LayerNorm)).items()}


# ---- 1: three epsilons ----------------------------------------------------------------------

@pytest.mark.parametrize("ours, reference, config", [
    (UNet2DConditionModel, diffusers.UNet2DConditionModel, UNET),
    (AutoencoderKL, diffusers.AutoencoderKL, VAE),
    (CLIPTextModel, lambda **config: ReferenceCLIP(CLIPTextConfig(**config)), TEXT_ENCODER),
], ids=["unet", "vae", "clip"])
def test_every_norm_has_the_reference_s_epsilon(ours, reference, config):
    with torch.device("meta"):                          # Stable Diffusion 1.5's sizes, no memory
        theirs = reference(**config)
    expected = {name: part.eps for name, part in theirs.named_modules()
                if isinstance(part, (torch.nn.GroupNorm, torch.nn.LayerNorm))}
    prefix = "text_model."                              # transformers dropped it, files kept it
    found = {name.removeprefix(prefix): eps for name, eps in epsilons(ours(config)).items()}
    assert found == {name.removeprefix(prefix): eps for name, eps in expected.items()}


def test_unet_epsilons():
    found = epsilons(UNet2DConditionModel(UNET))
    transformers = {name: eps for name, eps in found.items() if name.endswith("attentions.0.norm")}
    resnets = {name: eps for name, eps in found.items() if "resnets" in name}
    assert len(transformers) == 7 and set(transformers.values()) == {1e-6}
    assert len(resnets) == 44 and set(resnets.values()) == {1e-5}
    assert found["conv_norm_out"] == 1e-5


def test_vae_epsilons():
    assert set(epsilons(AutoencoderKL(VAE)).values()) == {1e-6}


# ---- 2: the VAE's encoder halves a map padded right and bottom only ---------------------------

def test_the_vae_encoder_pads_right_and_bottom_only():
    vae, net = AutoencoderKL(VAE), UNet2DConditionModel(UNET)
    of_vae = of_kind(vae, Downsample2D)
    assert len(of_vae) == 3 and all(down.conv.padding == (0, 1) for down in of_vae.values())
    assert all(down.conv.padding == (1, 1) for down in of_kind(net, Downsample2D).values())

    picture = np.arange(1.0, 37.0).reshape(1, 6, 6, 1)
    seen = {}                                           # what a corner of the kernel sees
    for padding in ((0, 1), (1, 1)):
        for corner in (0, 2):
            conv = Conv2d(1, 1, 3, stride=2, padding=padding)
            conv.weight.data, conv.bias.data = np.zeros((3, 3, 1, 1)), np.zeros(1)
            conv.weight.data[corner, corner] = 1
            seen[padding, corner] = conv(picture)[0, :, :, 0]
    np.testing.assert_array_equal(seen[(0, 1), 0], picture[0, ::2, ::2, 0])
    np.testing.assert_array_equal(seen[(0, 1), 2][:2, :2], picture[0, 2::2, 2::2, 0])
    assert not seen[(0, 1), 2][2].any() and not seen[(0, 1), 2][:, 2].any()      # right and bottom
    assert not seen[(1, 1), 0][0].any() and not seen[(1, 1), 0][:, 0].any()      # top and left


# ---- 3: the timestep embedding --------------------------------------------------------------

def test_timestep_embedding_is_cos_then_sin_over_half():
    embedding, _ = ops.timestep_embedding(np.array([0.0, 1.0]), 320)
    np.testing.assert_array_equal(embedding[0], [1] * 160 + [0] * 160)
    frequencies = 10000.0 ** (-np.arange(160) / 160)    # over 160, not 159: 1/10000 is not reached
    assert_allclose(embedding[1, :160], np.cos(frequencies), rtol=1e-12)
    assert_allclose(embedding[1, 160:], np.sin(frequencies), rtol=1e-12)


@pytest.mark.parametrize("config", [UNET, {key: value for key, value in UNET.items()
                                           if key not in ("flip_sin_to_cos", "freq_shift")}],
                         ids=["named", "left out"])
def test_the_unet_asks_for_cos_then_sin(config, monkeypatch):
    class Seen(Exception):
        """Carries the sinusoidal embedding out of the forward pass."""

    def stop(self, x, tape, *, condition):
        raise Seen(x)
    monkeypatch.setattr(unet.TimestepEmbedding, "forward", stop)
    with pytest.raises(Seen) as seen:
        UNet2DConditionModel(config)(np.zeros((1, 8, 8, 4)), np.array([981]), None)
    expected, _ = ops.timestep_embedding(np.array([981.0]), 320, flip_sin_to_cos=True, freq_shift=0)
    np.testing.assert_array_equal(seen.value.args[0], expected)


# ---- 4: the first and the last step -----------------------------------------------------------

@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_steps_offset_and_the_final_alpha(name):
    """50 steps are 981 ... 1, not 980 ... 0, and the last ends at alpha_bar[0], not at 1."""
    schedule = Schedule.from_config(SCHEDULER)
    start = np.ones((1, 2, 2, 4), np.float32)
    states = list(SAMPLERS[name](lambda x, t: 0 * x, start, schedule, 50, lambda: 0 * start))
    assert states[0].timestep == 981 and states[-1].timestep == 1
    # Without noise x_t = sqrt(alpha_bar_t) x_start: alpha_bar goes from that of 981 to that of 0.
    kept = np.sqrt(schedule.alphas_cumprod[0] / schedule.alphas_cumprod[981])
    assert_allclose(states[-1].latents, kept * start, rtol=1e-5)
    assert schedule.alphas_cumprod[0] < 0.9992


# ---- 5: heads ---------------------------------------------------------------------------------

def heads(config):
    """{block: head counts} of every attention layer."""
    found = {}
    for name, part in of_kind(UNet2DConditionModel(config), Attention).items():
        block = name.split(".attentions")[0]
        found.setdefault(block, set()).add(part.num_heads)
    return found


def test_attention_head_dim_is_the_number_of_heads():
    assert UNET["attention_head_dim"] == 8
    assert set.union(*heads(UNET).values()) == {8}


def test_attention_head_dim_may_be_a_list_of_head_counts():
    assert heads(dict(UNET, attention_head_dim=[5, 10, 20, 20])) == {
        "down_blocks.0": {5}, "down_blocks.1": {10}, "down_blocks.2": {20}, "mid_block": {20},
        "up_blocks.1": {20}, "up_blocks.2": {10}, "up_blocks.3": {5}}


def test_residual_blocks_of_the_unet_have_a_time_embedding_and_those_of_the_vae_have_none():
    with_time = [part.time_emb_proj is not None
                 for model in (UNet2DConditionModel(UNET), AutoencoderKL(VAE))
                 for part in of_kind(model, ResnetBlock2D).values()]
    assert with_time == [True] * 22 + [False] * 24
