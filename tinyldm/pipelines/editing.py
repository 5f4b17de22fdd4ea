"""From a picture, and a mask, to where a walk begins that changes it: image to image, inpainting.

Where it stands: pipeline.py -> Edit -> walk.Origin, for the sampler, and hints, for the Predictor.
"""
import math

from ..backend import get_xp
from ..diffusion.samplers.shared import NO_PICTURE, Origin
from ..errors import TinyldmError
from ..images import check_image, check_mask_size, from_pil, mask_from_pil
from .interpolation import ends, lerp, mixed

STRENGTH = 0.8              # how much is drawn anew where neither a number nor a mask says it


class Edit:
    """What the arguments image, strength and mask of StableDiffusion.stream ask for.

    strength: from 0 to 1, or None. inpaints: whether the model is made for inpainting, whose UNet
    reads the mask and the latents of what is left of the picture beside those it cleans. spread:
    make all steps, within the strength's share of the timesteps, in place of leaving some out; so
    few-step models change pictures, where there is no mask.
    Raises TinyldmError for arguments that are wrong or do not go together.
    """

    def __init__(self, image, strength, mask, inpaints, spread=False):
        self.image, self.mask, self.inpaints = image, mask, inpaints
        self.spread = spread and mask is None
        for end in [] if image is None else ends(image):
            check_image("image", end)
        if image is None and (mask is not None or strength is not None):
            raise TinyldmError("a mask and a strength go with an image: give one")
        if inpaints and mask is None:
            raise TinyldmError("this model paints into a picture: give an image and a mask, white "
                               "where to paint")
        if mask is not None:
            check_image("mask", mask)
            check_mask_size(mask, ends(image)[0])
        if strength is None:
            strength = STRENGTH if mask is None else 1.0
        self.strength = strength

    def steps_left_out(self, steps):
        """How many of a walk's first steps are not made. Raises TinyldmError if none remains."""
        if self.image is None or self.spread:
            return 0
        made = int(steps * self.strength)
        if made == 0:
            raise TinyldmError(f"strength {self.strength:g} leaves none of {steps} steps: take at "
                               f"least {math.ceil(1000 / steps) / 1000:g}, or more steps")
        return steps - made

    def prepare(self, encode, steps, size, latents, draw_noise):
        """-> the noise of the walk (B,h,w,C), its walk.Origin, hints for the UNet or None.

        encode: images (1,H,W,3), noise (B,h,w,C) -> latents (B,h,w,C). size: (W, H) in pixels.
        latents: given noise (B,h,w,C), or None. draw_noise() -> (B,h,w,C). The order of the draws
        is that of diffusers, on which depends what picture a seed gives.
        Raises TinyldmError for a mask with nothing to paint.
        """
        if self.image is None:
            return draw_noise() if latents is None else latents, NO_PICTURE, None
        first, holes, picture = self.steps_left_out(steps), 0, None
        if self.mask is not None:
            holes = mask_from_pil(self.mask, size)                      # (1,H,W,1)

        def encoded(noise, shown=1):
            return mixed(self.image, lambda image: encode(from_pil(image, size) * shown, noise),
                         lerp)

        noise_only = self.mask is not None and self.strength == 1
        if not (self.inpaints and noise_only):
            picture = encoded(draw_noise())
        latents = draw_noise() if latents is None else latents
        if self.mask is None:
            return latents, Origin(picture, first, reach=self.strength if self.spread else 1), None
        noise = draw_noise()                            # drawn by diffusers even if it is not used
        factor = size[0] // latents.shape[2]
        xp = get_xp(latents)
        cells = xp.asarray(holes[:, ::factor, ::factor], latents.dtype)     # (1,h,w,1)
        if not cells.any():
            raise TinyldmError("the mask leaves nothing to paint: make it white where the picture "
                               f"is to change, in spots of at least {factor}x{factor} pixels")
        if not self.inpaints:
            return latents, Origin(picture, first, cells, noise_only), None
        hints = [cells.repeat(len(latents), axis=0), encoded(noise, 1 - holes)]
        return latents, Origin(picture, first, None, noise_only), xp.concatenate(hints, axis=-1)
