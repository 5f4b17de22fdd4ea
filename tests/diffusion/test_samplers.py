"""Every sampler against diffusers' scheduler of the same name, step by step, with the same noise.

In float64, from the float32 tables of both. diffusers computes coefficients in float32, which are
off by up to 6e-6 where they are small differences, and whose last digits depend on the processor:
so its tables are widened first, except for samplers that round as ours do (SAME_ROUNDING).

The model is a fixed smooth function of x and t. The tests compare the samplers' arithmetic over
whole loops, so that a difference at one step grows in the next. All arrays given to a sampler
(latents, model outputs, noise) are read-only.
"""
import dataclasses
import inspect
import math
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_lms_discrete

from tests.support.reference import float32_noise
from tests.support.schedulers import SD, SD15, SD21, SDXL, TURBO
from tests.support.tolerance import within
from tinyldm.diffusion.samplers import CLASSES as PUBLIC
from tinyldm.diffusion.samplers import (
    SAMPLERS,
    check_sampler,
    default_sampler,
    find_sampler,
    own_options,
)
from tinyldm.diffusion.samplers.shared import NO_PICTURE, Origin, dynamic_threshold
from tinyldm.diffusion.schedule import Schedule
from tinyldm.errors import TinyldmError

CLASSES = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "pndm": "PNDMScheduler",
           "euler": "EulerDiscreteScheduler", "euler_ancestral": "EulerAncestralDiscreteScheduler",
           "heun": "HeunDiscreteScheduler", "lms": "LMSDiscreteScheduler",
           "dpmpp_2m": "DPMSolverMultistepScheduler",
           "dpmpp_2m_karras": "DPMSolverMultistepScheduler",
           "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
           "dpmpp_2m_sde_karras": "DPMSolverMultistepScheduler",
           "unipc": "UniPCMultistepScheduler", "deis": "DEISMultistepScheduler",
           "lcm": "LCMScheduler"}
CLASSES |= {name: CLASSES[name.rpartition("_")[0]] for name in SAMPLERS if name not in CLASSES}
# float32 coefficients, as in diffusers
SAME_ROUNDING = tuple(name for name in SAMPLERS if name.startswith(("euler", "heun")))
BY_ALPHA_BAR = ("ddpm", "ddim", "pndm", "lcm")          # coefficients in the table's precision
STEPS = (1, 2, 3, 4, 5, 10, 20, 50)
SHAPE = (2, 8, 8, 4)
TOLERANCE = 1e-5                    # of the latents' standard deviation, at every step

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
every_sampler = pytest.mark.parametrize("name", SAMPLERS)
every_prediction = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])


@pytest.fixture(autouse=True)
def equal_sigmas(request):
    """For float32 coefficients that magnify a sigma's last bit, where torch's root may be off."""
    case = getattr(request.node, "callspec", None)
    if case and case.params.get("name") in (*SAME_ROUNDING, "lms_karras", "lms_exponential"):
        request.getfixturevalue("exact_sqrt")


def stand_in(x, t):
    """(tensor, number) -> tensor: mixes channels, bends, and depends on t."""
    mix = torch.tensor([[3, -1, 0, 1], [1, 2, -2, 0], [0, 1, 3, -1], [-2, 0, 1, 2]]).to(x) * 0.2
    signs = torch.tensor([1, -1, 1, -1])
    return 0.8 * torch.tanh(x @ mix + math.sin(t / 200) * signs) + 0.3 * x


def predict(x, t):
    assert isinstance(x, np.ndarray), type(x)
    return read_only(stand_in(torch.from_numpy(x.copy()), t))


def read_only(tensor):
    array = tensor.numpy().copy()
    array.flags.writeable = False
    return array


def start(dtype=torch.float32):
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    return latents, read_only(latents)


def noise_source(dtype=torch.float32, seed=1):
    """draw_noise for ours: the numbers that diffusers draws from a torch generator of this seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: read_only(torch.randn(SHAPE, generator=generator).to(dtype))


def options_of(name):
    """The fields that make diffusers' class the sampler of this name."""
    return {**({"use_karras_sigmas": True} if name.endswith("_karras") else {}),
            **({"use_exponential_sigmas": True} if name.endswith("_exponential") else {}),
            **({"algorithm_type": "sde-dpmsolver++"} if "_sde" in name else {})}


def scheduler_of(name, config):
    if name.startswith("lms"):
        return lms_scheduler({**config, **options_of(name)})
    return getattr(diffusers, CLASSES[name]).from_config(config, **options_of(name))


def lms_scheduler(config):
    """diffusers' LMS, which needs one function of scipy and is hidden where scipy is missing."""
    def quad(f, start, end, epsrel):
        """Gauss' rule with four points: exact up to degree 7; diffusers needs degree 3 at most."""
        points, weights = np.polynomial.legendre.leggauss(4)
        values = [float(f(start + (end - start) * (point + 1) / 2)) for point in points.tolist()]
        return float(end - start) / 2 * np.dot(weights, values), 0.0

    if not hasattr(scheduling_lms_discrete, "integrate"):
        scheduling_lms_discrete.integrate = SimpleNamespace(quad=quad)
    return scheduling_lms_discrete.LMSDiscreteScheduler.from_config(config)


def widen(scheduler):
    """Make a scheduler's float32 tables float64, and so the coefficients that it computes."""
    for name, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "timesteps":
            setattr(scheduler, name, value.double())


@contextmanager
def float64_latents():
    """diffusers' schedulers with float32's noise, but without their rounding to float32."""
    to = torch.Tensor.to

    def kept(x, *args, **options):
        narrows = x.dtype == torch.float64 and args == (torch.float32,)
        return x if narrows else to(x, *args, **options)

    with mock.patch.object(torch.Tensor, "to", kept), float32_noise():
        yield


def reference_loop(scheduler, steps, origin=NO_PICTURE):
    """The pipelines' loop: (timestep, latents, x_start or None) after every model call."""
    scheduler.set_timesteps(steps)
    if type(scheduler).__name__ not in [CLASSES[name] for name in SAME_ROUNDING]:
        widen(scheduler)
    with float64_latents():
        yield from loop(scheduler, origin)


def loop(scheduler, origin):
    timesteps = scheduler.timesteps[origin.first * scheduler.order:]
    takes = inspect.signature(scheduler.step).parameters
    options = {"generator": torch.Generator().manual_seed(1)}
    options = {name: value for name, value in options.items() if name in takes}
    noise, _ = start(torch.float64)
    latents = noise * scheduler.init_noise_sigma
    if origin.picture is not None:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(origin.first * scheduler.order)
        picture = torch.tensor(origin.picture).double()
        if not origin.noise_only:
            latents = scheduler.add_noise(picture, noise, timesteps[:1])
    for i, t in enumerate(timesteps):
        output = stand_in(scheduler.scale_model_input(latents, t), float(t))
        result = scheduler.step(output, t, latents, **options)
        latents = result.prev_sample
        if origin.mask is not None:
            known, mask = picture, torch.tensor(origin.mask)
            if i < len(timesteps) - 1:
                known = scheduler.add_noise(picture, noise, timesteps[i + 1:i + 2])
            latents = (1 - mask) * known + mask * latents
        yield t.item(), latents.numpy(), result.get("pred_original_sample", result.get("denoised"))


def check(name, config, steps, scheduler=None, dtype=torch.float64, keywords=None, **options):
    """Compare the loops: timesteps, latents and predicted x_start. dtype: of ours."""
    scheduler = scheduler or scheduler_of(name, config)
    reference = list(reference_loop(scheduler, steps, **options))
    schedule, latents = Schedule.from_config(config), start(dtype)[1]
    if dtype == torch.float64 and name in BY_ALPHA_BAR:
        object.__setattr__(schedule, "alphas_cumprod", schedule.alphas_cumprod.astype(float))
    states = list(SAMPLERS[name](predict, latents, schedule, steps, noise_source(dtype),
                                 **(keywords or {}), **options))
    assert [state.step for state in states] == list(range(len(reference)))
    for state, (t, latents, x_start) in zip(states, reference):
        where = f"{name}, step {state.step} of {steps}, {config}"
        assert state.timestep == t, where
        assert state.latents.dtype == state.pred_x0.dtype == start(dtype)[1].dtype
        within(abs(state.latents - latents).max(), TOLERANCE * latents.std(), where)
        if x_start is not None:
            within(abs(state.pred_x0 - x_start.numpy()).max(), 2 * TOLERANCE * x_start.std(),
                   f"{where}: pred_x0")


@every_sampler
@every_prediction
@pytest.mark.parametrize("spacing", [None, "leading", "linspace", "trailing"])
def test_every_step_is_diffusers(name, prediction, spacing):
    config = {**SD, "prediction_type": prediction}
    if spacing:
        config["timestep_spacing"] = spacing
    # 50 exponential steps magnify the rounding of diffusers' sigmas in polynomials of degree 3.
    for steps in STEPS[:-1] if name == "lms_exponential" else STEPS:
        check(name, config, steps)


@every_sampler
@every_prediction
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_from_a_picture(name, prediction, masked, final):
    """Image to image and inpainting: fewer steps, from a noised picture, parts of it put back."""
    config = {**SD, "prediction_type": prediction, "final_sigmas_type": final}
    random = np.random.default_rng(5)
    picture = 0.8 * random.standard_normal(SHAPE)
    mask = (random.random((1, *SHAPE[1:3], 1)) < 0.6).astype(float) if masked else None
    for array in (picture, *([mask] if masked else [])):
        array.flags.writeable = False
    for steps, first in [(1, 0), (2, 1), (5, 0), (5, 1), (5, 2), (5, 3), (5, 4), (10, 7), (20, 4)]:
        check(name, config, steps, origin=Origin(picture, first, mask))
        check(name, config, steps, origin=Origin(picture, first, mask, noise_only=True))


@every_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("config", [SD15, SD21, SDXL, TURBO])
def test_published_configs(name, config, dtype):
    check(name, config, 7, dtype=dtype)
    check(name, config, 25, dtype=dtype)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde",
                                  "dpmpp_2m_sde_karras", "unipc"])
@every_prediction
def test_final_sigma_min(name, prediction):
    config = {**SD, "prediction_type": prediction, "final_sigmas_type": "sigma_min"}
    for steps in (*STEPS, 14, 15):              # DPM-Solver++'s last step changes between these two
        check(name, config, steps)


@pytest.mark.parametrize("name", [name for name in SAMPLERS
                                  if not name.endswith(("karras", "exponential"))])
@pytest.mark.parametrize("config", [
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},    # other fields missing
    {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True, "clip_sample_range": 2.0},
    {"trained_betas": [0.001 * i + 0.001 for i in range(60)], "num_train_timesteps": 60},
    {**SD, "set_alpha_to_one": True, "steps_offset": 0},
])
def test_other_fields(name, config):
    config = {"skip_prk_steps": True, **config}
    for steps in (1, 3, 20):
        check(name, config, steps)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "heun", "lms", "dpmpp_2m",
                                  "dpmpp_2m_sde", "unipc", "deis", "lcm"])
def test_sample_prediction(name):
    check(name, {**SD, "prediction_type": "sample"}, 10)


@pytest.mark.parametrize("name", [name for name in SAMPLERS
                                  if name != "pndm" and not name.endswith("exponential")
                                  and (name.startswith("dpm") or "karras" not in name)])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_zero_terminal_snr(name, spacing, exact_sqrt):
    """With one table for both: sigma = 4096 turns a table's last bit into 4e-4 of the latents.

    At 50 Karras steps diffusers leaves its own table (two timesteps round to 999). Its Heun and LMS
    have no such switch, so the test gives them the table.
    """
    config = {**SD, "prediction_type": "v_prediction", "timestep_spacing": spacing,
              "rescale_betas_zero_snr": True}
    schedule = Schedule.from_config(config)
    for steps in STEPS[:-1] if "karras" in name else STEPS:
        scheduler = scheduler_of(name, config)
        table = schedule.alphas_cumprod.copy()
        if name not in ("ddpm", "ddim", "lcm"):
            table[-1] = 2 ** -24
        scheduler.alphas_cumprod = torch.from_numpy(table)
        check(name, config, steps, scheduler)


@every_sampler
def test_zero_terminal_snr_with_epsilon(name):
    """Division by alpha_bar = 0 is an error; sigma = 4096 works, as in diffusers."""
    schedule = Schedule.from_config({**SD, "timestep_spacing": "trailing",
                                     "rescale_betas_zero_snr": True})
    states = SAMPLERS[name](predict, start()[1], schedule, 5, noise_source())
    if name in ("ddpm", "ddim", "pndm", "lcm"):
        refused(name, schedule, 5, message="rescale_betas_zero_snr")
    else:
        assert all(np.isfinite(state.latents).all() for state in states)


@every_sampler
def test_as_many_steps_as_training_timesteps(name):
    """Where diffusers leaves its tables (timestep 1000) or divides by zero, ours works."""
    T = 50 if name == "lcm" else 60
    for spacing in ("leading", "linspace", "trailing"):
        config = {**SD, "num_train_timesteps": T, "timestep_spacing": spacing}
        schedule = Schedule.from_config(config)
        states = list(SAMPLERS[name](predict, start()[1], schedule, T, noise_source()))
        assert len(states) == {"pndm": T + 1, "heun": 2 * T - 1}.get(name.partition("_")[0], T)
        assert np.isfinite(states[-1].latents).all()


@every_prediction
@pytest.mark.parametrize("spacing", [None, "leading", "linspace", "trailing"])
def test_pndm_begins_by_runge_kutta(prediction, spacing):
    config = {**SD15, "skip_prk_steps": False, "prediction_type": prediction}
    if spacing:
        config["timestep_spacing"] = spacing
    for steps in (4, 5, 8, 9, 10, 20, 50):              # half of 1000 // 8 is no whole number
        check("pndm", config, steps, keywords=own_options(config, "pndm"))
    published = {"beta_schedule": "linear", "steps_offset": 0, "set_alpha_to_one": True}
    for steps in (4, 20):
        check("pndm", config | published, steps, keywords={"skip_prk_steps": False})


# Of diffusers' test_scheduler_pndm.py: the sum and the mean of the absolute values at the end.
@pytest.mark.parametrize("options, total, mean", [
    ({}, 198.1318, 0.2580), ({"prediction_type": "v_prediction"}, 67.3986, 0.0878),
    ({"set_alpha_to_one": True, "beta_start": 0.01}, 230.0399, 0.2995),
    ({"set_alpha_to_one": False, "beta_start": 0.01}, 186.9482, 0.2434)], ids=str)
def test_the_published_loop_of_pndm(options, total, mean):
    config = {"_class_name": "PNDMScheduler", "beta_start": 0.0001, "beta_end": 0.02, **options}
    ramp = (np.arange(768).reshape(3, 8, 8, 4) / 768).astype(np.float32)
    *_, last = SAMPLERS["pndm"](lambda x, t: x * np.float32(t / (t + 1)), ramp,
                                Schedule.from_config(config), 10, None,
                                **own_options(config, default_sampler(config)))
    assert abs(abs(last.latents).sum() - total) < 1e-2
    assert abs(abs(last.latents).mean() - mean) < 1e-3


@every_prediction
@pytest.mark.parametrize("masked", [False, True])
def test_pndm_from_a_picture(prediction, masked):
    """By Runge-Kutta if all steps are made; or else as without it, like the public inpainting."""
    config = {**SD, "prediction_type": prediction}
    random = np.random.default_rng(5)
    picture = random.standard_normal(SHAPE)
    mask = (random.random((1, *SHAPE[1:3], 1)) < 0.6).astype(float) if masked else None
    for steps, first in [(4, 0), (10, 0), (10, 1), (10, 7), (2, 1)]:
        scheduler = scheduler_of("pndm", {**config, "skip_prk_steps": first > 0})
        check("pndm", config, steps, scheduler, keywords={"skip_prk_steps": False},
              origin=Origin(picture, first, mask))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_runge_kutta_takes_four_steps(steps):
    with pytest.raises(ValueError):
        diffusers.PNDMScheduler().set_timesteps(steps)
    with pytest.raises(TinyldmError, match=f"at least 4 steps, not {steps}: take more") as error:
        check_sampler("pndm", Schedule.from_config(SD), steps, options={"skip_prk_steps": False})
    assert "\n" not in str(error.value)
    check_sampler("pndm", Schedule.from_config(SD), steps)


@every_sampler
@pytest.mark.parametrize("prk", [False, True])
def test_progress_counts_every_step_once(name, prk):
    keywords = {"skip_prk_steps": False} if prk and name == "pndm" else {}
    for steps, first in [(1, 0), (4, 0), (10, 0), (10, 1), (10, 9)]:
        if steps > 1 or not keywords:
            states = SAMPLERS[name](predict, start()[1], Schedule.from_config(SD), steps,
                                    noise_source(), Origin(first=first), **keywords)
            assert sum(not state.repeats for state in states) == steps - first


def test_pndm_calls():
    schedule = Schedule.from_config(SD15)

    def timesteps(n):
        return [s.timestep for s in SAMPLERS["pndm"](predict, start()[1], schedule, n, None)]
    assert timesteps(1) == [1]                                      # one DDIM step, as in diffusers
    assert timesteps(3) == [667, 334, 334, 1]
    assert timesteps(50)[:4] == [981, 961, 961, 941]

    def by_runge_kutta(n):
        return [s.timestep for s in SAMPLERS["pndm"](predict, start()[1], schedule, n, None,
                                                     skip_prk_steps=False)]
    assert by_runge_kutta(4) == [751, 626, 626, 501, 501, 376, 376, 251, 251, 126, 126, 1, 1]
    assert by_runge_kutta(50)[:6] == [981, 971, 971, 961, 961, 951]
    assert len(by_runge_kutta(50)) == 59


@every_sampler
def test_dtype_is_kept(name):
    """Tables and coefficients never widen the latents' dtype."""
    for dtype in (np.float16, np.float32, np.float64):
        seen = []

        def keep(x, t, seen=seen):
            seen.append(x.dtype)
            return x * 0.5
        latents = start()[1].astype(dtype)
        states = list(SAMPLERS[name](keep, latents, Schedule.from_config(SD), 4,
                                     lambda dtype=dtype: start()[1].astype(dtype)))
        assert {*seen, *(s.latents.dtype for s in states), *(s.pred_x0.dtype for s in states)} == {
            np.dtype(dtype)}


@every_sampler
def test_the_last_pred_x0_is_the_result(name):
    """Latents and previews have one scale: at the end they agree up to the last step's noise."""
    *_, last = SAMPLERS[name](predict, start()[1], Schedule.from_config(SD), 50, noise_source())
    within(abs(last.latents - last.pred_x0).max(), 0.1 * last.latents.std())


@every_sampler
@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "20", None])
def test_bad_steps(name, steps):
    refused(name, Schedule.from_config(SD), steps, message="from 1 to 1000")


def test_other_bad_input():
    with pytest.raises(TinyldmError, match="'dpm2'.*ddpm, ddim, pndm, euler, euler_anc.*_karras"):
        check_sampler("dpm2", Schedule.from_config(SD), 5)
    zero_snr = Schedule.from_config({**SD, "rescale_betas_zero_snr": True})
    refused("pndm", zero_snr, 5, message="another sampler")
    for T, steps in ((1000, 51), (49, 4)):
        schedule = Schedule.from_config({**SD, "num_train_timesteps": T})
        refused("lcm", schedule, steps, message=f"lcm takes from 1 to 50 .*not {steps} of {T}")


@pytest.mark.parametrize("name, expected", [
    ("Euler a", "euler_ancestral"), ("DPM++ 2M Karras", "dpmpp_2m_karras"), ("euler", "euler"),
    ("DPM++ 2M SDE Karras", "dpmpp_2m_sde_karras"), ("dpmpp_2m", "dpmpp_2m"), ("PLMS", "pndm"),
    ("k_euler", "euler"), ("k_euler_ancestral", "euler_ancestral"), ("UniPC", "unipc"),
    ("k_dpmpp_2m", "dpmpp_2m"), ("DDIM", "ddim"), ("ddim ", "ddim"), ("dpmpp-2m-sde",
     "dpmpp_2m_sde"), ("DPM++ 2M", "dpmpp_2m"), ("sample_euler", "euler"), ("Heun", "heun"),
    ("EulerDiscreteScheduler", "euler"), ("DPMSolverMultistepScheduler", "dpmpp_2m"),
    ("EulerAncestralDiscreteScheduler", "euler_ancestral"), ("LMS", "lms"), ("LCM", "lcm"),
    ("UniPCMultistepScheduler", "unipc"), ("LMSDiscreteScheduler", "lms"), ("k_lms", "lms")])
def test_names_as_people_write_them(name, expected):
    assert find_sampler(name) == expected


@pytest.mark.parametrize("name, meant", [("eular", "euler"), ("Euler anc", "euler_ancestral"),
                                         ("dpm++ 2n", "dpmpp_2m"), ("unicp", "unipc")])
def test_a_near_name_is_proposed(name, meant):
    with pytest.raises(TinyldmError, match=f"unknown sampler .*; did you mean {meant}\\?$"):
        find_sampler(name)


def refused(name, schedule, steps, message):
    """Both by check_sampler, which calls no model, and by the sampler's first step."""
    with pytest.raises(TinyldmError, match=message):
        check_sampler(name, schedule, steps)
    with pytest.raises(TinyldmError, match=message):
        next(SAMPLERS[name](predict, start()[1], schedule, steps, noise_source()))


def test_default_sampler():
    for name, public in CLASSES.items():
        config = {**SD, "_class_name": public, **options_of(name)}
        assert default_sampler(config) == name
        saved = dict(scheduler_of(name, SD).config, _class_name=public)     # every field is named
        assert default_sampler(saved) == name
    assert [default_sampler(c) for c in (SD15, SD21, SDXL, TURBO)] == [
        "pndm", "ddim", "euler", "euler_ancestral"]


@pytest.mark.parametrize("options", [
    {"euler_at_final": True}, {"lower_order_final": False}, {"solver_order": 1},
    {"solver_type": "heun"}, {"solver_type": "heun", "algorithm_type": "sde-dpmsolver++"}], ids=str)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_options_of_the_weights_own_scheduler(options, final):
    config = {**SD, "_class_name": "DPMSolverMultistepScheduler", "final_sigmas_type": final,
              **options}
    name = default_sampler(config)
    assert name == ("dpmpp_2m_sde" if "algorithm_type" in options else "dpmpp_2m")
    keywords = own_options(config, name)
    assert keywords.items() >= {key: value for key, value in options.items()
                                if key != "algorithm_type"}.items()
    for steps in (1, 5, 20):
        scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config)
        check(name, config, steps, scheduler, keywords=keywords)
    assert own_options(config, "euler") == own_options({"_class_name": "x"}, name) == {}


@pytest.mark.parametrize("options", [{"solver_order": 1}, {"lower_order_final": False}], ids=str)
def test_options_of_deis(options):
    config = {**SD, "_class_name": "DEISMultistepScheduler", **options}
    assert own_options(config, default_sampler(config)) == options
    for steps in (1, 5, 20):
        check("deis", config, steps, diffusers.DEISMultistepScheduler.from_config(config),
              keywords=options)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("file, skips", [({}, False), ({"skip_prk_steps": None}, False),
                                         ({"skip_prk_steps": False}, False),
                                         ({"skip_prk_steps": True}, True)], ids=str)
def test_options_of_pndm(file, skips):
    """A file without the key means the public class's default."""
    config = {"_class_name": "PNDMScheduler", **file}
    assert own_options(config, default_sampler(config)) == {"skip_prk_steps": skips}
    assert own_options(config, "ddim") == {}


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_parallel_schedulers_are_the_same_algorithm(name):
    public = CLASSES[name].replace("Scheduler", "ParallelScheduler")
    assert default_sampler({**SD, "_class_name": public}) == name
    for steps in (1, 5, 20):
        check(name, SD, steps, getattr(diffusers, public).from_config(SD))


@pytest.mark.parametrize("config, expected, message", [
    ({"_class_name": "SASolverScheduler"}, "dpmpp_2m_sde", "SASol.* nearest sampler, dpmpp_2m_sde"),
    ({"_class_name": "DPMSolverSinglestepScheduler", "use_karras_sigmas": True}, "dpmpp_2m_karras",
     ""),
    ({"_class_name": "DEISMultistepScheduler", "solver_order": 3}, "deis", "solver_order = 3 .* 2"),
    ({"_class_name": "DPMSolverSinglestepScheduler"}, "dpmpp_2m", "DPMSolverSinglestepScheduler"),
    ({"_class_name": "KDPM2DiscreteScheduler", "use_karras_sigmas": True}, "heun_karras", "KDPM2"),
    ({"_class_name": "KDPM2AncestralDiscreteScheduler"}, "euler_ancestral", "KDPM2Ancestral"),
    ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, "euler",
     "EulerDiscreteScheduler with use_beta_sigmas = True is not built here: .* euler, and False"),
    ({"_class_name": "EulerDiscreteScheduler", "sigma_max": 10.0}, "euler", "sigma_max = 10.0"),
    ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "dpmpp_2m",
     "solver_order = 3 .* and 2"),
    ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "dpmpp_2m",
     "algorithm_type = 'dpmsolver' .* and 'dpmsolver[+][+]'"),
    ({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True}, "dpmpp_2m", "lu_lamb"),
    ({"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}, "unipc", "'bh1'"),
    ({"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]}, "unipc", "corrector"),
])
def test_the_nearest_sampler_is_taken_and_named(config, expected, message):
    with pytest.warns(UserWarning, match=message) as said:
        assert default_sampler(config) == expected
    assert len(said) == 1


@pytest.mark.parametrize("config, message", [
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch.*supported: DDPMScheduler"),
    ({}, "None.*supported: DDPMScheduler"), ({"_class_name": []}, "supported: DDPMScheduler"),
    ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas = True"),
    ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type"),
    ({"_class_name": "LCMScheduler", "original_inference_steps": 20}, "original_inference_steps"),
])
def test_unsupported_classes(config, message):
    with pytest.raises(TinyldmError, match=message) as error:
        default_sampler(config)
    assert "\n" not in str(error.value) and "dpmpp_2m_karras" in str(error.value)


# keys that change nothing, and why
CHANGE_NOTHING = {
    "flow_shift": "only with use_flow_sigmas, which is refused",
    "use_dynamic_shifting": "only with use_flow_sigmas, which is refused",
    "time_shift_type": "only with use_flow_sigmas, which is refused",
    "variance_type": "of DPM-Solver: it says which channels to drop, as pipelines do here anyway",
    "shift_terminal": "only with use_flow_sigmas, which is refused",
}
# keys for which the public class itself knows one value only
ONE_VALUE = {"DEISMultistepScheduler": {"algorithm_type", "solver_type"}}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_key_of_a_public_class_is_used_noted_or_refused(name):
    sampler, options, noted, refused = PUBLIC[name]
    cls = scheduling_lms_discrete.LMSDiscreteScheduler if sampler == "lms" else getattr(
        diffusers, name)
    keys = set(inspect.signature(cls.__init__).parameters) - {"self"}
    of_schedule = {item.name for item in dataclasses.fields(Schedule)} | {
        "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
        "rescale_betas_zero_snr"}
    names = {f"use_{spacing}_sigmas" for spacing in ("karras", "exponential")}
    rest = keys - of_schedule - names - {*options} - noted.keys() - refused.keys()
    assert rest <= CHANGE_NOTHING.keys() | ONE_VALUE.get(name, set())


# ---- thresholding, for pixels ---------------------------------------------------------------

THRESHOLDING = [name for name in SAMPLERS
                if "thresholding" in inspect.signature(
                    scheduler_of(name, SD).__init__).parameters]


@pytest.mark.parametrize("name", THRESHOLDING)
@every_prediction
@pytest.mark.parametrize("options", [
    {}, {"sample_max_value": 1.5}, {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 100.0},
    {"dynamic_thresholding_ratio": 1, "sample_max_value": 100.0},
    {"sample_max_value": 0.5, "clip_sample": True, "clip_sample_range": 0.1}], ids=str)
def test_dynamic_thresholding(name, prediction, options):
    config = {**SD, "thresholding": True, "prediction_type": prediction, **options}
    for steps in (1, 3, 20):
        check(name, config, steps)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in THRESHOLDING])
def test_thresholding_is_refused_where_the_public_class_has_none(name):
    schedule = Schedule.from_config({**SD, "thresholding": True})
    refused(name, schedule, 5, message="thresholding = true.*: choose ddpm, ddim, dpmpp_2m, unipc")


def test_the_numbers_of_dynamic_thresholding():
    x = np.linspace(-2, 2, 12).reshape(1, 2, 2, 3)
    for ratio, largest, expected in ((0.995, 1.5, [-1, -1, -0.848485, -0.606061]),
                                     (0.9, 100.0, [-1, -0.833333, -0.648148]),
                                     (0.995, 1.0, [-1, -1, -1, -0.909091])):
        schedule = Schedule.from_config({"thresholding": True, "sample_max_value": largest,
                                         "dynamic_thresholding_ratio": ratio})
        found = dynamic_threshold(x, schedule).reshape(-1)
        np.testing.assert_allclose(found[:len(expected)], expected, atol=1e-6)
        np.testing.assert_allclose(found, -found[::-1], atol=1e-15)
    # each image by its own quantile; one that stays within 1 is not changed
    both = dynamic_threshold(np.concatenate([x, x / 4]), schedule)
    np.testing.assert_array_equal(both[1:], x / 4)
    np.testing.assert_array_equal(both[:1], dynamic_threshold(x, schedule))


# ---- one trajectory under two names ---------------------------------------------------------

@every_prediction
@pytest.mark.parametrize("steps", [1, 2, 4, 20, 50])
@pytest.mark.parametrize("ends", [{"set_alpha_to_one": True, "final_sigmas_type": "zero"},
                                  {"set_alpha_to_one": False, "final_sigmas_type": "sigma_min"}])
def test_euler_is_ddim(prediction, steps, ends):
    """Euler's x is DDIM's x_t / sqrt(alpha_bar_t) at every step, with the same x_start.

    The steps divide T, so that DDIM's t - T / steps is the next timestep of the trailing list.
    """
    config = {**SD, "prediction_type": prediction, "timestep_spacing": "trailing", **ends}
    schedule, noise = Schedule.from_config(config), start(torch.float64)[1]
    end = 1.0 if ends["set_alpha_to_one"] else schedule.alphas_cumprod[0]
    sigma = schedule.sigmas[-1]                             # Euler starts at sigma times the noise
    x_t = noise * float(sigma * schedule.alphas_cumprod[-1] ** 0.5)
    trajectories = zip(SAMPLERS["euler"](predict, noise, schedule, steps, None),
                       SAMPLERS["ddim"](predict, x_t, schedule, steps, None), strict=True)
    for euler, ddim in trajectories:
        assert euler.timestep == ddim.timestep
        p = int(euler.timestep) - 1000 // steps
        alpha_bar = schedule.alphas_cumprod[p] if p >= 0 else end
        difference = abs(euler.latents * alpha_bar ** 0.5 - ddim.latents).max()
        within(difference, TOLERANCE * ddim.latents.std(), f"timestep {euler.timestep}")
        within(abs(euler.pred_x0 - ddim.pred_x0).max(), 2 * TOLERANCE * ddim.pred_x0.std(),
               f"timestep {euler.timestep}: pred_x0")
    assert p < 0
