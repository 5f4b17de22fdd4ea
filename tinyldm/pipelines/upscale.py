"""The x4 upscaler: a small picture and a prompt in, a picture four times as wide and high out.

    stream          picture, prompt, seed -> latents, denoised by a sampler that calls the UNet
    decode          latents -> images

The last stage of a cascade, Imagen's idea, made of Stable Diffusion's parts. The latents are as
wide and high as the given picture, since the VAE halves only twice. The UNet reads both side by
side, along the channels:

    latents x_t (B,H,W,4), the picture with noise (B,H,W,3) -> (B,H,W,7) -> prediction (B,H,W,4)

Noise of the level n is added to the picture, and n goes into the UNet as a class: so it learns to
repair what the stage before did wrong, and how much of the picture to believe
(noise-conditioning augmentation).

    picture_n = sqrt(alpha_bar_n) picture + sqrt(1 - alpha_bar_n) noise

Source: Saharia et al. 2022, arXiv:2205.11487, section 2.4; Ho et al. 2021, "Cascaded Diffusion
Models for High Fidelity Image Generation", arXiv:2106.15282, section 4.2; Rombach et al. 2022,
arXiv:2112.10752; diffusers' StableDiffusionUpscalePipeline.
"""
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..diffusion.samplers import SAMPLERS, check_sampler, own_options
from ..diffusion.schedule import Schedule
from ..errors import TinyldmError, note
from ..images import Pictures, from_pil
from .finite import finite_states
from .interpolation import ends, lerp, mixed
from .parts import check_colours, check_unet
from .pipeline import read_tokenizers
from .predictor import Predictor
from .preview import ShownState
from .request import (
    LARGEST,
    Prompted,
    check_whole,
    decoded_ends,
    takes,
    whole,
)
from .text_pipeline import TextPipeline

# Of diffusers' StableDiffusionUpscalePipeline.
STEPS, GUIDANCE, NOISE_LEVEL, MAX_NOISE_LEVEL = 75, 9.0, 20, 350
SCALING_FACTOR = 0.08333    # of its VAE; the first files of the weights do not say it
PUBLIC_FACTOR = 4           # its VAE's downsampling factor


@dataclass(frozen=True, eq=False)
class UpscaleRequest(Prompted):
    """The options, in the order in which they may be given by position.

    prompt: what the picture shows, as for Stable Diffusion: see request.Request. A list of prompts
        draws num_images of each, from the same seeds.
    image: the PIL image to enlarge. Its sides are rounded down to multiples of the VAE's
        downsampling factor, 4. It may be an interpolation.Between, which mixes two.
    noise_level: how much noise to add to the image first, from 0 to the weights' max_noise_level,
        350: more leaves more to the UNet, which repairs a blurred or damaged image, but keeps less
        of it.
    guidance_scale: how strongly to follow the prompt. Up to 1 there is no guidance. Default: the
        weights' own, or else 9.
    negative_prompt: what to move away from; or a list, one for each prompt.
    num_inference_steps: 1 to 1000; more is slower and finer. Default: the weights' own number.
    seed: image i is drawn from seed + i, and equals the single image of that seed; or a list of
        seeds, one for each image.
    sampler: a key of diffusion.samplers.SAMPLERS, or its name elsewhere. Default: the weights' own.
    latents: standard normal numbers to start from in place of the seed's, of shape (images, height,
        width, channels), with the sides of the given image.
    noise: whose normal numbers a seed stands for, a key of noise.GENERATORS.
    timestep_spacing: how the steps are spread over the training timesteps, "leading", "trailing" or
        "linspace". Default: the weights' own.
    clip_skip: how many of the text encoder's last layers to leave out: see request.Request.

    Raises TinyldmError for a value that is wrong for every upscaler.
    """

    prompt: Any
    image: Any = None
    noise_level: int = NOISE_LEVEL
    guidance_scale: float | None = None
    negative_prompt: Any = ""
    num_inference_steps: int | None = None
    seed: Any = 0
    num_images: int = 1
    sampler: str | None = None
    latents: Any = None
    noise: str = "torch-cpu"
    timestep_spacing: str | None = None
    clip_skip: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.image is None:
            raise TinyldmError("an upscaler enlarges a picture: give an image")
        object.__setattr__(self, "image", decoded_ends("image", self.image))
        object.__setattr__(self, "noise_level", whole(self.noise_level))


class Upscaler(TextPipeline):
    """A tokenizer, three models and two noise schedules that belong together.

    scheduler: the dict of a scheduler_config.json; its class is the default sampler.
    low_res_scheduler: the same of the noise that is added to the picture, of which only the noise
    schedule counts. max_noise_level, num_inference_steps, guidance_scale: as in model_index.json.
    low_memory: decode in tiles.
    Raises TinyldmError for parts that do not fit together.
    """

    Options, name = UpscaleRequest, "the upscaler"
    kind = "StableDiffusionUpscalePipeline"

    def __init__(self, tokenizer, text_encoder, unet, vae, scheduler, low_res_scheduler,
                 max_noise_level=MAX_NOISE_LEVEL, num_inference_steps=STEPS,
                 guidance_scale=GUIDANCE, low_memory=False):
        self.tokenizer, self.text_encoder, self.unet, self.vae = tokenizer, text_encoder, unet, vae
        self.scheduler, self.low_res_scheduler = scheduler, low_res_scheduler
        self.max_noise_level, self.num_inference_steps = max_noise_level, num_inference_steps
        self.guidance_scale, self.low_memory = guidance_scale, low_memory
        self._check_parts()
        self.schedule = Schedule.from_config(scheduler)
        self.low_res_schedule = Schedule.from_config(low_res_scheduler)
        levels = min(unet.settings.num_class_embeds, self.low_res_schedule.num_train_timesteps)
        if not max_noise_level < levels:
            raise TinyldmError(f"model_index.json: max_noise_level is {max_noise_level}, but the "
                               f"UNet and the low_res_scheduler have {levels} levels: expected "
                               "less than that")

    def _check_parts(self):
        vae, C = self.vae, self.vae.settings.latent_channels
        check_colours(vae)
        check_unet(self._readers, self.unet, (C + 3,), (C,), f"the VAE's latent_channels is {C} "
                   "and a picture has 3", "a table")
        if self.scale_factor != PUBLIC_FACTOR:
            note(f"the VAE's downsampling factor is {self.scale_factor}, so pictures become "
                 f"{self.scale_factor} times as wide and high: that of the public x4 upscaler is "
                 f"{PUBLIC_FACTOR}; use the VAE that the UNet was trained with")
        if vae.scaling_factor != SCALING_FACTOR:        # as the public pipeline corrects it
            if said := vae.config.get("scaling_factor"):
                note(f"the VAE's scaling_factor is {said:g}, but the upscaler was trained with "
                     f"{SCALING_FACTOR}, which is used")
            vae.scaling_factor = SCALING_FACTOR
            vae.config = vae.config | {"scaling_factor": SCALING_FACTOR}

    @classmethod
    def from_parts(cls, parts, low_memory=False):
        """PipelineParts -> Upscaler."""
        models, schedulers = parts.models, parts.schedulers
        return cls(read_tokenizers(parts)["tokenizer"], models["text_encoder"], models["unet"],
                   models["vae"], schedulers["scheduler"], schedulers["low_res_scheduler"],
                   parts.setting("max_noise_level", MAX_NOISE_LEVEL),
                   parts.setting("_num_inference_steps", STEPS),
                   parts.setting("_guidance_scale", GUIDANCE), low_memory)

    @takes(UpscaleRequest)
    def __call__(self, *arguments: Any, **options: Any) -> Pictures:
        """Enlarge a picture, num_images times -> list of PIL images. Arguments: see UpscaleRequest.

        In a notebook a progress bar shows the steps.
        """
        return self.draw(arguments, options)

    @takes(UpscaleRequest)
    def stream(self, *arguments: Any, **options: Any) -> Iterator[ShownState]:
        """Draw, one model call at a time -> iterator of State; the last one's latents are clean.

        Raises TinyldmError at once for a bad argument; and while drawing, if the latents stop being
        finite, with the step and the layer.
        """
        return self.follow(arguments, options)

    def complete(self, request):
        """Fill in what the request leaves to the model -> request."""
        check_whole("noise_level", request.noise_level, 0, self.max_noise_level)
        return super().complete(request)

    def states(self, request):
        """The iterator of `stream` for a request that `complete` has filled in."""
        steps, sampler = request.num_inference_steps, request.sampler
        schedule, options = self.schedule_for(request), own_options(self.scheduler, sampler)
        check_sampler(sampler, schedule, steps, options=options)
        size = W, H = self._size_of(request.image)
        seeds, level = request.generators(), request.noise_level
        shape = len(seeds), H, W, self.vae.settings.latent_channels
        latents = self.given_latents(request, shape)
        conditioning = self._conditioner(request.prompts, request.negative_prompts,
                                         request.guidance_scale, *size, request.clip_skip)
        for own in conditioning:
            own["class_labels"] = self.unet.xp.full(len(own["context"]), level)
        picture = self.array(mixed(request.image, lambda image: from_pil(image, size, "bicubic"),
                                   lerp))
        # diffusers' order of draws: first for the picture, then for the latents.
        noise = self.draw_noise(seeds, (*shape[:3], 3))
        noised = self.low_res_schedule.add_noise(picture.repeat(len(seeds), axis=0), noise,
                                                 np.full(len(seeds), level))
        draw_noise = partial(self.draw_noise, seeds, shape)             # () -> (B,H,W,C)
        predict = Predictor(self.unet, conditioning, request.guidance_scale, extra_channels=noised)
        states = SAMPLERS[sampler](predict, draw_noise() if latents is None else latents, schedule,
                                   steps, draw_noise, **options)
        return finite_states(states, predict)

    def _size_of(self, image):
        """(width, height) of the latents for a picture: its own, in multiples of the factor.

        Raises TinyldmError for a picture that is too small or too large.
        """
        image, f = ends(image)[0], self.scale_factor
        if min(image.size) < f:
            raise TinyldmError(f"the image is {image.width}x{image.height} pixels: give one of at "
                               f"least {f}x{f}")
        if max(image.size) * f > LARGEST:
            raise TinyldmError(f"the image is {image.width}x{image.height} pixels, and would "
                               f"become {f} times as wide and high: give one of at most "
                               f"{LARGEST // f} pixels per side")
        return image.width // f * f, image.height // f * f

    def picture_size(self, request):
        """(width, height) of the pictures of a request, in pixels."""
        W, H = self._size_of(request.image)
        return W * self.scale_factor, H * self.scale_factor

    @property
    def models(self):
        """{name of the part: model}."""
        return {"text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae}

    @property
    def schedulers(self):
        """{part: dict of its scheduler_config.json}."""
        return {"scheduler": self.scheduler, "low_res_scheduler": self.low_res_scheduler}

    @property
    def described(self):
        """What the pipeline is, for people."""
        return f"x{self.scale_factor} upscaler"

    def settings(self):
        """What model_index.json says besides the parts."""
        return super().settings() | {"_guidance_scale": self.guidance_scale,
                                     "max_noise_level": self.max_noise_level}
