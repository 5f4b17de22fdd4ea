"""Write a whole pipeline as a folder in the public diffusers layout, which folders.py reads."""
from ..errors import TinyldmError
from ..files import as_path, new_folder, write_json
from ..models.unet import UNet2DConditionModel
from .components import class_name, float_type, save_model


def save(pipe, folder, dtype=None):
    """Write a pipeline as a folder from which tinyldm and diffusers draw the same pictures.

    pipe: a StableDiffusion of any kind. folder: a new or an empty one; it appears only when it is
    complete. dtype: float16, 32 or 64, of the weights in the files. None means, for each model, the
    narrowest that loses nothing, so what came from float16 files stays float16.
    Raises TinyldmError for a folder that is not empty or cannot be written, and for weights that
    are not finite in dtype; nothing is left behind then.
    """
    dtype, folder = float_type(dtype), as_path("the folder", folder)
    if not hasattr(pipe, "unet"):
        raise TinyldmError("save takes a pipeline and then a folder, not a "
                           f"{type(pipe).__name__} first: tinyldm.save(pipe, folder)")
    if not isinstance(pipe.unet, UNet2DConditionModel):
        raise TinyldmError("the pipeline's UNet is a function, which no folder can hold: set "
                           "pipe.unet to a UNet2DConditionModel")
    tokenizers = {"tokenizer": pipe.tokenizer.save}
    settings = {"_num_inference_steps": pipe.num_inference_steps}
    if pipe.guidance_scale is not None:
        settings["_guidance_scale"] = pipe.guidance_scale
    if pipe.language:
        settings["_language"] = pipe.language.rule
    if pipe.tokenizer_2:
        tokenizers["tokenizer_2"] = pipe.tokenizer_2.save
        settings["force_zeros_for_empty_prompt"] = pipe.force_zeros_for_empty_prompt
    with new_folder(folder) as temporary:
        write_pipeline(temporary, pipe.models, tokenizers, pipe.scheduler, settings, dtype)


def write_pipeline(folder, models, tokenizers, scheduler, settings, dtype):
    """Write the parts of a pipeline into a folder, and last its model_index.json.

    models: {part: model}. tokenizers: {part: function that writes one into a given folder}.
    scheduler: the dict of scheduler_config.json. settings: further entries of model_index.json.
    dtype: see save_model.
    """
    for part, model in models.items():
        save_model(model, folder / part, dtype)
    for part, write in tokenizers.items():
        write(folder / part)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    classes = {part: ["transformers" if "text" in part else "diffusers", type(model).__name__]
               for part, model in models.items()}
    classes |= {part: ["transformers", "CLIPTokenizer"] for part in tokenizers}
    classes["scheduler"] = ["diffusers", class_name(scheduler)]
    unet, xl = models["unet"].settings, "text_encoder_2" in models
    inpainting = unet.in_channels != unet.out_channels
    name = f"StableDiffusion{'XL' * xl}{'Inpaint' * inpainting}Pipeline"
    if unet.time_cond_proj_dim and not xl and not inpainting:
        name = "LatentConsistencyModelPipeline"
    absent = ["feature_extractor", "image_encoder"]
    if not xl:
        absent.append("safety_checker")
        settings = settings | {"requires_safety_checker": False}
    index = {"_class_name": name, "_diffusers_version": "0.30.0", **settings, **classes,
             **{part: [None, None] for part in absent}}
    write_json(folder / "model_index.json", dict(sorted(index.items())))
