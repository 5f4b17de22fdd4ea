"""The shape of every block's output, as `python -m tinyldm.inspect FOLDER --shapes` prints it.

A model is called once on zeros, with a hook on every layer. Convolutions, linear layers, norms,
activations and attentions do not compute: their hooks return zeros of the output's shape. All else
is the model's own code, so the shapes are those of a real call. Weights are not read.
"""
import inspect
import math
import os
from pathlib import Path

import numpy as np

from ..checkpoints.components import build_model, has_config
from ..checkpoints.folders import fit_file
from ..checkpoints.formats.reading import read_tensors
from ..checkpoints.single_file.alone import one_component
from ..checkpoints.single_file.kinds import SINGLE_FILE, layout_of, recognise
from ..checkpoints.single_file.statements import read_statements
from ..configs import sides
from ..errors import TinyldmError
from ..layers import (
    Activation,
    Conv2d,
    DownsampleAverage,
    Linear,
    Upsample,
    WeightedOp,
    forward_hooks,
    named_modules,
)
from ..models.blocks import Attention
from ..models.vae import AutoencoderKL

SIZE = 64                       # of the input, where neither the caller nor the config says one
TOKENS = 77                     # of CLIP's prompts


def describe_shapes(path, size=None):
    """Lines on every model of a folder or a file. size: height and width of the input, or None.

    Of a folder only config.json is read. Raises TinyldmError for what is neither, and for a model
    or a size that cannot be called.
    """
    path = Path(path)
    if not os.path.isfile(path / "model_index.json"):
        return [line for name, module in _models(path).items()
                for line in of_model(name, module, size)]
    lines = []
    for config in sorted([*path.glob("*/config.json"), *path.glob("config.json")]):
        try:
            module = build_model(config.parent)
        except TinyldmError as error:                   # go on with the others
            lines.append(f"{config.parent}: not built: {error}")
        else:
            lines += of_model(config.parent, module, size)
    return lines


def _models(path):
    """{name: model without weights} of a component's folder, of its file, or of a single file."""
    if os.path.isdir(path):
        return {path: build_model(path)}
    stored = read_tensors(path)
    if has_config(path):
        return {path: build_model(path.parent)}
    if layout_of(stored)[1] == SINGLE_FILE:
        said = read_statements(stored, path)
        return fit_file(stored, recognise(stored, path, said.prediction_type), said)[0]
    alone = one_component(stored, path)
    return {path: alone.model(alone.config)}


def of_model(title, module, size=None):
    """Lines on a model: its inputs, then every block's output in the order of the calls."""
    for parameter in module.parameters():               # zeros that need no memory
        parameter.data = np.broadcast_to(np.float32(0), parameter.shape)
    numbers = sum(math.prod(parameter.shape) for parameter in module.parameters())
    lines = [f"{title}: {type(module).__name__}, {numbers:,} parameters"]
    for call, arrays in calls(module, size):
        try:
            rows = trace(module, lambda call=call, arrays=arrays: call(**arrays))
        except (AssertionError, ValueError) as error:   # a size that does not fit the levels
            raise TinyldmError(f"the model cannot be called with these inputs ({error}): choose "
                               "another --size") from None
        rows = [("", f"{'channels last, as here':<24} channels first, as in PyTorch"),
                *((f"{name} (input)", _shown(array)) for name, array in arrays.items()), *rows]
        width = max(len(name) for name, _ in rows)
        lines += [f"  {name:<{width}}  {shapes}" for name, shapes in rows]
    return lines


def trace(module, run):
    """[(name, shapes of the output)] of the blocks that run() calls, in the order of the calls.

    A block is a layer that consists of layers; what stands between blocks, such as conv_in, has a
    row too. The last row, "output", is what run() returns.
    """
    named, rows = list(named_modules(module)), []
    blocks = {name for name, layer in named if any(named_modules(layer))}
    shown = {layer for name, layer in named if name in blocks or _is_between(name, layer, blocks)}

    def hook(name, layer):
        def traced(forward, *inputs, **options):
            row = [name, ""]
            if layer in shown:
                rows.append(row)
            shape = quick_shape(layer, *inputs[:1])
            y = forward(*inputs, **options) if shape is None else np.zeros(shape, np.float32)
            row[1] = _shown(y)
            return y
        return traced

    with forward_hooks({layer: hook(name, layer) for name, layer in named}), (
            np.errstate(all="ignore")):                 # zeros may be divided by their length
        y = run()
    return [*map(tuple, rows), ("output", _shown(y))]


def quick_shape(layer, x=None):
    """The shape of a layer's output for x, for the layers that take long; None for any other."""
    if isinstance(layer, Linear):
        return *x.shape[:-1], layer.weight.shape[0]
    if isinstance(layer, Conv2d):
        *kernel, _, O = layer.weight.shape
        zeros = np.broadcast_to(layer.padding, (2, 2)).sum(axis=1).tolist()     # of both axes
        return (len(x), *((side + more - k) // layer.stride + 1
                          for side, more, k in zip(x.shape[1:3], zeros, kernel)), O)
    if isinstance(layer, Attention):
        return x.shape
    if isinstance(layer, WeightedOp):                   # a norm
        return x.shape
    if isinstance(layer, Activation):                   # by one row: GEGLU halves the width
        return *x.shape[:-1], layer.forward(np.zeros((1, x.shape[-1]), x.dtype)).shape[-1]
    return None


def calls(module, size=None):
    """[(function, {name: array})]: what a model is called with; a VAE encodes and decodes."""
    if not isinstance(module, AutoencoderKL):
        # StableUnCLIPImageNormalizer holds two vectors, and no forward.
        return [(module, inputs(module, size))] if hasattr(module, "forward") else []
    settings, f = module.settings, module.vae_scale_factor
    H, W = sides(size or settings.sample_size or SIZE)
    return [(module.encode, {"images": np.zeros((1, H, W, settings.in_channels), np.float32)}),
            (module.decode, {"z": np.zeros((1, H // f, W // f, settings.latent_channels),
                                           np.float32)})]


def inputs(module, size=None):
    """{argument: array of zeros} for the forward of a model: those that it requires.

    Raises TinyldmError for an argument that is not known here.
    """
    settings = getattr(module, "settings", None)
    places = [settings, *(getattr(settings, part, None) for part in ("text", "vision"))]    # CLIP

    def own(*keys):                                     # the first that the config has, or None
        return next((value for key in keys for place in places
                     if (value := getattr(place, key, None))), None)

    H, W = sides(size or own("sample_size", "image_size") or SIZE)
    D = own("cross_attention_dim", "embedding_dim")
    D = D[0] if isinstance(D, (list, tuple)) else D     # one item per level, all alike
    shapes = {
        "latents": ((1, H, W, own("in_channels")) if own("in_channels")
                    else (1, own("embedding_dim"))),    # a prior's: one embedding
        "images": (1, H, W, 3), "timesteps": (1,),
        "context": (1, own("num_embeddings") or TOKENS, D),
        "ids": (1, own("max_position_embeddings")),
        "text_embeds": (1, own("embedding_proj_dim", "embedding_dim")),
        "timestep_cond": (1, own("time_cond_proj_dim")), "time_ids": (1, 6), "class_labels": (1,)}
    if own("addition_embed_type"):                      # Stable Diffusion XL: P + 6F
        shapes["text_embeds"] = (1, own("projection_class_embeddings_input_dim")
                                 - 6 * own("addition_time_embed_dim"))
    kind = own("class_embed_type")
    if kind in ("projection", "simple_projection"):
        shapes["class_labels"] = (1, own("projection_class_embeddings_input_dim"))
    elif kind == "identity":
        shapes["class_labels"] = (1, own("temb_channels") or 4 * own("block_out_channels")[0])
    built = {"timestep_cond": own("time_cond_proj_dim"), "text_embeds": own("addition_embed_type"),
             "time_ids": own("addition_embed_type"),
             "class_labels": kind or own("num_class_embeds")}
    arrays = {}
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if parameter.default is not parameter.empty and not built.get(name):
            continue                                    # optional, and not in this model
        if None in shapes.get(name, (None,)):
            raise TinyldmError(f"the shapes of a {type(module).__name__} are not known here: its "
                               f"forward takes {name}")
        kinds = {"ids": np.int64, "class_labels": np.int64 if kind is None else np.float32}
        arrays[name] = np.zeros(shapes[name], kinds.get(name, np.float32))
    return arrays


def _is_between(name, layer, blocks):
    """Whether a layer without layers stands beside blocks: in the model, in its encoder or decoder,
    or as a block's last layer, which resamples."""
    owner, _, own = name.rpartition(".")
    if own.isdigit():
        return isinstance(layer, (Upsample, DownsampleAverage))
    beside = any(block.startswith(f"{owner}.") for block in blocks)
    return not owner or beside and not any(word.isdigit() for word in owner.split("."))


def _shown(y):
    """An output's shapes: "(1, 64, 64, 4)", of several arrays side by side."""
    if isinstance(y, (list, tuple)):
        return ", ".join(map(_shown, y))
    if getattr(y, "ndim", 0) == 4:
        B, H, W, C = y.shape
        return f"{f'({B}, {H}, {W}, {C})':<24} ({B}, {C}, {H}, {W})"
    return str(getattr(y, "shape", type(y).__name__))

