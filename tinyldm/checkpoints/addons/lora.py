"""LoRA, a small file that changes a model: read, checked, and merged into the weights.

    W += weight * alpha / rank * up @ down

For each layer a LoRA trains two thin matrices, down (rank, in) and up (out, rank), in place of a
change of the whole W (out, in). For a convolution, down is a convolution to `rank` channels and up
a 1x1 convolution. products.py has the formulas of its relatives: LoCon, LoHa, LoKr, differences.
Every trainer has its own names:

    lora_unet_mid_block_attentions_0_proj_in.lora_down.weight, .alpha       kohya
    lora_unet_middle_block_1_proj_in.lora_down.weight, .hada_w1_a, .alpha   kohya, LyCORIS, SDXL
    unet.mid_block.attentions.0.proj_in.lora_A.weight                       peft
    base_model.model.mid_block.attentions.0.proj_in.lora_A.default.weight   peft, as it saves itself
    unet.mid_block.attentions.0.[...].processor.to_q_lora.down.weight       diffusers, oldest
    text_encoder.[...].q_proj.lora_linear_layer.down.weight                 diffusers, later

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685,
section 4.1; names: kohya-ss/sd-scripts (networks/lora.py), KohakuBlueleaf/LyCORIS (modules),
diffusers 0.42 (loaders), peft 0.21.
"""
import math
import re
from contextlib import suppress
from pathlib import Path

import numpy as np

from ...backend import get_xp, is_finite, wide
from ...errors import TinyldmError, note, shorten
from ...layers import OUR_AXES, WeightedOp, file_shape, named_modules
from ..formats.reading import read_tensors
from ..single_file.kinds import layout_of, model_of_width
from ..single_file.names import unet_name
from . import textual_inversion
from .adapter_settings import read_settings, scale_of
from .products import changes_of

# The end of a name: which of a layer's tensors it is. peft may add the name of the adapter.
KEY = re.compile(r"(.+?)(?:[._]lora(?:_linear_layer)?[._](down|up|mid|A|B)(?:\.[^.]+)?\.weight|"
                 r"(?:[._]lora)?\.(alpha|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t[12])|"
                 r"diff|diff_b|w_norm|b_norm)(?:\.[^.]+)?)")
ROLES = {"A": "down", "B": "up"}
# The beginning of a name -> the part of the pipeline.
PARTS = textual_inversion.ENCODERS | {"unet": "unet", "diffusion_model": "unet"}
PREFIX = re.compile(rf"(?:lora_)?({'|'.join(sorted(PARTS, key=len, reverse=True))})[._]")
# What peft, torch and LyCORIS put around a model, and old diffusers around a layer.
WRAPPERS = re.compile(r"\b(base_model\.model\.|module\.|_orig_mod\.|lycoris_)|\.processor\b")
TEXT_LAYER = re.compile(r"text_model[._]|encoder[._]layers[._]")
OLD_WORDS = {"to_out.0": "to_out", "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v",
             "out_proj": "to_out"}
AROUND_NUMBERS = re.compile(r"_(?=\d)|(?<=\d)_")        # in an original name, these were dots
CONTEXT_LAYER = re.compile(r".*attn2_to_[kv]")
# Files that change a model by another formula, or that are something else.
RELATIVES = {
    r"\.dora_scale|lora_magnitude_vector": "a DoRA",
    r"oft_blocks|oft_diag|\.b?oft_[rRs]\b": "an OFT or BOFT",
    r"(?<!\.lora_[AB])\.[ab][12]\.weight$|glora_": "a GLoRA",
    r"\.on_input$|ia3_l\b": "an (IA)^3",
    r"\.lora_E\b": "an AdaLoRA",
    r"vera_lambda": "a VeRA",
    r"\.(down|up)_list\.": "a DyLoRA",
    r"lora_(B|up)(\.[^.]+)?\.bias$": "a LoRA with biases",
    r"^(unet|text_encoder):\d+": "a LoRA of the first kind, which numbers its layers",
    r"^lllite_|\.lllite": "a ControlNet-LLLite",
    r"^\d+\.[01]\.linear\.": "a hypernetwork",
    r"^ip_adapter\.|^image_proj\.": "an IP-Adapter"}
HYPERNETWORK = b"layer_structure"                       # in its pickle, where numbers are keys


def merge_lora(parts, path, weight, dtype, encoders=None):
    """Add a LoRA to the weights of models: W += weight * alpha / rank * up @ down.

    parts: {"unet": UNet2DConditionModel, "text_encoder": ..., "text_encoder_2": ...}, those that
    the pipeline has. path: a .safetensors file, or one that torch.save wrote. encoders: as for
    add_word; they learn the words that a file brings along. The sum is computed in float32 or
    wider; a changed weight is a new array of `dtype`. A note names what is left out, because it is
    no LoRA or because these models have no such layer.
    Raises TinyldmError, before anything is changed, for a file that is not a LoRA, one for another
    model or with another formula, half a pair, and numbers that are not finite or become so.
    """
    path = Path(path)
    changes, words, left_out = read_lora(parts, path)
    new = {word: textual_inversion.rows_for(encoders, path, tensors)
           for word, tensors in words.items()} if encoders else {}
    for layer, parameter, own in changes:               # once only to check, to need no memory
        if not is_finite(merged(parameter, own, weight, dtype)):
            raise TinyldmError(f"{path} with the weight {weight:g} makes numbers in {layer} that "
                               f"are too large for {np.dtype(dtype)}: use a smaller weight, or "
                               "another file")
    for _, parameter, own in changes:
        parameter.data = merged(parameter, own, weight, dtype)
    for word, rows in new.items():
        try:
            textual_inversion.learn(encoders, rows, word)
        except TinyldmError:                            # the vocabulary has it, perhaps from here
            left_out.append(f"the word {word}, which the vocabulary has already")
    left_out += [f"the word {word}" for word in words.keys() - new.keys()]
    if left_out:
        note(f"{path} is added, but this model has no place for {shorten(left_out)}")


def merged(parameter, changes, weight, dtype):
    """The parameter's array after its changes [(Change, scale)]; not finite if they overflow."""
    W, shape = parameter.data, file_shape(parameter)
    xp, sums = get_xp(W), wide(np.promote_types(W.dtype, dtype))
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks at the result
        for change, scale in changes:
            delta = (weight * scale * change.read(xp, sums)).reshape(shape)     # as in the file
            W = W + (delta.transpose(OUR_AXES) if delta.ndim == 4 else delta)   # (K,K,C,O)
        return xp.ascontiguousarray(W.astype(dtype))


# ---- reading and checking -------------------------------------------------------------------

def read_lora(parts, path):
    """A file -> changes, words, names left out. Raises: see merge_lora.

    changes: [(name, Parameter, [(Change, alpha / rank)])]. words: {word: {name: StoredTensor}}.
    """
    stored = read_tensors(path)
    settings = read_settings(path)
    check_relatives(path, stored)
    words, stored = textual_inversion.bundled(stored)
    layers = layers_by_spelling(parts)
    found, left_out, twice = find_layers(stored, path.parent.name, layers)
    if not any(tensors.keys() - {"alpha"} for tensors in found.values()):
        raise no_lora(path, stored)
    if twice:
        raise TinyldmError(f"{path} has two sets of matrices for one layer ({shorten(twice)}): "
                           "keep one of them")
    check_width(path, found, parts["unet"])
    nowhere = [tensor.name for target, tensors in found.items() if target not in layers
               for tensor in tensors.values()]
    # A text encoder is often the same in other models: if there are layers of the UNet, they say
    # whether this is the model.
    telling = [target for target in found if target[0] == "unet"] or list(found)
    if not any(target in layers for target in telling):
        raise TinyldmError(f"{path} was made for another model: names that match nothing here are "
                           f"{shorten(nowhere)}")
    fitting = {target: tensors for target, tensors in found.items() if target in layers}
    changes, no_bias = find_changes(path, settings, fitting, layers)
    return changes, words, left_out + nowhere + no_bias


def find_changes(path, settings, fitting, layers):
    """{target: {role: StoredTensor}} -> changes as in read_lora, names of biases that are missing.
    """
    changes, halves, wrong, no_bias = [], [], [], []
    for target, tensors in fitting.items():
        name, layer = layers[target]
        try:
            own = changes_of(tensors)
        except KeyError:
            own = []
        if not own:
            halves += [tensor.name for tensor in tensors.values()]
        for what in ("weight", "bias"):
            parameter = getattr(layer, what)
            here = [change for change in own if change.what == what]
            if parameter is None:
                no_bias += [f"{name}.bias"] * len(here)
            elif not all(fits(change, parameter, tensors) for change in here):
                sizes = " and ".join(f"{role} {tensors[role].shape}"
                                     for role in sorted(tensors, key=lambda role: role != "up"))
                wrong.append(f"{name} (expected {file_shape(parameter)}, found {sizes})")
            elif here:
                changes.append((f"{name}.{what}", parameter, [
                    (change, scale_of(settings, target[0], name, change, tensors, path))
                    for change in here]))
    if halves:
        raise TinyldmError(f"{path} must have all matrices of a layer, such as down and up, but "
                           f"has only a part for {shorten(halves)}: get it again")
    if wrong:
        raise TinyldmError(f"{path} was made for another model: shapes that do not fit are "
                           f"{shorten(wrong)}")
    return changes, no_bias


def fits(change, parameter, tensors):
    """Whether a Change has a parameter's shape, and its layer's alpha is one number."""
    O, *inputs = file_shape(parameter)
    alpha = tensors["alpha"].shape if "alpha" in tensors else ()
    return (change.shape(tuple(inputs[1:])) == (O, math.prod(inputs))
            and alpha in ((), (1,), (1, 1), (1, 1, 1, 1)))


# ---- names ----------------------------------------------------------------------------------

def find_layers(stored, folder, layers):
    """{name: StoredTensor} -> {target: {role: StoredTensor}}, names left out, names found twice.

    Left out are names that are not a LoRA's. folder: the name of the file's folder. layers: as
    from layers_by_spelling; a layer has one target, whatever the spelling in the file.
    """
    found, left_out, twice = {}, [], []
    for name, tensor in stored.items():
        match = KEY.fullmatch(name)
        if not match:
            left_out.append(name)
            continue
        role, target = ROLES.get(match[2], match[2] or match[3]), target_of(match[1], folder)
        if target in layers:
            target = target[0], flat(layers[target][0])
        if found.setdefault(target, {}).setdefault(role, tensor) is not tensor:
            twice.append(name)
    return found, left_out, twice


def target_of(name, folder=""):
    """A name in the file -> the part and the layer that it changes, underscores for dots.

    A name without a part belongs to that of the folder, as peft saves a model: to the text encoder
    if the name says so, else to the UNet.
    """
    name = WRAPPERS.sub("", name)
    prefix = PREFIX.match(name)
    if prefix:
        part, name = PARTS[prefix[1]], name[prefix.end():]
    else:
        part = PARTS.get(folder, "text_encoder" if TEXT_LAYER.match(name) else "unet")
    layer = flat(name)
    if part == "unet":                                  # the name may be the original one
        layer = flat(unet_name(AROUND_NUMBERS.sub(".", layer) + ".weight")).removesuffix("_weight")
    return part, layer


def layers_by_spelling(parts):
    """{target: (name of the layer, the layer)}, with every spelling of each layer's name."""
    return {(part, spelling): (name, layer) for part, model in parts.items()
            for name, layer in named_modules(model) if isinstance(layer, WeightedOp)
            for spelling in spellings(name)}


def spellings(name):
    """A layer's names: the public one, without `text_model.`, and with old diffusers' words."""
    names = [name, name.removeprefix("text_model.")]
    for word, old in OLD_WORDS.items():
        names += [name.replace(word, old) for name in names]
    return {flat(name) for name in names}


def flat(name):
    return name.replace(".", "_")


# ---- what is refused ------------------------------------------------------------------------

def check_relatives(path, stored):
    """Refuse a file that changes a model by a formula that is not supported."""
    for pattern, relative in RELATIVES.items():
        if any(re.search(pattern, name) for name in stored):
            raise TinyldmError(f"{path} is {relative}, which is not supported: use a plain LoRA")


def no_lora(path, stored):
    """The error for a file without any matrices of a LoRA."""
    if not stored and HYPERNETWORK in path.read_bytes():
        return TinyldmError(f"{path} is a hypernetwork, which is not supported: use a LoRA")
    _, kind = layout_of(stored)
    kind = "" if kind in (None, "LoRA") else f" but of the kind {kind}"
    return TinyldmError(f"{path} is no LoRA{kind}: expected pairs of names such as "
                        f"*.lora_down.weight and *.lora_up.weight, found {shorten(list(stored))}")


def check_width(path, found, unet):
    """Refuse a LoRA whose cross-attention expects a context of another width than the UNet's."""
    own = set(np.ravel(unet.settings.cross_attention_dim).tolist())
    for (_, layer), tensors in found.items():
        if not CONTEXT_LAYER.fullmatch(layer):
            continue
        with suppress(KeyError):                        # a matrix is missing: reported later
            for _, width in filter(None, (change.shape() for change in changes_of(tensors)
                                          if change.what == "weight")):
                if width not in own:
                    theirs, ours = (model_of_width("context", size) for size in (width, max(own)))
                    raise TinyldmError(f"{path} was made for {theirs}, but this is {ours}: use a "
                                       "LoRA made for it")
