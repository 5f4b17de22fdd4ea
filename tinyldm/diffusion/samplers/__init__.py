"""Samplers: from noise to latents, one model call at a time. One file per paper.

Every sampler is a generator function

    sampler(predict, latents, schedule, num_inference_steps, draw_noise, origin, ...)

    predict(x_t, t) -> model output   guidance included; x_t has unit scale, t is a python number
                                      (fractional for Euler with "linspace" spacing)
    latents                           standard normal, any shape, numpy or cupy; never written to
    schedule                          schedule.Schedule
    draw_noise() -> array             fresh standard normal numbers of latents' shape
    origin                            shared.Origin: the picture to begin from, if there is one

which yields a shared.State after every model call, so that a caller can show progress, look inside
or stop. check_sampler says beforehand what a sampler cannot do.

Coefficients are computed in float32, as the schedule's tables are, and in the order of PyTorch's
schedulers: then the differences of nearly equal numbers round alike. They are python floats when
they meet an array, so that it keeps its dtype.

There are two kinds of x. ddpm, ddim, pndm, dpm_solver, unipc, deis and lcm hold x_t = a x_start +
s noise with a^2 + s^2 = 1, as the model gets it. euler, heun and lms hold x = x_t / a = x_start +
sigma noise with sigma = s / a, and scale it for the model. Both describe the same trajectory: Euler
in x is DDIM in x_t.
"""
import difflib
import math
import re
from functools import partial

import numpy as np

from ...errors import TinyldmError, note
from .ddim import ddim
from .ddpm import ddpm
from .deis import deis
from .dpm_solver import dpmpp_2m
from .euler import euler, euler_ancestral
from .heun import heun
from .lcm import LCM_TIMESTEPS, lcm
from .lms import lms
from .pndm import pndm
from .shared import Origin
from .unipc import unipc

SAMPLERS = {
    "ddpm": ddpm,
    "ddim": ddim,
    "pndm": pndm,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "lms": lms,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": partial(dpmpp_2m, sde=True),
    "unipc": unipc,
    "deis": deis,
    "lcm": lcm,
}
# whose sigmas may be spaced otherwise, each also as NAME_karras and NAME_exponential
RESPACED = ("euler", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "deis")
SPACED = ("karras", "exponential")
SAMPLERS |= {f"{name}_{spacing}": partial(SAMPLERS[name], **{f"use_{spacing}_sigmas": True})
             for name in RESPACED for spacing in SPACED}

# which choose their timesteps themselves, whatever the schedule's spacing
OWN_TIMESTEPS = ("lcm", *(f"{name}_{spacing}" for name in RESPACED[3:] for spacing in SPACED))

# Of a class in public files: the name here; the keys that are options of that sampler; keys with
# their one value here, where another is drawn so and noted; and keys where another is refused, as
# the model would be used wrongly.
FLOW = {"use_flow_sigmas": False}
SIGMAS = {"use_beta_sigmas": False, "sigma_min": None, "sigma_max": None}
DPM = {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_beta_sigmas": False,
       "use_lu_lambdas": False, "lambda_min_clipped": -math.inf}
DPM_OPTIONS = ("solver_order", "solver_type", "lower_order_final", "euler_at_final")
LATENT_CONSISTENCY = {"original_inference_steps": LCM_TIMESTEPS, "timestep_scaling": 10.0}
CLASSES = {
    "DDPMScheduler": ("ddpm", ("variance_type",), {}, {}),
    "DDIMScheduler": ("ddim", (), {}, {}),
    "PNDMScheduler": ("pndm", ("skip_prk_steps",), {}, {}),
    "EulerDiscreteScheduler": ("euler", (), SIGMAS | {"interpolation_type": "linear"},
                               {"timestep_type": "discrete"}),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", (), {}, {}),
    "HeunDiscreteScheduler": ("heun", (), SIGMAS, {}),
    "LMSDiscreteScheduler": ("lms", (), SIGMAS, {}),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", DPM_OPTIONS, DPM, FLOW),
    "UniPCMultistepScheduler": ("unipc", (), SIGMAS | {
        "solver_order": 2, "solver_type": "bh2", "predict_x0": True, "lower_order_final": True,
        "disable_corrector": [], "solver_p": None}, FLOW),
    "DEISMultistepScheduler": ("deis", ("solver_order", "lower_order_final"),
                               {"solver_order": 2, "use_beta_sigmas": False}, FLOW),
    "LCMScheduler": ("lcm", (), {}, LATENT_CONSISTENCY),
}
# the same algorithm, for several images at once
CLASSES |= {"DDPMParallelScheduler": CLASSES["DDPMScheduler"],
            "DDIMParallelScheduler": CLASSES["DDIMScheduler"],
            "UnCLIPScheduler": CLASSES["DDPMScheduler"]}        # see schedule.UNCLIP
# classes that are not built here -> the nearest sampler
NEAREST = {
    "DPMSolverSinglestepScheduler": "dpmpp_2m", "TCDScheduler": "lcm",
    "SASolverScheduler": "dpmpp_2m_sde", "DPMSolverSDEScheduler": "dpmpp_2m_sde",
    "KDPM2DiscreteScheduler": "heun", "KDPM2AncestralDiscreteScheduler": "euler_ancestral",
}


# names elsewhere, as _plain spells them, where they are not those here
ALIASES = {"eulera": "euler_ancestral", "plms": "pndm", "dpmsolver": "dpmpp_2m",
           "dpmsolverpp": "dpmpp_2m", "dpmpp": "dpmpp_2m", "consistency": "lcm"}


def find_sampler(name):
    """The key of SAMPLERS that is meant: "Euler a", "DPM++ 2M Karras", "k_euler", a class's name.

    Raises TinyldmError for any other name, with the nearest one.
    """
    if name in (known := list(SAMPLERS)):
        return name
    names = {_plain(key): key for key in known} | ALIASES
    plain = _plain(name) if isinstance(name, str) else ""
    for spelled in (plain, plain.removeprefix("k"), plain.removeprefix("sample")):
        if spelled in names:
            return names[spelled]
    near = difflib.get_close_matches(plain, names, 1)
    meant = f"; did you mean {names[near[0]]}?" if near else ""
    raise TinyldmError(f"unknown sampler {name!r:.80}; known: {', '.join(known)}{meant}")


def _plain(name):
    """"DPM++ 2M Karras" -> "dpmpp2mkarras", "EulerDiscreteScheduler" -> "euler"."""
    name = re.sub("[^a-z0-9]", "", name.lower().replace("+", "p"))
    return re.sub("discrete|multistep|scheduler$|sampler$|gpu", "", name)


def check_sampler(name, schedule, num_inference_steps, first=0, reach=1.0, options=None,
                  outputs=1):
    """Raise TinyldmError for an unknown name, or a schedule or number of steps it cannot take.

    name: a key of SAMPLERS. The sampler makes its first step on a zero, without a model. first,
    reach: see Origin. options: further keywords of the sampler. outputs: how many times as many
    channels the model gives as it takes, 2 if it also predicts the variance.
    """
    name = find_sampler(name)
    zero, origin = np.zeros(1, np.float32), Origin(first=first, reach=reach)
    next(SAMPLERS[name](lambda x_t, t: np.tile(x_t, outputs), zero, schedule, num_inference_steps,
                        lambda: zero, origin, **(options or {})))


def default_sampler(config):
    """The name of the sampler that a scheduler_config.json (a dict) asks for.

    A note says what is drawn otherwise. Raises TinyldmError for a class that has no sampler near to
    it, or a variant of one for which the model would be used wrongly.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in {*CLASSES, *NEAREST}:
        raise TinyldmError(f"the scheduler class {name!r} is not supported; supported: "
                           f"{', '.join(CLASSES)}; or choose a sampler: {', '.join(SAMPLERS)}")
    if name in NEAREST:
        sampler = NEAREST[name]
        note(f"the weights' scheduler {name} is not built here: drawn with the nearest sampler, "
             f"{sampler}")
        refused = FLOW
    else:
        sampler, options, noted, refused = CLASSES[name]
        if config.get("algorithm_type") == "sde-dpmsolver++" and sampler == "dpmpp_2m":
            sampler, noted = "dpmpp_2m_sde", noted | {"algorithm_type": "sde-dpmsolver++"}
        if config.get("solver_order") == 1 and "solver_order" in options:
            noted = noted | {"solver_order": 1}
        for key, built in noted.items():
            if not _is(config.get(key), built):
                note(f"the weights' {name} with {key} = {config[key]!r} is not built here: drawn "
                     f"with the nearest sampler, {sampler}, and {built!r}")
    for key, built in refused.items():
        if not _is(config.get(key), built):
            raise TinyldmError(f"{name} with {key} = {config[key]!r} is not supported, only "
                               f"{built!r}; or choose a sampler: {', '.join(SAMPLERS)}")
    for spacing in SPACED:
        if config.get(f"use_{spacing}_sigmas") and sampler in RESPACED:
            return f"{sampler}_{spacing}"
    return sampler


def own_options(config, name):
    """{keyword: value} of a scheduler_config.json for its own class's sampler, if `name` is that.

    name: a key of SAMPLERS; with other names {}.
    """
    sampler, options, *_ = CLASSES.get(config.get("_class_name"), ("", ()))
    if not options or not name.startswith(sampler):
        return {}
    own = {key: config[key] for key in options if config.get(key) is not None}
    if "solver_type" in options:
        own["solver_type"] = "heun" if own.get("solver_type") == "heun" else "midpoint"
    if "skip_prk_steps" in options:
        own.setdefault("skip_prk_steps", False)         # the public class's default
    return own


def _is(value, built):
    """Whether a config's value is the one built here; an absent key is."""
    return value is None or value == built or isinstance(value, float) and value == -math.inf
