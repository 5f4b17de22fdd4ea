"""Write a whole pipeline as a folder in the public diffusers layout, which folders.py reads."""
from ..errors import TinyldmError
from ..files import as_path, new_folder, write_json
from ..layers import Module
from .components import class_name, float_type, save_model

ABSENT = ("feature_extractor", "image_encoder", "safety_checker")


def save(pipe, folder, dtype=None):
    """Write a pipeline as a folder from which tinyldm and diffusers draw the same pictures.

    pipe: a pipeline of any kind. folder: a new or an empty one; it appears only when it is
    complete. dtype: float16, 32 or 64, of the weights in the files. None means, for each model, the
    narrowest that loses nothing, so what came from float16 files stays float16.
    Raises TinyldmError for a folder that is not empty or cannot be written, and for weights that
    are not finite in dtype; nothing is left behind then.
    """
    dtype, folder = float_type(dtype), as_path("the folder", folder)
    if not hasattr(pipe, "schedulers"):
        raise TinyldmError("save takes a pipeline and then a folder, not a "
                           f"{type(pipe).__name__} first: tinyldm.save(pipe, folder)")
    for part, model in pipe.models.items():
        if not isinstance(model, Module) or not model.parameters():
            raise TinyldmError(f"the pipeline's {part} is a function, which no folder can hold: "
                               f"set pipe.{part} to a model")
    files = {part: tokenizer.save for part, tokenizer in pipe.tokenizers.items()}
    with new_folder(folder) as temporary:
        write_pipeline(temporary, pipe.kind, pipe.models, files, pipe.schedulers, pipe.settings(),
                       dtype)


def write_pipeline(folder, kind, models, tokenizers, schedulers, settings, dtype):
    """Write the parts of a pipeline into a folder, and last its model_index.json.

    kind: the public class. models: {part: model}. tokenizers: {part: function that writes one into
    a given folder}. schedulers: {part: dict of scheduler_config.json}. settings: further entries
    of model_index.json, which count more than what is written by itself. dtype: see save_model; or
    {part: dtype}, and None for the others.
    """
    for part, model in models.items():
        save_model(model, folder / part, dtype.get(part) if isinstance(dtype, dict) else dtype)
    for part, write in tokenizers.items():
        write(folder / part)
    for part, config in schedulers.items():
        write_json(folder / part / "scheduler_config.json", config)
    classes = {part: ["transformers" if type(model).__name__.startswith("CLIP") else "diffusers",
                      type(model).__name__] for part, model in models.items()}
    classes |= {part: ["transformers", "CLIPTokenizer"] for part in tokenizers}
    classes |= {part: ["diffusers", class_name(config)] for part, config in schedulers.items()}
    absent = {part: [None, None] for part in ABSENT
              if kind.startswith(("StableDiffusion", "LatentConsistency"))
              and not (part == "safety_checker" and "XL" in kind)
              and not (part == "image_encoder" and "Upscale" in kind)}
    index = {"_class_name": kind, "_diffusers_version": "0.30.0", **absent, **classes, **settings}
    write_json(folder / "model_index.json", dict(sorted(index.items())))
