"""Write LoRAs and textual inversions, as the other programs of the field read them.

lora.py and textual_inversion.py of training/stages/ -> here; those of this folder read. The
names of a layer's pair, down (rank, in) and up (out, rank):

    unet.down_blocks.0.attentions.0.[...].to_q.lora_A.weight, .lora_B.weight            diffusers
    lora_unet_down_blocks_0_attentions_0_[...]_to_q.lora_down.weight, .lora_up.weight,  kohya
        .alpha; for Stable Diffusion XL lora_unet_input_blocks_4_1_[...]_to_q

Source: diffusers 0.42 and peft 0.21 (save_lora_weights, get_peft_model_state_dict,
train_text_to_image_lora.py, textual_inversion.py); kohya-ss/sd-scripts (networks/lora.py,
train_network.py, library/sai_model_spec.py); Stability-AI/ModelSpec 1.0.1.
"""
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save

from ...backend import is_finite, to_host
from ...errors import TinyldmError
from ...layers import to_file
from ..formats.safetensors_file import write_safetensors
from ..formats.torch_file import NAMELESS
from ..single_file.names import original_unet_layer

LAYOUTS = ("diffusers", "kohya")
# What kohya's files call the model that was trained -> the same in ModelSpec's words.
BASES = {"sd_v1": "stable-diffusion-v1", "sd_v1_v": "stable-diffusion-v1",
         "sd_v2": "stable-diffusion-v2-512", "sd_v2_v": "stable-diffusion-v2-768-v",
         "sdxl_base_v1-0": "stable-diffusion-xl-v1-base"}
XL = "sdxl_base_v1-0"
KOHYA_PARTS = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}


class Rounding(NamedTuple):
    """What the dtype of a file did to the numbers."""

    numbers: int
    zeros: int                                          # that were not 0 before
    largest: float                                      # error


def write_lora(path, layers, layout="diffusers", metadata=None, *, base="sd_v1", dtype=np.float32):
    """Write a LoRA as one .safetensors file, whole or not at all -> Rounding.

    layers: {name: models.lora.LoRA}, named by the part of the pipeline and the layer, such as
    `unet.mid_block.attentions.0.proj_in`. base: a key of BASES, the model it belongs to; it decides
    kohya's names. metadata: {name: text} for the header, in kohya's layout only.
    kohya stores alpha in a tensor of its own. diffusers' layout has no place for alpha that all
    programs read, so there up is multiplied by alpha / rank, which makes alpha equal to the rank.
    Raises TinyldmError for numbers that are not finite in dtype, and if the file cannot be written.
    """
    assert layout in LAYOUTS and base in BASES, (layout, base)
    tensors, alphas = {}, {}
    for name, layer in layers.items():
        down, up = (to_file(to_host(matrix.weight.data)) for matrix in (layer.lora_A, layer.lora_B))
        if layout == "diffusers":
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": layer.scale * up}
        else:
            name = kohya_name(name, base)
            alphas[name] = layer.scale * len(down)
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up,
                        f"{name}.alpha": np.asarray(alphas[name])}
    tensors, rounding = narrowed(path, tensors, dtype)
    about = {}
    if layout == "kohya":
        ranks = {len(tensor) for name, tensor in tensors.items() if "lora_down" in name}
        about = kohya_metadata(path, base, "lora", metadata) | {
            "ss_network_module": "networks.lora", "ss_network_dim": _same(ranks),
            "ss_network_alpha": _same(set(alphas.values())), "ss_network_args": json.dumps({})}
        about |= hashes(tensors, about)
    write_safetensors(tensors, path, about)
    return rounding


def write_embedding(path, token, rows, layout="diffusers", metadata=None, *, base="sd_v1",
                    dtype=np.float32):
    """Write a textual inversion -> Rounding.

    rows: {part of the pipeline: vectors (n,D)}, text_encoder and for Stable Diffusion XL
    text_encoder_2. In diffusers' layout the word `token` is the tensor's name, and the second
    encoder has a file of its own, of the same name with _2. In kohya's, the file's name is the
    word. metadata, base, and what is raised: as for write_lora.
    """
    assert layout in LAYOUTS and base in BASES, (layout, base)
    path = Path(path)
    rows, rounding = narrowed(path, {part: to_host(array) for part, array in rows.items()}, dtype)
    if layout == "diffusers":
        files = {"text_encoder": path,
                 "text_encoder_2": path.with_name(f"{path.stem}_2{path.suffix}")}
        for part, vectors in rows.items():
            write_safetensors({token: vectors}, files[part])
        return rounding
    names = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"} if len(rows) == 2 else {
        "text_encoder": NAMELESS}
    tensors = {names[part]: vectors for part, vectors in rows.items()}
    about = kohya_metadata(path, base, "textual-inversion", metadata)
    write_safetensors(tensors, path, about | hashes(tensors, about))
    return rounding


def kohya_name(name, base):
    """unet.mid_block.attentions.0.proj_in -> kohya's name of this layer."""
    part, _, layer = name.partition(".")
    prefix = KOHYA_PARTS[part]
    if base == XL:
        prefix = prefix.replace("te_", "te1_")
        layer = original_unet_layer(layer) if part == "unet" else layer
    return prefix + layer.replace(".", "_")


def narrowed(path, tensors, dtype):
    """{name: array} -> the same in dtype, and the Rounding. Raises TinyldmError, see write_lora."""
    dtype, narrow = np.dtype(dtype), {}
    numbers, zeros, largest = 0, 0, 0.0
    for name, array in tensors.items():
        with np.errstate(over="ignore"):                # the next lines say it
            narrow[name] = np.asarray(array, dtype, order="C")
        if not is_finite(narrow[name]):
            raise TinyldmError(f"{name} has numbers that are not finite in {dtype}, so {path} was "
                               "not written: take float32, or a state of earlier steps")
        numbers += array.size
        zeros += int(((narrow[name] == 0) & (array != 0)).sum())
        if array.size:
            largest = max(largest, float(abs(narrow[name].astype(np.float64) - array).max()))
    return narrow, Rounding(numbers, zeros, largest)


# ---- the header of kohya's files ------------------------------------------------------------

def kohya_metadata(path, base, what, metadata):
    """What every file of kohya's layout says of itself, and `metadata`, which counts more.

    what: "lora" or "textual-inversion". The title is the file's own name, without its folder.
    """
    diffusers = what == "lora" and base != XL
    return {
        "ss_v2": str(base.startswith("sd_v2")), "ss_base_model_version": base,
        "ss_output_name": Path(path).stem,
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": f"{BASES[base]}/{what}",
        "modelspec.implementation":
            "diffusers" if diffusers else "https://github.com/Stability-AI/generative-models",
        "modelspec.title": Path(path).stem,
        "modelspec.prediction_type": "v" if base.endswith("_v") else "epsilon",
    } | (metadata or {})


def hashes(tensors, metadata):
    """The two names by which the web interfaces know the tensors, whatever else the header says.

    The first is the hash of the file after its header. The older one is that of 64 KiB after the
    first MiB, in a file whose header holds only what training wrote.
    """
    training = {name: text for name, text in metadata.items() if name.startswith("ss_")}
    file = save(tensors, training)
    start = 8 + int.from_bytes(file[:8], "little")
    return {"sshs_model_hash": hashlib.sha256(file[start:]).hexdigest(),
            "sshs_legacy_hash": hashlib.sha256(file[0x100000:0x110000]).hexdigest()[:8]}


def _same(values):
    """The one value of a set as text; "Dynamic", as kohya's tools write it, for several."""
    return f"{values.pop():g}" if len(values) == 1 else "Dynamic"
