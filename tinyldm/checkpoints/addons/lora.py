"""LoRA, a small file that changes a model: read, checked, and merged into the weights.

    W += weight * alpha / rank * up @ down

For each layer a LoRA trains two thin matrices, down (rank, in) and up (out, rank), in place of a
change of the whole W (out, in). For a convolution, down is a convolution to `rank` channels and up
a 1x1 convolution. Every trainer has its own names:

    lora_unet_mid_block_attentions_0_proj_in.lora_down.weight, .alpha       kohya
    lora_unet_middle_block_1_proj_in.lora_down.weight, .alpha               kohya, SDXL
    unet.mid_block.attentions.0.proj_in.lora_A.weight                       peft
    unet.mid_block.attentions.0.[...].processor.to_q_lora.down.weight       diffusers, oldest
    text_encoder.[...].q_proj.lora_linear_layer.down.weight                 diffusers, later

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685,
section 4.1; names: kohya-ss/sd-scripts (networks/lora.py), diffusers 0.42 (loaders), peft 0.21.
"""
import json
import math
import re
from pathlib import Path

import numpy as np

from ...backend import get_xp, wide
from ...errors import TinyldmError
from ...layers import Conv2d, Linear, named_modules
from ..components import shorten
from ..formats.reading import read_tensors
from ..formats.safetensors_file import read_metadata
from ..layout import OUR_AXES, file_shape
from ..single_file.kinds import model_of_width
from ..single_file.names import unet_name

KEY = re.compile(r"(.+?)(?:[._]lora(?:_linear_layer)?[._](down|up|A|B)\.weight|\.(alpha))")
ROLES = {"A": "down", "B": "up"}
# The beginning of a name -> the part of the pipeline; names without a known one are the UNet's.
PREFIXES = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
            "lora_te2_": "text_encoder_2", "unet.": "unet", "text_encoder.": "text_encoder",
            "text_encoder_2.": "text_encoder_2", "": "unet"}
OLD_WORDS = {"to_out.0": "to_out", "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v",
             "out_proj": "to_out"}
AROUND_NUMBERS = re.compile(r"_(?=\d)|(?<=\d)_")        # in an original name, these were dots
CONTEXT_LAYER = re.compile(r".*attn2_to_[kv]")
# Relatives of LoRA that change the weights by another formula.
RELATIVES = {r"\.lora_mid\.": "a LoCon in Tucker's form (lora_mid)", r"\.hada_": "a LoHa (hada_)",
             r"\.lokr_": "a LoKr (lokr_)", r"\.dora_scale|\.lora_magnitude_vector": "a DoRA",
             r"\.diff(_b)?$": "differences of whole weights (.diff)",
             r"lora_(B|up)\.bias$": "a LoRA with biases"}
ADAPTER = "lora_adapter_metadata"                       # in the header, written by diffusers


def merge_lora(parts, path, weight, dtype):
    """Add a LoRA to the weights of models: W += weight * alpha / rank * up @ down.

    parts: {"unet": UNet2DConditionModel, "text_encoder": ..., "text_encoder_2": ...}, those that
    the pipeline has. path: a .safetensors file, or one that torch.save wrote. The sum is computed
    in float32 or wider; a changed weight is a new array of `dtype`.
    Raises TinyldmError, before anything is changed, for a file that is not a LoRA, one for another
    model or with another formula, names that match nothing, half a pair, and numbers not finite.
    """
    for parameter, down, up, scale in read_lora(parts, Path(path)):
        W, shape = parameter.data, file_shape(parameter)
        xp, sums = get_xp(W), wide(np.promote_types(W.dtype, dtype))
        down, up = (xp.asarray(tensor.read(sums)) for tensor in (down, up))
        delta = up.reshape(up.shape[:2]) @ down.reshape(len(down), -1)      # (O,r) @ (r,C*K*K)
        delta = (weight * scale * delta).reshape(shape)              # (O,C) or (O,C,K,K)
        delta = delta.transpose(OUR_AXES) if delta.ndim == 4 else delta     # (K,K,C,O)
        parameter.data = xp.ascontiguousarray((W + delta).astype(dtype))


# ---- reading and checking -------------------------------------------------------------------

def read_lora(parts, path):
    """A file -> [(the Parameter that changes, down, up, alpha / rank)]. Raises: see merge_lora."""
    stored = read_tensors(path)
    for pattern, relative in RELATIVES.items():
        if any(re.search(pattern, name) for name in stored):
            raise TinyldmError(f"{path} is {relative}, which is not supported: use a plain LoRA")
    pairs, unmatched = find_pairs(stored)
    if not any(pair.keys() & {"down", "up"} for pair in pairs.values()):
        raise TinyldmError(f"{path} is no LoRA: expected pairs of names such as *.lora_down.weight "
                           f"and *.lora_up.weight, found {shorten(list(stored))}")
    check_width(path, pairs, parts["unet"])
    layers = layers_by_spelling(parts)
    unmatched += [tensor.name for target, pair in pairs.items() if target not in layers
                  for tensor in pair.values()]
    if unmatched:
        raise TinyldmError(f"{path} was made for another model: names that match nothing here are "
                           f"{shorten(unmatched)}")
    halves = [tensor.name for pair in pairs.values() if not {"down", "up"} <= pair.keys()
              for tensor in pair.values()]
    if halves:
        raise TinyldmError(f"{path} must have a down and an up matrix for every weight, but has "
                           f"only a part for {shorten(halves)}: get it again")
    settings = adapter_settings(path)
    changes, wrong = [], []
    for target, pair in pairs.items():
        layer, parameter = layers[target]
        rank = fitting_rank(parameter, **pair)
        if rank:
            alpha = (float(pair["alpha"].read(np.float64).reshape(-1)[0]) if "alpha" in pair
                     else adapter_alpha(settings, target[0], layer, rank, path))
            changes.append((parameter, pair["down"], pair["up"], alpha / rank))
        else:
            wrong.append(f"{layer} (expected {file_shape(parameter)}, found up "
                         f"{pair['up'].shape} and down {pair['down'].shape})")
    if wrong:
        raise TinyldmError(f"{path} was made for another model: shapes that do not fit are "
                           f"{shorten(wrong)}")
    for _, down, up, _ in changes:
        for tensor in (down, up):
            tensor.read(np.float32)                     # raises if a number is not finite
    return changes


def find_pairs(stored):
    """{name: StoredTensor} -> {target: {"down", "up", "alpha": StoredTensor}}, unmatched names.

    Unmatched are names that are not a LoRA's, and second names for the same tensor.
    """
    pairs, unmatched = {}, []
    for name, tensor in stored.items():
        match = KEY.fullmatch(name)
        if not match:
            unmatched.append(name)
            continue
        role = ROLES.get(match[2], match[2] or match[3])
        if pairs.setdefault(target_of(match[1]), {}).setdefault(role, tensor) is not tensor:
            unmatched.append(name)
    return pairs, unmatched


def target_of(name):
    """A name in the file -> the part and the layer that it changes, underscores for dots."""
    prefix = next(prefix for prefix in PREFIXES if name.startswith(prefix))
    part, layer = PREFIXES[prefix], flat(name.removeprefix(prefix).replace(".processor", ""))
    if part == "unet":                                  # the name may be the original one
        layer = flat(unet_name(AROUND_NUMBERS.sub(".", layer) + ".weight")).removesuffix("_weight")
    return part, layer


def layers_by_spelling(parts):
    """{target: (name of the layer, its weight)}, with every spelling of each layer's name."""
    return {(part, spelling): (name, layer.weight) for part, model in parts.items()
            for name, layer in named_modules(model) if isinstance(layer, (Linear, Conv2d))
            for spelling in spellings(name)}


def spellings(name):
    """A layer's names: the public one, without `text_model.`, and with old diffusers' words."""
    names = [name, name.removeprefix("text_model.")]
    for word, old in OLD_WORDS.items():
        names += [name.replace(word, old) for name in names]
    return {flat(name) for name in names}


def flat(name):
    return name.replace(".", "_")


def check_width(path, pairs, unet):
    """Refuse a LoRA whose cross-attention expects a context of another width than the UNet's."""
    own = set(np.ravel(unet.settings.cross_attention_dim).tolist())
    for (_, layer), pair in pairs.items():
        if "down" in pair and CONTEXT_LAYER.fullmatch(layer) and len(pair["down"].shape) > 1:
            width = pair["down"].shape[1]
            if width not in own:
                theirs, ours = (model_of_width("context", size) for size in (width, max(own)))
                raise TinyldmError(f"{path} was made for {theirs}, but this is {ours}: use a LoRA "
                                   "made for it")


def fitting_rank(parameter, down, up, alpha=None):
    """The rank of a pair that fits a weight, else 0. Matrices may be stored as 1x1 convolutions."""
    def matrix(shape):
        return shape[:2] if shape[2:] == (1, 1) else shape

    O, *inputs = file_shape(parameter)
    rank = down.shape[0] if down.shape else 0
    fits = (matrix(down.shape) == matrix((rank, *inputs)) and matrix(up.shape) == (O, rank)
            and (alpha is None or math.prod(alpha.shape) == 1))
    return rank if fits else 0


# ---- alpha ----------------------------------------------------------------------------------

def adapter_settings(path):
    """peft's settings, which diffusers writes into the header: {"unet.lora_alpha": ...}."""
    try:
        settings = json.loads(read_metadata(path).get(ADAPTER, "{}"), parse_int=float)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise TinyldmError(f"{path}: {ADAPTER} in its header must be a JSON object: get it again")
    return settings


def adapter_alpha(settings, part, layer, rank, path):
    """The alpha of a layer in peft's settings; the rank if they have none.

    alpha_pattern names layers by the ends of their names. rsLoRA divides by the square root of the
    rank: Kalajdzievski 2023, arXiv:2312.03732.
    """
    alpha = settings.get(f"{part}.lora_alpha", rank)
    pattern = settings.get(f"{part}.alpha_pattern") or {}
    if isinstance(pattern, dict):
        ends = [end for end in pattern if f".{layer}".endswith(f".{end.removeprefix('^')}")]
        alpha = pattern[ends[0]] if ends else alpha
    if (not isinstance(pattern, dict) or not isinstance(alpha, (int, float))
            or not math.isfinite(alpha)):
        raise TinyldmError(f"{path}: {ADAPTER} in its header must give {layer} a number as alpha: "
                           "get it again")
    return alpha * math.sqrt(rank) if settings.get(f"{part}.use_rslora") else alpha
