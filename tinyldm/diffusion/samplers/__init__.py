"""Samplers: from noise to latents, a model call at a time, each named after its paper.

Every sampler is a generator function

    sampler(predict, latents, schedule, num_inference_steps, draw_noise, origin, ...)

    predict(x_t, t) -> model output   guidance already inside; x_t has unit scale, t is a python
                                      number (fractional for Euler with "linspace" spacing)
    latents                           standard normal, any shape, numpy or cupy; never written to
    schedule                          schedule.Schedule
    draw_noise() -> array             a fresh standard normal of latents' shape, if noise is added
    origin                            walk.Origin, the picture to begin from, if there is one

which yields a walk.State after every model call, so a caller can show progress, look inside or
stop. All raise TinyldmError at the first step for a number of steps outside
1 .. num_train_timesteps; lcm, which has learnt 50 timesteps, for more than those.

Coefficients are computed in float32, as the schedule's tables are and in the order PyTorch's
schedulers have: differences of nearly equal numbers then round alike. They meet an array as python
floats, so that it keeps its dtype.

Two kinds of x appear. Those of variance_preserving.py and exponential.py hold x_t = a x_0 + s noise
with a^2 + s^2 = 1, as the model sees it. Those of variance_exploding.py hold x = x_t / a =
x_0 + sigma noise with sigma = s / a, and scale it back for the model. Either way the walk is the
same: Euler in x is DDIM with eta = 0 in x_t.
"""
import math
from functools import partial

from ...errors import TinyldmError
from .ddim import ddim
from .ddpm import ddpm
from .dpm_solver import dpmpp_2m
from .euler import euler, euler_ancestral
from .heun import heun
from .lcm import LCM_TIMESTEPS, lcm
from .lms import lms
from .pndm import pndm
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

EVENLY = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}

# the public files' class -> the name here, and the one value of each switch that is implemented
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


def get_sampler(name):
    """The sampler of a public name. Raises TinyldmError, listing the names, for any other."""
    if name not in SAMPLERS:
        raise TinyldmError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def default_sampler(config):
    """The name of the sampler that a scheduler_config.json (a dict) asks for.

    Raises TinyldmError for a class, or a variant of one, that is not among SAMPLERS.
    """
    name = config.get("_class_name")
    if name not in CLASSES:
        raise TinyldmError(f"the scheduler class {name!r} is not supported; supported: "
                           f"{', '.join(CLASSES)}; or choose a sampler: {', '.join(SAMPLERS)}")
    sampler, switches = CLASSES[name]
    config = {"skip_prk_steps": False, **config}        # what its absence means in the public class
    if sde := sampler == "dpmpp_2m" and config.get("algorithm_type") == "sde-dpmsolver++":
        switches = switches | {"algorithm_type": "sde-dpmsolver++"}
    for key, supported in switches.items():
        value = config.get(key)
        if value is not None and value != supported:
            raise TinyldmError(f"{name} with {key} = {value!r} is not supported, only "
                               f"{supported!r}; or choose a sampler: {', '.join(SAMPLERS)}")
    karras = sampler == "dpmpp_2m" and config.get("use_karras_sigmas")
    return sampler + "_sde" * sde + "_karras" * bool(karras)
