"""The files of Improved DDPM and of guided diffusion (ADM): names and configs, in diffusers' terms.

Such a file, cifar10_uncond_50M_500K.pt or 64x64_diffusion.pt, holds a UNet without a config. Its
names are those of Stable Diffusion's, which comes from this code. Names and shapes tell nearly all;
the number of heads, the order of q, k and v, and the noise schedule are those of the authors'
published models of that structure.
Source: openai/improved-diffusion, openai/guided-diffusion: unet.py, script_util.py and the flags
in README.md; Nichol & Dhariwal 2021, arXiv:2102.09672; Dhariwal & Nichol 2021, arXiv:2105.05233.
"""
import re

from ...errors import TinyldmError
from ...models.unet_2d import UNet2DModel
from ..layout import WRAPPER
from .names import UNET_BLOCK, UNET_RESNET, renamed, unet_name

TIME, MIDDLE, LABELS = "time_embed.0.weight", "middle_block.1.qkv.weight", "label_emb.weight"
UPSAMPLER = re.compile(r"output_blocks\.(\d{1,3})\.[12]\.(conv|in_layers\.0)\.weight")
ATTENTION = re.compile(r"(.+\.attentions\.\d+)\.(norm|qkv|proj_out)\.(weight|bias)")
IN_ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}
# The levels' widths in units of the first -> the pictures' size in pixels.
SIZES = {(1, 2, 2, 2): 32, (1, 2, 3, 4): 64, (1, 1, 2, 3, 4): 128, (1, 1, 2, 2, 4, 4): 256}
STEPS = 250                 # the authors' choice for drawing


def is_openai(names):
    """Whether the names of a file's tensors are those of such a UNet, without words before them."""
    return {TIME, MIDDLE} <= {WRAPPER.sub(r"\1", name) for name in names}


def unet(stored, path):
    """{name in the file: StoredTensor} -> the config of a UNet2DModel, and its tensors {public
    name: StoredTensor}. Names that are unknown stay as they are.

    Raises TinyldmError for a part of a UNet, and for shapes that no published one has.
    """
    stored = {WRAPPER.sub(r"\1", name): tensor for name, tensor in stored.items()}
    layers = _layers(stored, path)
    config = _config(stored, layers, path)
    tensors = {}
    for name, tensor in stored.items():
        tensors |= _public(name, tensor, layers, config)
    return config, tensors


def drawing(config):
    """How the authors draw with a UNet2DModel of this config, from `unet`.

    -> the dict of its scheduler_config.json, and entries of model_index.json. Improved DDPM has
    4000 steps. Without classes its network sees their numbers times 1000 / 4000.
    """
    is_adm, shifts = (config["downsample_type"] == "resnet",
                      config["resnet_time_scale_shift"] == "scale_shift")
    is_long = shifts and not is_adm
    is_cosine = is_long or is_adm and config["sample_size"] == 64
    learned = config["out_channels"] == 2 * config["in_channels"]
    scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 4000 if is_long else 1000,
                 "beta_start": 1e-4, "beta_end": 0.02,
                 "beta_schedule": "squaredcos_cap_v2" if is_cosine else "linear",
                 "timestep_spacing": "linspace", "clip_sample": True,
                 "variance_type": "learned_range" if learned else "fixed_large"}
    rescaled = {"_rescale_timesteps": True} if is_long and "num_class_embeds" not in config else {}
    return scheduler, {"_num_inference_steps": STEPS} | rescaled


# ---- the config -----------------------------------------------------------------------------

def _layers(stored, path):
    """The number of residual blocks in a level: the first upsampler stands behind one more."""
    found = [int(match[1]) for match in map(UPSAMPLER.fullmatch, stored) if match]
    if not found or not min(found):
        raise TinyldmError(f"{path} holds a UNet of Improved DDPM without its way up, or a "
                           "classifier: expected a whole UNet, such as 64x64_diffusion.pt")
    return min(found)


def _config(stored, layers, path):
    def shape(name, axes):
        if name not in stored or len(stored[name].shape) != axes or 0 in stored[name].shape:
            raise TinyldmError(f"{path} holds only a part of a UNet of Improved DDPM, without "
                               f"{name} of {axes} axes: get the whole file")
        return stored[name].shape

    numbers = {int(match[2]) for match in map(UNET_BLOCK.fullmatch, stored)
               if match and match[1] == "input"}
    firsts = [f"input_blocks.{n}" for n in range(1, max(numbers, default=0) + 1, layers + 1)]
    widths = [shape(f"{first}.0.out_layers.3.weight", 4)[0] for first in firsts]
    channels, outputs = shape("input_blocks.0.0.weight", 4)[1], shape("out.2.weight", 4)[0]
    factors = tuple(width / widths[0] for width in widths)
    if factors not in SIZES or shape(TIME, 2)[1] != widths[0]:
        raise TinyldmError(f"{path} holds a UNet of Improved DDPM with levels of "
                           f"{', '.join(map(str, widths))} channels: supported are those with "
                           f"factors of {'; '.join(str(known)[1:-1] for known in SIZES)}")
    size, attends = SIZES[factors], [f"{first}.1.qkv.weight" in stored for first in firsts]
    is_adm = any(f"output_blocks.{layers}.{i}.in_layers.0.weight" in stored for i in (1, 2))
    shifts = shape(f"{firsts[0]}.0.emb_layers.1.weight", 2)[0] == 2 * widths[0]
    # ADM has 64 channels in a head, at 128 pixels 4 heads. Improved DDPM has 4 heads; without
    # scale_shift one.
    heads = (4 if size == 128 else None) if is_adm else 4 if shifts else 1
    dims = [width // heads if heads else 64 for width in widths]
    used = {dim for dim, has in zip(dims, [*attends[:-1], True]) if has}
    resample, no_attention = ("resnet", "Resnet{}sampleBlock2D") if is_adm else ("conv",
                                                                               "{}Block2D")
    config = {
        "block_out_channels": widths, "layers_per_block": layers, "sample_size": size,
        "in_channels": channels, "out_channels": outputs,
        "down_block_types": ["AttnDownBlock2D" if has else no_attention.format("Down")
                             for has in attends],
        "up_block_types": ["AttnUpBlock2D" if has else no_attention.format("Up")
                           for has in reversed(attends)],
        "downsample_type": resample, "upsample_type": resample,
        "attention_head_dim": used.pop() if len(used) == 1 else dims,
        "resnet_time_scale_shift": "scale_shift" if shifts else "default",
        "norm_num_groups": 32, "attn_norm_num_groups": 32, "norm_eps": 1e-5,
        "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1,
    } | ({"num_class_embeds": shape(LABELS, 2)[0]} if LABELS in stored else {})
    try:
        UNet2DModel.Settings.read(config)
    except TinyldmError as error:
        raise TinyldmError(f"{path} does not hold a UNet of Improved DDPM that is supported "
                           f"({error})") from None
    return config


# ---- the names ------------------------------------------------------------------------------

def public_name(name, layers):
    """A name in the file -> the public one; of q, k and v together the name with qkv."""
    if name == LABELS:
        return "class_embedding.weight"
    match = UNET_BLOCK.fullmatch(name)
    if match and match[4].rpartition(".")[0] in UNET_RESNET:        # of a residual block
        down, inner = match[1] == "input", renamed(match[4], UNET_RESNET)
        level, layer = divmod(int(match[2]) - down, layers + 1)
        if down and layer == layers:
            return f"down_blocks.{level}.downsamplers.0.{inner}"
        if match[3] != "0":
            return f"up_blocks.{level}.upsamplers.0.{inner}"
    name = unet_name(name, layers)
    if match := ATTENTION.fullmatch(name):
        return f"{match[1]}.{IN_ATTENTION.get(match[2], match[2])}.{match[3]}"
    return name


def _public(name, tensor, layers, config):
    """A tensor under its public name; q, k and v in the rows of one become three tensors."""
    public = public_name(name, layers)
    if ".attentions." not in public:
        return {public: tensor}
    if tensor.shape[2:] == (1,):                        # a convolution over positions
        tensor = tensor._replace(shape=tensor.shape[:2], strides=tensor.strides[:2])
    stem, is_qkv, kind = public.partition("qkv.")
    width = tensor.shape[0] // 3 if tensor.shape else 0
    if not is_qkv or width not in config["block_out_channels"]:
        return {public: tensor}
    heads = _groups(config, width)
    d = width // heads
    pieces = {}
    for i, word in enumerate("qkv"):
        spans = [((3 * head + i) * d, (3 * head + i + 1) * d) for head in range(heads)]
        pieces[f"{stem}to_{word}.{kind}"] = (
            tensor.rows(*spans[0]) if heads == 1 else tensor.picked(spans))
    return pieces


def _groups(config, width):
    """How many groups of q, k and v there are in the rows of an attention's qkv: one per head.

    In the order that the authors call new there is one: q, k and v, in each of them the heads. Of
    the published files only ADM's of 64 pixels has it.
    """
    if config["downsample_type"] == "resnet" and config["sample_size"] == 64:
        return 1
    dims = config["attention_head_dim"]
    if isinstance(dims, list):
        dims = dims[config["block_out_channels"].index(width)]
    return width // dims
