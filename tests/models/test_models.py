"""Every model against diffusers and transformers on random weights: outputs and all gradients."""
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as ReferenceVAE
from diffusers import UNet2DConditionModel as ReferenceUNet
from transformers import CLIPTextConfig
from transformers import CLIPTextModel as ReferenceCLIP
from transformers import CLIPTextModelWithProjection as ReferenceCLIPWithProjection

from tests.support.reference import (
    assert_close,
    assert_same_gradients,
    copy_weights,
    nchw,
    nhwc,
    randomise,
    reference_names,
)
from tests.support.tolerance import within
from tinyldm import backend
from tinyldm.errors import TinyldmError
from tinyldm.layers import Tape
from tinyldm.models import (
    AutoencoderKL,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    UNet2DConditionModel,
)
from tinyldm.models.blocks import ResnetBlock2D

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
CONDITIONED = {             # UNets with further conditions: {name: width}
    "as LCM": (dict(SMALL, block_out_channels=[8, 16], layers_per_block=1,
                    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
                    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
                    attention_head_dim=2, cross_attention_dim=12, time_cond_proj_dim=10),
               {"timestep_cond": 10}),
    "as SDXL": (dict(SMALL, block_out_channels=[8, 16, 16], layers_per_block=1,
                     down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
                     up_block_types=["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
                     attention_head_dim=[2, 2, 4], cross_attention_dim=12,
                     transformer_layers_per_block=[1, 1, 3], use_linear_projection=True,
                     addition_embed_type="text_time", addition_time_embed_dim=6,
                     projection_class_embeddings_input_dim=41),
                {"text_embeds": 5, "time_ids": 6}),
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


class Sinusoidal64(torch.nn.Module):
    """The sinusoidal embedding in float64; diffusers computes it in float32 for every model."""

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
        for name in ("time_proj", "add_time_proj"):
            if theirs := getattr(reference, name, None):
                setattr(reference, name, Sinusoidal64(theirs.num_channels, theirs.flip_sin_to_cos,
                                                      theirs.downscale_freq_shift))
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
    assert not tape.entries
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


def conditioned_unet(name, dtype):
    """-> unet_pair's, and the further conditions: ours {name: array}, theirs as leaf tensors."""
    config, widths = CONDITIONED[name]
    pair = unet_pair(config, dtype, (8, 6))
    rng, kind = np.random.default_rng(3), pair[2].dtype
    more = {what: readonly(rng.standard_normal((2, width)).astype(kind))
            for what, width in widths.items()}
    if "time_ids" in more:
        more["time_ids"] = readonly(np.array([[64, 48, 0, 0, 64, 48], [32, 32, 4, 8, 16, 16]]))
    tensors = {what: torch.from_numpy(x.copy()) for what, x in more.items()}
    return pair, more, tensors


def call_conditioned(reference, latents, timesteps, context, tensors):
    added = {what: tensor for what, tensor in tensors.items() if what != "timestep_cond"}
    return reference(latents, torch.from_numpy(timesteps.copy()), context, added_cond_kwargs=added,
                     timestep_cond=tensors.get("timestep_cond")).sample


@pytest.mark.parametrize("name", CONDITIONED)
def test_conditioned_unet_gradients(name):
    pair, more, tensors = conditioned_unet(name, torch.float64)
    reference, module, latents, timesteps, context = pair
    x, c = nchw(latents).requires_grad_(), torch.from_numpy(context.copy()).requires_grad_()
    for tensor in tensors.values():
        if tensor.is_floating_point():                  # time_ids are integers
            tensor.requires_grad_()
    theirs = call_conditioned(reference, x, timesteps, c, tensors)
    tape = Tape()
    ours = module.forward(latents, timesteps, context, tape, **more)
    assert_close(ours, nhwc(theirs), 1e-8, "output")

    dy = readonly(np.random.default_rng(2).standard_normal(ours.shape))
    theirs.backward(nchw(dy))
    gradients = module.backward(dy, tape)
    assert not tape.entries
    assert_same_gradients(reference, module)
    dlatents, dcontext = gradients                      # whatever the config
    assert_close(dlatents, nhwc(x.grad), 1e-6, "dlatents")
    assert_close(dcontext, c.grad.numpy(), 1e-6, "dcontext")
    for what in ("timestep_cond", "text_embeds"):
        if what in tensors:
            assert_close(getattr(gradients, what), tensors[what].grad.numpy(), 1e-6, what)
        else:
            assert getattr(gradients, what) is None


@pytest.mark.parametrize("name", CONDITIONED)
def test_conditioned_unet_float32(name):
    pair, more, tensors = conditioned_unet(name, torch.float32)
    reference, module, latents, timesteps, context = pair
    with torch.no_grad():
        theirs = nhwc(call_conditioned(reference, nchw(latents), timesteps,
                                       torch.from_numpy(context.copy()), tensors))
    assert_close(module(latents, timesteps, context, **more), theirs, 1e-3, "fast")
    with backend.plain():
        assert_close(module(latents, timesteps, context, **more), theirs, 1e-4, "plain")


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
    assert not tape.entries
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
    assert not tape.entries
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


def projection_pair(end, dtype, **options):
    """-> reference, module, ids (2,77), each with an end token and another one after it."""
    config = dict(CLIPS["as SD 2"], projection_dim=7, eos_token_id=end, **options)
    reference = ReferenceCLIPWithProjection(CLIPTextConfig(**config)).to(dtype)
    module = copy_weights(randomise(reference).eval(), CLIPTextModelWithProjection(config))
    ids = np.random.default_rng(1).integers(3, 97, (2, 77))
    ids[[0, 1], [9, 30]] = ids[:, 76] = 98
    return reference, module, readonly(ids)


@pytest.mark.parametrize("end", [98, 2])
def test_clip_with_projection(end):
    reference, module, ids = projection_pair(end, torch.float64)
    theirs = reference(torch.from_numpy(ids.copy()), output_hidden_states=True)
    tape = Tape()
    ours = module.forward(ids, tape)
    expected = theirs.hidden_states[-2], theirs.text_embeds
    rng = np.random.default_rng(2)
    dys = [readonly(rng.standard_normal(y.shape)) for y in ours]
    for name, y, same in zip(("context", "text_embeds"), ours, expected):
        assert_close(y, same.detach().numpy(), 1e-8, name)
    torch.autograd.backward(expected, [torch.from_numpy(dy.copy()) for dy in dys])
    module.backward(*dys, tape)
    assert not tape.entries
    assert_same_gradients(reference, module)


@pytest.mark.parametrize("end", [98, 2])
def test_a_learned_word_and_the_pooled_token(end):
    """With eos_token_id 2 the largest id is pooled, a learned word's, here as in transformers."""
    reference, module, ids = projection_pair(end, torch.float64, vocab_size=101)
    ids = ids.copy()
    ids[:, 5] = 100                                     # added by textual inversion
    theirs = reference(torch.from_numpy(ids)).text_embeds.detach().numpy()
    assert_close(module(ids)[1], theirs, 1e-8)
    later = ids.copy()
    later[:, 7] = 3                                     # seen by the end token, not by the word
    assert np.array_equal(module(later)[1], module(ids)[1]) == (end == 2)


def test_clip_without_the_last_layer():
    """SDXL's first encoder. The last layer gets no gradient."""
    reference, module = clip_pair(CLIPS["as SD 1"], torch.float64)
    ids = readonly(np.random.default_rng(1).integers(0, 97, (2, 77)))
    theirs = reference(torch.from_numpy(ids.copy()), output_hidden_states=True).hidden_states[-2]
    tape = Tape()
    ours = module.forward(ids, tape, skip=1)
    assert_close(ours, theirs.detach().numpy(), 1e-8)
    dy = readonly(np.random.default_rng(2).standard_normal(ours.shape))
    theirs.backward(torch.from_numpy(dy.copy()))
    module.backward(dy, tape)
    assert not tape.entries
    expected = {name: same.grad for name, same in reference_names(reference)}
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None), name
        if parameter.grad is not None:
            error = abs(parameter.grad - expected[name].numpy()).max()
            within(error, 1e-6 * abs(expected[name].numpy()).max() + 1e-12, name)


@pytest.mark.parametrize("end", [98, 2])
def test_clip_with_projection_float32(end):
    reference, module, ids = projection_pair(end, torch.float32)
    with torch.no_grad():
        theirs = reference(torch.from_numpy(ids.copy()), output_hidden_states=True)
    for y, same in zip(module(ids), (theirs.hidden_states[-2], theirs.text_embeds)):
        assert_close(y, same.numpy(), 1e-3)


@pytest.mark.parametrize("change, named", [
    ({"act_fn": "mish"}, "mish"),
    ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "AttnDownBlock2D"),
    ({"class_embed_type": "timestep"}, "class_embed_type"),
    ({"addition_embed_type": "image"}, "image"),
    ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "mirror"),
    ({"block_out_channels": [8]}, "entries"),
])
def test_unet_refuses_what_it_does_not_build(change, named):
    with pytest.raises(TinyldmError, match=named):
        UNet2DConditionModel(dict(UNETS["attention at the bottom"], **change))


@pytest.mark.parametrize("model, config, key", [
    (UNet2DConditionModel, UNETS["as SD 1"], "cross_attention_dim"),
    (AutoencoderKL, VAES["one level"], "latent_channels"),
    (CLIPTextModel, CLIPS["as SD 1"], "hidden_size"),
    (CLIPTextModelWithProjection, CLIPS["as SD 1"], "projection_dim"),
], ids=lambda value: getattr(value, "__name__", None))
def test_a_missing_key_is_named(model, config, key):
    config = {name: value for name, value in config.items() if name != key}
    with pytest.raises(TinyldmError, match=f"lacks {key}: get"):
        model(config)


def test_text_time_needs_its_two_sizes():
    config = dict(CONDITIONED["as SDXL"][0], addition_time_embed_dim=None)
    with pytest.raises(TinyldmError, match=r"which are \(None, 41\)"):
        UNet2DConditionModel(config)


def test_a_residual_block_takes_a_time_embedding_if_it_was_built_for_one():
    x, temb = np.ones((1, 4, 4, 4)), np.ones((1, 6))
    for channels, wrong in ((6, None), (None, temb)):
        block = ResnetBlock2D(4, 4, 2, 1e-5, channels)
        for parameter in block.parameters():
            parameter.data = np.ones(parameter.shape)
        tape = Tape()
        y = block(x, tape, temb=None if channels is None else temb)
        dx, dtemb = block.backward(y, tape)
        assert not tape.entries and (dtemb is None) == (channels is None)
        with pytest.raises(AssertionError, match="temb"):
            block(x, temb=wrong)


def test_float16_keeps_its_digits():
    """float16 weights and maps; norms, softmax and sinusoidal embedding in float32, as on a GPU."""
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
