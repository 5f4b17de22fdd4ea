"""DDPM: a seed in, a picture out. No prompt and no VAE: the latents are the pixels.

    stream          seed -> pixels, denoised step by step by a sampler that calls the UNet; or from
                    a given picture, to which noise is added first (SDEdit)
    decode          pixels -> the same, clipped

A model with classes also takes a label. Any sampler draws with such a model; the public pipelines
of DDPM, DDIM and PNDM differ only in their default sampler and number of steps.
Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239, algorithm 2;
Meng et al. 2021, "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential
Equations", arXiv:2108.01073, algorithm 1.
"""
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..backend import is_finite
from ..configs import sides
from ..diffusion.samplers import SAMPLERS, check_sampler, own_options
from ..diffusion.samplers.ddpm import LEARNED
from ..diffusion.samplers.shared import NO_PICTURE, Origin
from ..diffusion.schedule import Schedule
from ..errors import TinyldmError, note
from ..images import Pictures, from_pil, to_rgb
from .editing import Edit
from .finite import finite_states
from .interpolation import as_list, ends, lerp, mixed
from .pipeline import Pipeline
from .predictor import Predictor
from .preview import ShownState
from .request import Drawing, check_edit, check_finite, check_whole, decoded_ends, takes, whole

# A public pipeline -> the class to which it turns every scheduler, if any, and its number of steps.
KINDS = {"DDPMPipeline": ({}, 1000), "DDIMPipeline": ({"_class_name": "DDIMScheduler"}, 50),
         "PNDMPipeline": ({"_class_name": "PNDMScheduler"}, 50)}
STRENGTH = 0.8              # as diffusers' image to image has it


@dataclass(frozen=True, eq=False)
class DDPMOptions(Drawing):
    """The options, in the order in which they may be given by position. See also request.Request.

    seed: image i is drawn from seed + i; or a list of seeds, one for each image.
    num_inference_steps: 1 to 1000; more is slower and finer. Default: the weights' own number.
    num_images: how many, of each label.
    sampler: a key of diffusion.samplers.SAMPLERS, or its name elsewhere. Default: the weights' own.
    latents: standard normal numbers to start from in place of the seed's, of shape (images, height,
        width, channels).
    noise: whose normal numbers a seed stands for, a key of noise.GENERATORS.
    timestep_spacing: "leading", "trailing" or "linspace". Default: the weights' own.
    label: for a model with classes, and only there: a whole number from 0, or a list of them. Where
        the model's class_embed_type is "timestep", any number; where it is "identity", a vector as
        long as the time embedding.
    image: a PIL image to begin from, also a Between of two; it is resized to the model's size, and
        made grey for a model of grey pictures.
    strength: 0 to 1, how much of it to draw anew: the share of the steps to make. Default: 0.8.

    Raises TinyldmError for a value that is wrong for every pipeline.
    """

    seed: Any = 0
    num_inference_steps: int | None = None
    num_images: int = 1
    sampler: str | None = None
    latents: Any = None
    noise: str = "torch-cpu"
    timestep_spacing: str | None = None
    label: Any = None
    image: Any = None
    strength: float | None = None

    def __post_init__(self):
        super().__post_init__()
        check_edit(self.image, self.strength, None)
        object.__setattr__(self, "image", decoded_ends("image", self.image))

    @property
    def subjects(self):
        """A list of the labels; [None] without any."""
        labels = as_list(self.label)
        if not labels:
            raise TinyldmError("a list of labels must have at least one: give one")
        return labels


class DDPM(Pipeline):
    """A UNet2DModel and a noise schedule.

    scheduler: the dict of a scheduler_config.json. num_inference_steps: the default; None: the
    public pipeline's. kind: the public pipeline's class, a key of KINDS. rescale_timesteps: the
    UNet sees timesteps between 0 and 1000, whatever their number, as in Improved DDPM.
    Raises TinyldmError for a UNet that does not give pictures.
    """

    Options, name = DDPMOptions, "DDPM"

    def __init__(self, unet, scheduler, num_inference_steps=None, kind="DDPMPipeline",
                 rescale_timesteps=False):
        own_class, steps = KINDS[kind]
        self.unet, self.scheduler, self._kind = unet, scheduler | own_class, kind
        self.schedule = Schedule.from_config(scheduler)
        self.rescale_timesteps = bool(rescale_timesteps)
        self.num_inference_steps = num_inference_steps or min(
            steps, self.schedule.num_train_timesteps)
        channels, outputs = unet.settings.in_channels, unet.settings.out_channels
        if channels not in (1, 3) or outputs not in (channels, 2 * channels):
            raise TinyldmError(f"the UNet's in_channels and out_channels are {channels} and "
                               f"{outputs}: expected 3 colours, or 1 for grey pictures, and the "
                               "same number or twice as many")
        multiple = 2 ** (len(unet.settings.block_out_channels) - 1)
        if None in self.size or any(side % multiple for side in self.size):
            raise TinyldmError("the UNet's sample_size, the size of the pictures in pixels, is "
                               f"{unet.settings.sample_size}: expected multiples of {multiple}")

    @classmethod
    def from_parts(cls, parts, low_memory=False):
        """PipelineParts -> DDPM. low_memory plays no part: there is no VAE to decode in tiles."""
        return cls(parts.models["unet"], parts.schedulers["scheduler"],
                   parts.index.get("_num_inference_steps"), parts.kind,
                   parts.index.get("_rescale_timesteps"))

    @takes(DDPMOptions)
    def __call__(self, *arguments: Any, **options: Any) -> Pictures:
        """Draw num_images pictures -> list of PIL images. Arguments: see DDPMOptions."""
        return self.draw(arguments, options)

    @takes(DDPMOptions)
    def stream(self, *arguments: Any, **options: Any) -> Iterator[ShownState]:
        """Draw, one model call at a time -> iterator of State; the last one's latents are clean.

        The arguments are the fields of DDPMOptions. Raises TinyldmError at once for a bad argument,
        and while drawing, if the latents stop being finite.
        """
        return self.follow(arguments, options)

    def complete(self, request):
        """Fill in what the options leave to the model -> options.

        Raises TinyldmError for a label that is missing or wrong.
        """
        self.conditions(request)
        done = super().complete(request)
        if request.image is None or request.strength is not None:
            return done
        return replace(done, strength=STRENGTH)

    def states(self, request):
        """The iterator of `stream` for options that `complete` has filled in."""
        steps, sampler, settings = request.num_inference_steps, request.sampler, self.unet.settings
        schedule, channels = self.schedule_for(request), settings.in_channels
        first = self._left_out(request)
        options = own_options(self.scheduler, sampler)
        learned = options.get("variance_type") in LEARNED   # all other samplers do without it
        check_sampler(sampler, schedule, steps, first, options=options,
                      outputs=settings.out_channels // channels if learned else 1)
        seeds, (width, height) = request.generators(), self.size
        shape = len(seeds), height, width, channels
        draw_noise = partial(self.draw_noise, seeds, shape)     # () -> (B,H,W,C)
        latents = self.given_latents(request, shape)
        latents = draw_noise() if latents is None else latents
        origin = NO_PICTURE
        if request.image is not None:
            origin = Origin(self._picture(request.image), first)
        scale = 1000 / schedule.num_train_timesteps if self.rescale_timesteps else 1
        predict = Predictor(self.unet, *self.guided(request), keeps_variance=learned,
                            timestep_scale=scale)
        states = SAMPLERS[sampler](predict, latents, schedule, steps, draw_noise, origin, **options)
        return finite_states(states, predict)

    def steps_made(self, request):
        """The steps of a completed request that a picture to begin from does not leave out."""
        return request.num_inference_steps - self._left_out(request)

    def _left_out(self, request):
        edit = Edit(request.image, request.strength, None, inpaints=False)
        return edit.steps_left_out(request.num_inference_steps)

    def _picture(self, image):
        """A PIL image, or a Between of two -> (1,H,W,C) of the model's size and colours."""
        if (own := ends(image)[0].size) != self.size:
            note(f"the image of {own[0]}x{own[1]} pixels is resized to "
                 f"{self.size[0]}x{self.size[1]}, the size of this model's pictures")
        channels = self.unet.settings.in_channels

        def pixels(end):
            end = end if channels == 3 else to_rgb("image", end).convert("L")
            return from_pil(end, self.size)[..., :channels]
        return self.array(mixed(image, pixels, lerp))

    def guided(self, request):
        """The Predictor's conditioning and its guidance scale; here there is no guidance."""
        return [self.conditions(request)], 1.0

    def conditions(self, request):
        """The UNet's keyword arguments for the labels: {"class_labels": (labels,) or (labels,E)}.

        {} for a model without classes. Raises TinyldmError for a label that is missing or wrong.
        """
        labels, settings, xp = request.subjects, self.unet.settings, self.unet.xp
        given = any(label is not None for label in labels)
        if self.unet.class_embedding is None:
            if given:
                raise TinyldmError("this model has no classes: leave the label out")
            return {}
        last, E = (settings.num_class_embeds or 0) - 1, settings.temb_channels
        if not given:
            expected = {None: f"a whole number from 0 to {last}", "timestep": "a number",
                        "identity": f"{E} numbers"}
            raise TinyldmError("this model draws pictures of a class: give a label, "
                               f"{expected[settings.class_embed_type]}")
        if settings.class_embed_type is None:
            labels = [whole(label) for label in labels]
            for label in labels:
                check_whole("a label", label, 0, last)
            return {"class_labels": xp.asarray(labels)}
        if settings.class_embed_type == "timestep":
            for label in labels:
                check_finite("a label", label)
            return {"class_labels": self.array(labels, "the labels")}
        labels = self.array(labels, "the labels")
        if labels.shape[1:] != (E,) or not is_finite(labels):   # a list is one of labels
            raise TinyldmError(f"a label must be {E} finite numbers in an array, or several a list "
                               f"of such, not of shape {labels.shape[1:]}")
        return {"class_labels": labels.astype(self.unet.dtype)}

    def decode(self, latents: Any) -> Any:
        """Clean pixels (B,H,W,C) -> images (B,H,W,3) in [-1, 1]; grey ones get three equal colours.
        """
        latents, channels = self.array(latents, "latents"), self.unet.settings.in_channels
        if latents.ndim != 4 or latents.shape[-1] != channels or 0 in latents.shape:
            raise TinyldmError(f"latents must have the shape (images, height, width, {channels}), "
                               f"not {latents.shape}")
        if not is_finite(latents):
            raise TinyldmError("latents must be finite, but they hold NaN or infinity: look for "
                               "where it began")
        return latents.clip(-1, 1).repeat(3 // channels, axis=-1)

    def picture_size(self, request):
        """(width, height) in pixels: the weights' own."""
        return self.size

    @property
    def size(self):
        """(width, height) of the pictures in pixels."""
        return sides(self.unet.settings.sample_size)[::-1]

    @property
    def models(self):
        """{name of the part: model}."""
        return {"unet": self.unet}

    @property
    def kind(self):
        """The public class whose folder holds such a pipeline."""
        return self._kind

    def settings(self):
        """What model_index.json says besides the parts."""
        rescaled = {"_rescale_timesteps": True} if self.rescale_timesteps else {}
        if rescaled or isinstance(self.unet.settings.attention_head_dim, (list, tuple)):
            note("these are weights of OpenAI's models, whose timesteps or attention heads "
                 "diffusers' classes cannot express: only tinyldm draws with the saved folder as "
                 "it should")
        return super().settings() | rescaled
