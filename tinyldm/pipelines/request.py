"""What to draw: the options of a pipeline's stream and __call__, checked once.

Every pipeline has a dataclass of its own, derived from Drawing, which holds what all share. Request
is Stable Diffusion's. What depends on a pipeline's models is checked in its own file.
"""
import difflib
import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Concatenate, ParamSpec, TypeVar, get_args

import numpy as np

from ..backend import is_finite
from ..diffusion.samplers import find_sampler
from ..diffusion.schedule import SPACINGS
from ..errors import TinyldmError, note
from ..images import check_image, decoded
from ..noise import get_generator
from .interpolation import Between, BetweenGenerator, as_list, ends, mixed

LARGEST = 8192              # pixels per side; more is a typing mistake, not a picture
MOST_STEPS, MOST_IMAGES, MOST_LAYERS = 1000, 10_000, 100        # the same

# Names on the command line and in other programs -> the same option here.
SYNONYMS = {
    "steps": "num_inference_steps", "guidance": "guidance_scale", "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale", "cfg_rescale": "guidance_rescale",
    "negative": "negative_prompt", "count": "num_images", "batch_size": "num_images",
    "num_images_per_prompt": "num_images", "scheduler": "sampler", "sampler_name": "sampler",
    "init_image": "image", "mask_image": "mask", "denoising_strength": "strength",
    "spacing": "timestep_spacing",
}
# Options of other programs with another meaning -> what to use here.
ELSEWHERE = {
    "generator": "seed= is what generator= is elsewhere, a whole number such as seed=5",
    "eta": "sampler='ddpm' or 'euler_ancestral' adds fresh noise in each step",
    "output_type": "the call gives PIL images; pipe.decode(state.latents) gives arrays",
    "return_dict": "the call gives a list of PIL images",
    "callback": "for state in pipe.stream(...) shows each step",
    "callback_on_step_end": "for state in pipe.stream(...) shows each step",
    "prompt_embeds": "give the prompt itself, with weights such as (word:1.3)",
    "prompt_2": "both text encoders read the same prompt",
    "timesteps": "num_inference_steps and timestep_spacing choose the timesteps",
    "sigmas": "a sampler such as 'dpmpp_2m_karras' chooses the sigmas",
}

P = ParamSpec("P")
T = TypeVar("T")


def takes(options: Callable[P, object]
          ) -> Callable[[Callable[..., T]], Callable[Concatenate[Any, P], T]]:
    """Decorator: the method takes self and what `options` takes, for editors and for inspect."""
    def decorate(method):
        own = list(inspect.signature(options).parameters.values())
        self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        method.__signature__ = inspect.Signature([self, *own])
        return method
    return decorate


class Drawing:
    """What the options of all pipelines share. The dataclass derived from it has these fields:

    num_inference_steps, seed, num_images, sampler, latents, noise, timestep_spacing
    """

    def __post_init__(self):
        """Raises TinyldmError for a value of these fields that is wrong for every pipeline."""
        for field in fields(self):
            types = {field.type, *get_args(field.type)}
            if field.name in ("seed", "label") or {int, float} & types:
                refuse_flags(field.name, getattr(self, field.name))
        for name in ("num_inference_steps", "num_images"):
            object.__setattr__(self, name, whole(getattr(self, name)))
        if self.num_inference_steps is not None:
            check_whole("the number of steps", self.num_inference_steps, 1, MOST_STEPS)
        check_whole("num_images", self.num_images, 1, MOST_IMAGES)
        check_whole("the number of images", self.count, 1, MOST_IMAGES)
        if self.sampler is not None:
            find_sampler(self.sampler)
        if self.timestep_spacing not in (None, *SPACINGS):
            raise TinyldmError(f"timestep_spacing must be {', '.join(SPACINGS[:-1])} or "
                               f"{SPACINGS[-1]}, not {self.timestep_spacing!r}")

    @property
    def subjects(self):
        """A list of what is drawn, num_images of each: prompts or labels. Here one of no name."""
        return [None]

    @property
    def count(self):
        """The number of pictures."""
        return len(self.subjects) * self.num_images

    def seeds(self):
        """One for each image: those given, or for each subject seed, seed + 1, ..., as Python ints.

        NumPy's small integers would wrap around. Raises TinyldmError for a list of another length.
        """
        seeds = as_list(self.seed)
        if seeds == [self.seed]:
            seed = mixed(self.seed, whole, Between)
            return [mixed(seed, lambda end, i=i: end + i if isinstance(end, int) else end,
                          Between) for i in range(self.num_images)] * len(self.subjects)
        if len(seeds) != self.count:
            raise TinyldmError(f"a list of seeds must have one for each of {self.count} images, "
                               f"not {len(seeds)}: give as many, or one seed")
        return [mixed(seed, whole, Between) for seed in seeds]

    def generators(self):
        """One generator of normal numbers per image; raises TinyldmError for a wrong seed."""
        generator = get_generator(self.noise)
        return [mixed(seed, generator, BetweenGenerator) for seed in self.seeds()]


class Prompted(Drawing):
    """What the options of pipelines with a text encoder share besides. Further fields:

    prompt, negative_prompt, guidance_scale, clip_skip
    """

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "clip_skip", whole(self.clip_skip))
        if self.negative_prompt is None:
            object.__setattr__(self, "negative_prompt", "")
        if self.guidance_scale is not None:
            check_finite("guidance_scale", self.guidance_scale)
        check_prompts(self.prompts, self.negative_prompts)
        if self.clip_skip is not None:
            check_whole("clip_skip", self.clip_skip, 0, MOST_LAYERS)

    @property
    def prompts(self):
        """A list, of one prompt or several."""
        prompts = as_list(self.prompt)
        if not prompts:
            raise TinyldmError("a list of prompts must have at least one: give one")
        return prompts

    @property
    def subjects(self):
        """The prompts."""
        return self.prompts

    @property
    def negative_prompts(self):
        """A list, one for each prompt, where one text is for all."""
        texts = as_list(self.negative_prompt)
        return texts if texts != [self.negative_prompt] else texts * len(self.prompts)


@dataclass(frozen=True, eq=False)
class Request(Prompted):
    """The options, in the order in which they may be given by position.

    prompt: what to draw, at any length, with weights such as (word:1.3): see text/prompt.py. A list
        of prompts draws num_images of each, from the same seeds.
    negative_prompt: what to move away from, in the same form; or a list, one for each prompt.
    num_inference_steps: 1 to 1000; more is slower and finer. PNDM makes one model call more, or
        nine with its Runge-Kutta start; Heun nearly two per step. Default: the weights' own number.
    guidance_scale: how strongly to follow the prompt. Up to 1 there is no guidance, and the
        negative prompt plays no part. A model that imitates guidance (LCM) gets this number as an
        input and ignores the negative prompt. Default: the weights' own, or else the public
        pipeline's: 7.5; 5 for Stable Diffusion XL without a mask, 8.5 for a Latent Consistency
        Model.
    seed: image i is drawn from seed + i, and equals the single image of that seed; or a list of
        seeds, one for each image.
    width, height: pixels, multiples of the VAE's downsampling factor. Default: the image's size,
        rounded down, or without an image the weights' own.
    sampler: a key of diffusion.samplers.SAMPLERS, or its name elsewhere, such as "Euler a" or
        "DPM++ 2M Karras". Default: the weights' own.
    latents: standard normal numbers to start from in place of the seed's, of shape (images,
        height / factor, width / factor, channels).
    noise: whose normal numbers a seed stands for, a key of noise.GENERATORS: torch's on the CPU
        ("torch-cpu") or on a GPU ("torch-cuda"), or NumPy's ("numpy").
    guidance_rescale: 0 to 1, how much to undo of the over-saturation that guidance causes.
    image: a PIL image to begin from; it is resized.
    strength: 0 to 1, how much of the image to draw anew: the share of the steps to make. The noise
        added to the image is that of the first of them (SDEdit, see Origin). A Latent Consistency
        Model makes all steps, from as little noise. With a mask, 1 begins from noise alone.
        Default: the public pipeline's, 0.8, and with a mask 1; for Stable Diffusion XL 0.3, and
        with a mask 0.9999.
    mask: a PIL image, white where to paint and black where the image is to stay. A model made for
        inpainting requires an image and a mask.
    timestep_spacing: how the steps are spread over the training timesteps, "leading", "trailing" or
        "linspace". Default: the weights' own. A single file does not say its own: there, few steps
        without guidance take "trailing", as Turbo, Lightning and Hyper models need.
    clip_skip: how many of the last layers of the text encoder to leave out for the prompt, counted
        as in diffusers: 1 takes the output of the layer before the last one, and in Stable
        Diffusion XL, which leaves the last one out anyway, that of one layer before. The negative
        prompt is read by all layers.

    The prompts, the seed and the image may each be an interpolation.Between, which mixes two.
    Raises TinyldmError for a value that is wrong for every pipeline.
    """

    prompt: Any
    negative_prompt: Any = ""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: Any = 0
    width: int | None = None
    height: int | None = None
    num_images: int = 1
    sampler: str | None = None
    latents: Any = None
    noise: str = "torch-cpu"
    guidance_rescale: float = 0.0
    image: Any = None
    strength: float | None = None
    mask: Any = None
    timestep_spacing: str | None = None
    clip_skip: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_fraction("guidance_rescale", self.guidance_rescale)
        for name in ("width", "height"):
            object.__setattr__(self, name, whole(getattr(self, name)))
            if getattr(self, name) is not None:
                check_pixels(name, getattr(self, name))
        check_edit(self.image, self.strength, self.mask)
        for name in ("image", "mask"):                  # decoded here, once, for all that read them
            object.__setattr__(self, name, decoded_ends(name, getattr(self, name)))


def check_prompts(prompts, negative_prompts):
    """Raise TinyldmError for lists of different lengths, and for what is no text."""
    if len(negative_prompts) != len(prompts):
        raise TinyldmError("negative_prompt must be one text, or a list as long as prompt's, "
                           f"{len(prompts)}, not {len(negative_prompts)}")
    for text in (end for own in (*prompts, *negative_prompts) for end in ends(own)):
        if not isinstance(text, str):
            raise TinyldmError("a prompt must be a string of valid Unicode, got "
                               f"{text!r}: pass plain text, or a list of such")


class UnknownOption(TinyldmError, TypeError):
    """A keyword that a call does not take; a TypeError, as from any other function."""


def own_names(options, kind=Request):
    """{name: value} of a call's options, with the names of other programs replaced by ours.

    kind: the dataclass of the options.
    Raises UnknownOption, which says what is meant, for an unknown name and for one given twice.
    """
    known, own = [field.name for field in fields(kind)], {}
    for name, value in options.items():
        mine = SYNONYMS.get(name, name)
        if mine in own:
            raise UnknownOption(f"{name} and {mine} are one option: give one of them")
        if mine in ELSEWHERE and mine not in known:
            raise UnknownOption(f"there is no option {name}: {ELSEWHERE[name]}")
        if mine not in known:
            synonyms = [name for name, mine in SYNONYMS.items() if mine in known]
            near = difflib.get_close_matches(name, [*known, *synonyms], 1)
            meant = f"did you mean {SYNONYMS.get(*near * 2)}?" if near else "known are "
            raise UnknownOption(f"there is no option {name!r}: {meant}"
                                + ("" if near else ", ".join(known)))
        own[mine] = value
    return own


def whole(value):
    """A whole number of any type, such as np.int8 or 512.0, as a Python int; else the value."""
    try:
        real = isinstance(value, (float, np.floating))
        return int(value) if real and value.is_integer() else operator.index(value)
    except TypeError:
        return value


def refuse_flags(name, value):
    """Raise TinyldmError for True or False, numbers to Python, also in a list or a Between."""
    for end in [end for item in as_list(value) for end in ends(item)]:
        if isinstance(end, (bool, np.bool_)):
            raise TinyldmError(f"{name} must be a number, not {end}: give one, or leave it out")


def decoded_ends(name, image):
    """An image, or each of a Between's, as a decoded PIL image; None stays None."""
    if isinstance(image, Between):
        return image._replace(first=decoded(name, image.first), second=decoded(name, image.second))
    return None if image is None else decoded(name, image)


def check_finite(name, value):
    try:
        finite = math.isfinite(value)
    except (TypeError, OverflowError):
        finite = False
    if not finite:
        raise TinyldmError(f"{name} must be a finite number, not {value!r}")


def check_whole(name, value, least, most):
    if not isinstance(value, int) or not least <= value <= most:
        raise TinyldmError(f"{name} must be a whole number from {least} to {most}, not {value!r}")


def check_pixels(name, pixels, least=1):
    """-> pixels as an int; raises TinyldmError unless it is one from least to LARGEST."""
    try:
        pixels = operator.index(pixels)
    except TypeError:
        raise TinyldmError(f"{name} must be a whole number of pixels, not {pixels!r}") from None
    if not 0 < pixels <= LARGEST:
        raise TinyldmError(f"{name} must be from {least} to {LARGEST} pixels, not {pixels}")
    return pixels


def check_edit(image, strength, mask):
    """Raise TinyldmError for values, or for pairs of them, that are wrong for every pipeline."""
    if image is None and (mask is not None or strength is not None):
        raise TinyldmError("a mask or a strength needs an image: give one")
    for end in [] if image is None else ends(image):
        check_image("image", end)
    if mask is not None:
        check_image("mask", mask)
    if strength is not None:
        check_fraction("strength", strength)


def check_fraction(name, value):
    check_finite(name, value)
    if not 0 <= value <= 1:
        raise TinyldmError(f"{name} must be from 0 to 1, not {value:g}")


def picture_size(width, height, image, own, factor):
    """(width, height) in pixels: as given, else the image's, else of own = (height, width) latents.

    factor: the VAE's downsampling factor.
    Raises TinyldmError for a side that is missing, too large or no multiple of the factor.
    """
    if image is not None:
        image = ends(image)[0]
        own = image.height // factor, image.width // factor
        if 0 in own and None in (width, height):
            raise TinyldmError(f"the image is {image.width}x{image.height} pixels, too small "
                               f"for multiples of {factor}: give a width and a height")
    return _side("width", width, own[1], factor), _side("height", height, own[0], factor)


def _side(name, pixels, own, factor):
    if pixels is None and own is None:
        raise TinyldmError(f"the weights name no size: {name} must be given")
    pixels = check_pixels(name, own * factor if pixels is None else pixels, factor)
    if pixels % factor:
        near = [n for n in (pixels // factor * factor, -(-pixels // factor) * factor) if n]
        raise TinyldmError(f"{name} must be a multiple of {factor}, not {pixels}: "
                           f"the nearest is {' or '.join(map(str, near))}")
    return pixels


def note_on_size(size, own, from_image):
    """A note on a picture of more pixels than the model was made for.

    size, own: (width, height) of the picture and of the weights. from_image: the size is that of a
    given picture.
    """
    times = math.prod(size) / math.prod(own)
    if times > 1:
        many = f"{times:.2g}" if times < 10 else f"{times:,.0f}"
        what = "the image is drawn at its" if from_image else "the picture has"
        note(f"{what} {size[0]}x{size[1]} pixels, {many} times as many as the {own[0]}x{own[1]} of "
             "the weights: things may repeat or fall apart, and it takes longer; a width and a "
             "height make it smaller")


def check_latents(latents, shape, factor):
    """Raise TinyldmError unless the latents are finite and of that shape."""
    if latents.shape != shape:
        sides = "height, width" if factor == 1 else f"height / {factor}, width / {factor}"
        raise TinyldmError(f"latents must be finite and of shape {shape} (num_images, {sides}, "
                           f"channels), not {latents.shape}")
    if not is_finite(latents):
        raise TinyldmError("latents must be finite and of this dtype's range, but they hold NaN, "
                           "infinity or larger numbers: give standard normal ones")
