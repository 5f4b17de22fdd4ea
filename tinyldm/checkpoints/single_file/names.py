"""The original names of Stable Diffusion's weights, as in single files -> the public names.

    model.diffusion_model.*     the UNet, with one list of blocks down and one up
    first_stage_model.*         the VAE; the decoder's levels are numbered from the picture
    cond_stage_model.*          the text encoder: CLIP with its public names, or OpenCLIP

SDXL has `conditioner.embedders.0.*` and `.1.*` in place of the last one. Some programs put
the words of WRAPPERS before all of these.
Source: CompVis/latent-diffusion and Stability-AI/stablediffusion (openaimodel.py, model.py),
mlfoundations/open_clip (transformer.py).
"""
import re

from ...errors import TinyldmError
from ..layout import is_leftover

LAYERS = 2                  # residual blocks per level of the encoder, in every Stable Diffusion
VAE_LEVELS = 4              # except in the x4 upscaler

# Whatever programs put before the names: model., module., state_dict., pipeline. ...
WRAPPERS = re.compile(r"(?:[\w-]+\.)+?"
                      r"(?=(?:model\.diffusion_model|first_stage_model|cond_stage_model|"
                      r"conditioner)\.)")

UNET_NAMES = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
              "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
              "label_emb": "class_embedding",           # a table, the x4 upscaler's
              "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
UNET_BLOCK = re.compile(r"(input|output)_blocks\.(\d{1,3})\.(\d)\.(.+)")
UNET_MIDDLE = re.compile(r"middle_block\.([012])\.(.+)")
PUBLIC_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.([a-z]+)\.(\d+)\.(.+)")
PUBLIC_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)")
UNET_RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
               "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}

VAE_BLOCK = re.compile(r"(encoder|decoder)\.(down|up)\.(\d{1,3})\.(.+)")
VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(block|attn)_([12])\.(.+)")
VAE_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0",
                 "norm": "group_norm"}

OPEN_CLIP = {"positional_embedding": "text_model.embeddings.position_embedding.weight",
             "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
             "ln_final.weight": "text_model.final_layer_norm.weight",
             "ln_final.bias": "text_model.final_layer_norm.bias"}
OPEN_CLIP_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
OPEN_CLIP_WORDS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
                   "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj"}


def by_part(stored, text_layers, vae_levels=VAE_LEVELS):
    """{name in the file: StoredTensor} -> {part: {public name: StoredTensor}}, {name: the rest}.

    A part has the name of its diffusers folder. text_layers: if OpenCLIP is the only text encoder,
    how many of its layers the model uses; the next layer and what follows it are dropped.
    vae_levels: how many the VAE has. A matrix with q, k and v in its rows becomes three.
    """
    found, names = {}, {}
    for name, tensor in stored.items():
        if not is_leftover(name) and not _is_marker(name, tensor):
            bare = _unwrapped(name)
            names[name if bare in names or bare != name and bare in stored else bare] = tensor
    for name, tensor in names.items():
        prefix, part, rename = next(row for row in PREFIXES if name.startswith(row[0]))
        inner, tensors = name.removeprefix(prefix), found.setdefault(part, {})
        if rename is open_clip_names:
            dropped = _is_dropped(part, inner, text_layers)
            renamed = {} if dropped else open_clip_names(inner, tensor)
        elif rename is vae_name:
            renamed = {vae_name(inner, vae_levels): tensor}
        else:
            renamed = {rename(inner) if rename else inner: tensor}
        for public, piece in renamed.items():
            tensors[tensor.name if public in tensors else public] = piece
    rest = found.pop(None, {})
    return found, rest


def _unwrapped(name):
    """A name without words before those that name a part, nor torch.compile's in it."""
    name = WRAPPERS.sub("", name, count=1) if WRAPPERS.match(name) else name
    return name.replace("._orig_mod.", ".")


def _is_marker(name, tensor):
    """Whether a tensor beside the models holds at most one number: a counter, a flag."""
    return tensor.shape in ((), (0,), (1,)) and "." not in name


def with_ema_weights(stored, path):
    """The tensors, with the UNet's EMA (averaged) weights in place of the trained ones.

    The original code names them model_ema. and the UNet's name without `model.` and its dots.
    Others keep the dots, or write ema., ema_model. or _ema anywhere in the name.
    Raises TinyldmError for a file that does not hold all of them.
    """
    unet = [name for name in stored if not is_leftover(name)
            and _unwrapped(name).startswith("model.diffusion_model.")]
    averages = {_short(name): tensor for name, tensor in stored.items() if EMA_WORD.search(name)}
    found = {name: averages[_short(name)] for name in unet if _short(name) in averages}
    if len(found) < len(unet) or not unet:
        raise TinyldmError(f"{path} holds averaged weights (model_ema.*) of {len(found)} of the "
                           f"UNet's {len(unet)} tensors: load it without ema")
    return stored | found


EMA_WORD = re.compile(r"(^|[._])ema(?=[._]|$)")


def _short(name):
    """The name of a UNet's tensor, trained or averaged, without dots and what stands before."""
    letters = re.sub(r"[._]", "", EMA_WORD.sub("", name))
    return re.sub(r"^(model|unet)+", "", letters.rpartition("diffusionmodel")[2])


# ---- the UNet and the VAE -------------------------------------------------------------------

def unet_name(name, layers=LAYERS):
    """A UNet's original name -> the public one. layers: residual blocks per level of the encoder.

    input_blocks.n counts conv_in, then for each level its residual blocks and its downsampler.
    output_blocks.n counts the residual blocks; an upsampler is the last module of such a block.
    """
    stem, _, kind = name.rpartition(".")
    if stem in UNET_NAMES:
        return f"{UNET_NAMES[stem]}.{kind}"
    if match := UNET_MIDDLE.fullmatch(name):
        number, inner = int(match[1]), match[2]
        return ("mid_block." + (f"attentions.0.{inner}" if number == 1 else
                                f"resnets.{number // 2}.{renamed(inner, UNET_RESNET)}"))
    if not (match := UNET_BLOCK.fullmatch(name)):
        return name
    side, number, module, inner = match[1], int(match[2]), int(match[3]), match[4]
    down = side == "input"
    level, layer = divmod(number - down, layers + 1)
    block = f"{'down' if down else 'up'}_blocks.{level}"
    if inner.startswith("op."):
        return f"{block}.downsamplers.0.conv.{inner.removeprefix('op.')}"
    if inner.startswith("conv."):
        return f"{block}.upsamplers.0.{inner}"
    if module == 0:
        return f"{block}.resnets.{layer}.{renamed(inner, UNET_RESNET)}"
    return f"{block}.attentions.{layer}.{inner}"


def original_unet_layer(layer, layers=LAYERS):
    """The public name of a UNet's layer -> the original one: the inverse of unet_name."""
    stems = {public: original for original, public in UNET_NAMES.items()}
    words = {public: original for original, public in UNET_RESNET.items()}
    if match := PUBLIC_MIDDLE.fullmatch(layer):
        kind, number, inner = match[1], int(match[2]), match[3]
        return (f"middle_block.1.{inner}" if kind == "attentions" else
                f"middle_block.{2 * number}.{words.get(inner, inner)}")
    if not (match := PUBLIC_BLOCK.fullmatch(layer)):
        return stems.get(layer, layer)
    way, level, kind, number, inner = match[1], int(match[2]), match[3], int(match[4]), match[5]
    side, first = "input" if way == "down" else "output", level * (layers + 1) + (way == "down")
    if kind == "downsamplers":
        return f"input_blocks.{first + layers}.0.op"
    if kind == "upsamplers":                            # after a residual block and a transformer
        return f"output_blocks.{first + layers}.2.conv"
    if kind == "resnets":
        return f"{side}_blocks.{first + number}.0.{words.get(inner, inner)}"
    return f"{side}_blocks.{first + number}.1.{inner}"


def vae_name(name, levels=VAE_LEVELS):
    """A VAE's original name -> the public one. levels: how many it has.

    decoder.up.n counts levels from the picture; the public names count from the latents.
    """
    if match := VAE_MIDDLE.fullmatch(name):
        side, what, number, inner = match[1], match[2], int(match[3]), match[4]
        return (f"{side}.mid_block." +
                (f"attentions.0.{renamed(inner, VAE_ATTENTION)}" if what == "attn" else
                 f"resnets.{number - 1}.{inner}"))
    if match := VAE_BLOCK.fullmatch(name):
        side, way, level, inner = match[1], match[2], int(match[3]), match[4]
        level = level if way == "down" else levels - 1 - level
        inner = inner.replace("block.", "resnets.", 1).replace("nin_shortcut", "conv_shortcut")
        inner = re.sub(r"^(down|up)sample\.", r"\1samplers.0.", inner)
        return f"{side}.{way}_blocks.{level}.{inner}"
    return name.replace(".norm_out.", ".conv_norm_out.")


def renamed(name, words):
    """A name whose words before the last one are replaced, as the table says."""
    stem, _, kind = name.rpartition(".")
    return f"{words.get(stem, stem)}.{kind}"


# ---- OpenCLIP -------------------------------------------------------------------------------

def open_clip_names(name, tensor):
    """An OpenCLIP weight -> {public name: tensor}.

    A matrix or bias (3D,...) with q, k, v in its rows becomes three tensors. text_projection is
    stored for x @ weight, in the public files for x @ weight.T.
    """
    if name in OPEN_CLIP:
        return {OPEN_CLIP[name]: tensor}
    if name == "text_projection":
        return {"text_projection.weight": tensor.transposed()}
    if not (match := OPEN_CLIP_LAYER.fullmatch(name)):
        return {name: tensor}
    layer, inner = f"text_model.encoder.layers.{match[1]}.", match[2]
    if inner in ("attn.in_proj_weight", "attn.in_proj_bias") and tensor.shape:
        D, kind = tensor.shape[0] // 3, inner.removeprefix("attn.in_proj_")
        return {f"{layer}self_attn.{word}_proj.{kind}": tensor.rows(i * D, (i + 1) * D)
                for i, word in enumerate("qkv")}
    return {layer + renamed(inner, OPEN_CLIP_WORDS): tensor}


def _is_dropped(part, name, text_layers):
    """Whether an OpenCLIP weight has no effect on the UNet: if OpenCLIP is alone (Stable Diffusion
    2), its last layer. The projection after it is dropped by layout.fitted."""
    return part == "text_encoder" and name.startswith(f"transformer.resblocks.{text_layers}.")


# The beginning of a name, the part it belongs to, and the rule for the rest of the name, if any.
PREFIXES = (
    ("model.diffusion_model.", "unet", unet_name),
    ("first_stage_model.", "vae", vae_name),
    ("vae.", "vae", vae_name),                          # re-packed files
    ("cond_stage_model.transformer.", "text_encoder", None),
    ("cond_stage_model.model.", "text_encoder", open_clip_names),
    ("conditioner.embedders.0.transformer.", "text_encoder", None),
    ("conditioner.embedders.0.model.", "text_encoder", open_clip_names),
    ("conditioner.embedders.1.model.", "text_encoder_2", open_clip_names),
    ("conditioner.embedders.1.transformer.", "text_encoder_2", None),
    ("conditioner.embedders.1.", "text_encoder_2", None),
    ("conditioner.embedders.0.", "text_encoder", None),
    ("cond_stage_model.", "text_encoder", None),
    ("", None, None),                                   # of no part
)
