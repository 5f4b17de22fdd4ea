"""Read a whole pipeline: a folder in the public diffusers layout, or a single file.

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/

A single file in the original layout holds only the weights of the models; see single_file/.
"""
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..configs import Config, one_of, within
from ..errors import TinyldmError, note
from ..files import read_json
from ..layers import check_fit
from ..models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ..models.clip_vision import CLIPVisionModelWithProjection
from ..models.dit import DiTTransformer2DModel
from ..models.prior import PriorTransformer, StableUnCLIPImageNormalizer
from ..models.unet import UNet2DConditionModel
from ..models.unet_2d import UNet2DModel
from ..models.vae import AutoencoderKL
from . import hub
from .components import (
    config_errors,
    fill,
    find_weights,
    has_config,
    load_model,
    note_unknown_keys,
    read_config,
)
from .formats.reading import read_tensors
from .layout import fitted
from .single_file import dit, kinds, openai
from .single_file.alone import LABELS
from .single_file.names import by_part, with_ema_weights
from .single_file.statements import read_statements, told_scheduler

# What a part of a pipeline may be besides a model of some class -> a file that it has.
SCHEDULER, VOCABULARY, PROCESSOR = "scheduler", "tokenizer", "feature_extractor"
FILE_OF = {SCHEDULER: "scheduler_config.json", VOCABULARY: "vocab.json",
           PROCESSOR: "preprocessor_config.json"}
COMPONENTS = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL,
              "text_encoder_2": CLIPTextModelWithProjection}            # only Stable Diffusion XL
XL = COMPONENTS | {"tokenizer": VOCABULARY, "tokenizer_2": VOCABULARY,
                   "scheduler": SCHEDULER}
SD = {part: kind for part, kind in XL.items() if "_2" not in part}
DDPM = {"unet": UNet2DModel, "scheduler": SCHEDULER}
UNCLIP = SD | {"image_normalizer": StableUnCLIPImageNormalizer,
               "image_noising_scheduler": SCHEDULER}
# The public pipeline classes that are read here: {part: its kind}. pipelines/loading.py says which
# class here draws with them.
PIPELINES = {
    "StableDiffusionPipeline": SD,
    "StableDiffusionImg2ImgPipeline": SD,
    "StableDiffusionInpaintPipeline": SD,
    "LatentConsistencyModelPipeline": SD,
    "StableDiffusionXLPipeline": XL,
    "StableDiffusionXLImg2ImgPipeline": XL,
    "StableDiffusionXLInpaintPipeline": XL,
    "StableUnCLIPPipeline": UNCLIP | {
        "prior_tokenizer": VOCABULARY, "prior_text_encoder": CLIPTextModelWithProjection,
        "prior": PriorTransformer, "prior_scheduler": SCHEDULER},
    "StableUnCLIPImg2ImgPipeline": UNCLIP | {
        "feature_extractor": PROCESSOR, "image_encoder": CLIPVisionModelWithProjection},
    "DDPMPipeline": DDPM,
    "DDIMPipeline": DDPM,
    "PNDMPipeline": DDPM,
    "GuidedDDPMPipeline": DDPM,
    "CascadePipeline": {"text_encoder": CLIPTextModel, "tokenizer": VOCABULARY,
                        "unet": UNet2DConditionModel, "scheduler": SCHEDULER,
                        "super_res": UNet2DConditionModel, "super_res_scheduler": SCHEDULER,
                        "low_res_scheduler": SCHEDULER},
    "StableDiffusionUpscalePipeline": SD | {"low_res_scheduler": SCHEDULER},
    "DiTPipeline": {"transformer": DiTTransformer2DModel, "vae": AutoencoderKL,
                    "scheduler": SCHEDULER},
}
# The schedulers that sample with a UNet or its like, of whose prediction a user may know better. A
# prior's is not, and others only add noise.
UNET_SCHEDULERS = {"scheduler", "super_res_scheduler"}
# Every Stable Diffusion uses CLIP's vocabulary. Single files do not contain it.
TOKENIZER = "openai/clip-vit-large-patch14"
TOKENIZER_FILES = ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
TOKENIZER_VARIABLE = "TINYLDM_TOKENIZER"


class PipelineParts(NamedTuple):
    """A pipeline as read from its files."""

    models: dict                                        # {part: Module}
    schedulers: dict                                    # {part: dict of scheduler_config.json}
    folders: dict                                       # {tokenizer or processor: Path}
    index: dict                                         # of model_index.json, as far as known
    paddings: dict = {}                                 # {tokenizer: token}, if not the files' own

    @property
    def kind(self):
        """The public class of the pipeline."""
        return self.index["_class_name"]

    def setting(self, key, default):
        """What model_index.json says for a key; the default if it is absent or null."""
        value = self.index.get(key)
        return default if value is None else value


def load_pipeline_parts(path, dtype=np.float32, low_memory=False, ema=False, vae=None,
                        prediction_type=None):
    """Read the models of a pipeline and its scheduler's config -> PipelineParts.

    path: a folder, or a single file. dtype, low_memory: see fill; with float16, a VAE whose config
    says `force_upcast` is float32. ema: if a single file also holds the UNet's weights averaged
    over the training, take these. vae: a folder or a file with the VAE to use in place of the
    pipeline's own, see load_vae. prediction_type: what the UNet predicts, whatever the files say.
    Raises TinyldmError for a pipeline not in PIPELINES, and for anything missing or wrong in a
    component. All cheap checks come before the first weight.
    """
    if Path(path).is_file():
        return _load_file(Path(path), dtype, low_memory, ema, vae, prediction_type)
    if ema:
        note(f"{path} has one set of weights: those averaged apart, ema, are for single files "
             "that hold both")
    return _load_folder(Path(path), dtype, low_memory, vae, prediction_type)


def _load_folder(folder, dtype, low_memory, vae, prediction_type):
    index = read_index(folder)
    note_unknown_keys(folder / "model_index.json", IndexConfig, index)
    parts = PIPELINES[index["_class_name"]]
    if vae and parts.get("vae") is not AutoencoderKL:
        raise TinyldmError(f"{folder} holds a {index['_class_name']}, which has no VAE: leave vae "
                           "out")
    places = {part: part_folder(folder, part, kind) for part, kind in parts.items()
              if not (part == "vae" and vae)}
    schedulers = {part: read_json(places[part] / "scheduler_config.json")
                  for part, kind in parts.items() if kind == SCHEDULER}
    for part in UNET_SCHEDULERS & schedulers.keys() if prediction_type else ():
        said = schedulers[part].get("prediction_type") or prediction_type
        if said != prediction_type:
            note(f"{folder} says that the model predicts {said}: {prediction_type} is used, as "
                 "asked for")
        schedulers[part] = schedulers[part] | {"prediction_type": prediction_type}
    dtypes = {}
    for part in (part for part in places if isinstance(parts[part], type)):
        model, config = read_config(places[part])
        if model is not parts[part]:
            raise TinyldmError(f"{places[part] / 'config.json'} must name a "
                               f"{parts[part].__name__}, not a {model.__name__}: get it again")
        dtypes[part] = _dtype(config, dtype)
        find_weights(places[part], dtypes[part])
    models = {"vae": load_vae(vae, _own_vae_config(folder), dtype, low_memory)} if vae else {}
    models |= {part: load_model(places[part], own, low_memory) for part, own in dtypes.items()}
    folders = {part: places[part] for part, kind in parts.items()
               if kind in (VOCABULARY, PROCESSOR)}
    return PipelineParts(models, schedulers, folders, index)


def part_folder(folder, part, kind):
    """Where the files of a pipeline's part are: in its own folder, or beside model_index.json.

    The latter is how the first pipelines were published, which have one model and one scheduler.
    Raises TinyldmError if they are in neither.
    """
    if (folder / part).is_dir():
        return folder / part
    if (folder / FILE_OF.get(kind, "config.json")).is_file():
        return folder
    hint = "; --vae (from Python vae=) puts in another" if part == "vae" else ""
    raise TinyldmError(f"expected a folder {folder / part}, found none: is the download "
                       f"complete?{hint}")


def _own_vae_config(folder):
    """The config of the VAE in a pipeline's folder; without one, of its kind of UNet's VAE."""
    if (folder / "vae" / "config.json").is_file():
        return read_config(folder / "vae")[1]
    if not (folder / "unet").is_dir():
        return kinds.SD1.vae                            # DiT
    width = read_config(folder / "unet")[1].get("cross_attention_dim")
    return (kinds.SDXL if width == kinds.SDXL.unet["cross_attention_dim"] else kinds.SD1).vae


def load_vae(path, own, dtype=np.float32, low_memory=False):
    """The VAE in a folder or a file of its own, or of a whole pipeline's.

    own: the config of the checkpoint's own VAE, or of its kind's. A file without a config has this
    one, and a config without a `scaling_factor` has that of this one: the UNet was trained on
    latents of that scale. A config that names another one is believed, with a note.
    Raises TinyldmError as load_model does, and for anything other than a VAE.
    """
    path = Path(path)
    if (path / "model_index.json").is_file():
        path = path / "vae"
    scale, config, defaults = AutoencoderKL.Settings.read(own).scaling_factor, own, own
    if path.is_dir() or has_config(path):
        model, config = read_config(path if path.is_dir() else path.parent)
        if model is not AutoencoderKL:
            raise TinyldmError(f"{path} holds a {model.__name__}, not a VAE: name a VAE's folder "
                               "or file as vae")
        defaults = {"scaling_factor": scale}
    vae = load_model(path, _dtype(config, dtype), low_memory, defaults)
    if not isinstance(vae, AutoencoderKL):
        raise TinyldmError(f"{path} holds a {type(vae).__name__}, not a VAE: name a VAE's folder "
                           "or file as vae")
    if vae.scaling_factor != scale:
        note(f"{path} says that its scaling_factor is {vae.scaling_factor:g}, the model's own VAE "
             f"has {scale:g}: if the pictures look wrong, it was made for another model")
    return vae


Part = list[str] | list[None] | None                    # the library and the class that wrote it


@dataclass(frozen=True)
class IndexConfig(Config):
    """The public model_index.json."""

    UNUSED = frozenset({
        "safety_checker", "requires_safety_checker", "feature_extractor",   # none here
        "image_encoder",                                # for adapters that read pictures
        "add_watermarker", "watermarker"})              # none here

    force_zeros_for_empty_prompt: bool | None = None
    requires_aesthetics_score: bool | None = None
    max_noise_level: int | None = within(0, 100_000, None)      # of the upscaler
    _num_inference_steps: int | None = within(1, 1000, None)
    _guidance_scale: float | None = within(0, 100, None)
    _guided_channels: int | None = within(1, 1024, None)        # the original DiT's: 3 of 4
    _rescale_timesteps: bool | None = None              # Improved DDPM's: t * 1000 / T
    id2label: dict | None = None                        # names by the numbers of classes
    unet: Part = one_of(default=None, lengths=(2,))
    transformer: Part = one_of(default=None, lengths=(2,))
    vae: Part = one_of(default=None, lengths=(2,))
    text_encoder: Part = one_of(default=None, lengths=(2,))
    text_encoder_2: Part = one_of(default=None, lengths=(2,))
    tokenizer: Part = one_of(default=None, lengths=(2,))
    tokenizer_2: Part = one_of(default=None, lengths=(2,))
    scheduler: Part = one_of(default=None, lengths=(2,))
    low_res_scheduler: Part = one_of(default=None, lengths=(2,))
    super_res: Part = one_of(default=None, lengths=(2,))
    super_res_scheduler: Part = one_of(default=None, lengths=(2,))
    prior: Part = one_of(default=None, lengths=(2,))
    prior_text_encoder: Part = one_of(default=None, lengths=(2,))
    prior_tokenizer: Part = one_of(default=None, lengths=(2,))
    prior_scheduler: Part = one_of(default=None, lengths=(2,))
    image_normalizer: Part = one_of(default=None, lengths=(2,))
    image_noising_scheduler: Part = one_of(default=None, lengths=(2,))


def read_index(folder):
    """The dict of folder/model_index.json.

    Raises TinyldmError for a pipeline that is not supported, and as IndexConfig.read does.
    """
    path = folder / "model_index.json"
    index = read_json(path)
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in PIPELINES:
        raise TinyldmError(f"{path} names the pipeline {name}, supported "
                           f"are {', '.join(PIPELINES)}")
    with config_errors(path, f"{name} that is supported"):
        IndexConfig.read(index)
    if index.get("requires_aesthetics_score"):
        raise TinyldmError(f"{folder} holds the refiner of Stable Diffusion XL, which is not "
                           "supported: use the base model")
    return index


def _dtype(config, dtype):
    """float32 in place of float16, in which the activations of some VAEs overflow."""
    return np.float32 if dtype == np.float16 and config.get("force_upcast") else dtype


def _load_file(path, dtype, low_memory, ema, vae, prediction_type):
    stored = read_tensors(path)
    if dit.is_dit(stored):
        return _load_dit(path, dtype, low_memory, vae, prediction_type)
    if openai.is_openai(stored):
        return _load_openai(path, dtype, low_memory, ema, vae, prediction_type)
    statements = read_statements(stored, path)
    kind = kinds.recognise(stored, path, prediction_type or statements.prediction_type)
    scheduler = told_scheduler(kind.scheduler, statements, prediction_type, path)
    if ema:
        stored = with_ema_weights(stored, path)
    tokenizer = _tokenizer_folder()
    models, parameters, tensors = fit_file(stored, kind, statements, own_vae=not vae)
    _check_parts(path, kind, models, tensors)
    misfit = f"{path} does not fit {kind.name}"
    check_fit(misfit, parameters, tensors)
    other = {"vae": load_vae(vae, _vae_config(kind, statements), dtype, low_memory)} if vae else {}
    for part, model in models.items():
        own = {name: tensors[f"{part}.{name}"] for name, _ in model.named_parameters()}
        fill(model, own, misfit, _dtype(model.config, dtype), low_memory)
    paddings = {"tokenizer": kind.padding}
    if kind.padding_2:
        paddings["tokenizer_2"] = kind.padding_2
    # A Turbo's file looks like its base model's: see StableDiffusion.complete.
    schedulers = {"scheduler": scheduler | {"_assumed": True}}
    if kind.low_res_scheduler:
        schedulers["low_res_scheduler"] = kind.low_res_scheduler
    return PipelineParts(models | other, schedulers, dict.fromkeys(paddings, tokenizer),
                         {"_class_name": kind.pipeline}, paddings)


def _load_dit(path, dtype, low_memory, vae, prediction_type):
    """The original DiT's file holds its transformer alone; its VAE is Stable Diffusion 1's."""
    if not vae:
        raise _no_vae(path, "DiT")
    models = {"transformer": load_model(path, dtype, low_memory),
              "vae": load_vae(vae, kinds.SD1.vae, dtype, low_memory)}
    told = {"prediction_type": prediction_type} if prediction_type else {}
    return PipelineParts(models, {"scheduler": dit.SCHEDULER | told}, {},
                         {"_class_name": "DiTPipeline", **dit.SETTINGS})


def _load_openai(path, dtype, low_memory, ema, vae, prediction_type):
    """A file of Improved DDPM or guided diffusion holds a UNet of pixels, drawn with as DDPM is."""
    if vae:
        raise TinyldmError(f"{path} holds a UNet of Improved DDPM, which draws pixels without a "
                           "VAE: leave vae out")
    if ema:
        note(f"{path} has one set of weights: Improved DDPM's averaged ones, ema, are a file of "
             "their own, such as ema_0.9999_500000.pt")
    unet = load_model(path, dtype, low_memory)
    told = {"prediction_type": prediction_type} if prediction_type else {}
    scheduler, settings = openai.drawing(unet.config)
    return PipelineParts({"unet": unet}, {"scheduler": scheduler | told}, {},
                         {"_class_name": "DDPMPipeline", **settings})


def _no_vae(path, name):
    return TinyldmError(f"{path} ({name}) holds no VAE: name one with --vae (from Python vae=), a "
                        "file, a folder or a name on the hub")


def fit_file(stored, kind, statements, own_vae=True):
    """The models of a single file's kind -> {part: model}, {name: parameter}, {name: StoredTensor}.

    The names are part.name; a tensor that is no parameter keeps its name in the file. own_vae: if
    False, leave out the file's VAE, as another one takes its place.
    """
    found, tensors = by_part(stored, kind.text_encoder["num_hidden_layers"],
                             len(kind.vae["block_out_channels"]))
    configs = kind._asdict() | {"vae": _vae_config(kind, statements)}
    if not own_vae:
        found.pop("vae", None)
        configs.pop("vae")
    models = {part: model(configs[part]) for part, model in COMPONENTS.items() if configs.get(part)}
    parameters = {}                                     # of all models together, as part.name
    for part, model in models.items():
        own = dict(model.named_parameters())
        parameters |= {f"{part}.{name}": parameter for name, parameter in own.items()}
        for name, tensor in fitted(found.pop(part, {}), own).items():
            tensors[f"{part}.{name}" if name in own else tensor.name] = tensor
    tensors |= {tensor.name: tensor for other in found.values() for tensor in other.values()}
    return models, parameters, tensors


def _vae_config(kind, statements):
    measured = statements.scale_factor
    return kind.vae if measured is None else kind.vae | {"scaling_factor": measured}


def lacking(models, tensors):
    """The parts of which {part.name: tensor} has no tensor at all."""
    return [part for part in models if not any(name.startswith(f"{part}.") for name in tensors)]


def _check_parts(path, kind, models, tensors):
    """Raise TinyldmError, one line, if the file has no tensor at all of one of the models."""
    absent = lacking(models, tensors)
    if absent == ["vae"]:
        raise _no_vae(path, kind.name)
    if absent:
        lacks = " and no ".join(LABELS[part] for part in absent)
        holds = " and ".join(LABELS[part] for part in models if part not in absent)
        alone = "; load_model reads the UNet alone" if holds == LABELS["unet"] else ""
        raise TinyldmError(f"{path} holds only the {holds} of {kind.name}, no {lacks}: get the "
                           f"whole checkpoint, or that model as a folder{alone}")


def _tokenizer_folder():
    """A folder with CLIP's vocabulary: the one in TINYLDM_TOKENIZER, else from the hub."""
    if folder := os.environ.get(TOKENIZER_VARIABLE):
        if not Path(folder).is_dir():
            raise TinyldmError(f"{TOKENIZER_VARIABLE} must name a folder with vocab.json and "
                               f"merges.txt, but there is no folder {folder}")
        return Path(folder)
    try:
        return hub.fetch(TOKENIZER, TOKENIZER_FILES)
    except TinyldmError as error:
        raise TinyldmError(f"a single file has no tokenizer, and {error}; or let "
                           f"{TOKENIZER_VARIABLE} name a folder with CLIP's vocab.json and "
                           "merges.txt, such as the tokenizer folder of any Stable Diffusion"
                           ) from None
