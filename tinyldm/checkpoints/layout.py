"""What public weight files call and how they order a weight, against what a model's parameter does.

Models use today's public names, so most names are equal. Three older habits are met in published
files: VAE attention named query/key/value/proj_attn, text encoders without the `text_model.`
prefix, and a stored list of positions, which says nothing. Pure functions of names and shapes.
"""
import re

FILE_AXES = (3, 2, 0, 1)                                # (K,K,C,O) -> (O,C,K,K)
OUR_AXES = (2, 3, 1, 0)                                 # (O,C,K,K) -> (K,K,C,O)

POSITION_IDS = "text_model.embeddings.position_ids"     # 0 to 76, stored by transformers < 4.31
# diffusers before 0.17 -> after
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_NAME = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
# The same matrices were 1x1 convolutions in the original latent diffusion code.
VAE_ATTENTION_WEIGHT = re.compile(r"(encoder|decoder)\.mid_block\.attentions\.0\."
                                  r"(to_q|to_k|to_v|to_out\.0)\.weight")


def file_shape(parameter):
    """The shape a parameter has in a public file: convolutions (O,C,K,K), all others as here."""
    shape = parameter.shape
    return tuple(shape[axis] for axis in FILE_AXES) if len(shape) == 4 else tuple(shape)


def to_file(array):
    """An array of a parameter in the file's layout: (K,K,C,O) -> (O,C,K,K), others as they are."""
    return array.transpose(FILE_AXES) if array.ndim == 4 else array


def fitted(stored, wanted):
    """{name in the file: StoredTensor} -> {name in the model: StoredTensor as the model has it}."""
    tensors = public_names(stored, wanted)
    return {name: squeezed(name, tensor) for name, tensor in tensors.items()}


def public_names(stored, wanted):
    """{name in the file: tensor} -> {name in the model: tensor}, for a model with names `wanted`.

    A name that no rule turns into a wanted one is kept, and so is one whose place is taken already:
    strict loading then reports it as unexpected.
    """
    names = {}
    for name, tensor in stored.items():
        public = _public_name(name, wanted)
        if public is not None:
            names[name if public in stored and public != name else public] = tensor
    return names


def _public_name(name, wanted):
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


def squeezed(name, tensor):
    """A VAE attention matrix stored as 1x1 convolution (O,C,1,1) -> (O,C); others as they are."""
    if VAE_ATTENTION_WEIGHT.fullmatch(name) and tensor.shape[2:] == (1, 1):
        return tensor._replace(shape=tensor.shape[:2], strides=tensor.strides[:2])
    return tensor
