"""Whole drawings by diffusers in float64 and by ours, and how near they must be.

Two drawings in float32 differ by the rounding errors of both, and in the reference these depend on
the processor: torch's kernels do. So the reference computes in float64, and only ours rounds.
"""
import copy

import numpy as np

from tests.support.extra import diffusers, torch
from tests.support.reference import float32_noise, nchw, nhwc, widen_embeddings
from tests.support.tolerance import assert_close, assert_same_pixels

PROMPT = "a photo of an astronaut riding a horse on mars, red cat"
NEGATIVE = "low quality!"
STEPS = 5
# Of the reference's standard deviation, at every step. float32: a call of these small UNets is off
# by 1e-6 of its output's, guidance 7.5 multiplies that by 7.5 + 6.5, and 7 calls at most add up.
# float64: diffusers' schedulers compute their coefficients, and some the next latents, in float32.
LATENTS_TOLERANCE = {np.float32: 1e-4, np.float64: 1e-5}


class Reference:
    """diffusers' pipeline of a folder, in float64, with its outputs in our layout."""

    def __init__(self, folder):
        diffusers.utils.logging.set_verbosity_error()
        half = any((folder / "unet").glob("*fp16*"))
        self.folder = folder
        self.pipe = diffusers.DiffusionPipeline.from_pretrained(
            folder, torch_dtype=torch.float64, variant="fp16" if half else None)
        self.pipe.set_progress_bar_config(disable=True)
        widen_embeddings(self.pipe)

    def __call__(self, seeds=(0,), prompt=PROMPT, **options):
        """-> latents after every step [(B,h,w,4)], pictures (B,H,W,3) uint8."""
        states = []
        if "latents" in options:
            options["latents"] = nchw(options["latents"]).double()

        def keep(pipe, step, timestep, tensors):
            states.append(nhwc(tensors["latents"]))
            return {}

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with float32_noise():
            images = self.pipe(
                prompt, num_inference_steps=STEPS, num_images_per_prompt=len(seeds),
                generator=generators, callback_on_step_end=keep, **options).images
        return states, np.stack([np.asarray(image) for image in images])


def ours(pipe, **options):
    """The same of ours, the latents by stream and the pictures by a call; by default with guidance
    7.5, whatever the kind of model."""
    options = {"guidance_scale": 7.5} | options
    states = list(pipe.stream(PROMPT, num_inference_steps=STEPS, **options))
    assert [state.step for state in states] == list(range(len(states)))
    images = pipe(PROMPT, num_inference_steps=STEPS, **options)
    return [state.latents for state in states], np.stack([np.asarray(image) for image in images])


def assert_same_drawing(ours, theirs):
    (our_states, our_images), (their_states, their_images) = ours, theirs
    assert len(our_states) == len(their_states)
    for step, (a, b) in enumerate(zip(our_states, their_states)):
        assert b.dtype == np.float64
        assert_close(a, b, LATENTS_TOLERANCE[a.dtype.type], f"latents after step {step + 1}")
    assert_same_pictures(our_images, their_images)


def assert_same_pictures(ours, theirs):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.uint8
    inside = (theirs > 0) & (theirs < 255)
    assert theirs.std() > 20 and inside.mean() > 0.5, "the reference's picture says nothing"
    assert_same_pixels(ours, theirs, 2)


class Editing(Reference):
    """diffusers' pipeline for image to image, or with a mask for inpainting, of the same parts."""

    def __call__(self, seeds=(0,), **options):
        xl = hasattr(self.pipe, "text_encoder_2")
        task = "Inpaint" if "mask_image" in options else "Img2Img"
        editing = copy.copy(self)
        editing.pipe = getattr(diffusers, f"StableDiffusion{'XL' * xl}{task}Pipeline")(
            **self.pipe.components, **({} if xl else {"requires_safety_checker": False}))
        editing.pipe.set_progress_bar_config(disable=True)
        widen_embeddings(editing.pipe)
        return Reference.__call__(editing, seeds, guidance_scale=7.5, **options)
