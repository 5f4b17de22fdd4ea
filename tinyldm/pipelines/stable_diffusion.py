"""Stable Diffusion: prompt and seed in, picture out; or a picture in, and another one out.

    encode_prompt   text -> context, which the UNet attends to
    encode          images -> latents, where sampling may begin in place of noise
    stream          seed -> latents, denoised step by step by a sampler that calls the UNet
    decode          latents -> images

Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models",
arXiv:2112.10752, figure 3.
"""
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from ..configs import sides
from ..diffusion.samplers import OWN_TIMESTEPS, SAMPLERS, check_sampler, own_options
from ..diffusion.schedule import Schedule
from ..errors import TinyldmError, note
from ..images import Pictures
from .conditioning import Conditioner
from .editing import Edit
from .finite import check_output, finite_states
from .interpolation import ends
from .language import Language
from .parts import check_parts
from .pipeline import read_tokenizers
from .predictor import FunctionUNet, Predictor
from .preview import ShownState
from .request import Request, check_latents, note_on_size, picture_size, takes
from .text_pipeline import TextPipeline

STEPS = 50                  # where the weights recommend no number of their own
FEW_STEPS = 4               # the same for a UNet that imitates guidance: it is made for few steps
DISTILLED = 8               # the most steps that Turbo, Lightning and Hyper models are made for


class StableDiffusion(TextPipeline):
    """A tokenizer, three models and a noise schedule that belong together.

    scheduler: the dict of a scheduler_config.json; its class is the default sampler.
    num_inference_steps, guidance_scale: the defaults; a folder may recommend its own as
    `_num_inference_steps` and `_guidance_scale` in model_index.json. No guidance_scale: that of
    diffusers' pipeline of this kind. low_memory: decode in tiles. tokenizer_2, text_encoder_2: only
    in Stable Diffusion XL. force_zeros_for_empty_prompt: see Conditioner. language: the Language of
    a model that knows no other; other prompts get a note.
    Raises TinyldmError for parts that do not fit together.
    """

    Options, name = Request, "Stable Diffusion"

    def __init__(self, tokenizer, text_encoder, unet, vae, scheduler, num_inference_steps=STEPS,
                 low_memory=False, tokenizer_2=None, text_encoder_2=None,
                 force_zeros_for_empty_prompt=True, language=None, guidance_scale=None):
        self.tokenizer, self.text_encoder, self.unet, self.vae = tokenizer, text_encoder, unet, vae
        self.tokenizer_2, self.text_encoder_2 = tokenizer_2, text_encoder_2
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        self.scheduler, self.num_inference_steps = scheduler, num_inference_steps
        self.low_memory, self.language, self.guidance_scale = low_memory, language, guidance_scale
        check_parts(self._readers, unet, vae)
        # Old files have other values of these two. The public pipeline corrects them too, except
        # those of SDXL and Latent Consistency Models.
        newer = unet.settings.addition_embed_type or unet.settings.time_cond_proj_dim
        corrected = {} if newer else {"steps_offset": 1, "clip_sample": False}
        schedule = Schedule.from_config({"clip_sample": False} | scheduler)
        self.schedule = replace(schedule, **corrected)

    @classmethod
    def from_parts(cls, parts, low_memory=False):
        """PipelineParts -> StableDiffusion."""
        models, index = parts.models, parts.index
        steps = FEW_STEPS if models["unet"].settings.time_cond_proj_dim else STEPS
        tokenizers = read_tokenizers(parts)
        rule = index.get("_language")
        return cls(tokenizers["tokenizer"], models["text_encoder"], models["unet"], models["vae"],
                   parts.schedulers["scheduler"], index.get("_num_inference_steps", steps),
                   low_memory, tokenizers.get("tokenizer_2"), models.get("text_encoder_2"),
                   index.get("force_zeros_for_empty_prompt", True), rule and Language(rule),
                   index.get("_guidance_scale"))

    @takes(Request)
    def __call__(self, *arguments: Any, **options: Any) -> Pictures:
        """Draw num_images pictures of a prompt -> list of PIL images. Arguments: see Request.

        In a notebook a progress bar shows the steps.
        """
        return self.draw(arguments, options)

    @takes(Request)
    def stream(self, *arguments: Any, **options: Any) -> Iterator[ShownState]:
        """Draw, one model call at a time -> iterator of State; the last one's latents are clean.

        The arguments are the fields of Request, in their order: see request.py.
        Raises TinyldmError at once for a bad argument; and while drawing, if the latents stop being
        finite, with the step and the layer.
        """
        return self.follow(arguments, options)

    def states(self, request):
        """The iterator of `stream` for a Request that `complete` has filled in."""
        steps, sampler = request.num_inference_steps, request.sampler
        schedule = self.schedule_for(request)
        edit = self.edit(request.image, request.strength, request.mask, sampler)
        first = edit.steps_left_out(steps)
        options = own_options(self.scheduler, sampler)
        check_sampler(sampler, schedule, steps, first, edit.reach, options)
        latents = request.latents
        latents = None if latents is None else self.array(latents, "latents")
        size = self.size(request.width, request.height, request.image, latents)
        if self.unet.settings.sample_size:
            note_on_size(size, self.size(), request.image is not None
                         and request.width is request.height is latents is None)
        f = self.vae.vae_scale_factor
        seeds = request.generators()
        shape = len(seeds), size[1] // f, size[0] // f, self.vae.settings.latent_channels
        if latents is not None:
            check_latents(latents, shape, f)
        draw_noise = partial(self.draw_noise, seeds, shape)       # () -> (B,h,w,C)
        conditioning = self._conditioner(request.prompts, request.negative_prompts,
                                         request.guidance_scale, *size, request.clip_skip)
        if self.language:
            # No word at all is the usual negative prompt, and was trained as one.
            texts = [*request.prompts, *filter(None, request.negative_prompts)]
            for word in dict.fromkeys(end for text in texts for end in ends(text)):
                self.language.check(word)
        latents, origin, extra_channels = edit.prepare(self.encode, first, size, latents,
                                                       draw_noise)
        predict = Predictor(self.unet, conditioning, request.guidance_scale,
                            request.guidance_rescale, extra_channels)
        states = SAMPLERS[sampler](predict, latents, schedule, steps, draw_noise, origin, **options)
        return finite_states(states, predict)

    def encode_prompt(self, text: Any) -> Any:
        """Text -> context (1, 77 * chunks, D), which the UNet attends to.

        It is the text transformer's last hidden state, weighted, with the chunks of a long prompt
        side by side. In Stable Diffusion XL it is the last but one of both text encoders, side by
        side along D. See conditioning.py.
        """
        return self._conditioner.context(text)

    @property
    def _readers(self):
        readers = [(self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)]
        return readers[:1 if self.text_encoder_2 is None else 2]

    @property
    def _conditioner(self):
        return Conditioner(self._readers, self.unet.settings.time_cond_proj_dim,
                           self.force_zeros_for_empty_prompt)

    def encode(self, images, noise):
        """Draw latents from the VAE's distribution for images, by standard normal numbers.

        images (1 or B,H,W,3) in [-1, 1], noise (B,h,w,C) -> latents (B,h,w,C). With low_memory one
        tile at a time.
        """
        encode = self.vae.encode_tiled if self.low_memory else self.vae.encode
        images, f = self.array(images, "images"), self.vae.vae_scale_factor
        noise = self.array(noise, "noise")
        if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape or any(
                side % f for side in images.shape[1:3]):
            raise TinyldmError("images must have the shape (images, height, width, 3), with sides "
                               f"that are multiples of {f}, not {images.shape}")
        expected = images.shape[1] // f, images.shape[2] // f, self.vae.settings.latent_channels
        if noise.shape[1:] != expected:
            raise TinyldmError(f"noise must have the shape (images, {', '.join(map(str, expected))}"
                               f") for these images, not {noise.shape}")
        images = images.astype(self.vae.dtype)
        mean, logvar = (self.array(moment) for moment in encode(images))
        latents = self.vae.to_latents(mean + self.unet.xp.exp(logvar / 2) * noise)
        check_output(latents, "the picture is encoded to NaN or infinity", self.vae,
                     partial(encode, images))
        return latents

    @property
    def unet(self) -> Any:
        """The noise predictor. A function may be set in its place: see FunctionUNet."""
        return vars(self)["unet"]

    @unet.setter
    def unet(self, unet: Any) -> None:
        if not hasattr(unet, "settings"):
            unet = FunctionUNet(unet, like=vars(self).get("unet"))
        vars(self)["unet"] = unet

    @property
    def described(self):
        """What the pipeline is, for people."""
        settings = self.unet.settings
        kind = "Stable Diffusion" + " XL" * (len(self._readers) == 2)
        if settings.time_cond_proj_dim:
            kind = "Latent Consistency Model" + kind.removeprefix("Stable Diffusion")
        return kind + " for inpainting" * (settings.in_channels != settings.out_channels)

    @property
    def kind(self):
        """The public class whose folder holds such a pipeline."""
        unet, xl = self.unet.settings, self.text_encoder_2 is not None
        inpainting = unet.in_channels != unet.out_channels
        if unet.time_cond_proj_dim and not xl and not inpainting:
            return "LatentConsistencyModelPipeline"
        return f"StableDiffusion{'XL' * xl}{'Inpaint' * inpainting}Pipeline"

    def settings(self):
        """What model_index.json says besides the parts."""
        settings = super().settings()
        if self.guidance_scale is not None:
            settings["_guidance_scale"] = self.guidance_scale
        if self.language:
            settings["_language"] = self.language.rule
        if self.tokenizer_2:
            return settings | {"force_zeros_for_empty_prompt": self.force_zeros_for_empty_prompt}
        return settings | {"requires_safety_checker": False}

    @property
    def tokenizers(self):
        """{part: Tokenizer}."""
        found = {"tokenizer": self.tokenizer, "tokenizer_2": self.tokenizer_2}
        return {part: tokenizer for part, tokenizer in found.items() if tokenizer is not None}

    @property
    def models(self):
        """{name of the part: model}, with text_encoder_2 only where there is one."""
        parts = {name: getattr(self, name)
                 for name in ("text_encoder", "text_encoder_2", "unet", "vae")}
        return {name: model for name, model in parts.items() if model is not None}

    # ---- options ----------------------------------------------------------------------------

    def complete(self, request):
        """Fill in what the request leaves to the model -> Request.

        The number of steps, the guidance scale, the strength, the sampler and the timestep spacing.
        Raises TinyldmError for a wrong number of steps.
        """
        guidance_scale, strength = self._own_scale_and_strength(request)
        done = replace(super().complete(request), guidance_scale=guidance_scale, strength=strength)
        steps, sampler, spacing = done.num_inference_steps, done.sampler, done.timestep_spacing
        few = steps <= DISTILLED and guidance_scale <= 1
        if (request.timestep_spacing is None and sampler not in OWN_TIMESTEPS and few
                and spacing != "trailing" and not self.unet.settings.time_cond_proj_dim):
            suited = f"few steps ({steps}) without guidance suit Turbo, Lightning and Hyper models"
            if not self.scheduler.get("_assumed"):
                note(f"{suited}: if this is one, choose the timestep spacing trailing, as the "
                     "weights' own begins below the noisiest timestep")
                return done
            changed = ""
            if request.sampler is None and sampler == "pndm":
                # SD-Turbo's own sampler; PNDM averages over several steps.
                sampler, changed = "euler", " and the sampler euler in place of pndm"
            note(f"{suited}, so the timestep spacing is trailing{changed}: for any other model "
                 "choose the timestep spacing leading")
            return replace(done, timestep_spacing="trailing", sampler=sampler)
        return done

    def steps_made(self, request):
        """The steps of a completed request that a picture to begin from does not leave out."""
        edit = self.edit(request.image, request.strength, request.mask, request.sampler)
        return request.num_inference_steps - edit.steps_left_out(request.num_inference_steps)

    def picture_size(self, request):
        """(width, height) of the pictures of a request, in pixels."""
        return self.size(request.width, request.height, request.image)

    def _own_scale_and_strength(self, request):
        """The request's guidance scale and strength, or the weights' or diffusers' defaults.

        Source: diffusers' StableDiffusionPipeline, StableDiffusionXLPipeline,
        LatentConsistencyModelPipeline, and those for image to image and inpainting beside them.
        """
        guidance_scale, strength = request.guidance_scale, request.strength
        xl, masked = self.text_encoder_2 is not None, request.mask is not None
        if guidance_scale is None:
            guidance_scale = self.guidance_scale
        if guidance_scale is None:
            imitates = self.unet.settings.time_cond_proj_dim
            guidance_scale = 8.5 if imitates else 5.0 if xl and not masked else 7.5
        if strength is None and request.image is not None:
            strength = (0.9999 if masked else 0.3) if xl else 1.0 if masked else 0.8
        return guidance_scale, strength

    def edit(self, image=None, strength=None, mask=None, sampler=None):
        """The Edit that these options ask for. Raises TinyldmError."""
        channels = self.vae.settings.latent_channels
        inpaints = self.unet.settings.in_channels == 2 * channels + 1
        spread = self.unet.settings.time_cond_proj_dim and self.sampler(sampler) == "lcm"
        return Edit(image, strength, mask, inpaints, spread)

    def size(self, width=None, height=None, image=None, latents=None):
        """(width, height) in pixels; where None the latents', the image's, or the weights' own."""
        own = sides(self.unet.settings.sample_size)
        if latents is not None and latents.ndim == 4:
            own, image = latents.shape[1:3], None
        return picture_size(width, height, image, own, self.vae.vae_scale_factor)
