"""Pictures in and out: PIL images <-> the arrays in [-1, 1] that the VAE reads and writes.

Beside pipeline.py, which calls it at both ends; the conversions are those of diffusers' image
processor. What a person's file may have wrong ends here in a TinyldmError.
"""
import warnings

import numpy as np

from .backend import to_host
from .errors import TinyldmError


def open_image(path, mode="RGB"):
    """The picture in a file, upright, as a PIL image of a mode ("RGB", or "L" for a mask).

    Raises TinyldmError for a file that is not there or not a picture.
    """
    from PIL import Image, ImageOps  # takes long to import

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert(mode)
    except Exception as error:          # Pillow's plugins raise all kinds for a damaged file
        reason = "" if isinstance(error, Image.UnidentifiedImageError) else f" ({error})"
        raise TinyldmError(f"cannot read {path} as a picture{reason}: give a PNG, a JPEG or "
                           "another file that Pillow reads") from None


def check_image(name, image):
    """Raise TinyldmError for what is not a PIL image."""
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise TinyldmError(f"{name} must be a PIL image, not a {type(image).__name__}: "
                           "PIL.Image.open reads a file")


def from_pil(image, size):
    """A PIL image -> (1,H,W,3) float32 in [-1, 1], resized to size = (W, H)."""
    pixels = np.asarray(_resized(image.convert("RGB"), size), np.float32)
    return (pixels / 255 * 2 - 1)[None]


def mask_from_pil(mask, size):
    """A PIL image -> (1,H,W,1) float32, resized: 1 where it is at least half white, else 0."""
    pixels = np.asarray(_resized(mask, size).convert("L"), np.float32)
    return (pixels / 255 >= 0.5).astype(np.float32)[None, :, :, None]


def _resized(image, size):
    from PIL import Image

    return image.resize(size, Image.Resampling.LANCZOS)


def check_mask_size(mask, image):
    """Warn of a mask that is not of its picture's size."""
    if mask.size != image.size:
        warnings.warn(f"the mask is {mask.width}x{mask.height} pixels and the image "
                      f"{image.width}x{image.height}: the mask is resized", stacklevel=4)


def to_pil(images):
    """Images (B,H,W,3) in [-1, 1] -> list of PIL images."""
    from PIL import Image

    pixels = (to_host(images).astype(np.float32) / 2 + 0.5).clip(0, 1)
    return [Image.fromarray(image) for image in (pixels * 255).round().astype(np.uint8)]
