"""The names and axes of weights in public files, and in the models here.

The models use today's public names, so most names are equal. Published files have three older
habits: VAE attention is named query/key/value/proj_attn, text encoders lack the `text_model.`
prefix, and the constant list of positions 0 to 76 is stored too.
"""
import re

from ..layers import OUR_AXES as OUR_AXES  # the axes of one weight: layers.py
from ..layers import file_shape as file_shape
from ..layers import to_file as to_file

POSITION_IDS = "text_model.embeddings.position_ids"     # stored by transformers < 4.31
# diffusers before 0.17 -> since then
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_NAME = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
# The same matrices were 1x1 convolutions in the original latent diffusion code.
VAE_ATTENTION_WEIGHT = re.compile(r"(encoder|decoder)\.mid_block\.attentions\.0\."
                                  r"(to_q|to_k|to_v|to_out\.0)\.weight")


def fitted(stored, wanted):
    """{name in the file: StoredTensor} -> {name in the model: StoredTensor in the model's shape}.

    wanted: the names of the model's parameters. A name that no rule turns into one of these is
    kept, and so is a second name of the same weight; strict loading reports both as unexpected.
    """
    tensors = {}
    for name, tensor in stored.items():
        public = _public_name(name, wanted)
        if public is not None:
            public = name if public in stored else public
            tensors[public] = _squeezed(public, tensor)
    return tensors


def _public_name(name, wanted):
    """The public name for any name in a file; None for the list of positions."""
    if name in wanted:
        return name
    prefixed = name if name.startswith("text_model.") else f"text_model.{name}"
    if prefixed in wanted:
        return prefixed
    if prefixed == POSITION_IDS:
        return None
    old = OLD_NAME.fullmatch(name)
    if old and (renamed := f"{old[1]}.{OLD_ATTENTION[old[2]]}.{old[3]}") in wanted:
        return renamed
    return name


def _squeezed(name, tensor):
    """A VAE attention matrix stored as a 1x1 convolution (O,C,1,1) -> (O,C); others unchanged."""
    if VAE_ATTENTION_WEIGHT.fullmatch(name) and tensor.shape[2:] == (1, 1):
        return tensor._replace(shape=tensor.shape[:2], strides=tensor.strides[:2])
    return tensor
