"""Pictures -> the input of the Inception network: 299 x 299 numbers around -1 to 1.

The known programs differ in how they resize and scale, and so do their FIDs:

    pytorch   pytorch-fid: bilinear, pixel centres aligned, without antialiasing; x / 127.5 - 1
    clean     clean-fid: Pillow's bicubic filter with antialiasing, not rounded; (x - 128) / 128
    tf        the first FID, ADM's evaluator, torch-fidelity: TensorFlow 1's bilinear, pixel corners
              aligned; (x - 128) / 128

"Aligned" pixel corners shift the picture by half a pixel, and without antialiasing a large picture
loses most of its pixels: Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN
Evaluation", arXiv:2104.11222.
"""
import numpy as np

SIZE = 299


def pytorch(picture):
    """uint8 (H,W,3) -> float32 (299,299,3) in [-1, 1]."""
    return 2 * bilinear(picture.astype(np.float32) / 255, SIZE) - 1


def clean(picture):
    """The same, in [-1, 1)."""
    return _centred(bicubic(picture.astype(np.float32), SIZE).clip(0, 255))


def tf(picture):
    return _centred(bilinear(picture.astype(np.float32), SIZE, half_pixel=False))


RESIZES = {"pytorch": pytorch, "clean": clean, "tf": tf}


def _centred(picture):
    return (picture - 128) / 128


def bilinear(picture, size, half_pixel=True):
    """(H,W,C) -> (size,size,C), each number between the two nearest of a row and of a column.

    half_pixel: the first pixel's centre stays half a pixel from the edge, as in PyTorch.
    """
    for axis in (0, 1):
        n = picture.shape[axis]
        scale = np.float64(np.float32(n / size))        # rounded like theirs: the digits count
        at = np.arange(size) * scale if not half_pixel else (np.arange(size) + 0.5) * scale - 0.5
        at = at.astype(np.float32).clip(0)
        first = at.astype(int)
        share = (at - first.astype(np.float32)).reshape(-1, *[1] * (2 - axis))
        second = np.minimum(first + 1, n - 1)
        picture = (picture.take(first, axis) * (1 - share)
                   + picture.take(second, axis) * share)
    return picture


def bicubic(picture, size):
    """float32 (H,W,C) -> (size,size,C), by Pillow, one channel at a time."""
    from PIL import Image

    channels = [Image.fromarray(channel).resize((size, size), Image.Resampling.BICUBIC)
                for channel in np.ascontiguousarray(picture.transpose(2, 0, 1))]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)
