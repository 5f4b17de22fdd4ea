"""The names and shapes in published weight files, made from published configs.

published_configs.json holds the configs as the hub has them. Of a folder, the reference's classes
on PyTorch's meta device give the names and shapes, without memory for the weights. Of a single
file, the rules of single_files.py turn them into the original ones. DIGESTS says that both are
those of the real files: it was made from lists of what these files hold.
"""
import hashlib
import json
from functools import cache
from pathlib import Path

from tests.support import single_files
from tests.support.extra import diffusers, torch, transformers
from tests.support.reference import reference_names
from tinyldm.models import (
    AutoencoderKL,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    UNet2DConditionModel,
)

CONFIGS = json.loads(Path(__file__).with_name("published_configs.json").read_text())
MODELS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel,
          "text_encoder_2": CLIPTextModelWithProjection}
SINGLE_FILES = {"sd1": "SD 1.5", "sd2": "SD 2.1", "sdxl": "SDXL", "sdxl_refiner": "SDXL refiner",
                "x4": "SD x4 upscaler"}
DIGESTS = {
    "SD 1.5": "460f9bb5ecfb18ca", "SD 2.1": "efd1d16ed6e69eeb", "SDXL": "4e414f4c640ac917",
    "SD x4 upscaler": "2b736fe018a85bb3",
    "sd1": "60460e882f7ac4bf", "sd2": "8ffdd5729a2c5b0f", "sdxl": "a315649793940cb9",
    "sdxl_refiner": "f9e7a41f551df181"}


@cache
def published_shapes(model, part):
    """{name: shape} of a part of a published folder, in PyTorch's order of axes."""
    kind, config = MODELS[part].__name__, CONFIGS[model][part]
    if "text" in part:
        build, config = getattr(transformers, kind), transformers.CLIPTextConfig(**config)
        with torch.device("meta"):
            reference = build(config)
    else:
        with torch.device("meta"):
            reference = getattr(diffusers, kind).from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in reference_names(reference)}


@cache
def original_rows(kind):
    """Of a single file, (part, name, shape, public name, public shape, what is done to it) each.

    copy, squeeze (a 1x1 convolution becomes a matrix), T (transposed), a third of the rows
    (0, 1 or 2), or drop, which has no public name.
    """
    model, found = SINGLE_FILES[kind], []
    xl, levels = kind.startswith("sdxl"), 3 if kind == "sdxl" else 4
    openclip = kind in ("sd2", "x4")                    # as the only text encoder
    for part in [part for part in MODELS if part in CONFIGS[model]]:
        if kind == "sdxl_refiner" and part == "vae":
            continue                                    # its list has none
        shapes = published_shapes(model, part)
        if part == "unet":
            prefixes = single_files.unet_prefixes(levels, kind in ("sdxl", "x4"))
            found += [(part, f"model.diffusion_model.{single_files.renamed(name, prefixes)}", shape,
                       name, shape, "copy") for name, shape in shapes.items()]
        elif part == "vae":
            for name, shape in shapes.items():
                theirs = single_files.renamed(name, single_files.vae_prefixes(3 + (kind != "x4")))
                is_matrix = "attentions" in name and len(shape) == 2
                found.append((part, f"first_stage_model.{theirs}", shape + is_matrix * (1, 1),
                              name, shape, "squeeze" if is_matrix else "copy"))
        elif openclip or part == "text_encoder_2":
            place = {"sdxl": "conditioner.embedders.1",
                     "sdxl_refiner": "conditioner.embedders.0"}.get(kind, "cond_stage_model")
            found += open_clip_rows(part, f"{place}.model.", shapes, unused_layer=openclip)
        else:
            start = f"{'conditioner.embedders.0' if xl else 'cond_stage_model'}.transformer."
            found += [(part, start + name, shape, name, shape, "copy")
                      for name, shape in shapes.items()]
            positions = "text_model.embeddings.position_ids"
            found.append((part, start + positions, (1, 77), None, None, "drop"))
    return found


def open_clip_rows(part, start, shapes, unused_layer):
    layers = 1 + max(int(name.split(".")[3]) for name in shapes if ".layers." in name)
    names = single_files.open_clip_names(layers + unused_layer)
    rows, width = [], shapes["text_model.final_layer_norm.weight"][0]
    for name, shape in shapes.items():
        if name == "text_projection.weight":
            rows.append((part, f"{start}text_projection", shape[::-1], name, shape, "T"))
            continue
        theirs, third = names[name]
        whole = shape if third is None else (3 * shape[0], *shape[1:])
        rows.append((part, start + theirs, whole, name, shape, "copy" if third is None else third))
    if unused_layer:
        rows.append((part, f"{start}text_projection", (width, width), None, None, "drop"))
        last = f"text_model.encoder.layers.{layers}."
        unused = {theirs for name, (theirs, _) in names.items() if name.startswith(last)}
        rows += [(part, start + theirs, (2,), None, None, "drop") for theirs in sorted(unused)]
    return [*rows, (part, f"{start}logit_scale", (), None, None, "drop")]


def digest(rows):
    """Of (part, name, shape) in folders; of original_rows, of which a dropped one is a name."""
    lines = sorted("\t".join(str(list(x) if isinstance(x, tuple) else x) for x in row)
                   for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
