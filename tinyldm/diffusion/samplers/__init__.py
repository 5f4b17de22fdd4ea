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

There are two kinds of x. ddpm, ddim, pndm, dpm_solver, unipc and lcm hold x_t = a x_start + s noise
with a^2 + s^2 = 1, as the model gets it. euler, heun and lms hold x = x_t / a = x_start +
sigma noise with sigma = s / a, and scale it for the model. Both describe the same trajectory: Euler
in x is DDIM in x_t.
"""
import math
from difflib import get_close_matches
from functools import partial

import numpy as np

from ...errors import TinyldmError
from .ddim import ddim
from .ddpm import ddpm
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
    "dpmpp_2m_karras": partial(dpmpp_2m, use_karras_sigmas=True),
    "dpmpp_2m_sde": partial(dpmpp_2m, sde=True),
    "dpmpp_2m_sde_karras": partial(dpmpp_2m, sde=True, use_karras_sigmas=True),
    "unipc": unipc,
    "lcm": lcm,
}

# which choose their timesteps themselves, whatever the schedule's spacing
OWN_TIMESTEPS = ("dpmpp_2m_karras", "dpmpp_2m_sde_karras", "lcm")

# switches that must be off
EVENLY = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}

# the class in public files -> the name here, and the one supported value of each switch
CLASSES = {
    "DDPMScheduler": ("ddpm", {"variance_type": "fixed_small"}),
    "DDIMScheduler": ("ddim", {}),
    "PNDMScheduler": ("pndm", {"skip_prk_steps": True}),
    "EulerDiscreteScheduler": ("euler", {
        **EVENLY, "interpolation_type": "linear", "timestep_type": "discrete"}),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", {}),
    "HeunDiscreteScheduler": ("heun", EVENLY),
    "LMSDiscreteScheduler": ("lms", EVENLY),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", {
        "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint",
        "lower_order_final": True, "euler_at_final": False, "lambda_min_clipped": -math.inf,
        "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False,
        "use_flow_sigmas": False}),
    "UniPCMultistepScheduler": ("unipc", {
        **EVENLY, "solver_order": 2, "solver_type": "bh2", "predict_x0": True,
        "lower_order_final": True, "disable_corrector": [], "solver_p": None,
        "use_flow_sigmas": False}),
    "LCMScheduler": ("lcm", {"original_inference_steps": LCM_TIMESTEPS, "timestep_scaling": 10.0}),
}


def check_name(name):
    """Raise TinyldmError for a sampler that is not one of SAMPLERS."""
    if not isinstance(name, str) or name not in SAMPLERS:
        near = get_close_matches(str(name).lower(), SAMPLERS, 1)
        raise TinyldmError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}"
                           f"{near and f'; did you mean {near[0]}?' or ''}")


def check_sampler(name, schedule, num_inference_steps, first=0, reach=1.0):
    """Raise TinyldmError for an unknown name, or a schedule or number of steps it cannot take.

    The sampler makes its first step on a zero, without a model. first, reach: see Origin.
    """
    check_name(name)
    zero, origin = np.zeros(1, np.float32), Origin(first=first, reach=reach)
    next(SAMPLERS[name](lambda x_t, t: x_t, zero, schedule, num_inference_steps, lambda: zero,
                        origin))


def default_sampler(config):
    """The name of the sampler that a scheduler_config.json (a dict) asks for.

    Raises TinyldmError for a class, or a variant of it, that is not supported.
    """
    name = config.get("_class_name")
    if name not in CLASSES:
        raise TinyldmError(f"the scheduler class {name!r} is not supported; supported: "
                           f"{', '.join(CLASSES)}; or choose a sampler: {', '.join(SAMPLERS)}")
    sampler, switches = CLASSES[name]
    config = {"skip_prk_steps": False, **config}        # the public class's default
    if sde := sampler == "dpmpp_2m" and config.get("algorithm_type") == "sde-dpmsolver++":
        switches = switches | {"algorithm_type": "sde-dpmsolver++"}
    for key, supported in switches.items():
        value = config.get(key)
        if value is not None and value != supported:
            raise TinyldmError(f"{name} with {key} = {value!r} is not supported, only "
                               f"{supported!r}; or choose a sampler: {', '.join(SAMPLERS)}")
    karras = sampler == "dpmpp_2m" and config.get("use_karras_sigmas")
    return sampler + "_sde" * sde + "_karras" * bool(karras)
