"""A cascade of pixel models, a small Imagen: a prompt in, a picture in two stages out.

    the base            seed -> a picture of 16x16, denoised by a sampler that calls `unet`
    super-resolution    that picture, enlarged, with noise -> one of 64x64, by `super_res`

There is no VAE: the latents of both stages are the pixels themselves, in [-1, 1]. Both UNets attend
to the same text. The second one reads its own noisy pixels beside the enlarged picture of the first
one, to which noise of the level n was added (noise-conditioning augmentation):

    low_n = sqrt(alpha_bar_n) enlarged + sqrt(1 - alpha_bar_n) noise
    pixels x_t (B,H,W,3), low_n (B,H,W,3) -> (B,H,W,6) -> prediction (B,H,W,3)

In training n is random and the UNet gets it, through an embedding like the timestep's. So it learns
to correct the first stage's mistakes, of which the noise hides the details. Thresholding keeps the
pixels within [-1, 1] in spite of strong guidance: see samplers.shared.dynamic_threshold.
Source: Saharia et al. 2022, "Photorealistic Text-to-Image Diffusion Models with Deep Language
Understanding" (Imagen), arXiv:2205.11487, sections 2.2 to 2.5; Ho et al. 2021, "Cascaded Diffusion
Models for High Fidelity Image Generation", arXiv:2106.15282. The stages compute what diffusers'
IFPipeline and IFSuperResolutionPipeline compute, with CLIP's text encoder in T5's place.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .. import ops
from ..backend import is_finite
from ..configs import sides
from ..diffusion.samplers import (
    SAMPLERS,
    check_sampler,
    default_sampler,
    find_sampler,
    own_options,
)
from ..diffusion.samplers.ddpm import LEARNED
from ..diffusion.schedule import Schedule
from ..errors import TinyldmError, note
from ..images import Pictures, from_pil
from .finite import finite_states
from .interpolation import ends, lerp, mixed
from .parts import check_unet
from .pipeline import read_tokenizers
from .predictor import Predictor
from .preview import ShownState
from .request import (
    MOST_STEPS,
    Prompted,
    check_finite,
    check_whole,
    decoded_ends,
    takes,
    whole,
)
from .text_pipeline import TextPipeline

STEPS, GUIDANCE = 50, 7.0
THRESHOLDING = "none", "static", "dynamic"


@dataclass(frozen=True, eq=False)
class CascadeRequest(Prompted):
    """The options, in the order in which they may be given by position.

    prompt: what to draw, as for Stable Diffusion: see request.Request. A list of prompts draws
        num_images of each, from the same seeds.
    negative_prompt: what to move away from; or a list, one for each prompt.
    num_inference_steps: 1 to 1000, of each stage. Default: the weights' own number.
    guidance_scale: how strongly to follow the prompt, in both stages. Up to 1 there is no guidance.
        Default: the weights' own, or else 7.
    noise_level: how much noise to add to the first stage's picture, a timestep of the
        low_res_scheduler: more lets the second stage change more. Default: a tenth of its
        timesteps.
    thresholding: of both stages' x_start. "none"; "static", which clips it to [-1, 1]; "dynamic",
        which also scales it. Default: as the schedulers say. dynamic without a sample_max_value
        above 1 in a scheduler has no bound, as in the paper.
    super_res_steps, super_res_guidance_scale, super_res_sampler: of the second stage, if not those
        of both.
    seed: image i is drawn from seed + i, and equals the single image of that seed; or a list of
        seeds, one for each image.
    num_images: of each prompt.
    sampler: a key of diffusion.samplers.SAMPLERS, or its name elsewhere. Default: of each stage the
        weights' own.
    latents: standard normal numbers to start from in place of the seed's, of shape (images, height,
        width, 3), with the sides of the first stage's pictures, or with an image of the second's.
    noise: whose normal numbers a seed stands for, a key of noise.GENERATORS.
    image: a PIL image in place of the first stage's, which then is left out.
    timestep_spacing: how the steps are spread over the training timesteps, "leading", "trailing" or
        "linspace". Default: of each stage the weights' own.
    clip_skip: how many of the text encoder's last layers to leave out: see request.Request.

    Raises TinyldmError for a value that is wrong for every cascade.
    """

    prompt: Any
    negative_prompt: Any = ""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    noise_level: int | None = None
    thresholding: str | None = None
    super_res_steps: int | None = None
    super_res_guidance_scale: float | None = None
    super_res_sampler: str | None = None
    seed: Any = 0
    num_images: int = 1
    sampler: str | None = None
    latents: Any = None
    noise: str = "torch-cpu"
    image: Any = None
    timestep_spacing: str | None = None
    clip_skip: int | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("super_res_steps", "noise_level"):
            object.__setattr__(self, name, whole(getattr(self, name)))
        if self.super_res_steps is not None:
            check_whole("super_res_steps", self.super_res_steps, 1, MOST_STEPS)
        if self.super_res_guidance_scale is not None:
            check_finite("super_res_guidance_scale", self.super_res_guidance_scale)
        if self.super_res_sampler is not None:
            find_sampler(self.super_res_sampler)
        if self.thresholding not in (None, *THRESHOLDING):
            raise TinyldmError(f"thresholding must be {', '.join(THRESHOLDING[:-1])} or "
                               f"{THRESHOLDING[-1]}, not {self.thresholding!r}")
        object.__setattr__(self, "image", decoded_ends("image", self.image))


class Stage(NamedTuple):
    """One of the two models, and how to sample with it."""

    unet: Any
    scheduler: dict
    schedule: Schedule
    sampler: str
    steps: int
    guidance_scale: float

    def check(self):
        """Raise TinyldmError for a schedule or a number of steps that the sampler cannot take."""
        check_sampler(self.sampler, self.schedule, self.steps, options=self.options,
                      outputs=self.unet.settings.out_channels // 3 if self.learned else 1)

    @property
    def options(self):
        """The sampler's keywords."""
        return own_options(self.scheduler, self.sampler)

    @property
    def learned(self):
        """Whether the sampler uses a variance that the model predicts."""
        return self.options.get("variance_type") in LEARNED

    def states(self, latents, draw_noise, conditioning, extra_channels=None):
        """Sample: noise (B,H,W,3), conditioning of both predictions -> iterator of State."""
        conditioning = conditioning[None if self.guidance_scale > 1 else -1:]
        predict = Predictor(self.unet, conditioning, self.guidance_scale,
                            extra_channels=extra_channels, keeps_variance=self.learned)
        states = SAMPLERS[self.sampler](predict, latents, self.schedule, self.steps, draw_noise,
                                        **self.options)
        return finite_states(states, predict)


class Cascade(TextPipeline):
    """A tokenizer, a text encoder, two UNets and three noise schedules that belong together.

    unet, scheduler: of the base; the dict of a scheduler_config.json, whose class is the default
    sampler. super_res, super_res_scheduler: of the second stage. low_res_scheduler: of the noise
    that is added in between, of which only the noise schedule counts. num_inference_steps,
    guidance_scale: the defaults.
    Raises TinyldmError for parts that do not fit together.
    """

    Options, name, kind = CascadeRequest, "the cascade", "CascadePipeline"

    def __init__(self, tokenizer, text_encoder, unet, super_res, scheduler, super_res_scheduler,
                 low_res_scheduler, num_inference_steps=STEPS, guidance_scale=GUIDANCE):
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        self.unet, self.super_res, self.scheduler = unet, super_res, scheduler
        self.super_res_scheduler = super_res_scheduler
        self.low_res_scheduler = low_res_scheduler
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        check_unet(self._readers, unet, (3,), (3, 6), "a picture has 3 colours, and a learned "
                   "variance 3 more channels")
        check_unet(self._readers, super_res, (6,), (3, 6), "two pictures have 6 colours, and a "
                   "prediction 3 or with a variance 6", "timestep", "the super_res UNet")
        small, large = self._size_of(unet), self._size_of(super_res)
        if small[0] > large[0] or small[1] > large[1]:
            raise TinyldmError(f"the base draws pictures of {small[0]}x{small[1]} pixels, and "
                               f"super_res makes them {large[0]}x{large[1]}: expected larger ones")
        self.schedule, self.super_res_schedule, self.low_res_schedule = map(
            Schedule.from_config, (scheduler, super_res_scheduler, low_res_scheduler))

    @classmethod
    def from_parts(cls, parts, low_memory=False):
        """PipelineParts -> Cascade. low_memory plays no part: there is no VAE to decode in tiles.
        """
        models, schedulers = parts.models, parts.schedulers
        return cls(read_tokenizers(parts)["tokenizer"], models["text_encoder"], models["unet"],
                   models["super_res"], schedulers["scheduler"], schedulers["super_res_scheduler"],
                   schedulers["low_res_scheduler"],
                   parts.setting("_num_inference_steps", STEPS),
                   parts.setting("_guidance_scale", GUIDANCE))

    @takes(CascadeRequest)
    def __call__(self, *arguments: Any, **options: Any) -> Pictures:
        """Draw num_images pictures of a prompt -> list of PIL images. Arguments: CascadeRequest's.

        In a notebook a progress bar shows the steps.
        """
        return self.draw(arguments, options)

    @takes(CascadeRequest)
    def stream(self, *arguments: Any, **options: Any) -> Iterator[ShownState]:
        """Draw, one model call at a time -> iterator of State; the last one's latents are clean.

        First come the states of the base, then those of the second stage, of larger latents; their
        steps are counted on.
        Raises TinyldmError at once for a bad argument; and while drawing, if the latents stop being
        finite, with the step and the layer.
        """
        return self.follow(arguments, options)

    def complete(self, request):
        """Fill in what the request leaves to the model -> request, of both stages."""
        done, T = super().complete(request), self.low_res_schedule.num_train_timesteps
        steps, own = request.super_res_steps, request.super_res_guidance_scale
        steps = done.num_inference_steps if steps is None else steps
        self.super_res_schedule.check_steps(steps, "super_res_steps")
        level = T // 10 if request.noise_level is None else request.noise_level
        check_whole("noise_level", level, 0, T - 1)
        sampler = request.super_res_sampler or request.sampler
        sampler = find_sampler(sampler) if sampler else default_sampler(self.super_res_scheduler)
        # Without a spacing of the request, each stage has that of its own schedule.
        spacing = None if request.timestep_spacing is None else done.timestep_spacing
        return replace(done, noise_level=level, super_res_steps=steps,
                       super_res_guidance_scale=done.guidance_scale if own is None else own,
                       super_res_sampler=sampler, timestep_spacing=spacing)

    def states(self, request):
        """The iterator of `stream` for a request that `complete` has filled in."""
        base, super_res = self._stages(request)
        for stage in (base, super_res) if request.image is None else (super_res,):
            stage.check()
        seeds, (w, h), (W, H) = request.generators(), *map(self._size_of, self.models_in_order)
        small, large = (len(seeds), h, w, 3), (len(seeds), H, W, 3)
        latents = self.given_latents(request, small if request.image is None else large)
        conditioning = self._conditioner(
            request.prompts, request.negative_prompts,
            max(base.guidance_scale, super_res.guidance_scale), W, H, request.clip_skip)
        picture = None
        if request.image is not None:
            picture = self._picture(request.image, (w, h)).repeat(len(seeds), axis=0)
        return self._sample(base, super_res, picture, latents, conditioning, request.noise_level,
                            partial(self.draw_noise, seeds, small),
                            partial(self.draw_noise, seeds, large))

    def _sample(self, base, super_res, low, latents, conditioning, level, draw_small, draw_large):
        """The states of both stages; low (B,h,w,3): a picture in place of the first one's."""
        first = 0
        if low is None:
            noise = draw_small() if latents is None else latents
            for state in base.states(noise, draw_small, conditioning):
                yield state
            low, first, latents = state.latents, state.step + 1, None
        # diffusers' order of draws: first for the pixels, then for the small picture.
        noise = draw_large() if latents is None else latents
        levels = np.full(len(noise), level)
        enlarged, _ = ops.upsample_bilinear(low, noise.shape[1:3])
        noised = self.low_res_schedule.add_noise(enlarged, draw_large(), levels)
        xp = self.unet.xp
        conditioning = [own | {"class_labels": xp.full(len(own["context"]), level)}
                        for own in conditioning]
        for state in super_res.states(noise, draw_large, conditioning, noised):
            yield state._replace(step=first + state.step)

    def _stages(self, request):
        """The two Stages of a completed request."""
        options = ("sampler", "num_inference_steps", "guidance_scale"), (
            "super_res_sampler", "super_res_steps", "super_res_guidance_scale")
        return [Stage(unet, scheduler, self._schedule_of(schedule, request),
                      *(getattr(request, name) for name in names))
                for unet, scheduler, schedule, names in zip(
                    self.models_in_order, (self.scheduler, self.super_res_scheduler),
                    (self.schedule, self.super_res_schedule), options)]

    def _schedule_of(self, schedule, request):
        """A stage's schedule, with the timestep spacing and the thresholding of a request."""
        changes, how = {}, request.thresholding
        if request.timestep_spacing is not None:
            changes["timestep_spacing"] = request.timestep_spacing
        if how == "none":
            changes |= {"thresholding": False, "clip_sample": False}
        elif how is not None:           # static: dynamic thresholding that never exceeds 1
            own = schedule.sample_max_value
            largest = 1.0 if how == "static" else own if own > 1 else math.inf
            changes |= {"thresholding": True, "sample_max_value": largest}
        return replace(schedule, **changes)

    def _picture(self, image, size):
        """A PIL image, or a Between of two -> (1,h,w,3), in the size of the first stage's."""
        if (own := ends(image)[0].size) != size:
            note(f"the image of {own[0]}x{own[1]} pixels is resized to {size[0]}x{size[1]}, which "
                 "is what this super-resolution enlarges")
        return self.array(mixed(image, lambda end: from_pil(end, size, "bicubic"), lerp))

    def decode(self, latents: Any) -> Any:
        """Pixels (B,H,W,3) of either stage -> images (B,H,W,3) in [-1, 1], of the second's size.

        Those of the base are enlarged as the second stage gets to see them.
        """
        latents, sizes = self.array(latents, "latents"), list(
            map(self._size_of, self.models_in_order))
        if latents.ndim != 4 or latents.shape[2:0:-1] not in sizes or latents.shape[3] != 3:
            raise TinyldmError(f"latents must be pixels of shape (images, height, width, 3), with "
                               f"the sides {sizes[0]} or {sizes[1]}, not {latents.shape}")
        if not is_finite(latents):
            raise TinyldmError("latents must be finite, but they hold NaN or infinity: look for "
                               "where it began")
        return ops.upsample_bilinear(latents, sizes[1][::-1])[0].clip(-1, 1)

    def steps_made(self, request):
        """How many steps both stages of a completed request make."""
        first = request.num_inference_steps if request.image is None else 0
        return first + request.super_res_steps

    def picture_size(self, request):
        """(width, height) in pixels: the weights' own."""
        return self._size_of(self.super_res)

    @staticmethod
    def _size_of(unet):
        size = unet.settings.sample_size
        if size is None:
            raise TinyldmError("the UNet's sample_size, the size of its pictures in pixels, is "
                               "null: expected a number")
        return sides(size)[::-1]

    @property
    def models_in_order(self):
        """The UNets of the two stages."""
        return self.unet, self.super_res

    @property
    def models(self):
        """{name of the part: model}."""
        return {"text_encoder": self.text_encoder, "unet": self.unet, "super_res": self.super_res}

    @property
    def schedulers(self):
        """{part: dict of its scheduler_config.json}."""
        return {"scheduler": self.scheduler, "super_res_scheduler": self.super_res_scheduler,
                "low_res_scheduler": self.low_res_scheduler}

    @property
    def described(self):
        """What the pipeline is, for people."""
        (w, h), (W, H) = map(self._size_of, self.models_in_order)
        return f"Cascade {w}x{h} to {W}x{H}"

    def settings(self):
        """What model_index.json says besides the parts."""
        return super().settings() | {"_guidance_scale": self.guidance_scale}
