"""Every model against diffusers and transformers on random weights: outputs and all gradients."""
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as ReferenceVAE
from diffusers import UNet2DConditionModel as ReferenceUNet
from transformers import CLIPTextConfig
from transformers import CLIPTextModel as ReferenceCLIP

from tinyldm import backend
from tinyldm.errors import TinyldmError
from tinyldm.layers import Tape
from tinyldm.models import AutoencoderKL, CLIPTextModel, UNet2DConditionModel

from .reference import assert_close, assert_same_gradients, copy_weights, nchw, nhwc, randomise

DOWN3 = ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
UP3 = ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
SMALL = {"in_channels": 4, "out_channels": 4, "norm_num_groups": 4, "norm_eps": 1e-5}
UNETS = {
    "as SD 1": dict(SMALL, block_out_channels=[8, 16, 16], layers_per_block=2,
                    down_block_types=DOWN3, up_block_types=UP3,
                    attention_head_dim=2, cross_attention_dim=12),
    "as SD 2": dict(SMALL, block_out_channels=[8, 16, 24], layers_per_block=1,
                    down_block_types=DOWN3, up_block_types=UP3,
                    attention_head_dim=[1, 2, 3], cross_attention_dim=10,
                    use_linear_projection=True),
    "attention at the bottom": dict(SMALL, block_out_channels=[8, 12], layers_per_block=1,
                                    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
                                    up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
                                    attention_head_dim=4, cross_attention_dim=6),
    "deep transformers": dict(SMALL, block_out_channels=[8, 16], layers_per_block=1,
                              down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
                              up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
                              attention_head_dim=[2, 4], cross_attention_dim=6,
                              transformer_layers_per_block=[1, 2],
                              use_linear_projection=True, flip_sin_to_cos=False, freq_shift=1),
    "one level, nine channels": dict(SMALL, in_channels=9,
                                     block_out_channels=[8], layers_per_block=3,
                                     down_block_types=["CrossAttnDownBlock2D"],
                                     up_block_types=["CrossAttnUpBlock2D"],
                                     attention_head_dim=1, cross_attention_dim=5),
}
VAE = dict(in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=4)
VAES = {
    "four levels": dict(VAE, block_out_channels=[4, 8, 8, 16], layers_per_block=2),
    "two levels": dict(VAE, block_out_channels=[8, 12], layers_per_block=1),
    "one level": dict(VAE, block_out_channels=[8], layers_per_block=1),
}
CLIP = dict(vocab_size=99, max_position_embeddings=77,
            bos_token_id=97, eos_token_id=98, pad_token_id=1)
CLIPS = {
    "as SD 1": dict(CLIP, hidden_size=24, intermediate_size=48, num_hidden_layers=3,
                    num_attention_heads=4, hidden_act="quick_gelu"),
    "as SD 2": dict(CLIP, hidden_size=20, intermediate_size=32, num_hidden_layers=2,
                    num_attention_heads=5, hidden_act="gelu"),
}


def vae_config(config):
    levels = len(config["block_out_channels"])
    return dict(config, down_block_types=["DownEncoderBlock2D"] * levels,
                up_block_types=["UpDecoderBlock2D"] * levels)


def readonly(array):
    array.flags.writeable = False
    return array


class Waves64(torch.nn.Module):
    """The timestep's waves in float64; diffusers makes them in float32 whatever the model."""

    def __init__(self, dim, flip_sin_to_cos, downscale_freq_shift):
        super().__init__()
        self.dim, self.flip, self.shift = dim, flip_sin_to_cos, downscale_freq_shift

    def forward(self, timesteps):
        half = self.dim // 2
        frequencies = 10000.0 ** -(torch.arange(half).double() / (half - self.shift))
        angles = timesteps.double()[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, sin] if self.flip else [sin, cos], 1)


def unet_pair(config, dtype, size, batch=2, tokens=7):
    torch.manual_seed(0)
    reference = randomise(ReferenceUNet(**config).to(dtype)).eval()
    module = copy_weights(reference, UNet2DConditionModel(config))
    if dtype == torch.float64:
        waves = reference.time_proj
        reference.time_proj = Waves64(waves.num_channels, waves.flip_sin_to_cos,
                                      waves.downscale_freq_shift)
    rng = np.random.default_rng(1)
    kind = np.float64 if dtype == torch.float64 else np.float32
    latents = readonly(rng.standard_normal((batch, *size, config["in_channels"])).astype(kind))
    D = config["cross_attention_dim"]
    context = readonly(rng.standard_normal((batch, tokens, D)).astype(kind))
    timesteps = readonly(np.array([3, 981, 500][:batch]))
    return reference, module, latents, timesteps, context


@pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=str)
@pytest.mark.parametrize("name", UNETS)
def test_unet_gradients(name, size):
    reference, module, latents, timesteps, context = unet_pair(UNETS[name], torch.float64, size)
    x, c = nchw(latents).requires_grad_(), torch.from_numpy(context.copy()).requires_grad_()
    theirs = reference(x, torch.from_numpy(timesteps.copy()), c).sample
    tape = Tape()
    ours = module.forward(latents, timesteps, context, tape)
    assert_close(ours, nhwc(theirs), 1e-8, "output")

    dy = readonly(np.random.default_rng(2).standard_normal(ours.shape))
    theirs.backward(nchw(dy))
    dlatents, dcontext = module.backward(dy, tape)
    assert len(tape) == 0
    assert_same_gradients(reference, module)
    assert_close(dlatents, nhwc(x.grad), 1e-6, "dlatents")
    assert_close(dcontext, c.grad.numpy(), 1e-6, "dcontext")
    np.testing.assert_array_equal(ours, module.forward(latents, timesteps, context))


@pytest.mark.parametrize("name", UNETS)
def test_unet_float32(name):
    reference, module, latents, timesteps, context = unet_pair(UNETS[name], torch.float32, (12, 8))
    with torch.no_grad():
        theirs = nhwc(reference(nchw(latents), torch.from_numpy(timesteps.copy()),
                                torch.from_numpy(context.copy())).sample)
    assert_close(module(latents, timesteps, context), theirs, 1e-3, "fast")
    with backend.plain():
        assert_close(module(latents, timesteps, context), theirs, 1e-4, "plain")


def vae_pair(config, dtype):
    config = vae_config(config)
    reference = randomise(ReferenceVAE(**config).to(dtype)).eval()
    return reference, copy_weights(reference, AutoencoderKL(config))


@pytest.mark.parametrize("name", VAES)
def test_vae_gradients(name):
    reference, module = vae_pair(VAES[name], torch.float64)
    rng = np.random.default_rng(1)
    images = readonly(rng.standard_normal((2, 16, 24, 3)))
    x = nchw(images).requires_grad_()
    moments = reference.encode(x).latent_dist
    tape = Tape()
    mean, logvar = module.encode(images, tape)
    assert_close(mean, nhwc(moments.mean), 1e-8, "mean")
    assert_close(logvar, nhwc(moments.logvar), 1e-8, "logvar")

    eps = rng.standard_normal(mean.shape)       # through the sample and the decoder, and both back
    z = mean + np.exp(0.5 * logvar) * eps
    theirs = reference.decode(moments.mean + moments.std * nchw(eps)).sample
    ours = module.decode(z, tape)
    assert_close(ours, nhwc(theirs), 1e-8, "image")

    dy = readonly(rng.standard_normal(ours.shape))
    theirs.backward(nchw(dy))
    dz = module.decode_backward(dy, tape)
    dimages = module.encode_backward(dz, dz * eps * 0.5 * np.exp(0.5 * logvar), tape)
    assert len(tape) == 0
    assert_same_gradients(reference, module)
    assert_close(dimages, nhwc(x.grad), 1e-6, "dimages")
    np.testing.assert_array_equal(ours, module.decode(z))


def test_vae_float32():
    reference, module = vae_pair(VAES["four levels"], torch.float32)
    rng = np.random.default_rng(1)
    images = readonly(rng.standard_normal((1, 40, 48, 3)).astype(np.float32))
    z = readonly(rng.standard_normal((1, 5, 7, 4)).astype(np.float32))
    with torch.no_grad():
        mean = nhwc(reference.encode(nchw(images)).latent_dist.mean)
        decoded = nhwc(reference.decode(nchw(z)).sample)
    assert_close(module.encode(images)[0], mean, 1e-3, "encode, fast")
    assert_close(module.decode(z), decoded, 1e-3, "decode, fast")
    with backend.plain():
        assert_close(module.encode(images)[0], mean, 1e-4, "encode, plain")
        assert_close(module.decode(z), decoded, 1e-4, "decode, plain")


def clip_pair(config, dtype):
    reference = randomise(ReferenceCLIP(CLIPTextConfig(**config)).to(dtype)).eval()
    return reference, copy_weights(reference, CLIPTextModel(config))


@pytest.mark.parametrize("name", CLIPS)
def test_clip_gradients(name):
    reference, module = clip_pair(CLIPS[name], torch.float64)
    ids = readonly(np.random.default_rng(1).integers(0, 97, (2, 77)))
    theirs = reference(torch.from_numpy(ids.copy())).last_hidden_state
    tape = Tape()
    ours = module.forward(ids, tape)
    assert_close(ours, theirs.detach().numpy(), 1e-8, "context")
    dy = readonly(np.random.default_rng(2).standard_normal(ours.shape))
    theirs.backward(torch.from_numpy(dy.copy()))
    module.backward(dy, tape)
    assert len(tape) == 0
    assert_same_gradients(reference, module)
    np.testing.assert_array_equal(ours, module.forward(ids))


@pytest.mark.parametrize("name", CLIPS)
def test_clip_float32(name):
    reference, module = clip_pair(CLIPS[name], torch.float32)
    ids = np.random.default_rng(1).integers(0, 97, (2, 77))
    with torch.no_grad():
        theirs = reference(torch.from_numpy(ids)).last_hidden_state.numpy()
    assert_close(module(ids), theirs, 1e-3, "fast")
    with backend.plain():
        assert_close(module(ids), theirs, 1e-4, "plain")


@pytest.mark.parametrize("change, named", [
    ({"act_fn": "mish"}, "mish"),
    ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "AttnDownBlock2D"),
    ({"class_embed_type": "timestep"}, "class_embed_type"),
    ({"addition_embed_type": "text_time"}, "text_time"),
    ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "mirror"),
    ({"block_out_channels": [8]}, "entries"),
])
def test_unet_refuses_what_it_does_not_build(change, named):
    with pytest.raises(TinyldmError, match=named):
        UNet2DConditionModel(dict(UNETS["attention at the bottom"], **change))


def test_float16_keeps_its_digits():
    """float16 weights and maps: norms, softmax and the timestep's waves in float32, as on a GPU."""
    reference, module, latents, timesteps, context = unet_pair(
        UNETS["as SD 1"], torch.float32, (8, 8))
    with torch.no_grad():
        theirs = nhwc(reference(nchw(latents), torch.from_numpy(timesteps.copy()),
                                torch.from_numpy(context.copy())).sample)
    for parameter in module.parameters():
        parameter.data = parameter.data.astype(np.float16)
    ours = module(latents.astype(np.float16), timesteps, context.astype(np.float16))
    assert ours.dtype == np.float16
    assert_close(ours.astype(np.float32), theirs, 0.02, "float16")
