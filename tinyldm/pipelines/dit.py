"""DiT: a class and a seed in, a picture of that class out.

    stream          seed -> latents, denoised step by step by a sampler that calls the transformer
    decode          latents -> images

No text is read: a label, the number of a class, is all that the transformer is conditioned on. The
VAE, the samplers and guidance are Stable Diffusion's.
Source: Peebles & Xie 2022, "Scalable Diffusion Models with Transformers", arXiv:2212.09748;
diffusers' DiTPipeline; facebookresearch/DiT, sample.py.
"""
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ..diffusion.samplers import SAMPLERS, check_sampler, own_options
from ..diffusion.samplers.ddpm import LEARNED
from ..diffusion.schedule import Schedule
from ..errors import TinyldmError, note
from ..images import Pictures
from .finite import finite_states
from .interpolation import as_list
from .labels import label_number, read_names, written_names
from .parts import check_transformer
from .pipeline import Pipeline
from .predictor import Predictor
from .preview import ShownState
from .request import Drawing, check_finite, takes

STEPS, GUIDANCE = 50, 4.0           # of diffusers' DiTPipeline


@dataclass(frozen=True, eq=False)
class DiTOptions(Drawing):
    """The options, in the order in which they may be given by position.

    label: what to draw: the number of a class, or one of the names that the weights give it, such
        as "golden retriever"; a list of labels draws num_images of each, from the same seeds. The
        number after the last class means "no class".
    guidance_scale: how strongly to follow the label. Up to 1 there is no guidance. Default: the
        weights' own, or else 4.
    num_inference_steps: 1 to 1000; more is slower and finer. Default: the weights' own number.
    seed: image i is drawn from seed + i, and equals the single image of that seed; or a list of
        seeds, one for each image.
    sampler: a key of diffusion.samplers.SAMPLERS, or its name elsewhere. Default: the weights' own.
    latents: standard normal numbers to start from in place of the seed's, of shape (images,
        sample_size, sample_size, channels).
    noise: whose normal numbers a seed stands for, a key of noise.GENERATORS.
    timestep_spacing: how the steps are spread over the training timesteps, "leading", "trailing" or
        "linspace". Default: the weights' own.

    Raises TinyldmError for a value that is wrong for every pipeline.
    """

    label: Any
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    seed: Any = 0
    num_images: int = 1
    sampler: str | None = None
    latents: Any = None
    noise: str = "torch-cpu"
    timestep_spacing: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.guidance_scale is not None:
            check_finite("guidance_scale", self.guidance_scale)

    @property
    def subjects(self):
        """A list, of one label or several."""
        labels = self.label.tolist() if isinstance(self.label, np.ndarray) else self.label
        labels = as_list(labels)
        if not labels:
            raise TinyldmError("a list of labels must have at least one: give one")
        return labels


class DiT(Pipeline):
    """A transformer, a VAE and a noise schedule that belong together.

    scheduler: the dict of a scheduler_config.json; its class is the default sampler. names: {name
    of a class: its number}, see read_names. num_inference_steps, guidance_scale: the defaults.
    guided_channels: how many channels of the latents are guided, None for all. The original guides
    three of four, an oversight that its authors keep as their figures were measured with it.
    low_memory: decode in tiles.
    A learned variance is used by the sampler ddpm if the scheduler says so, as the original does,
    and left out for any other sampler, as in diffusers.
    Raises TinyldmError for parts that do not fit together.
    """

    Options, name, network = DiTOptions, "DiT", "transformer"
    kind = "DiTPipeline"

    def __init__(self, transformer, vae, scheduler, names=None, num_inference_steps=STEPS,
                 guidance_scale=GUIDANCE, guided_channels=None, low_memory=False):
        self.transformer, self.vae, self.scheduler = transformer, vae, scheduler
        self.names, self.num_inference_steps = names or {}, num_inference_steps
        self.guidance_scale, self.guided_channels = guidance_scale, guided_channels
        self.low_memory = low_memory
        check_transformer(transformer, vae)
        last = transformer.settings.num_embeds_ada_norm - 1
        if wrong := [name for name, number in self.names.items() if number > last]:
            raise TinyldmError(f"model_index.json: id2label names class {self.names[wrong[0]]} "
                               f"{wrong[0]!r:.60}, but the transformer has the classes 0 to {last}")
        self.schedule = Schedule.from_config(scheduler)

    @classmethod
    def from_parts(cls, parts, low_memory=False):
        """PipelineParts -> DiT."""
        models, index = parts.models, parts.index
        return cls(models["transformer"], models["vae"], parts.schedulers["scheduler"],
                   read_names(index.get("id2label")),
                   parts.setting("_num_inference_steps", STEPS),
                   parts.setting("_guidance_scale", GUIDANCE),
                   index.get("_guided_channels"), low_memory)

    @takes(DiTOptions)
    def __call__(self, *arguments: Any, **options: Any) -> Pictures:
        """Draw num_images pictures of a label -> list of PIL images. Arguments: see DiTOptions.

        In a notebook a progress bar shows the steps.
        """
        return self.draw(arguments, options)

    @takes(DiTOptions)
    def stream(self, *arguments: Any, **options: Any) -> Iterator[ShownState]:
        """Draw, one model call at a time -> iterator of State; the last one's latents are clean.

        Raises TinyldmError at once for a bad argument; and while drawing, if the latents stop being
        finite, with the step and the layer.
        """
        return self.follow(arguments, options)

    def complete(self, request):
        """Fill in what the request leaves to the model -> request, with the labels' numbers.

        Raises TinyldmError for an unknown label.
        """
        labels = [self.label_number(label) for label in request.subjects]
        return replace(super().complete(request), label=labels)

    def states(self, request):
        """The iterator of `stream` for a request that `complete` has filled in."""
        steps, sampler, schedule = (request.num_inference_steps, request.sampler,
                                    self.schedule_for(request))
        options = own_options(self.scheduler, sampler)
        settings, xp = self.transformer.settings, self.transformer.xp
        learned = options.get("variance_type") in LEARNED   # all other samplers do without it
        check_sampler(sampler, schedule, steps, options=options,
                      outputs=2 if learned and settings.learns_variance else 1)
        seeds = request.generators()
        shape = (len(seeds), settings.sample_size, settings.sample_size, settings.in_channels)
        draw_noise = partial(self.draw_noise, seeds, shape)         # () -> (B,h,w,C)
        latents = self.given_latents(request, shape)
        latents = draw_noise() if latents is None else latents
        labels = request.label
        conditioning = [{"class_labels": xp.asarray(labels)}]
        if request.guidance_scale > 1:
            no_class = [settings.num_embeds_ada_norm] * len(labels)
            conditioning.insert(0, {"class_labels": xp.asarray(no_class)})
        predict = Predictor(self.transformer, conditioning, request.guidance_scale,
                            guided_channels=self.guided_channels,
                            keeps_variance=learned)
        states = SAMPLERS[sampler](predict, latents, schedule, steps, draw_noise, **options)
        return finite_states(states, predict)

    def label_number(self, label):
        """A class's number or name -> its number. Raises TinyldmError for an unknown one."""
        return label_number(label, self.transformer.settings.num_embeds_ada_norm, self.names)

    def picture_size(self, request):
        """(width, height) of the pictures, in pixels."""
        return (self.transformer.settings.sample_size * self.scale_factor,) * 2

    @property
    def models(self):
        """{name of the part: model}."""
        return {"transformer": self.transformer, "vae": self.vae}

    @property
    def described(self):
        """What the pipeline is, for people."""
        return f"DiT of {self.transformer.settings.num_embeds_ada_norm} classes"

    def settings(self):
        """What model_index.json says besides the parts."""
        if self.transformer.settings.freq_shift == 0:
            note("these are weights of the original DiT, whose timestep embedding and guidance "
                 "differ from diffusers': there, the saved folder draws other pictures")
        settings = super().settings() | {"_guidance_scale": self.guidance_scale}
        settings |= written_names(self.names)
        if self.guided_channels is not None:
            settings["_guided_channels"] = self.guided_channels
        return settings
