"""The original DiT's file, such as DiT-XL-2-256x256.pt: its names and config, in diffusers' terms.

It holds a transformer without a config, so shapes tell all but the number of heads. Its authors'
class computes a little otherwise than diffusers', to which the same weights were copied: the
timestep's frequencies, one eps, the number of guided channels. The config and the settings here are
the authors'.
Source: facebookresearch/DiT, models.py, sample.py; diffusers, scripts/convert_dit_to_diffusers.py.
"""
import math
import re

import numpy as np

from ...errors import TinyldmError
from ...models.dit import DiTConfig, positions
from ..layout import WRAPPER

TABLE, PATCHES, POSITIONS = ("y_embedder.embedding_table.weight", "x_embedder.proj.weight",
                             "pos_embed")
# In the file -> public.
NAMES = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1",
         "final_layer.linear": "proj_out_2"}
# The file has one embedding. diffusers' class has one in every block.
EMBEDDING = {"t_embedder.mlp.0": "timestep_embedder.linear_1",
             "t_embedder.mlp.2": "timestep_embedder.linear_2",
             "y_embedder.embedding_table": "class_embedder.embedding_table"}
BLOCK = re.compile(r"blocks\.(\d{1,4})\.(.+)")
IN_BLOCK = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0",
            "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
HEADS = {1152: 16}          # DiT-XL; in all others a head has 64 channels
SCHEDULER = {"_class_name": "DDPMScheduler", "beta_start": 1e-4, "beta_end": 0.02,
             "beta_schedule": "linear", "num_train_timesteps": 1000, "clip_sample": False,
             "variance_type": "learned_range", "timestep_spacing": "linspace"}
# Entries of model_index.json: sample.py takes 250 steps, guidance 4 on three channels.
SETTINGS = {"_num_inference_steps": 250, "_guidance_scale": 4.0, "_guided_channels": 3}


def is_dit(names):
    """Whether the names of a file's tensors are those of the original DiT."""
    bare = {WRAPPER.sub(r"\1", name) for name in names}
    return {TABLE, PATCHES, "blocks.0.adaLN_modulation.1.weight"} <= bare


def transformer(stored, path):
    """{name in the file: StoredTensor} -> the config of a DiTTransformer2DModel, and its tensors
    {public name: StoredTensor}. Names that are unknown stay as they are.

    Raises TinyldmError for shapes that no DiT has, and for positions that are not DiT's.
    """
    stored = {WRAPPER.sub(r"\1", name): tensor for name, tensor in stored.items()}
    config = _config(stored, path)
    try:
        DiTConfig.read(config)
    except TinyldmError as error:
        raise TinyldmError(f"{path} holds no DiT that is supported ({error})") from None
    if POSITIONS in stored:
        _check_positions(stored.pop(POSITIONS), config, path)
    tensors = {}
    for name, tensor in stored.items():
        tensors |= _public(name, tensor, config["num_layers"])
    return config, tensors


def _config(stored, path):
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    blocks = [int(match[1]) for match in map(BLOCK.fullmatch, stored) if match]
    last = shapes.get("final_layer.linear.weight", ())
    table = shapes.get(POSITIONS, (1, 0, 0))
    if list(map(len, (shapes[PATCHES], shapes[TABLE], last, table))) != [4, 2, 2, 3]:
        raise TinyldmError(f"{path} holds only a part of a DiT: get the whole file")
    (D, channels, p, _), classes = shapes[PATCHES], shapes[TABLE][0] - 1
    tokens = table[1] or (32 // max(p, 1)) ** 2         # without positions 256x256 pixels
    if D % 64 or not D or not p or math.isqrt(tokens) ** 2 != tokens:
        raise TinyldmError(f"{path} holds a DiT of {D} channels and {tokens} tokens: expected a "
                           "multiple of 64 channels, and tokens that make a square")
    heads = HEADS.get(D, D // 64)
    return {"num_layers": max(blocks) + 1, "num_attention_heads": heads,
            "attention_head_dim": D // heads, "in_channels": channels,
            "out_channels": last[0] // p ** 2, "patch_size": p,
            "sample_size": p * math.isqrt(tokens), "num_embeds_ada_norm": classes,
            "attention_bias": True, "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
            "norm_eps": 1e-6, "freq_shift": 0}


def _check_positions(tensor, config, path):
    """The file's positions must be those that the model computes; bfloat16 keeps two digits."""
    G = config["sample_size"] // config["patch_size"]
    D = config["num_attention_heads"] * config["attention_head_dim"]
    if tensor.shape != (1, G * G, D) or not np.allclose(
            tensor.read(np.float32)[0], positions(np, G, D), rtol=0, atol=0.01):
        raise TinyldmError(f"{path}: its pos_embed is not DiT's table of sines and cosines for "
                           f"{G}x{G} patches, so this is another model, which is not supported")


def _public(name, tensor, num_layers):
    """A tensor under its public names: one, three for q, k and v in one, or one for each block."""
    stem, _, kind = name.rpartition(".")
    if stem in NAMES:
        return {f"{NAMES[stem]}.{kind}": tensor}
    if stem in EMBEDDING:
        return {f"transformer_blocks.{i}.norm1.emb.{EMBEDDING[stem]}.{kind}": tensor
                for i in range(num_layers)}
    if not (match := BLOCK.fullmatch(stem)):
        return {name: tensor}
    block, inner = f"transformer_blocks.{match[1]}.", match[2]
    if inner == "attn.qkv" and tensor.shape:
        D = tensor.shape[0] // 3
        return {f"{block}attn1.to_{word}.{kind}": tensor.rows(i * D, (i + 1) * D)
                for i, word in enumerate("qkv")}
    return {f"{block}{IN_BLOCK[inner]}.{kind}" if inner in IN_BLOCK else name: tensor}
