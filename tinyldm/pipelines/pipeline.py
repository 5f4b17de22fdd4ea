"""What all pipelines share: a call that draws, a stream of its steps, arrays and random numbers.

A pipeline is one system in one file, from its options to pictures. It has

    Options         the dataclass of its call's options, derived from request.Drawing
    from_parts      PipelineParts, as read from files -> the pipeline
    models          {part: Module}; the one named `network` predicts in every step
    scheduler       the dict of the scheduler_config.json whose sampler is the default
    schedule        the Schedule of it
    num_inference_steps     the default
    complete        fills in what the options leave to the model
    states          completed options -> iterator of State
    picture_size    completed options -> (width, height) of the pictures, in pixels
    kind            the public class whose folder holds such a pipeline, a key of folders.PIPELINES
    decode          latents -> images (B,H,W,3) in [-1, 1], where there is no vae

and takes the rest from here.
"""
import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..backend import array_library, free_scratch, is_finite
from ..diffusion.samplers import OWN_TIMESTEPS, default_sampler, find_sampler
from ..errors import TinyldmError, note
from ..images import to_pil
from .finite import check_output
from .preview import shown
from .progress import with_bar
from .request import check_latents, own_names


class Pipeline:
    """The part of a pipeline that does not depend on its system. See above."""

    name = "a pipeline"             # in messages: "DDPM draws without a prompt"
    network = "unet"                # the attribute that holds the model called in every step
    prompt_is_optional = False      # where the options have one
    language = guidance_scale = None
    tokenizers = {}                 # {part: Tokenizer}
    takes_addons = False            # LoRAs and learned words: see TextPipeline

    # ---- drawing ----------------------------------------------------------------------------

    def draw(self, arguments, options):
        """What __call__ gives: a list of PIL images. In a notebook a progress bar shows the steps.
        """
        request = self.complete(self.request(arguments, options))
        for state in with_bar(self.states(request), self.steps_made(request)):
            latents = state.latents
        return to_pil(self.decode(latents))

    def follow(self, arguments, options):
        """What stream gives: an iterator of ShownState. Raises TinyldmError at once."""
        return shown(self.states(self.complete(self.request(arguments, options))), self)

    def request(self, arguments, options):
        """The options of a call, checked."""
        return self.Options(*arguments, **own_names(options, self.Options))

    def complete(self, request):
        """Fill in the steps, the sampler, the timestep spacing and the guidance scale -> request.

        Raises TinyldmError for a wrong number of steps.
        """
        steps, spacing = request.num_inference_steps, request.timestep_spacing
        steps = self.num_inference_steps if steps is None else steps
        self.schedule.check_steps(steps)
        sampler = self.sampler(request.sampler)
        if sampler in OWN_TIMESTEPS:
            if spacing is not None:
                note(f"the sampler {sampler} has timesteps of its own: timestep_spacing "
                     f"{spacing!r} plays no part")
            spacing = None
        elif spacing is None:
            spacing = self.schedule.timestep_spacing
        own = {}
        if getattr(request, "guidance_scale", 0) is None:       # not all options have one
            own["guidance_scale"] = self.guidance_scale
        return replace(request, num_inference_steps=steps, sampler=sampler,
                       timestep_spacing=spacing, **own)

    def sampler(self, name=None):
        """The name of the sampler that will draw: the given one, or the weights' own.

        name: as find_sampler takes it, or None. Raises TinyldmError for an unknown one.
        """
        return default_sampler(self.scheduler) if name is None else find_sampler(name)

    def steps_made(self, request):
        """How many steps a completed request makes, for progress bars."""
        return request.num_inference_steps

    def schedule_for(self, request):
        """The schedule, with the timestep spacing of a completed request."""
        if request.timestep_spacing in (None, self.schedule.timestep_spacing):
            return self.schedule
        return replace(self.schedule, timestep_spacing=request.timestep_spacing)

    def decode(self, latents: Any) -> Any:
        """Clean latents (B,h,w,C) -> images (B,f*h,f*w,3) in [-1, 1], f the VAE's factor, for
        a pipeline with a `vae`.

        One picture at a time, as the VAE has the largest arrays of the whole pipeline; with
        low_memory one tile at a time.
        """
        latents, channels = self.array(latents, "latents"), self.vae.settings.latent_channels
        if latents.ndim != 4 or latents.shape[-1] != channels or 0 in latents.shape:
            raise TinyldmError(f"latents must have the shape (images, height, width, {channels}), "
                               f"not {latents.shape}")
        if not is_finite(latents):
            raise TinyldmError("latents must be finite, but they hold NaN or infinity, which is "
                               "decoded to NaN: look for where it began")
        z = self.vae.to_z(latents).astype(self.vae.dtype)
        decode = self.vae.decode_tiled if self.low_memory else self.vae.decode
        if self.low_memory:
            free_scratch()                              # what the network used
        images = [decode(z[i:i + 1]) for i in range(len(z))]
        free_scratch()
        for i, image in enumerate(images):
            check_output(image, f"picture {i} is decoded to NaN or infinity", self.vae,
                         partial(decode, z[i:i + 1]))
        return self.vae.xp.concatenate(images).clip(-1, 1)

    # ---- parts ------------------------------------------------------------------------------

    def load_lora(self, path, weight=1.0):
        """Raises TinyldmError: only a TextPipeline takes a LoRA."""
        raise TinyldmError(f"{self.name} takes no LoRA: leave it out")

    def load_textual_inversion(self, path, token=None):
        """Raises TinyldmError: only a TextPipeline has a vocabulary."""
        raise TinyldmError(f"{self.name} reads no words, so it takes no learned one: leave it out")

    @property
    def scale_factor(self):
        """Pixels of a picture per side of one of its latents; without a VAE these are pixels."""
        return self.vae.vae_scale_factor if hasattr(self, "vae") else 1

    @property
    def schedulers(self):
        """{part: dict of its scheduler_config.json}."""
        return {"scheduler": self.scheduler}

    def settings(self):
        """What model_index.json says besides the parts, for tinyldm.save."""
        return {"_num_inference_steps": self.num_inference_steps}

    def to_device(self, device):
        """Move all models to "cpu" or "cuda". Raises TinyldmError for a missing GPU."""
        xp = array_library(device)
        for model in self.models.values():
            model.move_to(xp)

    @property
    def described(self):
        """The name with what is special of these weights."""
        return self.name

    def __repr__(self):
        parts = ", ".join(f"{name} {sum(math.prod(p.shape) for p in model.parameters()) / 1e6:.3g}M"
                          for name, model in self.models.items())
        network = getattr(self, self.network)
        device = "cpu" if network.xp is np else "cuda"
        try:
            sampler = self.sampler()
        except TinyldmError:                            # its own is not supported
            sampler = self.scheduler.get("_class_name")
        return (f"<{self.described}: {parts}; {network.dtype} on {device}; {sampler}, "
                f"{self.num_inference_steps} steps>")

    # ---- arrays -----------------------------------------------------------------------------

    def draw_noise(self, generators, shape):
        """Normal numbers (B,h,w,C) or (B,C), in the reference's order: image by image, channels
        first."""
        _, *sides, C = shape
        noise = np.concatenate([generator.randn((1, C, *sides)) for generator in generators])
        return self.array(np.moveaxis(noise, 1, -1))

    def given_latents(self, request, shape):
        """A request's latents as an array of that shape; None if it has none.

        Raises TinyldmError for another shape, and for numbers that are not finite.
        """
        if request.latents is None:
            return None
        latents = self.array(request.latents, "latents")
        check_latents(latents, shape, self.scale_factor)
        return latents

    def array(self, values, name="values"):
        """On the models' device, at least float32: float16 is too coarse for a sampler's sums.

        Raises TinyldmError, with the name, for what is no array of numbers.
        """
        network = getattr(self, self.network)
        dtype = np.promote_types(network.dtype, np.float32)
        try:
            if "complex" in str(getattr(values, "dtype", "")):     # NumPy, CuPy or torch
                raise TypeError("its numbers are complex")
            return network.xp.ascontiguousarray(network.xp.asarray(values, dtype))
        except (TypeError, ValueError, RuntimeError) as error:      # RuntimeError: a torch tensor
            raise TinyldmError(f"{name} must be an array of numbers, not a "
                               f"{type(values).__name__} ({error})") from None


def read_tokenizers(parts):
    """PipelineParts -> {part: Tokenizer}."""
    from ..text.tokenizer import Tokenizer  # here: `import tinyldm` need not wait for its library

    return {part: Tokenizer.from_folder(folder, parts.paddings.get(part))
            for part, folder in parts.folders.items() if "tokenizer" in part}
