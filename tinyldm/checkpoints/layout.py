"""The names and axes of weights in public files, and in the models here.

The models use today's public names, so most names are equal. Published files have three older
habits: VAE attention is named query/key/value/proj_attn, CLIP's encoders lack the `text_model.` or
`vision_model.` prefix, and the constant list of positions 0 to 76 is stored too. Programs that
train and merge models leave more beside the weights: see is_leftover.
"""
import re

# What says nothing about a model. Any word of a name, between dots, decides.
LEFTOVERS = "|".join((
    r"position_ids|attn_mask|causal_(attention_)?mask",         # constants of a text encoder
    r"logit_scale|logit_bias",                                  # only for training CLIP
    r"betas|alphas(_cumprod)?(_prev)?|(log_)?sigmas|sqrt_\w+|log_one_minus_\w+|posterior_\w+|"
    r"logvar|lvlb_weights",                                     # tables of the noise schedule
    r"\w*loss(es|_\w+)?|lpips|\w*discriminator|\w*perceptual\w*",   # how the VAE was trained
    r"embedding_manager",                                       # of a textual inversion's training
    r"num_batches_tracked",                                     # how many batches a norm has seen
    r"optimi[sz]er\w*|lr_scheduler\w*|(grad_)?scaler|global_step|epoch|num_updates",
    r"safety_checker|safety_model|v_pred|ztsnr",                # the last two: see statements.py
))
LEFTOVER = re.compile(rf"(.*\.)?({LEFTOVERS})(\..*)?|(.*[._])?ema([._].*)?")
# The halves of CLIP, which see texts and pictures. What comes after a half is its projection.
HALVES = {"text_model.": re.compile(r"(.*\.)?(text_model\..*|text_projection(\.weight)?)"),
          "vision_model.": re.compile(r"(.*\.)?(vision_model|visual|visual_projection)(\..*)?")}
PROJECTION = re.compile(r"(.*\.)?(text|visual)_projection(\.weight)?")
# torch puts these words before the names of a module that it compiled or wrapped.
WRAPPER = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|module)\.")
# diffusers before 0.17 -> since then
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_NAME = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
# The same matrices were 1x1 convolutions in the original latent diffusion code.
VAE_ATTENTION_WEIGHT = re.compile(r"(encoder|decoder)\.mid_block\.attentions\.0\."
                                  r"(to_q|to_k|to_v|to_out\.0)\.weight")


def is_leftover(name):
    """Whether a name says that its tensor is no weight of a model: a table, a loss, an average."""
    return LEFTOVER.fullmatch(name) is not None


def fitted(stored, wanted):
    """{name in the file: StoredTensor} -> {name in the model: StoredTensor in the model's shape}.

    wanted: the names of the model's parameters. What is_leftover says, and what of CLIP the model
    has no use for, is left out. Any other name that no rule turns into a parameter's is kept, and
    so is a second name of the same weight; strict loading reports both as unexpected.
    """
    tensors = {}
    for name, tensor in stored.items():
        public = _public_name(name, wanted)
        if public in wanted or not (is_leftover(name) or _is_unused(name, wanted)):
            public = name if public in stored or public in tensors else public
            tensors[public] = _squeezed(public, tensor)
    return tensors


def ignored(stored, tensors):
    """The names of stored tensors that no StoredTensor in `tensors` comes from."""
    used = {tensor.name for tensor in tensors}
    return [name for name, tensor in stored.items() if tensor.name not in used]


def _is_unused(name, wanted):
    """Whether an encoder of CLIP has no use for a name: the other half, its own projection."""
    found = [half for half in HALVES if any(own.startswith(half) for own in wanted)]
    if not found:
        return False
    projects = any(PROJECTION.fullmatch(own) for own in wanted)
    return (any(HALVES[half].fullmatch(name) for half in HALVES.keys() - found)
            or not projects and bool(PROJECTION.fullmatch(name)))


def _public_name(name, wanted):
    """The public name for any name in a file; the name itself if no rule fits."""
    if name in wanted:
        return name
    bare = WRAPPER.sub(r"\1", name)
    if bare != name:
        public = _public_name(bare, wanted)
        return public if public in wanted else name
    for half in HALVES:
        if half + name in wanted:
            return half + name
    old = OLD_NAME.fullmatch(name)
    if old and (renamed := f"{old[1]}.{OLD_ATTENTION[old[2]]}.{old[3]}") in wanted:
        return renamed
    return name


def _squeezed(name, tensor):
    """A VAE attention matrix stored as a 1x1 convolution (O,C,1,1) -> (O,C); others unchanged."""
    if VAE_ATTENTION_WEIGHT.fullmatch(name) and tensor.shape[2:] == (1, 1):
        return tensor._replace(shape=tensor.shape[:2], strides=tensor.strides[:2])
    return tensor
