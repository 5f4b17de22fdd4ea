"""Pictures and masks to start from."""
import numpy as np
from PIL import Image, ImageDraw

SIZE = 70, 59                       # of the picture; no multiple of a VAE's downsampling factor


def picture(seed=0, size=SIZE, mode="RGB"):
    """Large soft patches of colour."""
    patches = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(patches).resize(size).convert(mode)


def hole(size=SIZE):
    """A mask: a white disc with a grey rim on black."""
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    width, height = size
    draw.ellipse((0.1 * width, 0.1 * height, 0.8 * width, 0.8 * height), fill=100)
    draw.ellipse((0.2 * width, 0.2 * height, 0.7 * width, 0.7 * height), fill=255)
    return mask


def thin(side):
    """A mask with white lines between the pixels at which it is sampled for the latents."""
    mask = Image.new("L", (side, side))
    mask.paste(255, (5, 0, 8, side))
    return mask
