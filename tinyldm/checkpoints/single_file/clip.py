"""CLIP's original file, of openai/CLIP or of mlfoundations/open_clip: its names, its config.

    visual.*                            the image half; a matrix `proj` that is stored transposed
    transformer.*, token_embedding ...  the text half, as in the files of Stable Diffusion 2
    logit_scale

q, k and v are one matrix. Shapes tell all of the config but two things. The number of heads follows
from the width in every published model. The activation is quick_gelu in OpenAI's and in some of
open_clip's: open_clip_config.json beside the file says so.
Source: openai/CLIP, clip/model.py, build_model; mlfoundations/open_clip, model.py, model_configs/.
"""
import math
import re

import numpy as np

from ...errors import TinyldmError, note
from ...files import read_json
from ..layout import WRAPPER
from .names import OPEN_CLIP, OPEN_CLIP_WORDS, open_clip_names

PATCHES = "visual.conv1.weight"
VISION = {PATCHES: "vision_model.embeddings.patch_embedding.weight",
          "visual.class_embedding": "vision_model.embeddings.class_embedding",
          "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
          "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
          "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
          "visual.ln_post.weight": "vision_model.post_layernorm.weight",
          "visual.ln_post.bias": "vision_model.post_layernorm.bias"}
PROJECTIONS = {"visual.proj": "visual_projection.weight",
               "text_projection": "text_projection.weight"}             # both are stored transposed
# What OpenAI's files hold besides: whole numbers. open_clip's do not.
SIZES = {"input_resolution", "context_length", "vocab_size"}
LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d{1,4})\..+")
# The width of OpenCLIP's H, g, bigG and E: all have 16 heads, and gelu. In the others a head has 64
# channels.
SIXTEEN_HEADS = {1280, 1408, 1664, 1792}
CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def is_clip(names):
    """Whether the names of a file's tensors are those of the original CLIP, with both halves."""
    bare = {WRAPPER.sub(r"\1", name) for name in names}
    return {"text_projection", "transformer.resblocks.0.ln_1.weight"} <= bare and any(
        name.startswith("visual.") for name in bare)


def weights_of(folder):
    """The weight file of a folder as open_clip publishes it; None if it is no such folder."""
    if not (folder / CONFIG).is_file() or (folder / "config.json").is_file():
        return None
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def whole(stored, path, defaults=None):
    """{name in the file: StoredTensor} -> the config of a CLIPModel, and its tensors {public name:
    StoredTensor}. Names that are unknown stay as they are.

    defaults: {"hidden_act": "quick_gelu" or "gelu"}, for a file that does not say which; a note
    says what is taken without it.
    Raises TinyldmError for a CLIP with another kind of image half, and for one that is not whole.
    """
    stored = {WRAPPER.sub(r"\1", name): tensor for name, tensor in stored.items()}
    config = _config(stored, path, defaults or {})
    tensors = {}
    for name, tensor in stored.items():
        if name not in SIZES:
            tensors |= _public(name, tensor)
    return config, tensors


def _public(name, tensor):
    """A tensor under its public name; or three, for q, k and v in one."""
    if name in VISION:
        return {VISION[name]: tensor}
    if name in PROJECTIONS:
        return {PROJECTIONS[name]: tensor.transposed() if len(tensor.shape) == 2 else tensor}
    found = open_clip_names(name.removeprefix("visual."), tensor)
    if name.startswith("visual.") and LAYER.fullmatch(name):
        return {public.replace("text_model.", "vision_model.", 1): piece
                for public, piece in found.items()}
    return {name: tensor} if name.startswith("visual.") else found


def _config(stored, path, defaults):
    """The config of a CLIPModel, from the shapes of its tensors."""
    if "visual.class_embedding" not in stored:          # a ResNet, or one of timm's
        raise TinyldmError(f"{path} holds a CLIP whose image half is not a vision transformer, "
                           "which is not supported: use ViT-B/32, ViT-L/14 or another ViT")
    names = {PATCHES: 4, "visual.positional_embedding": 2, "visual.proj": 2,
             "visual.transformer.resblocks.0.mlp.c_fc.weight": 2, "token_embedding.weight": 2,
             "positional_embedding": 2, "transformer.resblocks.0.mlp.c_fc.weight": 2}
    shapes = [stored[name].shape if name in stored else () for name in names]
    if [len(shape) for shape in shapes] != list(names.values()):
        raise TinyldmError(f"{path} holds only a part of a CLIP: get the whole file")
    patches, places, (_, P), vision_mlp, (V, D), (M, _), text_mlp = shapes
    layers = {half: 1 + max((int(match[2]) for match in map(LAYER.fullmatch, stored)
                             if match and match[1] == half), default=0)
              for half in ("visual.", None)}
    W, channels, p, _ = patches
    known = _model_config(path)
    act = _activation(stored, path, W, known, defaults)
    return {
        "projection_dim": P,
        "text_config": {
            "vocab_size": V, "hidden_size": D, "intermediate_size": text_mlp[0],
            "num_hidden_layers": layers[None], "max_position_embeddings": M, "hidden_act": act,
            "num_attention_heads": known.get("text_cfg", {}).get("heads") or max(1, D // 64),
            "eos_token_id": 2, "projection_dim": P},    # 2: the largest id, as both programs do
        "vision_config": {
            "hidden_size": W, "intermediate_size": vision_mlp[0], "hidden_act": act,
            "num_hidden_layers": layers["visual."], "num_channels": channels, "patch_size": p,
            "num_attention_heads": _vision_heads(W, known),
            "image_size": p * math.isqrt(max(0, places[0] - 1)), "projection_dim": P}}


def _vision_heads(width, known):
    each = known.get("vision_cfg", {}).get("head_width")
    if each is None and width in SIXTEEN_HEADS:
        return 16
    return max(1, width // (each or 64))


def _activation(stored, path, width, known, defaults):
    """quick_gelu or gelu: what the caller says, or the config beside the file, or the file."""
    if "hidden_act" in defaults:
        return defaults["hidden_act"]
    if known:
        return "quick_gelu" if known.get("quick_gelu") else "gelu"
    if SIZES <= stored.keys():
        return "quick_gelu"
    if width not in SIXTEEN_HEADS:
        note(f"{path} does not say its activation: gelu is taken, open_clip's own; for weights "
             "that are OpenAI's use load_model(..., defaults={'hidden_act': 'quick_gelu'})")
    return "gelu"


def _model_config(path):
    """What open_clip_config.json beside a file says about its model; {} if there is none."""
    beside = path.with_name(CONFIG)
    if path.name not in WEIGHTS or not beside.is_file():
        return {}
    config = read_json(beside).get("model_cfg")
    sizes = [config.get(half) for half in ("vision_cfg", "text_cfg")] if isinstance(
        config, dict) else [None]
    numbers = [part.get(key, 1) for part in sizes if isinstance(part, dict)
               for key in ("heads", "head_width")]
    if len(numbers) != 4 or not all(type(n) is int and 1 <= n <= 65536 for n in numbers):
        raise TinyldmError(f"{beside} must have an object model_cfg with vision_cfg and text_cfg, "
                           "and whole numbers of heads, but does not: get it again")
    return config


# ---- the way back ---------------------------------------------------------------------------

def original_arrays(arrays):
    """{public name: array}, a CLIPModel's state_dict -> {name in OpenAI's file: array}.

    open_clip and openai/CLIP load these; of the latter a file has the three SIZES besides.
    """
    words = {new: old for old, new in OPEN_CLIP_WORDS.items()}
    names = {new: old for table in (VISION, OPEN_CLIP) for old, new in table.items()}
    transposed = {new: old for old, new in PROJECTIONS.items()}
    found = {}
    for name, array in arrays.items():
        layer = re.fullmatch(r"(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)\.(\w+)", name)
        if layer is None:
            found[transposed.get(name) or names.get(name, name)] = (
                array.T if name in transposed else array)
            continue
        half, number, stem, kind = layer.groups()
        block = f"{'visual.' * (half == 'vision')}transformer.resblocks.{number}."
        if stem == "self_attn.q_proj":
            start = name.removesuffix(f"q_proj.{kind}")
            found[f"{block}attn.in_proj_{kind}"] = np.concatenate(
                [arrays[f"{start}{word}_proj.{kind}"] for word in "qkv"])
        elif stem in words:
            found[f"{block}{words[stem]}.{kind}"] = array
    return found
