"""Pictures -> features: one row of numbers per picture, which the distances compare.

Folders are read as pytorch-fid reads them: all pictures of one folder, by their names' ends, none
of its sub-folders, in the order of their names. An .npz with pictures, arr_0 (N,H,W,3) uint8, is
what ADM's code writes.
"""
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .. import ops
from ..backend import is_finite, to_host
from ..errors import TinyldmError, shorten
from ..files import as_path
from ..models.clip_model import CLIPModel
from ..models.clip_vision import CLIPVisionModelWithProjection
from .fid import read_npz
from .resize import RESIZES

ENDS = ".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"


class Extractor(NamedTuple):
    """One way to get features."""

    kind: str                   # what tells it from others: such features do not compare
    prepare: Callable           # an RGB PIL image -> float32 (H,W,3)
    compute: Callable           # (B,H,W,3) -> (B,F)
    xp: Any = np                # of the arrays that compute takes


def pictures_in(path):
    """A folder -> the paths of its pictures, sorted; an .npz with pictures -> (N,H,W,3) uint8.

    Raises TinyldmError where there are none.
    """
    path = as_path("a folder of pictures", path)
    if path.suffix == ".npz":
        pictures = read_npz(path).get("arr_0", np.empty(0))
        if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != np.uint8:
            raise TinyldmError(f"{path} holds no pictures, arr_0 (N,H,W,3) of uint8: name a folder "
                               "of pictures; statistics are enough for the FID alone")
        return pictures
    try:
        names = sorted(os.listdir(path))
    except (OSError, ValueError) as error:
        raise TinyldmError(f"cannot read the folder {path} ({getattr(error, 'strerror', error)}): "
                           "name a folder of pictures, or an .npz") from None
    found = [path / name for name in names if name.lower().endswith(ENDS)]
    if not found:
        raise TinyldmError(f"{path} holds no pictures ({' '.join(ENDS)}), but {shorten(names)}: "
                           "name the folder in which they lie; sub-folders are not searched")
    return found


def extract(pictures, extractor, batch=50, progress=lambda done: None):
    """Paths, PIL images or arrays (H,W,3) of uint8 -> features (N,F) float32.

    progress: called with the number of pictures that are done, after every batch.
    Raises TinyldmError for a picture that cannot be read.
    """
    found = []
    for start in range(0, len(pictures), batch):
        arrays = [extractor.prepare(as_image(picture)) for picture in pictures[start:start + batch]]
        features = to_host(extractor.compute(extractor.xp.asarray(np.stack(arrays))))
        if not is_finite(features):
            raise TinyldmError("the features hold NaN or infinity: the network's weights are not "
                               "those of a trained one, or the wrong file")
        found.append(features.astype(np.float32, copy=False))
        progress(len(arrays))
    return np.concatenate(found)


def as_image(picture):
    from PIL import Image

    from ..images import open_unchanged

    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    return picture.convert("RGB") if isinstance(picture, Image.Image) else open_unchanged(picture)


# ---- networks ---------------------------------------------------------------------------------

def inception(module, dims=2048, resize="pytorch"):
    """The Inception network's features. dims: 64, 192, 768, 2048, or 1008: logits without bias, as
    the inception score takes them."""
    if dims == 1008 and module.fc is None:
        raise TinyldmError("the file of the Inception network lacks its last layer, fc, which the "
                           "inception score needs: use the whole file")

    def compute(images):
        features = module(images, features=dims)
        return features - module.fc.bias.data if dims == 1008 else features
    return Extractor(f"inception {dims}, resize {resize}",
                     lambda image: RESIZES[resize](np.asarray(image)), compute, module.xp)


def clip(module, processor):
    """The image embeddings of a CLIPModel or a CLIPVisionModelWithProjection, not normalised."""
    if isinstance(module, CLIPModel):
        compute = module.encode_image
    elif isinstance(module, CLIPVisionModelWithProjection):
        def compute(images):
            return module(images)[1]
    else:
        raise TinyldmError(f"CLIP's features are image embeddings, but a {type(module).__name__} "
                           "has none: use a whole CLIP, or a vision model with projection")
    width, _ = module.visual_projection.weight.shape
    return Extractor(f"clip of {width} numbers", lambda image: processor([image])[0], compute,
                     module.xp)


def bundled_vae(module):
    """The mean latents of the bundled model's VAE, averaged over squares of 4x4.

    No one else has such features, so they compare only among themselves. But nothing else is
    needed, and they tell the bundled model's pictures apart.
    """
    from PIL import Image

    side = module.settings.sample_size

    def prepare(image):
        image = image.resize((side, side), Image.Resampling.LANCZOS)
        return np.asarray(image, np.float32) / 127.5 - 1
    return Extractor("the bundled VAE", prepare,
                     lambda images: ops.average_pool(module.encode(images)[0], 4, 4)[0].reshape(
                         len(images), -1), module.xp)
