"""What to draw: the options of StableDiffusion.stream and __call__, checked once.

What depends on the pipeline's models is checked in stable_diffusion.py and editing.py.
"""
import math
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import is_finite
from ..diffusion.samplers import check_name
from ..diffusion.schedule import SPACINGS
from ..errors import TinyldmError
from ..images import check_image, decoded
from ..noise import get_generator
from .interpolation import Between, BetweenGenerator, ends, mixed

LARGEST = 8192              # pixels per side; more is a typing mistake, not a picture
MOST_STEPS, MOST_IMAGES = 1000, 10_000                  # the same


@dataclass(frozen=True, eq=False)
class Request:
    """The options, in the order in which they may be given by position.

    prompt: what to draw, at any length, with weights such as (word:1.3): see text/prompt.py.
    negative_prompt: what to move away from, in the same form.
    num_inference_steps: 1 to 1000; more is slower and finer. PNDM makes one model call more, Heun
        nearly two per step. Default: the weights' own number.
    guidance_scale: how strongly to follow the prompt. Up to 1 there is no guidance, and the
        negative prompt plays no part. A model that imitates guidance (LCM) gets this number as an
        input and ignores the negative prompt.
    seed: image i is drawn from seed + i, and equals the single image of that seed.
    width, height: pixels, multiples of the VAE's downsampling factor. Default: the image's size,
        rounded down, or without an image the weights' own.
    sampler: a key of diffusion.samplers.SAMPLERS. Default: the weights' own.
    latents: standard normal numbers to start from in place of the seed's, of shape (num_images,
        height / factor, width / factor, channels).
    noise: whose normal numbers a seed stands for, a key of noise.GENERATORS: torch's on the CPU
        ("torch-cpu") or on a GPU ("torch-cuda"), or NumPy's ("numpy").
    guidance_rescale: 0 to 1, how much to undo of the over-saturation that guidance causes.
    image: a PIL image to begin from; it is resized.
    strength: 0 to 1, how much of the image to draw anew: the share of the steps to make. The noise
        added to the image is that of the first of them (SDEdit, see Origin). A Latent Consistency
        Model makes all steps, from as little noise. With a mask, 1 begins from noise alone.
        Default: 0.8, with a mask 1.
    mask: a PIL image, white where to paint and black where the image is to stay. A model made for
        inpainting requires an image and a mask.
    timestep_spacing: how the steps are spread over the training timesteps, "leading", "trailing" or
        "linspace". Default: the weights' own. A single file does not say its own: there, few steps
        without guidance take "trailing", as Turbo, Lightning and Hyper models need.

    The prompts, the seed and the image may each be an interpolation.Between, which mixes two.
    Raises TinyldmError for a value that is wrong for every pipeline.
    """

    prompt: Any
    negative_prompt: Any = ""
    num_inference_steps: int | None = None
    guidance_scale: float = 7.5
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

    def __post_init__(self):
        if self.num_inference_steps is not None:
            check_whole("the number of steps", self.num_inference_steps, 1, MOST_STEPS)
        check_finite("guidance_scale", self.guidance_scale)
        check_fraction("guidance_rescale", self.guidance_rescale)
        check_whole("num_images", self.num_images, 1, MOST_IMAGES)
        for name in ("width", "height"):
            if getattr(self, name) is not None:
                check_pixels(name, getattr(self, name))
        if self.sampler is not None:
            check_name(self.sampler)
        if self.timestep_spacing not in (None, *SPACINGS):
            raise TinyldmError(f"timestep_spacing must be {', '.join(SPACINGS[:-1])} or "
                               f"{SPACINGS[-1]}, not {self.timestep_spacing!r}")
        check_edit(self.image, self.strength, self.mask)
        for name in ("image", "mask"):                  # decoded here, once, for all that read them
            object.__setattr__(self, name, _decoded(name, getattr(self, name)))

    def generators(self):
        """One generator of normal numbers per image; raises TinyldmError for a wrong seed."""
        generator = get_generator(self.noise)
        return [mixed(self.seed, lambda seed, i=i: generator(seed + i if i else seed),
                      BetweenGenerator) for i in range(self.num_images)]


def _decoded(name, image):
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
    if not isinstance(value, (int, np.integer)) or not least <= value <= most:
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


def check_latents(latents, shape, factor):
    if latents.shape != shape or not is_finite(latents):
        raise TinyldmError(f"latents must be finite and of shape {shape} (num_images, height / "
                           f"{factor}, width / {factor}, channels), not {latents.shape}")
