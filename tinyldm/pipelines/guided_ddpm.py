"""DDPM by class, with guidance: a label and a seed in, a picture out.

    ddpm.py draws; here are the names of the classes and the second prediction, of "no class".

python -m tinyldm.training ddpm --classes writes such a model. No public pipeline class has guidance
between classes in pixels, so its folder names one of this package; the UNet in it is diffusers'.
Source: Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", arXiv:2207.12598, algorithm 2.
"""
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..errors import TinyldmError
from ..images import Pictures
from .ddpm import DDPM, DDPMOptions
from .labels import label_number, read_names, written_names
from .preview import ShownState
from .request import check_finite, takes

GUIDANCE = 2.0


@dataclass(frozen=True, eq=False)
class GuidedDDPMOptions(DDPMOptions):
    """The options of DDPM, and guidance_scale: how strongly to follow the label.

    Up to 1 there is no guidance. Default: the weights' own. label: a class's number, or its name;
    the number after the last class means "no class".
    """

    guidance_scale: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.guidance_scale is not None:
            check_finite("guidance_scale", self.guidance_scale)


class GuidedDDPM(DDPM):
    """A DDPM whose UNet knows, after its classes, one more that stands for "no class".

    names: {name of a class: its number}. guidance_scale: the default. The rest as DDPM.
    Raises TinyldmError for a UNet without classes.
    """

    Options, kind = GuidedDDPMOptions, "GuidedDDPMPipeline"

    def __init__(self, unet, scheduler, num_inference_steps=None, rescale_timesteps=False, *,
                 names=None, guidance_scale=GUIDANCE):
        super().__init__(unet, scheduler, num_inference_steps, rescale_timesteps=rescale_timesteps)
        self.names, self.guidance_scale = names or {}, guidance_scale
        if unet.settings.class_embed_type or (unet.settings.num_class_embeds or 0) < 2:
            raise TinyldmError("guidance needs a UNet with at least one class and \"no class\": "
                               "num_class_embeds from 2, without class_embed_type")

    @classmethod
    def from_parts(cls, parts, low_memory=False):
        """PipelineParts -> GuidedDDPM."""
        index = parts.index
        return cls(parts.models["unet"], parts.schedulers["scheduler"],
                   index.get("_num_inference_steps"), index.get("_rescale_timesteps"),
                   names=read_names(index.get("id2label")),
                   guidance_scale=parts.setting("_guidance_scale", GUIDANCE))

    @takes(GuidedDDPMOptions)
    def __call__(self, *arguments: Any, **options: Any) -> Pictures:
        """Draw num_images pictures -> list of PIL images. Arguments: see GuidedDDPMOptions."""
        return self.draw(arguments, options)

    @takes(GuidedDDPMOptions)
    def stream(self, *arguments: Any, **options: Any) -> Iterator[ShownState]:
        """Draw, one model call at a time -> iterator of State, as DDPM.stream."""
        return super().stream(*arguments, **options)

    @property
    def no_class(self):
        """The label of "no class", which is also the number of classes."""
        return self.unet.settings.num_class_embeds - 1

    def complete(self, request):
        """Fill in what the options leave to the model -> options, with the labels' numbers.

        Raises TinyldmError for a label that is missing or wrong.
        """
        labels = [label_number(label, self.no_class, self.names) for label in request.subjects]
        return super().complete(replace(request, label=labels))

    def guided(self, request):
        """With guidance the conditions of "no class", too."""
        conditions = self.conditions(request)
        if request.guidance_scale <= 1:
            return [conditions], 1.0
        labels = conditions["class_labels"]
        nothing = {"class_labels": self.unet.xp.full_like(labels, self.no_class)}
        return [nothing, conditions], request.guidance_scale

    def settings(self):
        """What model_index.json says besides the parts."""
        return super().settings() | {"_guidance_scale": self.guidance_scale,
                                     **written_names(self.names)}
