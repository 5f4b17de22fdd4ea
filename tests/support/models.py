"""Configs of small models of every kind, their weights and inputs, without torch."""
import numpy as np

from tests.support.arrays import normal, read_only
from tinyldm.layers import OUR_AXES, file_shape
from tinyldm.models import (
    AutoencoderKL,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DiTTransformer2DModel,
    PriorTransformer,
    UNet2DConditionModel,
    UNet2DModel,
)
from tinyldm.shapes import configs


def random_weights(module, seed, dtype=np.float32):
    """{name in the files: array}, normal numbers: biases and norms too, so that no zero hides.

    RandomState, because NumPy promises that its numbers stay the same.
    """
    rng, tensors = np.random.RandomState(seed), {}
    for name, parameter in module.named_parameters():
        noise = np.asarray(rng.standard_normal(file_shape(parameter)))
        if noise.ndim == 1:
            noise = 0.2 * noise + ("norm" in name and name.endswith("weight"))
        elif noise.ndim:
            noise *= noise[0].size ** -0.5
        tensors[name] = noise.astype(dtype)
    return tensors


def inception_weights(module, dtype=np.float64):
    """As random_weights, for ReLUs and for batch norms, whose variances must be positive."""
    rng, tensors = np.random.RandomState(0), {}
    for name, parameter in module.named_parameters():
        shape = file_shape(parameter)
        if name.endswith("running_var"):
            noise = rng.uniform(0.5, 2, shape)
        elif len(shape) == 1:
            noise = 0.2 * rng.standard_normal(shape) + name.endswith("bn.weight")
        else:
            noise = rng.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5
        tensors[name] = noise.astype(dtype)
    return tensors


def with_weights(module, tensors):
    for name, parameter in module.named_parameters():
        tensor = tensors[name]
        tensor = tensor.transpose(OUR_AXES) if tensor.ndim == 4 else tensor
        parameter.data = read_only(np.asarray(tensor, order="C"))
    return module


def fill(module):
    for parameter in module.parameters():
        parameter.data = 0.1 * normal(*parameter.shape)
    return module


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
DIT = dict(num_layers=2, in_channels=4, sample_size=8, num_embeds_ada_norm=10)
DITS = {
    "learned variance": dict(DIT, num_attention_heads=2, attention_head_dim=6, out_channels=8),
    "large patches": dict(DIT, num_attention_heads=3, attention_head_dim=4, patch_size=4,
                          attention_bias=False, norm_eps=1e-3, in_channels=3),
    "one layer": dict(DIT, num_attention_heads=1, attention_head_dim=8, patch_size=1,
                      sample_size=3, num_layers=1, out_channels=5),
}
PIXELS = {"block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1,
          "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
          "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "attention_head_dim": None}
UNETS_2D = {                # of UNet2DModel
    "as CIFAR-10's": dict(PIXELS, block_out_channels=[8, 16, 16], layers_per_block=2,
                          down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
                          up_block_types=["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
                          norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False,
                          freq_shift=1),
    "heads of 4": dict(PIXELS, attention_head_dim=4, center_input_sample=True, out_channels=6),
    "scale and shift, resampling resnets": dict(
        PIXELS, down_block_types=["AttnDownBlock2D"] * 2, up_block_types=["AttnUpBlock2D"] * 2,
        resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet",
        num_class_embeds=5, time_embedding_dim=12),
    "as ADM": dict(PIXELS, block_out_channels=[8, 12, 16], resnet_time_scale_shift="scale_shift",
                   down_block_types=["ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"],
                   up_block_types=["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
                   upsample_type="resnet", attn_norm_num_groups=2, attention_head_dim=4),
    "classes as timesteps": dict(PIXELS, class_embed_type="timestep", add_attention=False),
    "classes as vectors": dict(PIXELS, class_embed_type="identity", mid_block_type=None),
    "one level, nine channels": dict(PIXELS, block_out_channels=[8], in_channels=9,
                                     down_block_types=["AttnDownBlock2D"],
                                     up_block_types=["UpBlock2D"], layers_per_block=3),
}
# Published ones: google/ddpm-cifar10-32, google/ddpm-cat-256; and the tutorials' of 128 pixels.
CIFAR10 = {
    "sample_size": 32, "block_out_channels": [128, 256, 256, 256], "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None, "norm_eps": 1e-6, "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1}
CAT256 = CIFAR10 | {
    "sample_size": 256, "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4]}
TRACE = {"sample_size": 128, "block_out_channels": [128, 128, 256, 256, 512, 512],
         "down_block_types": ["DownBlock2D"] * 6, "up_block_types": ["UpBlock2D"] * 6}
PRIOR = dict(num_attention_heads=3, attention_head_dim=4, num_layers=2, embedding_dim=8,
             num_embeddings=7, additional_embeddings=4)
PRIORS = {
    "as karlo": PRIOR,
    "other widths": dict(PRIOR, embedding_proj_dim=5, clip_embed_dim=6, num_layers=1,
                         time_embed_dim=12),
    "one token of text": dict(PRIOR, num_embeddings=1, num_attention_heads=1, attention_head_dim=6),
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


VISIONS = {                 # of CLIP's vision transformer
    "as L/14": dict(hidden_size=24, intermediate_size=48, num_hidden_layers=3,
                    num_attention_heads=4, hidden_act="quick_gelu", image_size=12, patch_size=4),
    "as H/14": dict(hidden_size=20, intermediate_size=32, num_hidden_layers=2,
                    num_attention_heads=2, hidden_act="gelu", image_size=11, patch_size=3),
}
WHOLE_CLIPS = {             # of CLIPModel
    "as L/14": {"text_config": dict(CLIPS["as SD 1"], projection_dim=3), "projection_dim": 6,
                "vision_config": dict(VISIONS["as L/14"], projection_dim=4)},
    "as H/14, old": {"text_config": dict(CLIPS["as SD 2"], eos_token_id=2, projection_dim=7),
                     "vision_config": VISIONS["as H/14"], "projection_dim": 7},
}


def vae_config(config):
    levels = len(config["block_out_channels"])
    return dict(config, down_block_types=["DownEncoderBlock2D"] * levels,
                up_block_types=["UpDecoderBlock2D"] * levels)


SMALL_VAE = configs.VAE | {"block_out_channels": [8, 8, 8], "norm_num_groups": 4}
SMALL_UNET = configs.UNET | {"block_out_channels": [8, 8, 16], "norm_num_groups": 4,
                             "cross_attention_dim": 16}
SMALL_TEXT = configs.TEXT_ENCODER | {"hidden_size": 16, "intermediate_size": 32,
                                     "num_hidden_layers": 1}


def spoil(module, name):
    parameter = dict(module.named_parameters())[name]
    parameter.data = parameter.data.copy()
    parameter.data.flat[0] = np.nan


# ---- each small model with weights and inputs, in float64 -----------------------------------

def cases():
    """{name: (class, config)} of every small model."""
    unets = UNETS | {name: config for name, (config, _) in CONDITIONED.items()}
    projecting = dict(CLIPS["as SD 2"], projection_dim=7)
    return {f"{model.__name__} {name}": (model, config) for model, configs in (
        (UNet2DConditionModel, unets),
        (UNet2DModel, UNETS_2D), (DiTTransformer2DModel, DITS),
        (AutoencoderKL, {name: vae_config(config) for name, config in VAES.items()}),
        (CLIPTextModel, CLIPS), (CLIPTextModelWithProjection, {"as SDXL": projecting}),
        (CLIPVisionModel, VISIONS), (CLIPVisionModelWithProjection, {
            "as L/14": dict(VISIONS["as L/14"], projection_dim=7)}), (CLIPModel, WHOLE_CLIPS),
        (PriorTransformer, PRIORS),
    ) for name, config in configs.items()}


def inputs(name):
    """{argument: array} for a call of the model: of the VAE images and latents."""
    model, config = cases()[name]
    rng = np.random.RandomState(1)
    if model is UNet2DConditionModel:
        more = CONDITIONED.get(name.removeprefix("UNet2DConditionModel "), (None, {}))[1]
        arrays = {"latents": rng.standard_normal((2, 7, 9, config["in_channels"])),
                  "timesteps": np.array([3.0, 981.0]),
                  "context": rng.standard_normal((2, 7, config["cross_attention_dim"])),
                  **{what: rng.standard_normal((2, width)) for what, width in more.items()}}
        if "time_ids" in arrays:
            arrays["time_ids"] = np.array([[64.0, 48, 0, 0, 64, 48], [32, 32, 4, 8, 16, 16]])
    elif model is UNet2DModel:
        arrays = {"latents": rng.standard_normal((2, 8, 12, config.get("in_channels", 3))),
                  "timesteps": np.array([3.0, 981.0])}
        if (labels := class_labels(config, rng)) is not None:
            arrays["class_labels"] = labels
    elif model is DiTTransformer2DModel:
        size = config["sample_size"]
        arrays = {"latents": rng.standard_normal((2, size, size, config["in_channels"])),
                  "timesteps": np.array([3.0, 981.0]),
                  "class_labels": np.array([4, config["num_embeds_ada_norm"]])}
    elif model is PriorTransformer:
        C, M = config["embedding_dim"], config["num_embeddings"]
        arrays = {"latents": rng.standard_normal((2, C)), "timesteps": np.array([3.0, 981.0]),
                  "text_embeds": rng.standard_normal((2, config.get("embedding_proj_dim") or C)),
                  "context": rng.standard_normal((2, M, C)),
                  "mask": np.arange(M) < [[M], [1]]}
    elif model in (CLIPVisionModel, CLIPVisionModelWithProjection):
        arrays = {"images": rng.standard_normal((2, *[config["image_size"]] * 2, 3))}
    elif model is CLIPModel:
        ids = rng.randint(3, 97, (3, 77))
        ids[[0, 1, 2], [9, 30, 76]] = 98
        size = config["vision_config"]["image_size"]
        arrays = {"images": rng.standard_normal((2, size, size, 3)), "ids": ids}
    elif model is AutoencoderKL:
        arrays = {"images": rng.standard_normal((2, 8, 16, 3)),
                  "z": rng.standard_normal((2, 2, 3, config["latent_channels"]))}
    else:
        ids = rng.randint(3, 97, (2, 77))
        ids[[0, 1], [9, 30]] = config["eos_token_id"]
        arrays = {"ids": ids}
    return {what: read_only(x) for what, x in arrays.items()}


def class_labels(config, rng):
    """Labels for two images, of the kind that a UNet2DModel's config names; None: it has none."""
    if config.get("class_embed_type") == "identity":
        return rng.standard_normal((2, 4 * config["block_out_channels"][0]))
    if config.get("class_embed_type") == "timestep":
        return np.array([7.0, 250.0])
    return np.array([4, 1]) if "num_class_embeds" in config else None


def make(name):
    """The model of a case, with its weights."""
    model, config = cases()[name]
    module = model(config)
    return with_weights(module, random_weights(module, 0, np.float64))


def outputs(module, arrays, *tape):
    """What a model makes of its inputs: a tuple of arrays."""
    if isinstance(module, AutoencoderKL):
        return *module.encode(arrays["images"], *tape), module.decode(arrays["z"], *tape)
    if isinstance(module, DiTTransformer2DModel):
        return (module.forward(*arrays.values(), *tape),)
    if isinstance(module, PriorTransformer):
        *inputs, mask = arrays.values()
        return (module.post_process_latents(module.forward(*inputs, *tape, mask=mask), *tape),)
    y = module.forward(*(arrays[name] for name in ("latents", "images", "timesteps", "context",
                                                   "ids") if name in arrays), *tape,
                       **{name: x for name, x in arrays.items() if name in
                          ("timestep_cond", "text_embeds", "time_ids", "class_labels")})
    return y if isinstance(y, tuple) else (y,)


def backward(module, arrays, dys, tape):
    """Undo `outputs` -> {input: its gradient}; the parameters get theirs."""
    if isinstance(module, AutoencoderKL):
        return {"z": module.decode_backward(dys[2], tape),
                "images": module.encode_backward(*dys[:2], tape)}
    if isinstance(module, PriorTransformer):
        dys = [module.post_process_latents_backward(*dys, tape)]
    found = module.backward(*dys, tape)
    if isinstance(module, DiTTransformer2DModel):
        return {"latents": found}
    if isinstance(module, (CLIPVisionModel, CLIPVisionModelWithProjection, CLIPModel)):
        return {"images": found}
    names = ("latents", "context", "timestep_cond", "text_embeds", "class_labels")
    return {name: getattr(found, name) for name in names
            if name in arrays and getattr(found, name) is not None}
