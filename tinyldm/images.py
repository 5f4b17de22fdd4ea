"""Pictures in and out: files <-> PIL images <-> the VAE's arrays in [-1, 1].

The conversions are those of diffusers' image processor. A bad file ends in a TinyldmError.
"""
import os

import numpy as np

from .backend import to_host
from .errors import TinyldmError, note
from .files import replacing, temporary_beside

# ---- files ----------------------------------------------------------------------------------

def open_image(path, mode="RGB"):
    """Read a file -> an upright PIL image of this mode ("RGB", or "L" for a mask).

    Raises TinyldmError for a file that is missing or not a picture.
    """
    from PIL import Image, ImageOps  # takes long to import

    try:
        with Image.open(path) as image:
            return _converted(ImageOps.exif_transpose(image), mode)
    except Exception as error:          # Pillow raises many types for damaged files
        reason = "" if isinstance(error, Image.UnidentifiedImageError) else f" ({error})"
        raise TinyldmError(f"cannot read {path} as a picture{reason}: give a PNG, a JPEG or "
                           "another file that Pillow reads") from None


def check_output(path):
    """Before a long drawing, write a small picture. Raises TinyldmError if that fails."""
    from PIL import Image

    if not os.path.isdir(path.parent):
        raise TinyldmError(f"cannot write {path}: there is no folder {path.parent}")
    with temporary_beside(path) as temporary:
        write(Image.new("RGB", (16, 16)), path, temporary, "")


def save(image, path, text, **options):
    """Save a picture under a temporary name, then move it: the file is whole or not there."""
    with replacing(path) as temporary:
        write(image, path, temporary, text, **options)


def write(image, path, temporary, text, **options):
    """Save as `temporary` in the format of path's suffix; PNG carries the text as `parameters`."""
    from PIL import Image, PngImagePlugin

    suffix = path.suffix.lower()
    Image.preinit()                                     # the usual formats; loading all takes 0.2 s
    image_format = Image.EXTENSION.get(suffix) or Image.registered_extensions().get(suffix)
    if image_format not in Image.SAVE:
        known = sorted(end for end, name in Image.EXTENSION.items() if name in Image.SAVE)
        raise TinyldmError(f"{path} must end as a picture format that Pillow writes: "
                           f"{' '.join(known)}")
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", text)
    options |= {"PNG": {"pnginfo": chunks}, "JPEG": {"quality": 95}}.get(image_format, {})
    try:
        image.save(temporary, image_format, **options)
    except (KeyError, ValueError) as error:             # from plugins, for a mode or a size
        raise TinyldmError(f"cannot write {path}: {image_format} does not take this picture "
                           f"({error}): choose another format") from None


# ---- arrays ---------------------------------------------------------------------------------

def check_image(name, image):
    """Raise TinyldmError for anything but a PIL image."""
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise TinyldmError(f"{name} must be a PIL image, not a {type(image).__name__}: "
                           "PIL.Image.open reads a file")


def from_pil(image, size):
    """Resize a PIL image to size = (W, H) -> (1,H,W,3) float32 in [-1, 1]."""
    pixels = np.asarray(_resized(_converted(image, "RGB"), size), np.float32)
    return (pixels / 255 * 2 - 1)[None]


def mask_from_pil(mask, size):
    """Resize a PIL image to size = (W, H) -> (1,H,W,1) float32: 1 if at least half white, else 0.
    """
    pixels = np.asarray(_converted(_resized(mask, size), "L"), np.float32)
    return (pixels / 255 >= 0.5).astype(np.float32)[None, :, :, None]


def _converted(image, mode):
    """Convert a PIL image to a mode, with white behind transparent parts, as web pages show it."""
    if image.mode.startswith("I;16"):                   # Pillow's convert would clip at 255
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
    """A note on a mask that is not of its image's size."""
    if mask.size != image.size:
        note(f"the mask is {mask.width}x{mask.height} pixels and the image "
             f"{image.width}x{image.height}: the mask is resized")


def to_pil(images):
    """Images (B,H,W,3) in [-1, 1] -> list of PIL images."""
    from PIL import Image

    pixels = (to_host(images).astype(np.float32) / 2 + 0.5).clip(0, 1)
    return [Image.fromarray(image) for image in (pixels * 255).round().astype(np.uint8)]


def grid(images, columns, gap):
    """PIL images of one size, so many per row, with `gap` pixels between them -> one PIL image."""
    from PIL import Image

    W, H = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (W + gap) - gap, rows * (H + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (W + gap), i // columns * (H + gap)))
    return sheet
