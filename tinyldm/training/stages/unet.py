"""python -m tinyldm.training unet: train a UNet in full, of some weights or a new one.

    weights ─load→ pipeline ─prepared→ its UNet or a new one, its noise schedule or another
    pictures, captions ─FineTuning→ gradients ─Trainer→ the folder --output ─read back→ checked

The folder is a whole pipeline in the public layout: python -m tinyldm --weights FOLDER draws with
it. The VAE stays as it is, and so do the text encoders, unless they are trained, too.
Source: Rombach et al. 2022, arXiv:2112.10752, eq. 3; diffusers' examples/text_to_image
(train_text_to_image.py). Schedules: Lin et al. 2023, arXiv:2305.08891.
"""
import numpy as np

from ...cli.options import path
from ...diffusion.schedule import BETA_SCHEDULES, PREDICTION_TYPES
from ...errors import TinyldmError
from ...files import read_json
from ...layers import trainable_parameters
from ...models import UNet2DConditionModel
from ...pipelines.stable_diffusion import StableDiffusion
from ..optim import initialise
from ..options import DTYPES
from .stage import Stage, check_free, check_kind, load_weights, writer
from .stage import add_options as add_common

CREATION = 2 ** 32 - 1      # the key of the first numbers; the steps have smaller ones
SETTINGS = ("from_scratch", "unet_config", "train_text_encoder", "prediction_type",
            "beta_schedule", "zero_terminal_snr")
# Of each --beta-schedule: where it is published, DDPM, Stable Diffusion and Improved DDPM.
BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "squaredcos_cap_v2": None}
# Schedulers of diffusers that take every prediction type and zero terminal SNR.
COMPLETE = ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler",
            "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
            "UniPCMultistepScheduler")
# What another scheduler takes over.
COMMON = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas",
          "prediction_type", "rescale_betas_zero_snr", "steps_offset", "timestep_spacing")


def add_options(parser):
    add = parser.add_argument_group("UNet").add_argument
    add("--from-scratch", action="store_true", help="begin with new weights; the VAE, the text "
        "encoders and the UNet's config are those of --weights")
    add("--unet-config", type=path, metavar="FILE", help="the config.json of another UNet to begin "
        "from scratch, say a narrower one; it must fit the VAE and the text encoders")
    add("--train-text-encoder", action="store_true", help="also train the text encoders")
    add = parser.add_argument_group("noise schedule").add_argument
    add("--prediction-type", choices=PREDICTION_TYPES, help="what the UNet learns to predict "
        "(the weights' own)")
    add("--beta-schedule", choices=BETA_SCHEDULES, help="how the noise grows: as in DDPM, Stable "
        "Diffusion or Improved DDPM (the weights' own)")
    add("--zero-terminal-snr", action="store_true", help="rescale it so that the last timestep is "
        "pure noise, for pictures that are darker or brighter than grey")
    add_common(parser, steps=15_000, learning_rate=1e-5, output="unet", dropout=0.1, layouts=False)


def run(options):
    """Train, write and check. Raises TinyldmError for whatever is wrong."""
    check_free(options.output / "model_index.json", options)
    stage = begin(options)
    pipe, untrained = stage.pipe, stage.probe()
    parts = choose(pipe, options)
    stage.train(named_parameters(pipe),
                writer(pipe, stage.result, parts, DTYPES[options.save_as]), SETTINGS)

    def read_back():
        stage.pipe = load_weights(stage.result, options.device, DTYPES[options.dtype])
        return untrained
    stage.check(read_back)
    stage.show_use(weights=stage.result)


def begin(options):
    """The Stage of the options, with what they make of the weights."""
    trained = ("unet", *("text_encoder", "text_encoder_2") * options.train_text_encoder)
    pipe = load_weights(options.weights, options.device, DTYPES[options.dtype], exact=trained)
    pipe = prepared(pipe, options)
    return Stage(options, pipe=pipe, result=options.output)


def prepared(pipe, options):
    """A pipeline with the UNet and the noise schedule of the options, on its device.

    Raises TinyldmError for a config of a UNet that does not fit.
    """
    unet, scheduler = pipe.unet, scheduler_of(pipe.scheduler, options)
    if file := options.unet_config:
        try:
            unet = UNet2DConditionModel(read_json(file))
        except TinyldmError as error:
            raise TinyldmError(f"--unet-config: {error}") from None
        options.unet_config = str(file)                 # a setting: a value for JSON
    if file or options.from_scratch:
        initialise(unet, np.random.default_rng([options.seed, CREATION]))
        unet.move_to(pipe.vae.xp)
    try:
        new = StableDiffusion(
            pipe.tokenizer, pipe.text_encoder, unet, pipe.vae, scheduler,
            pipe.num_inference_steps, tokenizer_2=pipe.tokenizer_2,
            text_encoder_2=pipe.text_encoder_2, guidance_scale=pipe.guidance_scale,
            force_zeros_for_empty_prompt=pipe.force_zeros_for_empty_prompt)
    except TinyldmError as error:
        raise TinyldmError(f"{file or options.weights}: {error}") from None
    check_kind(new, file or options.weights)
    if new.schedule.alphas_cumprod[-1] == 0 and new.schedule.prediction_type == "epsilon":
        raise TinyldmError("at zero terminal SNR the last timestep is pure noise, from which the "
                           "noise tells nothing of the picture: give --prediction-type "
                           "v_prediction or sample")
    return new


def scheduler_of(own, options):
    """The dict of the scheduler_config.json that the options make of a pipeline's own."""
    changed = {}
    if options.beta_schedule:
        changed |= {"beta_schedule": options.beta_schedule, "trained_betas": None}
        if betas := BETAS[options.beta_schedule]:
            changed |= dict(zip(("beta_start", "beta_end"), betas))
    if options.prediction_type:
        changed["prediction_type"] = options.prediction_type
    if options.zero_terminal_snr:                       # and it begins at the last timestep
        changed |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if changed and own.get("_class_name") not in COMPLETE:
        own = {key: own[key] for key in COMMON if key in own}
        own |= {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}
    return own | changed


def choose(pipe, options):
    """Freeze a pipeline except what the options train -> the names of these parts."""
    for model in pipe.models.values():
        model.freeze()
    parts = [part for part in pipe.models if part == "unet"
             or options.train_text_encoder and "text_encoder" in part]
    for part in parts:
        for parameter in getattr(pipe, part).parameters():
            parameter.trainable = True
    if "text_encoder_2" in parts:                       # the last layer of the first is not used
        text = pipe.text_encoder.text_model
        text.encoder.layers[-1].freeze()
        text.final_layer_norm.freeze()
    return parts


def named_parameters(pipe):
    """[(name with its part, Parameter)], of what is trained."""
    return [(f"{part}.{name}", parameter) for part, model in pipe.models.items()
            for name, parameter in trainable_parameters(model)]
