"""Pictures in and out: files <-> PIL images <-> the arrays in [-1, 1] of the VAE.

Beside pipeline.py and __main__.py, which call it at both ends; the conversions are those of
diffusers' image processor. What a person's file may have wrong ends here in a TinyldmError.
"""
import os

import numpy as np

from .backend import to_host
from .errors import TinyldmError, note
from .files import replacing, temporary_beside

# ---- files ----------------------------------------------------------------------------------

def open_image(path, mode="RGB"):
    """The picture in a file, upright, as a PIL image of a mode ("RGB", or "L" for a mask).

    Raises TinyldmError for a file that is not there or not a picture.
    """
    from PIL import Image, ImageOps  # takes long to import

    try:
        with Image.open(path) as image:
            return _converted(ImageOps.exif_transpose(image), mode)
    except Exception as error:          # Pillow's plugins raise all kinds for a damaged file
        reason = "" if isinstance(error, Image.UnidentifiedImageError) else f" ({error})"
        raise TinyldmError(f"cannot read {path} as a picture{reason}: give a PNG, a JPEG or "
                           "another file that Pillow reads") from None


def check_output(path):
    """Find out before the long drawing whether a picture can be saved there: write a small one.

    Raises TinyldmError.
    """
    from PIL import Image

    if not os.path.isdir(path.parent):
        raise TinyldmError(f"cannot write {path}: there is no folder {path.parent}")
    with temporary_beside(path) as temporary:
        write(Image.new("RGB", (16, 16)), path, temporary, "")


def save(image, path, text, **options):
    """Write under a temporary name, then move into place: the file is whole or not there."""
    with replacing(path) as temporary:
        write(image, path, temporary, text, **options)


def write(image, path, temporary, text, **options):
    """Save as `temporary` in the format of path's suffix; PNG carries the text as `parameters`."""
    from PIL import Image, PngImagePlugin

    suffix = path.suffix.lower()
    Image.preinit()                                     # the usual formats; all take 0.2 s more
    image_format = Image.EXTENSION.get(suffix) or Image.registered_extensions().get(suffix)
    if image_format not in Image.SAVE:
        known = sorted(end for end, name in Image.EXTENSION.items() if name in Image.SAVE)
        raise TinyldmError(f"{path} must end as a picture format does that Pillow writes: "
                           f"{' '.join(known)}")
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", text)
    options |= {"PNG": {"pnginfo": chunks}, "JPEG": {"quality": 95}}.get(image_format, {})
    try:
        image.save(temporary, image_format, **options)
    except (KeyError, ValueError) as error:             # what plugins say of a mode or a size
        raise TinyldmError(f"cannot write {path}: {image_format} does not take this picture "
                           f"({error}): choose another format") from None


# ---- arrays ---------------------------------------------------------------------------------

def check_image(name, image):
    """Raise TinyldmError for what is not a PIL image."""
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise TinyldmError(f"{name} must be a PIL image, not a {type(image).__name__}: "
                           "PIL.Image.open reads a file")


def from_pil(image, size):
    """A PIL image -> (1,H,W,3) float32 in [-1, 1], resized to size = (W, H)."""
    pixels = np.asarray(_resized(_converted(image, "RGB"), size), np.float32)
    return (pixels / 255 * 2 - 1)[None]


def mask_from_pil(mask, size):
    """A PIL image -> (1,H,W,1) float32, resized: 1 where it is at least half white, else 0."""
    pixels = np.asarray(_converted(_resized(mask, size), "L"), np.float32)
    return (pixels / 255 >= 0.5).astype(np.float32)[None, :, :, None]


def _converted(image, mode):
    """A PIL image in another mode: what is transparent lies on white, as pages show it.

    Of 16 bits Pillow's own convert leaves 255 of all above 255.
    """
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value / 257)
    if "A" in image.getbands() or "transparency" in image.info:
        from PIL import Image

        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _resized(image, size):
    from PIL import Image

    return image.resize(size, Image.Resampling.LANCZOS)


def check_mask_size(mask, image):
    """Warn of a mask that is not of its picture's size."""
    if mask.size != image.size:
        note(f"the mask is {mask.width}x{mask.height} pixels and the image "
             f"{image.width}x{image.height}: the mask is resized")


def to_pil(images):
    """Images (B,H,W,3) in [-1, 1] -> list of PIL images."""
    from PIL import Image

    pixels = (to_host(images).astype(np.float32) / 2 + 0.5).clip(0, 1)
    return [Image.fromarray(image) for image in (pixels * 255).round().astype(np.uint8)]
