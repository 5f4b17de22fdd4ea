"""Begin from a picture: image to image, and inpainting with a mask.

stable_diffusion.py -> Edit -> Origin, for the sampler, and the extra channels of an inpainting
UNet, for the Predictor.
"""
import math

from ..backend import get_xp
from ..diffusion.samplers.shared import NO_PICTURE, Origin
from ..errors import TinyldmError
from ..images import check_mask_size, from_pil, mask_from_pil
from .interpolation import ends, lerp, mixed
from .request import check_edit


class Edit:
    """What the options image, strength and mask of a Request ask for.

    strength: from 0 to 1; None only without an image. inpaints: whether the model is made for
    inpainting; its UNet also reads the mask and the latents of the masked picture. spread: make all
    steps, over the strength's share of the timesteps, and leave none out; few-step models change
    pictures so, if there is no mask.
    Raises TinyldmError for arguments that are wrong or do not go together.
    """

    def __init__(self, image, strength, mask, inpaints, spread=False):
        self.image, self.mask, self.inpaints = image, mask, inpaints
        check_edit(image, strength, mask)
        if inpaints and mask is None:
            raise TinyldmError("this model is made for inpainting: give an image and a mask, white "
                               "where to paint")
        self.strength = strength
        self.spread = bool(spread) and image is not None and mask is None
        self.reach = strength if self.spread else 1.0

    def steps_left_out(self, steps):
        """How many of the first steps are not made. Raises TinyldmError if none would be made."""
        if self.image is None or self.spread:
            return 0
        made = int(steps * self.strength)
        if made == 0:
            raise TinyldmError(f"strength {self.strength:g} leaves none of {steps} steps: take at "
                               f"least {math.ceil(1000 / steps) / 1000:g}, or more steps")
        return steps - made

    def prepare(self, encode, first, size, latents, draw_noise):
        """-> the noise to start from (B,h,w,C), an Origin, the UNet's extra channels or None.

        encode: images (1,H,W,3), noise (B,h,w,C) -> latents (B,h,w,C). first: steps_left_out.
        size: (W, H) in pixels. latents: given noise (B,h,w,C), or None. draw_noise() -> (B,h,w,C);
        the order of the draws is that of diffusers, so that a seed gives the same picture.
        Raises TinyldmError for a mask with nothing to paint.
        """
        if self.image is None:
            return draw_noise() if latents is None else latents, NO_PICTURE, None
        holes, picture = 0, None
        if self.mask is not None:
            check_mask_size(self.mask, ends(self.image)[0])
            holes = mask_from_pil(self.mask, size)                      # (1,H,W,1)

        def encoded(noise, shown=1):
            return mixed(self.image, lambda image: encode(from_pil(image, size) * shown, noise),
                         lerp)

        noise_only = self.mask is not None and self.strength == 1
        if not (self.inpaints and noise_only):
            picture = encoded(draw_noise())
        latents = draw_noise() if latents is None else latents
        if self.mask is None:
            return latents, Origin(picture, first, reach=self.reach), None
        noise = draw_noise()                            # diffusers draws it even if unused
        factor = size[0] // latents.shape[2]
        xp = get_xp(latents)
        mask = xp.asarray(holes[:, ::factor, ::factor], latents.dtype)      # (1,h,w,1)
        if not mask.any():
            raise TinyldmError("the mask leaves nothing to paint: make it white where the picture "
                               f"is to change, in spots of at least {factor}x{factor} pixels")
        if not self.inpaints:
            return latents, Origin(picture, first, mask, noise_only), None
        extra_channels = xp.concatenate([mask.repeat(len(latents), axis=0),
                                         encoded(noise, 1 - holes)], axis=-1)
        return latents, Origin(picture, first, None, noise_only), extra_channels
