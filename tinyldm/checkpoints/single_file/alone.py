"""A file with one component and no config: a VAE, a text encoder, CLIP, the original DiT, a UNet.

Such a file has the names of a whole single file, those of one part of it without the words before
them, or the public names; names.py turns all of these into the public ones. Shapes tell which
Stable Diffusion it belongs to, except for a VAE: those of SD 1, 2 and XL are shaped alike.
"""
import re
from typing import NamedTuple

from ...errors import TinyldmError
from ...models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ...models.clip_model import CLIPModel
from ...models.dit import DiTTransformer2DModel
from ...models.unet import UNet2DConditionModel
from ...models.unet_2d import UNet2DModel
from ...models.vae import AutoencoderKL
from . import clip, ddpm, dit, kinds, openai
from .names import by_part

# What layout_of says -> the words that stand before the names in a whole single file.
BARE = {"VAE": "first_stage_model.", "UNet": "model.diffusion_model."}
TEXT = {"original": "cond_stage_model.model.", "transformers": "cond_stage_model.transformer."}
# Words before the names that say nothing, and all that stands before a text encoder's.
BEFORE = re.compile(r"(?:(?:model|diffusion_model|module|_orig_mod|state_dict)\.)+|"
                    r".*?\.(?=text_model\.)")
LABELS = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder",
          "text_encoder_2": "second text encoder"}


class Alone(NamedTuple):
    """A component as found in a file."""

    model: type
    config: dict
    tensors: dict                                       # {public name: StoredTensor}


def one_component(stored, path, vae_config=None, xl=False):
    """The one component in {name: StoredTensor} -> Alone.

    vae_config: if given, the VAE is wanted, of a whole single file too, and has this config. None
    means that of Stable Diffusion 1, or with xl of Stable Diffusion XL; scaling_factor differs. Of
    a CLIP it may say the activation, see clip.whole.
    Raises TinyldmError for a file of several components, and of none that is known.
    """
    if ddpm.is_ddpm(stored):
        raise TinyldmError(f"{path} holds a network of the original DDPM code: put a config.json "
                           "with its description (ch, ch_mult, num_res_blocks, attn_resolutions, "
                           "resolution) beside it")
    if dit.is_dit(stored):
        return Alone(DiTTransformer2DModel, *dit.transformer(stored, path))
    if openai.is_openai(stored):
        return Alone(UNet2DModel, *openai.unet(stored, path))
    if clip.is_clip(stored):
        return Alone(CLIPModel, *clip.whole(stored, path, vae_config))
    found, rest = _parts(stored)
    if vae_config and "vae" in found:
        found, rest = {"vae": found["vae"]}, {}
    if len(found) > 1:
        raise TinyldmError(f"{path} holds {' and '.join(LABELS[part] for part in found)} of a "
                           "pipeline: read it with tinyldm.load or --weights; load_model reads "
                           "files of one component")
    if not found:
        layout, content = kinds.layout_of(stored)
        what = f"{content} in the {layout} layout" if content else (
            f"an unknown kind of model ({len(stored)} tensors: {', '.join(list(stored)[:4])} ...)")
        raise TinyldmError(f"{path} holds {what}: expected a UNet, a VAE or a text encoder of "
                           "Stable Diffusion 1, 2 or XL, a DiT or a CLIP")
    (part, tensors), = found.items()
    model, config = _model(part, tensors, path, vae_config, xl)
    return Alone(model, config, tensors | {tensor.name: tensor for tensor in rest.values()})


def _parts(stored):
    layers = kinds.SD2.text_encoder["num_hidden_layers"]
    found, rest = by_part(stored, layers)
    layout, content = kinds.layout_of(stored)
    start = TEXT.get(layout) if content == "text encoder" else BARE.get(content)
    if not found and start:
        bare = {start + BEFORE.sub("", name, count=1) if BEFORE.match(name) else start + name:
                tensor for name, tensor in stored.items()}
        found, rest = by_part(bare, layers)
    return found, rest


def _model(part, tensors, path, vae_config, xl):
    """The model class and the config of a part, by its tensors' shapes."""
    if part == "vae":
        return AutoencoderKL, vae_config or (kinds.SDXL if xl else kinds.SD1).vae
    if part == "unet":
        kind = kinds.kind_of_unet(tensors, path, "v_prediction")
        if kind is None:
            raise TinyldmError(f"{path} holds a part of a UNet, without its first convolution or "
                               "its attention to the text: get the whole file")
        return UNet2DConditionModel, kind.unet
    width = next((tensor.shape[-1] for name, tensor in tensors.items()
                  if name.endswith("token_embedding.weight") and tensor.shape), None)
    projects = "text_projection.weight" in tensors
    for config in (kinds.SD1.text_encoder, kinds.SD2.text_encoder, kinds.SDXL.text_encoder_2):
        if config["hidden_size"] == width:
            second = "projection_dim" in config and projects
            return CLIPTextModelWithProjection if second else CLIPTextModel, config
    raise TinyldmError(f"{path} holds the text encoder of {kinds.model_of_width('text', width)}: "
                       "supported are those of Stable Diffusion 1, 2 and XL")
