"""peft's settings of a LoRA: the alpha and the rank of layers for which its tensors name none.

diffusers writes them into the header, as `unet.lora_alpha` and so on; peft writes them into
adapter_config.json, beside adapter_model.safetensors.
Source: peft 0.21 (LoraConfig, LoHaConfig, LoKrConfig), diffusers 0.42 (save_lora_weights).
"""
import json
import math
import re

import numpy as np

from ...errors import TinyldmError, note
from ..formats.safetensors_file import read_metadata

HEADER, FILE, WEIGHTS = "lora_adapter_metadata", "adapter_config.json", "adapter_model"
KINDS = ("LORA", "LOHA", "LOKR", None)                  # peft_type
# Ways to begin a training that change the model's own weights, too.
CHANGE_THE_MODEL = ("pissa", "olora", "corda", "loftq")
WHOLE_NUMBERS = {"I64": "<i8", "I32": "<i4"}            # an alpha may be one
# A pattern is a regular expression of a layer's name. One from a file could take for ever, so only
# those are matched that consist of these signs, do not repeat groups, and have few choices to make.
SIGNS, REPEATED_GROUP, CHOICES = (re.compile(pattern) for pattern in (
    r"[\w.^$|()\\*+?-]{1,300}", r"[)*+?][*+?]", r"[*+?(]"))


def read_settings(path):
    """The settings of a file -> {name: value}; {} if it has none.

    Raises TinyldmError if they are no JSON object, or those of something else than a LoRA.
    """
    beside, place = path.with_name(FILE), f"{path}: {HEADER} in its header"
    try:
        if path.stem == WEIGHTS:
            place, text = beside, beside.read_text(encoding="utf-8")
        else:
            text = read_metadata(path).get(HEADER, "{}")
        settings = json.loads(text, parse_int=float)
    except FileNotFoundError:
        note(f"{beside} is missing, so the alpha of {path.name} is taken to be its rank: put both "
             "into one folder")
        settings = {}
    except (OSError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise TinyldmError(f"{place} must be a JSON object: get it again")
    kind, begin = settings.get("peft_type"), str(settings.get("init_lora_weights")).lower()
    if kind not in KINDS:
        raise TinyldmError(f"{path} is peft's {kind}, which is not supported: use a plain LoRA")
    if begin.startswith(CHANGE_THE_MODEL):
        raise TinyldmError(f"{path} belongs to weights that its training changed at the beginning "
                           f"(init_lora_weights {begin}): convert it to a plain LoRA with peft")
    return settings


def scale_of(settings, part, layer, change, tensors, path):
    """alpha / rank of a Change: by what its matrices are multiplied.

    tensors: {role: StoredTensor} of the layer, maybe with its alpha. Without any alpha it is the
    rank. rsLoRA divides by the square root of the rank: Kalajdzievski 2023, arXiv:2312.03732. A
    LoKr of two whole matrices has no rank; LyCORIS does not scale it, peft does.
    Raises TinyldmError if a setting is not a number.
    """
    rank = change.rank
    if rank and "alpha" in tensors:
        return read_number(tensors["alpha"]) / rank
    r = setting(settings, part, layer, "r", "rank_pattern", None)
    if not rank and (r is None or not change.kronecker):
        return 1.0                                      # a difference, or LyCORIS' LoKr
    rank = r if rank is None else rank
    alpha = setting(settings, part, layer, "alpha", "alpha_pattern", rank)      # LoHa and LoKr
    alpha = setting(settings, part, layer, "lora_alpha", "alpha_pattern", alpha)
    if (not all(isinstance(value, (int, float)) and math.isfinite(value) for value in (alpha, rank))
            or rank <= 0):
        raise TinyldmError(f"{path}: {FILE}, or {HEADER} in the header, must give {layer} a number "
                           "as alpha and one above 0 as rank: get it again")
    rslora = setting(settings, part, layer, "use_rslora", None, False)
    return alpha / (math.sqrt(rank) if rslora else rank)


def setting(settings, part, layer, name, pattern, default):
    """A layer's value: that of a pattern which ends its name, else that of all layers."""
    value = settings.get(f"{part}.{name}", settings.get(name, default))
    patterns = settings.get(f"{part}.{pattern}", settings.get(pattern)) or {}
    if not isinstance(patterns, dict):
        return str(patterns)                            # no number, which the caller says
    return next((own for end, own in patterns.items() if _matches(end, layer)), value)


def _matches(pattern, layer):
    """Whether peft's pattern means a layer: as a regular expression, it matches the name's end.

    Raises TinyldmError for a pattern that is not simple, see SIGNS.
    """
    try:
        if (SIGNS.fullmatch(pattern) and not REPEATED_GROUP.search(pattern)
                and len(CHOICES.findall(pattern)) <= 3):
            return re.match(rf"(.*\.)?({pattern})$", layer) is not None
    except re.error:
        pass
    raise TinyldmError(f"the pattern {pattern!r} in {FILE}, or in {HEADER} of the header, is no "
                       "simple regular expression: write the layers' names out")


def read_number(tensor):
    """A tensor of one number, which may be a whole number. Raises TinyldmError."""
    if tensor.format in WHOLE_NUMBERS:
        return float(np.frombuffer(tensor.mapped, WHOLE_NUMBERS[tensor.format], 1, tensor.start)[0])
    return float(tensor.read(np.float64).reshape(()))
