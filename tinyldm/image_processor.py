"""Pictures for CLIP: PIL images of any size -> the arrays that its vision transformer expects.

Between images.py and models/clip_vision.py: resize the short side to the transformer's size, cut
the middle out, shift and scale each channel to about mean 0 and variance 1. The sizes and numbers
are in a folder's preprocessor_config.json.

The result equals transformers' PIL processor (CLIPImageProcessorPil) to the bit: Pillow resizes
bytes, and rounds. transformers 5 resizes with torchvision by default, which rounds differently.
Source: openai/CLIP, clip/clip.py, _transform.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .configs import Config, show, within
from .errors import TinyldmError, note, shorten
from .files import as_path, read_json, write_json
from .images import LARGEST, to_rgb

FILE = "preprocessor_config.json"
WHOLE = "processor_config.json"                         # holds the same under "image_processor"
# Of openai/clip-vit-*: the mean and the standard deviation of its training pictures.
MEAN = 0.48145466, 0.4578275, 0.40821073
STD = 0.26862954, 0.26130258, 0.27577711
KINDS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil",
         "CLIPFeatureExtractor", None)


@dataclass(frozen=True, kw_only=True)
class ImageProcessorConfig(Config):
    """The public preprocessor_config.json. Defaults are those of transformers: CLIP's."""

    CHANGES = {"image_processor_type": KINDS, "feature_extractor_type": KINDS,
               "do_pad": (False, None), "pad_size": (None,), "use_square_size": (False, None)}
    UNUSED = frozenset({
        "do_convert_rgb",                               # always: the networks have three channels
        "default_to_square",                            # False for CLIP, whatever the file says
        "processor_class", "return_tensors", "data_format", "input_data_format", "device",
        "disable_grouping"})                            # of transformers' own arrays and classes

    do_resize: bool = True
    size: int | dict = within(1, 8192, 224)             # of the short side, or height and width
    resample: int = within(0, 5, 3)                     # Pillow's number of a filter: 3 is bicubic
    do_center_crop: bool = True
    crop_size: int | dict = within(1, 8192, 224)
    do_rescale: bool = True
    rescale_factor: float = within(0, 1e4, 1 / 255)
    do_normalize: bool = True
    image_mean: float | list[float] = within(-1e4, 1e4, MEAN, lengths=(3,))
    image_std: float | list[float] = within(0, 1e4, STD, lengths=(3,))

    def __post_init__(self):
        _check_size("size", self.size, ({"shortest_edge"}, {"height", "width"}))
        _check_size("crop_size", self.crop_size, ({"height", "width"},))


def _check_size(name, size, allowed):
    if isinstance(size, dict) and not (set(size) in allowed and all(
            type(n) is int and 1 <= n <= 8192 for n in size.values())):
        words = " or ".join(" and ".join(sorted(keys)) for keys in allowed)
        raise TinyldmError(f"{name} must be a whole number, or an object of {words} from 1 to "
                           f"8192, not {show(size)}")


class ImageProcessor:
    """config: the dict of the public preprocessor_config.json; {} is CLIP's at 224 pixels.

    Called with a list of PIL images of any mode and size -> (B,H,W,3) float32. Raises TinyldmError
    for a config that is not supported, for anything but PIL images, and for a picture so narrow
    that resizing its short side would make it too large.
    """

    def __init__(self, config=None):
        self.config = {} if config is None else config
        self.settings = ImageProcessorConfig.read(self.config)

    @classmethod
    def from_folder(cls, folder):
        """Read preprocessor_config.json, or what processor_config.json holds of it.

        Raises TinyldmError if there is neither, and as the class does; notes keys that are unknown.
        """
        folder = as_path("the folder of an image processor", folder)
        path = folder / FILE
        if path.is_file() or not (folder / WHOLE).is_file():
            config = read_json(path)
        else:
            path = folder / WHOLE
            config = read_json(path).get("image_processor")
            if not isinstance(config, dict):
                raise TinyldmError(f"{path} must have an object image_processor, but does not: get "
                                   f"{FILE} of the same model")
        try:
            processor = cls(config)
        except TinyldmError as error:
            raise TinyldmError(f"{path} does not describe an image processor that is supported "
                               f"({error})") from None
        if unknown := ImageProcessorConfig.unknown(config):
            note(f"{path} has keys that are unknown here and play no part ({shorten(unknown)})")
        return processor

    def save(self, folder):
        """Write preprocessor_config.json, which transformers reads."""
        identity = {"image_processor_type": "CLIPImageProcessor"}
        write_json(Path(folder) / FILE, self.config | identity)

    def __call__(self, images):
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        if not images:
            raise TinyldmError("expected one picture at least, got none: give a PIL image or more")
        arrays = [self._one(image) for image in images]
        if len({array.shape for array in arrays}) != 1:
            sizes = sorted({f"{array.shape[1]}x{array.shape[0]}" for array in arrays})
            raise TinyldmError("pictures must have one size after preprocessing, not "
                               f"{shorten(sizes)}: give pictures of one size, or a processor with "
                               "do_center_crop")
        return np.stack(arrays)

    def _one(self, image):                              # -> (H,W,3) float32
        s, image = self.settings, to_rgb("image", image)
        if s.do_resize:
            image = image.resize(self._resized(*image.size), s.resample)
        x = np.asarray(image)
        if s.do_center_crop:
            x = _centre(x, *_height_and_width(s.crop_size))
        if s.do_rescale:
            x = x * s.rescale_factor                    # float64, then rounded once
        x = x.astype(np.float32)
        if s.do_normalize:
            x = (x - np.float32(s.image_mean)) / np.float32(s.image_std)
        return x

    def _resized(self, width, height):
        """The (width, height) to resize a picture to."""
        size = self.settings.size
        if isinstance(size, dict) and "height" in size:
            return size["width"], size["height"]
        short = size["shortest_edge"] if isinstance(size, dict) else size
        long = int(short * max(width, height) / min(width, height))
        if short * long > LARGEST:
            raise TinyldmError(f"a picture of {width}x{height} pixels is too narrow: with {short} "
                               f"pixels on its short side it would have {long} on the other: cut "
                               "a piece out of it")
        return (short, long) if width <= height else (long, short)


def _height_and_width(size):
    return (size["height"], size["width"]) if isinstance(size, dict) else (size, size)


def _centre(x, H, W):
    """The H x W pixels in the middle of x (h,w,3); if x is smaller, with black around it."""
    missing = [max(0, wanted - n) for wanted, n in zip((H, W), x.shape)]
    if any(missing):                                    # an odd number: the larger half is before
        x = np.pad(x, [*((n - n // 2, n // 2) for n in missing), (0, 0)])
    top, left = (x.shape[0] - H) // 2, (x.shape[1] - W) // 2
    return x[top:top + H, left:left + W]
