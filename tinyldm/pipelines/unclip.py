"""Stable unCLIP: a prompt or a picture in, and a picture of that content out.

DALL-E 2's idea with the parts of Stable Diffusion: the UNet is conditioned on CLIP's embedding of
the picture that is to be drawn. A diffusion prior makes one of a prompt; or CLIP's image encoder
makes one of a given picture, of which other seeds draw variations.

    prompt  -> prior.py: the prior          ┐
    picture -> CLIP's vision transformer    ┴ image embedding -> noise_embeds -> class labels ┐
    prompt  -> conditioning.py              -> context                                         ┤
    seed    -> latents, denoised step by step by a sampler that calls the UNet  <──────────────┘

Source: Ramesh et al. 2022, "Hierarchical Text-Conditional Image Generation with CLIP Latents",
arXiv:2204.06125, sections 2 and 3; diffusers' StableUnCLIPPipeline, StableUnCLIPImg2ImgPipeline.
"""
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from .. import ops
from ..backend import get_xp
from ..configs import sides
from ..diffusion.samplers import SAMPLERS, check_sampler, own_options
from ..diffusion.schedule import Schedule
from ..errors import TinyldmError, note
from ..image_processor import ImageProcessor
from ..images import Pictures, check_image
from .finite import check_output, finite_states
from .interpolation import ends, mixed
from .parts import check_parts
from .pipeline import read_tokenizers
from .predictor import Predictor
from .preview import ShownState
from .prior import TextPrior, slerp_on_device
from .request import (
    MOST_STEPS,
    Prompted,
    check_finite,
    check_latents,
    check_pixels,
    check_whole,
    decoded_ends,
    note_on_size,
    picture_size,
    takes,
    whole,
)
from .text_pipeline import TextPipeline

# The defaults of diffusers' pipelines.
STEPS, GUIDANCE = 20, 10.0
PRIOR_STEPS, PRIOR_GUIDANCE = 25, 4.0


@dataclass(frozen=True, eq=False)
class UnCLIPRequest(Prompted):
    """The options, in the order in which they may be given by position.

    prompt: what to draw, as for Stable Diffusion; or a list of prompts. Weights that have a prior
        need one: the prior makes an image embedding of it. Beside a picture it may be left out.
    negative_prompt: what to move away from; the UNet alone reads it.
    num_inference_steps: 1 to 1000; more is slower and finer. Default: the weights' own number.
    guidance_scale: how strongly to follow the prompt and the embedding. Up to 1 there is no
        guidance. Default: the weights' own, or else 10.
    seed: image i is drawn from seed + i, and equals the single image of that seed; or a list of
        seeds, one for each image. Of a picture, each seed draws another variation.
    width, height: pixels, multiples of the VAE's downsampling factor. Default: the weights' own.
    sampler: a key of diffusion.samplers.SAMPLERS, or its name elsewhere. Default: the weights' own.
    latents: standard normal numbers to start from in place of the seed's, of shape (images,
        height / factor, width / factor, channels).
    noise: whose normal numbers a seed stands for, a key of noise.GENERATORS.
    image: a PIL image, for weights with an image encoder. Its content is drawn anew, whatever its
        size; a Between of two images draws what is between both, along the arc from one embedding
        to the other.
    noise_level: from 0 to 999, how much noise to add to the image embedding: more of it, more
        difference between seeds. Default: 0, which is very little.
    prior_guidance_scale, prior_num_inference_steps: of the prior. Default: 4, and 25.
    timestep_spacing: how the steps are spread over the training timesteps, "leading", "trailing" or
        "linspace". Default: the weights' own.
    clip_skip: how many of the last layers of the UNet's text encoder to leave out: see
        request.Request.

    The prompts and the seed may also be a Between. Two prompts are mixed as two pictures are: the
    prior draws an embedding of each, from the same seed.
    Raises TinyldmError for a value that is wrong for every pipeline.
    """

    prompt: Any = None
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
    image: Any = None
    noise_level: int = 0
    prior_guidance_scale: float | None = None
    prior_num_inference_steps: int | None = None
    timestep_spacing: str | None = None
    clip_skip: int | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("width", "height", "noise_level", "prior_num_inference_steps"):
            object.__setattr__(self, name, whole(getattr(self, name)))
        if self.prior_guidance_scale is not None:
            check_finite("prior_guidance_scale", self.prior_guidance_scale)
        for name in ("width", "height"):
            if getattr(self, name) is not None:
                check_pixels(name, getattr(self, name))
        if self.prior_num_inference_steps is not None:
            check_whole("prior_num_inference_steps", self.prior_num_inference_steps, 1, MOST_STEPS)
        for end in [] if self.image is None else ends(self.image):
            check_image("image", end)
        object.__setattr__(self, "image", decoded_ends("image", self.image))

    @property
    def prompts(self):
        """A list, of one prompt or several; without a prompt [""]."""
        return [""] if self.prompt is None else super().prompts


class UnCLIP(TextPipeline):
    """Stable Diffusion's parts, whose UNet takes image embeddings; and what makes these.

    scheduler, image_noising_scheduler: dicts of a scheduler_config.json, of the UNet and of the
    noise that is added to embeddings. image_normalizer: the embeddings' mean and std. Either
    text_prior, a TextPrior, or image_encoder with its feature_extractor, the preprocessing of
    pictures. num_inference_steps, guidance_scale: the defaults. low_memory: decode in tiles.
    Raises TinyldmError for parts that do not fit together.
    """

    Options, name = UnCLIPRequest, "Stable unCLIP"

    def __init__(self, tokenizer, text_encoder, unet, vae, scheduler, image_normalizer,
                 image_noising_scheduler, *, text_prior=None, image_encoder=None,
                 feature_extractor=None, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
                 low_memory=False):
        self.tokenizer, self.text_encoder, self.unet, self.vae = tokenizer, text_encoder, unet, vae
        self.scheduler, self.schedule = scheduler, Schedule.from_config(scheduler)
        self.image_normalizer, self.image_noising_scheduler = (image_normalizer,
                                                               image_noising_scheduler)
        self.noising_schedule = Schedule.from_config(image_noising_scheduler)
        self.text_prior, self.image_encoder = text_prior, image_encoder
        self.feature_extractor = feature_extractor
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.low_memory = low_memory
        check_parts(self._readers, unet, vae, "projection")
        C = image_normalizer.settings.embedding_dim
        made = (text_prior.prior.settings.embedding_dim if text_prior else
                image_encoder.settings.projection_dim)
        if (made, unet.settings.projection_class_embeddings_input_dim) != (C, 2 * C):
            raise TinyldmError(
                f"image embeddings have {made} channels, the image_normalizer's embedding_dim is "
                f"{C}, and the UNet's projection_class_embeddings_input_dim is "
                f"{unet.settings.projection_class_embeddings_input_dim}, but should be twice as "
                "many: use parts of one pipeline")

        self._check_pictures()

    def _check_pictures(self):
        """Raise TinyldmError if the preprocessing gives pictures of another size than it should."""
        if self.text_prior:
            return
        side = self.image_encoder.settings.image_size
        blank = Image.new("RGB", (side, side))
        _, height, width, _ = self.feature_extractor([blank]).shape
        if (height, width) != (side, side):
            raise TinyldmError(f"the feature_extractor gives pictures of {width}x{height} pixels, "
                               f"but the image encoder takes {side}x{side}: use parts of one "
                               "pipeline")

    @classmethod
    def from_parts(cls, parts, low_memory=False):
        """PipelineParts -> UnCLIP."""
        models, schedulers = parts.models, parts.schedulers
        tokenizers, source = read_tokenizers(parts), {}
        if "prior" in models:
            source["text_prior"] = TextPrior(
                tokenizers["prior_tokenizer"], models["prior_text_encoder"], models["prior"],
                schedulers["prior_scheduler"])
        else:
            source["image_encoder"] = models["image_encoder"]
            source["feature_extractor"] = ImageProcessor.from_folder(
                parts.folders["feature_extractor"])
        return cls(tokenizers["tokenizer"], models["text_encoder"], models["unet"], models["vae"],
                   schedulers["scheduler"], models["image_normalizer"],
                   schedulers["image_noising_scheduler"], **source, low_memory=low_memory,
                   num_inference_steps=parts.setting("_num_inference_steps", STEPS),
                   guidance_scale=parts.setting("_guidance_scale", GUIDANCE))

    @takes(UnCLIPRequest)
    def __call__(self, *arguments: Any, **options: Any) -> Pictures:
        """Draw num_images pictures of a prompt or of a picture's content -> list of PIL images.

        Arguments: see UnCLIPRequest. In a notebook a progress bar shows the steps.
        """
        return self.draw(arguments, options)

    @takes(UnCLIPRequest)
    def stream(self, *arguments: Any, **options: Any) -> Iterator[ShownState]:
        """Draw, one call of the UNet at a time -> iterator of State; the last latents are clean.

        The prior makes all its steps before the first one. Raises TinyldmError at once for a bad
        argument; and while drawing, if numbers stop being finite, with the step and the layer.
        """
        return self.follow(arguments, options)

    def complete(self, request):
        """Fill in what the request leaves to the model -> request.

        Raises TinyldmError if it has neither what the prior nor what the image encoder reads.
        """
        if self.text_prior and request.image is not None:
            raise TinyldmError("these weights have a prior, which reads a prompt, but no image "
                               "encoder: leave the image out, or use weights of "
                               "StableUnCLIPImg2ImgPipeline")
        if self.text_prior and request.prompt is None:
            raise TinyldmError("these weights draw a prompt: give one")
        if not self.text_prior and request.image is None:
            raise TinyldmError("these weights draw variations of a picture, with or without a "
                               "prompt: give an image")
        mixed(request.image, lambda end: end, lambda *_: None)      # is the weight from 0 to 1?
        check_whole("noise_level", request.noise_level, 0,
                    self.noising_schedule.num_train_timesteps - 1)
        of_prior = {}
        for name, default in [("prior_guidance_scale", PRIOR_GUIDANCE),
                              ("prior_num_inference_steps", PRIOR_STEPS)]:
            value = getattr(request, name)
            if value is not None and not self.text_prior:
                note(f"these weights have no prior, so {name} plays no part")
            of_prior[name] = default if value is None else value
        return replace(super().complete(request), **of_prior)

    def states(self, request):
        """The iterator of `stream` for a request that `complete` has filled in."""
        steps, sampler = request.num_inference_steps, request.sampler
        schedule, options = self.schedule_for(request), own_options(self.scheduler, sampler)
        check_sampler(sampler, schedule, steps, options=options)
        if self.text_prior:
            self.text_prior.check_steps(request.prior_num_inference_steps)
        latents = None if request.latents is None else self.array(request.latents, "latents")
        size, f = self._size(request, latents), self.scale_factor
        if self.unet.settings.sample_size:
            note_on_size(size, self.picture_size(UnCLIPRequest()), False)
        generators = request.generators()
        shape = (len(generators), size[1] // f, size[0] // f, self.vae.settings.latent_channels)
        if latents is not None:
            check_latents(latents, shape, f)
        conditioning = self._conditioner(request.prompts, request.negative_prompts,
                                         request.guidance_scale, *size, request.clip_skip)

        def states():                   # the normal numbers are drawn in the order of diffusers
            labels = self.noise_embeds(self.embed(request, generators), request.noise_level,
                                       self._draw_rows(generators))
            labels = labels.astype(self.unet.dtype)
            *_, cond = conditioning
            cond["class_labels"] = labels
            if len(conditioning) == 2:
                conditioning[0]["class_labels"] = get_xp(labels).zeros_like(labels)
            predict = Predictor(self.unet, conditioning, request.guidance_scale)
            draw_noise = partial(self.draw_noise, generators, shape)    # () -> (B,h,w,C)
            start = draw_noise() if latents is None else latents
            yield from finite_states(SAMPLERS[sampler](predict, start, schedule, steps, draw_noise,
                                                       **options), predict)
        return states()

    # ---- image embeddings -------------------------------------------------------------------

    def embed(self, request, generators):
        """The image embeddings (B,C) of a completed request; generators: one for each image."""
        if self.text_prior:
            prompts = [prompt for prompt in request.prompts for _ in range(request.num_images)]
            return self.array(self.text_prior(
                prompts, request.prior_guidance_scale, request.prior_num_inference_steps,
                partial(self._draw_rows, generators)))
        embeds = mixed(request.image, self.encode_image, slerp_on_device)
        return embeds.repeat(len(generators), axis=0)

    def encode_image(self, image):
        """A PIL image -> its embedding (1,C), as CLIP's image encoder gives it."""
        if not self.image_encoder:
            raise TinyldmError("these weights have no image encoder: use weights of "
                               "StableUnCLIPImg2ImgPipeline")
        encoder = self.image_encoder
        pixels = encoder.xp.asarray(self.feature_extractor([image]), encoder.dtype)    # (1,H,W,3)
        _, embeds = encoder(pixels)
        embeds = self.array(embeds)
        check_output(embeds, "the image encoder's output is NaN or infinite", encoder,
                     partial(encoder, pixels))
        return embeds

    def noise_embeds(self, embeds, noise_level, noise):
        """Image embeddings (B,C), as CLIP gives them -> what the UNet takes as class_labels (B,2C).

        noise (B,C), normal numbers, is added to the normalised embeddings as at the training
        timestep noise_level, a whole number. So small errors of the prior do no harm, and there is
        less to copy of a picture. Behind the noisy embedding comes that of the noise_level.
        """
        B, C = embeds.shape
        xp, levels = get_xp(embeds), np.full(B, noise_level)
        noisy = self.noising_schedule.add_noise(self.image_normalizer.scale(embeds), noise, levels)
        noisy = self.image_normalizer.unscale(noisy)
        level, _ = ops.timestep_embedding(xp.asarray(levels, embeds.dtype), C)
        return xp.concatenate([noisy, level.astype(noisy.dtype)], axis=1)

    def _draw_rows(self, generators):
        """Normal numbers (B,C), one row for each image."""
        return self.draw_noise(generators, (len(generators),
                                            self.image_normalizer.settings.embedding_dim))

    # ---- parts ------------------------------------------------------------------------------

    def picture_size(self, request):
        """(width, height) of the pictures of a request, in pixels."""
        return self._size(request, None)

    def _size(self, request, latents):
        own = sides(self.unet.settings.sample_size)
        if latents is not None and latents.ndim == 4:
            own = latents.shape[1:3]
        return picture_size(request.width, request.height, None, own, self.scale_factor)

    @property
    def prompt_is_optional(self):
        """Whether a picture is enough."""
        return self.text_prior is None

    @property
    def prior(self):
        """The PriorTransformer; None where there is an image encoder in its place."""
        return self.text_prior and self.text_prior.prior

    @property
    def kind(self):
        """The public class whose folder holds such a pipeline."""
        return f"StableUnCLIP{'' if self.text_prior else 'Img2Img'}Pipeline"

    @property
    def models(self):
        """{name of the part: model}."""
        source = ({"prior_text_encoder": self.text_prior.text_encoder, "prior": self.prior}
                  if self.text_prior else {"image_encoder": self.image_encoder})
        return {**source, "image_normalizer": self.image_normalizer,
                "text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae}

    @property
    def schedulers(self):
        """{part: dict of its scheduler_config.json}."""
        of_prior = {"prior_scheduler": self.text_prior.scheduler} if self.text_prior else {}
        return of_prior | {"image_noising_scheduler": self.image_noising_scheduler,
                           "scheduler": self.scheduler}

    @property
    def tokenizers(self):
        """{part: what reads prompts, or pictures}."""
        source = ({"prior_tokenizer": self.text_prior.tokenizer} if self.text_prior else
                  {"feature_extractor": self.feature_extractor})
        return source | super().tokenizers

    def settings(self):
        """What model_index.json says besides the parts, and of which library some are."""
        settings = super().settings() | {
            "_guidance_scale": self.guidance_scale,
            "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"]}
        if self.text_prior is None:
            settings["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        return settings
