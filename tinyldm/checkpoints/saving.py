"""A whole pipeline -> a folder in the public diffusers layout: what folders.py reads, written.

Called by users as tinyldm.save, and by training/export.py; the models go through components.py.
"""
from pathlib import Path

from ..files import new_folder, write_json
from .components import class_name, float_type, save_model


def save(pipe, folder, dtype=None):
    """Write a pipeline as a folder that tinyldm and diffusers load, and draw the same pictures of.

    pipe: a StableDiffusion of any kind, from wherever its weights came. folder: a new one, or
    empty; it is there when it is whole. dtype: float16, 32 or 64, of the weights in the files; None
    for the narrowest that loses nothing, a model at a time: so float16 files stay such.
    Raises TinyldmError for a folder that has something in it or cannot be written, and for weights
    that are not finite in dtype; nothing is left then.
    """
    dtype = float_type(dtype)
    tokenizers = {"tokenizer": pipe.tokenizer.save}
    settings = {"_num_inference_steps": pipe.num_inference_steps}
    if pipe.tokenizer_2:
        tokenizers["tokenizer_2"] = pipe.tokenizer_2.save
        settings["force_zeros_for_empty_prompt"] = pipe.force_zeros_for_empty_prompt
    with new_folder(Path(folder).expanduser()) as temporary:
        write_pipeline(temporary, pipe.models, tokenizers, pipe.scheduler, settings, dtype)


def write_pipeline(folder, models, tokenizers, scheduler, settings, dtype):
    """Write the parts of a pipeline into a folder, and last what makes it one, model_index.json.

    models: {part: model}; tokenizers: {part: what writes one into a given folder}; scheduler: the
    dict of scheduler_config.json; settings: what else model_index.json is to say. dtype: see
    save_model.
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
    name = pipeline_name(models)
    absent = ["feature_extractor", "image_encoder"]
    if "XL" not in name:
        absent.append("safety_checker")
        settings = settings | {"requires_safety_checker": False}
    index = {"_class_name": name, "_diffusers_version": "0.30.0", **settings, **classes,
             **{part: [None, None] for part in absent}}
    write_json(folder / "model_index.json", dict(sorted(index.items())))


def pipeline_name(models):
    """What diffusers calls the pipeline that draws with these {part: model}."""
    unet, xl = models["unet"].config, "text_encoder_2" in models
    inpainting = unet["in_channels"] != unet["out_channels"]
    if unet.get("time_cond_proj_dim") and not xl and not inpainting:
        return "LatentConsistencyModelPipeline"
    return f"StableDiffusion{'XL' * xl}{'Inpaint' * inpainting}Pipeline"
