"""Which options of the command line mean something to a pipeline: those with a field of its call.

options.py -> check_meant, with the class of the weights' pipeline.
"""
import dataclasses

from ..errors import TinyldmError, note
from ..pipelines.interpolation import as_list

# The options of a picture -> the field of a pipeline's options.
FIELDS = {
    "prompt": "prompt", "negative": "negative_prompt", "steps": "num_inference_steps",
    "guidance": "guidance_scale", "seed": "seed", "width": "width", "height": "height",
    "sampler": "sampler", "noise": "noise", "guidance_rescale": "guidance_rescale",
    "image": "image", "strength": "strength", "mask": "mask", "label": "label",
    "timestep_spacing": "timestep_spacing", "clip_skip": "clip_skip", "noise_level": "noise_level",
}
NEGATIVE, SEED, NOISE, RESCALE = "", 0, "torch-cpu", 0.0       # defaults
DEFAULTS = {"seed": SEED, "noise": NOISE, "guidance_rescale": RESCALE}
# Options that only make sense with another one's field -> that one's.
NEEDS = {"random": "prompt", "to_prompt": "prompt", "to_image": "image", "lora_folder": "prompt"}
ADD_ONS = "lora", "embedding"


def check_meant(args, pipeline):
    """Raise TinyldmError for an option that means nothing to a pipeline, and for what it needs."""
    known = fields_of(pipeline)
    leave_out(args, pipeline)
    for option, field in (FIELDS | NEEDS).items():
        value = getattr(args, option)
        given = value is not None and value is not False and value not in ("", [])  # 0 is given
        if given and field not in known and value != DEFAULTS.get(option):
            what = "a prompt" if option == "prompt" else f"--{option.replace('_', '-')}"
            raise TinyldmError(f"{pipeline.name} draws without {what}: leave it out")
    for option in ADD_ONS:
        if getattr(args, option) and not pipeline.takes_addons:
            raise TinyldmError(f"{pipeline.name} takes no --{option}: leave it out")
    if "prompt" in known and not (args.random or args.prompt or pipeline.prompt_is_optional):
        raise TinyldmError("the following arguments are required: prompt (--help lists the "
                           "options)")


def leave_out(args, pipeline):
    """Undo, with a note, what --like or --from-parameters says and means nothing to a pipeline.

    They may tell of a picture of another system. Changes args, which keeps what the command gives.
    """
    known, unused = fields_of(pipeline), {}
    for option, (value, default) in args.told.items():
        means = (pipeline.takes_addons if option in ADD_ONS else
                 (FIELDS | NEEDS).get(option, "seed") in known)
        if not means and getattr(args, option) == value != default:
            setattr(args, option, default)
            unused[option] = value
    if unused:
        names = ", ".join(f"{option.replace('_', ' ')}: "
                          f"{', '.join(map(str, as_list(value)))}"
                          for option, value in unused.items())
        note(f"{pipeline.name} draws without some of the parameters, which are not used: {names}")


def fields_of(pipeline):
    """The names of the options that a pipeline's call takes."""
    return {field.name for field in dataclasses.fields(pipeline.Options)}
