"""openai's files of Improved DDPM and of guided diffusion (ADM): names and config of their UNet.

The skeleton is that of Stable Diffusion's single file, which came from it: input_blocks,
middle_block, output_blocks. q, k and v are the rows of one matrix, in one of two orders. A file
holds no config. Shapes tell its network except for the number of heads, the order of q, k and v,
the size of the pictures and the schedule; these are the flags that its authors give for each file.
Source: openai/improved-diffusion and openai/guided-diffusion, README.md and unet.py.
"""
import re

from ...errors import TinyldmError
from ..formats.stored import Joined
from ..layout import WRAPPER

MARK = {"time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight",
        "out.2.weight"}
IN_RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
             "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
IN_ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}
ENDS = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "label_emb": "class_embedding", "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out",
        "out.2": "conv_out"}
MIDDLE = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}
BLOCK = re.compile(r"(input|output)_blocks\.(\d{1,3})\.(\d)\.(.+)")
# The widths of the levels, in units of the first -> the size of the pictures.
SIZES = {(1, 2, 2, 2): 32, (1, 2, 3, 4): 64, (1, 1, 2, 3, 4): 128, (1, 1, 2, 2, 4, 4): 256}
HEAD_CHANNELS = 64                  # of ADM; all others have as many heads at every level
SCHEDULER = {"_class_name": "DDPMScheduler", "clip_sample": True, "prediction_type": "epsilon",
             "timestep_spacing": "linspace"}
STEPS = 250                         # of 1000 or 4000, respaced


def is_iddpm(names):
    """Whether the names of a file's tensors are those of openai's UNetModel."""
    return MARK <= {WRAPPER.sub(r"\1", name) for name in names}


def unet(stored, path):
    """{name in the file: StoredTensor} -> the config of a UNet2DModel, and its tensors {public
    name: StoredTensor}. Names that are unknown stay as they are.

    Raises TinyldmError for a file that is only a part, and for networks that are not built here.
    """
    stored = {WRAPPER.sub(r"\1", name): tensor for name, tensor in stored.items()}
    config = _config(stored, path)
    is_new = config["downsample_type"] == "resnet" and config["sample_size"] == 64
    heads = [width // dim for width, dim in zip(config["block_out_channels"], _head_dims(config))]
    tensors = {}
    for name, tensor in stored.items():
        public, level = _public_name(name, config["layers_per_block"], len(heads))
        own = _matrices(public, tensor, heads[level], is_new)
        tensors |= {name: tensor} if own.keys() & tensors.keys() else own
    return config, tensors


def drawing(config):
    """A model's config -> its scheduler_config.json, and entries of model_index.json.

    The unconditional models of Improved DDPM see timesteps that are rescaled to 0 ... 1000.
    """
    is_adm, old = config["downsample_type"] == "resnet", config["resnet_time_scale_shift"]
    long = not is_adm and old == "scale_shift"
    cosine = long or is_adm and config["sample_size"] == 64
    learned = config["out_channels"] == 2 * config["in_channels"]
    shape = {"beta_schedule": "squaredcos_cap_v2"} if cosine else {
        "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    scheduler = SCHEDULER | shape | {
        "num_train_timesteps": 4000 if long else 1000,
        "variance_type": "learned_range" if learned else "fixed_large"}
    rescaled = {"_rescale_timesteps": True} if long and "num_class_embeds" not in config else {}
    return scheduler, {"_num_inference_steps": STEPS} | rescaled


def _config(stored, path):
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    places = [match.groups() for match in map(BLOCK.fullmatch, shapes) if match]
    outputs = [int(n) for side, n, *_ in places if side == "output"]
    # The first block of the way up that ends in an upsampler: a convolution, or a second resnet.
    ends = {int(n): inner for side, n, j, inner in places if side == "output" and j != "0"
            and inner in ("conv.weight", "in_layers.2.weight")}
    layers = min(ends, default=max(outputs, default=0))
    levels = (max(outputs, default=0) + 1) // (layers + 1)
    widths = [shapes.get(f"input_blocks.{1 + level * (layers + 1)}.0.out_layers.3.weight", (0,))[0]
              for level in range(levels)]
    first, last = shapes["input_blocks.0.0.weight"], shapes["out.2.weight"]
    names = [f"input_blocks.{1 + level * (layers + 1)}.1.qkv.weight" for level in range(levels)]
    if not layers or not widths or 0 in widths or len(first) != 4 or len(last) != 4 or (
            max(outputs) + 1 != levels * (layers + 1)):
        raise TinyldmError(f"{path} holds only a part of a UNet of openai's diffusion models: get "
                           "the whole file")
    if first[1] not in (1, 3) or widths[0] != first[0] or any(width % 32 for width in widths):
        raise TinyldmError(f"{path} holds a UNet of openai's diffusion models for {first[1]} "
                           f"channels, of widths {widths}: expected 1 or 3 channels and multiples "
                           "of 32; their upsamplers are not supported")
    if shapes.get("time_embed.0.weight", (0, 0))[-1] != widths[0]:
        raise TinyldmError(f"{path} holds a UNet whose first level is narrower than its embedding "
                           "of time, as ADM's for 512x512 pixels, which is not supported")
    attends = [name in shapes for name in names]
    is_adm = ends.get(layers) == "in_layers.2.weight"
    emb = shapes.get("input_blocks.1.0.emb_layers.1.weight", (0,))[0]
    config = {
        "sample_size": SIZES.get(tuple(width / widths[0] for width in widths), 8 << levels - 1),
        "in_channels": first[1], "out_channels": last[0], "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": [_block(attend, is_adm, "Down") for attend in attends],
        "up_block_types": [_block(attend, is_adm, "Up") for attend in reversed(attends)],
        "downsample_type": "resnet" if is_adm else "conv",
        "upsample_type": "resnet" if is_adm else "conv",
        "resnet_time_scale_shift": "scale_shift" if emb == 2 * widths[0] else "default",
        "norm_num_groups": 32, "attn_norm_num_groups": 32, "norm_eps": 1e-5,
        "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0}
    if "label_emb.weight" in shapes:
        config["num_class_embeds"] = shapes["label_emb.weight"][0]
    config["attention_head_dim"] = _head_dim(config)
    return config


def _block(attends, is_adm, way):
    kind = "AttnDownBlock2D" if attends else "ResnetDownsampleBlock2D" if is_adm else "DownBlock2D"
    return kind.replace("Downsample", f"{way}sample").replace("DownBlock", f"{way}Block")


def _head_dim(config):
    """ADM: 64 channels, except 4 heads at 128x128 pixels. Improved DDPM: 4 heads, or in the models
    without scale_shift one."""
    if config["downsample_type"] == "resnet" and config["sample_size"] != 128:
        return HEAD_CHANNELS
    if config["resnet_time_scale_shift"] == "default":
        return None
    return [width // 4 for width in config["block_out_channels"]]


def _head_dims(config):
    dim = config["attention_head_dim"]
    widths = config["block_out_channels"]
    return dim if isinstance(dim, list) else [min(dim or width, width) for width in widths]


def _public_name(name, layers, levels):
    """-> the public name, and the level of the block. A block of the way down is one layer; its
    level ends in a downsampler."""
    stem, _, kind = name.rpartition(".")
    if stem in ENDS:
        return f"{ENDS[stem]}.{kind}", 0
    if name.startswith("middle_block."):
        _, place, inner = name.split(".", 2)
        return _inner(MIDDLE.get(place, f"middle_block.{place}"), inner), levels - 1
    if not (match := BLOCK.fullmatch(name)):
        return name, 0
    side, n, j, inner = match[1], int(match[2]), int(match[3]), match[4]
    if side == "input":
        level, i = divmod(n - 1, layers + 1)
        block, resample = f"down_blocks.{level}", "downsamplers.0"
        is_resample = i == layers
    else:
        level, i = divmod(n, layers + 1)
        block, resample = f"up_blocks.{level}", "upsamplers.0"
        is_resample = j > 0 and inner.split(".")[0] not in ("norm", "qkv", "proj_out")
        level = levels - 1 - level
    if is_resample:
        inner = re.sub("^op|^conv", "conv", inner)
        return _inner(f"{block}.{resample}", inner), min(level, levels - 1)
    return (_inner(f"{block}.{'attentions' if j else 'resnets'}.{i}", inner),
            min(max(level, 0), levels - 1))


def _inner(block, inner):
    stem, _, kind = inner.rpartition(".")
    names = IN_ATTENTION if ".attentions." in block else IN_RESNET
    return f"{block}.{names.get(stem, stem)}.{kind}"


def _matrices(public, tensor, heads, is_new):
    """A tensor under its public name; q, k and v apart. Attention's (O,C,1) become matrices (O,C).

    The rows of q, k, v are in the order of head, q/k/v, channel; or if is_new of q/k/v, head,
    channel.
    """
    if ".attentions." in public and tensor.shape[2:] == (1,):
        tensor = tensor._replace(shape=tensor.shape[:2], strides=tensor.strides[:2])
    stem, _, kind = public.rpartition(".")
    if not stem.endswith(".qkv") or not tensor.shape or tensor.shape[0] % (3 * heads):
        return {public: tensor}
    d = tensor.shape[0] // (3 * heads)                  # channels of a head
    found = {}
    for i, word in enumerate("qkv"):
        firsts = [((i * heads + h) if is_new else (3 * h + i)) * d for h in range(heads)]
        rows = Joined([tensor.rows(first, first + d) for first in firsts])
        found[f"{stem.removesuffix('qkv')}to_{word}.{kind}"] = rows
    return found
