"""Pictures in and out: files <-> PIL images <-> the VAE's arrays in [-1, 1].

The conversions are those of diffusers' image processor. A bad file ends in a TinyldmError.
"""
import os
import textwrap
import threading
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .errors import TinyldmError, clean, note
from .files import replacing, temporary_beside

if TYPE_CHECKING:
    from PIL import Image

# ---- reading --------------------------------------------------------------------------------

# What Pillow decodes by itself, without another program: for an EPS it would start Ghostscript.
USUAL = "PNG", "JPEG", "GIF", "BMP", "PPM"              # loading the others too takes 0.2 s
OTHERS = "WEBP", "TIFF", "AVIF", "JPEG2000", "MPO", "TGA", "QOI", "ICO", "DIB"
LARGEST = 8192 ** 2         # pixels to decode: as many as the largest picture to draw has
SILENT = threading.RLock()  # the list of warnings to ignore is one for all threads
FLAT = 16                   # levels of 255: colours that differ by less count as one
HEIC = b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"    # brands of its files
ORIENTATION = 0x0112        # EXIF's number of it
LETTER, LINE = 6, 13        # pixels of the default font: about a letter's width, a line's height
SHEET, CELL, GAP = 1024, 256, 4     # pixels, in a notebook: a row's width, a few pictures', between


class UnreadablePicture(TinyldmError):
    """A file that is no picture, or one that cannot be decoded. `reason` is part of the message."""

    reason = ""


class Stored(NamedTuple):
    """How a file stores its picture."""

    mode: str                   # Pillow's name
    frames: int                 # of an animation, otherwise 1
    turned: bool                # whether EXIF says that it must be turned or mirrored
    transparent: bool           # whether any of its pixels is


def open_image(path, mode="RGB"):
    """Read a file -> an upright PIL image of this mode ("RGB", or "L" for a mask).

    Raises TinyldmError for a file that is missing, too large, damaged or not a picture.
    """
    with _opened(path) as image:
        image = decoded(path, image)
    return (_without_alpha(image) if mode == "L" else _on_white(image)).convert(mode)


def open_described(path):
    """Read a file -> as open_image, but without its notes: the picture, "RGB", and its Stored."""
    with _opened(path) as image:
        mode = image.mode
        plain, frames, turned = _decoded(path, image)
    transparent = "A" in plain.getbands() and plain.getchannel("A").getextrema()[0] < 255
    return _on_white(plain).convert("RGB"), Stored(mode, frames, turned, transparent)


def open_unchanged(path):
    """Read a file -> an RGB PIL image as other programs that measure pictures read it: the pixels
    as they are stored, neither turned by EXIF nor with white behind transparent parts.

    Raises TinyldmError as open_image does.
    """
    with _opened(path) as image, _reading(path):
        _check_size(image)
        return image.convert("RGB")


def _check_size(image):
    if not image.width * image.height:
        raise ValueError("it has no pixels")
    if image.width * image.height > LARGEST:
        raise ValueError(f"its {image.width}x{image.height} pixels are more than "
                         f"{LARGEST:,}: make it smaller")


def decoded(name, image):
    """Decode a PIL image -> an upright one of mode "1", "L", "P", "LA", "RGB" or "RGBA".

    Of an animation it is the first frame. Only an "RGBA" or an "LA" has transparent parts.
    Raises TinyldmError, with the name, for anything that is no PIL image or cannot be decoded.
    """
    check_image(name, image)
    plain, frames, _ = _decoded(name, image)
    if frames > 1:
        note(f"{name} is an animation of {frames} frames: the first one is used")
    return plain


def _decoded(name, image):
    """-> an image as `decoded` says, the number of its frames, whether EXIF turned it."""
    from PIL import ImageOps

    with _reading(name):
        if image.format not in (None, *USUAL, *OTHERS):
            raise ValueError(f"its format {image.format} is not one of those that are safe to read")
        _check_size(image)
        frames = getattr(image, "n_frames", 1) if image.format in ("GIF", "WEBP", "PNG") else 1
        image.load()
        try:
            turned = image.getexif().get(ORIENTATION, 1) in range(2, 9)
            upright = ImageOps.exif_transpose(image)
        except Exception:                               # damaged EXIF; the pixels are good
            turned, upright = False, image.copy()
        return _plain(upright), frames, turned


@contextmanager
def _opened(path):
    """A file as a PIL image whose pixels are not read yet."""
    from PIL import Image, UnidentifiedImageError

    with _reading(path):
        Image.preinit()
        try:
            image = Image.open(path, formats=USUAL)
        except UnidentifiedImageError:
            Image.init()
            try:
                image = Image.open(path, formats=[name for name in OTHERS if name in Image.OPEN])
            except UnidentifiedImageError:
                if not _is_heic(path):                  # a telephone's; its name may end in .jpg
                    raise
                raise ValueError("it is HEIC, which is not supported: save it as JPEG") from None
    with image:
        yield image


def _is_heic(path):
    with open(path, "rb") as file:
        start = file.read(12)
    return start[4:8] == b"ftyp" and start[8:] in HEIC


@contextmanager
def _reading(name):
    """Pillow's many errors inside become TinyldmErrors, and its warnings are left out."""
    from PIL import Image, UnidentifiedImageError

    try:
        with SILENT, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (TinyldmError, MemoryError):
        raise
    except Exception as error:                          # its errors share no base
        if isinstance(error, Image.DecompressionBombError):
            error = f"it has more than {LARGEST:,} pixels: make it smaller"
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        unreadable = UnreadablePicture(f"cannot read {name} as a picture{reason}: give a PNG, a "
                                       "JPEG, a WebP or another common picture file")
        unreadable.reason = ("its content is no picture" if not reason else
                             clean(getattr(error, "strerror", None) or error))
        raise unreadable from None


def _plain(image):
    """A decoded PIL image of any mode -> one of 8 bits per channel: see `decoded`."""
    if image.mode[0] in "IF":                           # of 16 or 32 bits; convert clips at 255
        return _eight_bits(image)
    if image.mode == "La":                              # colours times alpha
        return image.convert("LA")
    if image.mode in ("RGBa", "PA") or "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode not in ("1", "L", "P", "LA", "RGB", "RGBA"):
        return image.convert("RGB")
    return image


def _eight_bits(image):
    """A grey PIL image of 16 or 32 bits -> "L". White is the least of 1, 255, 65535 that fits."""
    from PIL import Image

    values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
    brightest = values.max()
    whites = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))
    white = next((white for white in whites if brightest <= white), brightest)
    return Image.fromarray((values.clip(0, white) * 255 // white).astype(np.uint8))


def _without_alpha(mask):
    """A mask as `decoded` gives it -> the same without alpha, white where to paint.

    Strokes of one colour on a transparent layer are what to paint: paint programs and canvas
    widgets export them so. Holes in a picture, or in black, are what to paint, too. In a mask of
    white and grey its transparent parts count as black. Alpha that is the same everywhere says
    nothing, but of a layer that is wholly transparent nothing is painted.
    """
    from PIL import Image

    if "A" not in mask.getbands():
        return mask
    pixels = np.asarray(mask.convert("RGBA"))
    colours, alpha = pixels[..., :3], pixels[..., 3]
    most = alpha.max()
    if alpha.min() == most:
        return mask.convert("RGB") if most else Image.new("L", mask.size)
    solid = colours[alpha >= most / 2]                                  # (N,3)
    one_colour = np.ptp(solid, axis=0).max() <= FLAT
    if solid.max() <= FLAT or np.ptp(solid, axis=1).max() > FLAT and not one_colour:
        note("the mask is a picture, or black, with transparent parts: those are painted")
        painted = 1 - alpha / 255
    elif one_colour:
        note("the mask has one colour and transparent parts: what is not transparent is painted")
        painted = alpha / most                          # strokes may be half transparent as well
    else:
        note("the mask has several greys and transparent parts: those count as black")
        painted = np.asarray(mask.convert("RGB").convert("L")) / 255 * (alpha / 255)
    return Image.fromarray((painted * 255).round().astype(np.uint8))


def _on_white(image):
    """A picture as `decoded` gives it, with white behind transparent parts, as web pages show it.
    """
    from PIL import Image

    if "A" not in image.getbands():
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def read_parameters(path):
    """What a picture's file says about how it was drawn -> text, or None if it says nothing.

    It is the chunk "parameters" of a PNG, the EXIF user comment of a JPEG or a WebP, or the comment
    of a GIF, as tinyldm and the web interfaces write them; or InvokeAI's or ComfyUI's JSON.
    Raises TinyldmError for a file that is missing, damaged or not a picture.
    """
    with _opened(path) as image, _reading(path):
        if image.format == "PNG":
            image.load()                                # chunks may follow the pixels
        for name in ("parameters", "invokeai_metadata", "prompt", "comment"):
            text = image.info.get(name)
            if isinstance(text, bytes):
                text = text.decode("utf-8", "replace")
            if isinstance(text, str) and text.strip():
                return text
        try:
            return _user_comment(image.getexif().get_ifd(EXIF).get(USER_COMMENT))
        except Exception:                               # damaged EXIF says nothing
            return None


def size_and_mode(path):
    """A picture's (width, height) and Pillow's name of its mode. Raises as read_parameters does."""
    with _opened(path) as image:
        return image.size, image.mode


EXIF, USER_COMMENT = 0x8769, 0x9286


def _user_comment(value):
    """EXIF's user comment, whose first 8 bytes name its encoding -> text or None."""
    if isinstance(value, str):
        return value.strip() or None
    code, text = bytes(value or b"")[:8], bytes(value or b"")[8:]
    if code.startswith(b"UNICODE"):                     # UTF-16 in either order: letters have a 0
        order = "be" if text[::2].count(0) > text[1::2].count(0) else "le"
        text = text.decode(f"utf-16-{order}", "replace").lstrip("\ufeff")
    else:
        text = text.decode("utf-8", "replace")
    return text.strip("\0 ") or None


# ---- writing --------------------------------------------------------------------------------

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
        raise TinyldmError(f"{path} must end as a picture format that Pillow writes, such as .gif "
                           ".jpg .pdf .png .tif or .webp")
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", text)
    options |= {"PNG": {"pnginfo": chunks}, "JPEG": {"quality": 95}}.get(image_format, {})
    try:
        image.save(temporary, image_format, **options)
    except OSError as error:
        if error.errno:                                 # the system's own
            raise
        raise TinyldmError(f"cannot write {path} ({error}): choose another format") from None
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


def from_pil(image, size, filter="lanczos"):
    """Resize a PIL image to size = (W, H) -> (1,H,W,3) float32 in [-1, 1].

    filter: "lanczos" or "bicubic".
    """
    image = _on_white(decoded("image", image)).convert("RGB")
    return (np.asarray(_resized(image, size, filter), np.float32) / 255 * 2 - 1)[None]


def to_rgb(name, image):
    """Any PIL image -> an upright one of mode "RGB", with white behind transparent parts.

    Raises TinyldmError, with the name, as `decoded` does.
    """
    return _on_white(decoded(name, image)).convert("RGB")


def mask_from_pil(mask, size):
    """Resize a PIL image to size = (W, H) -> (1,H,W,1) float32: 1 if at least half white, else 0.
    """
    mask = _resized(_without_alpha(decoded("mask", mask)), size).convert("L")
    return (np.asarray(mask, np.float32) / 255 >= 0.5).astype(np.float32)[None, :, :, None]


def _resized(image, size, filter="lanczos"):
    from PIL import Image

    return image.resize(size, Image.Resampling[filter.upper()])


def check_mask_size(mask, image):
    """A note on a mask that is not of its image's size."""
    if mask.size != image.size:
        note(f"the mask is {mask.width}x{mask.height} pixels and the image "
             f"{image.width}x{image.height}: the mask is resized")


class Pictures(list["Image.Image"]):
    """A list of PIL images, which a notebook shows on one sheet.

    The sheet is a PNG, as PIL's own images show themselves: the sites that show notebooks leave out
    what lies within HTML.
    """

    def sheet(self):
        """All on one PIL image, in rows; small ones are a whole number of times as large."""
        side = CELL if len(self) <= SHEET // CELL else CELL // 2
        cells = [enlarged(image, side) for image in self]
        return grid(cells, min(len(cells), max(1, SHEET // cells[0].width)), GAP)

    def _repr_png_(self):
        return self.sheet()._repr_png_() if self else None


def to_pil(images: Any) -> Pictures:
    """Images (B,H,W,3) in [-1, 1] -> Pictures, a list of PIL images.

    What lies beyond -1 and 1 is clipped. Raises TinyldmError for anything else, also for NaN.
    """
    from PIL import Image

    try:
        pixels = np.asarray(images.get() if hasattr(images, "get") else images, np.float32)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise TinyldmError("images must be an array of numbers (images, height, width, 3), not a "
                           f"{type(images).__name__} ({error})") from None
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape or np.isnan(pixels).any():
        raise TinyldmError("images must be numbers from -1 to 1 of shape (images, height, width, "
                           f"3), not {'NaN in ' * bool(np.isnan(pixels).any())}{pixels.shape}")
    pixels = (pixels / 2 + 0.5).clip(0, 1) * 255
    return Pictures(Image.fromarray(image) for image in pixels.round().astype(np.uint8))


def grid(images, columns, gap):
    """PIL images, so many per row, with at least `gap` pixels between them -> one PIL image."""
    from PIL import Image

    W, H = (max(sides) for sides in zip(*(image.size for image in images)))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (W + gap) - gap, rows * (H + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (W + gap), i // columns * (H + gap)))
    return sheet


def enlarged(image, side):
    """A small PIL image, a whole number of times as large: about `side`, its longer side."""
    times = max(1, round(side / max(image.size)))
    return image.resize((times * image.width, times * image.height), 0)         # the nearest pixel


def labelled(image, text, side, lines=3):
    """A PIL image in a white square, shrunk to `side` where it is larger, with lines of text below.
    """
    from PIL import Image, ImageDraw, ImageFont

    cell = Image.new("RGB", (side, side + lines * LINE), "white")
    shown = image.copy()
    shown.thumbnail((side, side))
    cell.paste(shown, ((side - shown.width) // 2, (side - shown.height) // 2))
    wrapped = textwrap.wrap(clean(text), side // LETTER, max_lines=lines, placeholder=" ...")
    text = "\n".join(wrapped)
    font = ImageFont.load_default()
    if not hasattr(font, "path"):                       # Pillow's own, which has Latin letters only
        text = text.encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(cell).text((0, side), text, "black", font, spacing=0)
    return cell
