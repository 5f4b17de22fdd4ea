"""Preprocessing for CLIP: equal to transformers' PIL processor to the bit."""
import json

import numpy as np
import pytest
from PIL import Image

from tests.support.extra import transformers
from tinyldm.errors import TinyldmError
from tinyldm.files import write_json
from tinyldm.image_processor import ImageProcessor

SIZES = [(50, 37), (37, 50), (40, 40), (1, 1), (41, 40), (40, 41), (81, 160), (3, 200), (39, 300),
         (640, 479)]
MODES = ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "YCbCr"]
SMALL = {"size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}}
CONFIGS = [
    {}, SMALL, {"size": 40, "crop_size": 40},           # the last as older files write it
    SMALL | {"crop_size": {"height": 33, "width": 36}}, SMALL | {"crop_size": 61},
    SMALL | {"size": {"height": 50, "width": 45}}, SMALL | {"resample": 2},
    SMALL | {"do_resize": False}, SMALL | {"do_rescale": False}, SMALL | {"do_normalize": False},
    SMALL | {"image_mean": 0.5, "image_std": [0.5, 0.4, 0.3], "rescale_factor": 1 / 127.5},
    SMALL | {"do_center_crop": False, "do_resize": False},
]


def picture(size, mode="RGB", seed=0):
    """Smooth colours with noise, so that a resize overshoots and rounds."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    pixels[size[1] // 2:] = pixels[:1, :1]
    image = Image.fromarray(pixels, "RGBA")
    return image.convert("RGB").convert(mode) if mode in ("P", "1", "CMYK", "YCbCr") else (
        image.convert(mode))


def reference(config, images):
    found = transformers.CLIPImageProcessorPil(**config)(images, return_tensors="np")
    return found["pixel_values"].transpose(0, 2, 3, 1)


def same(ours, theirs):
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.int32), theirs.copy().view(np.int32))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_transformers(size, config):
    image = picture(size)
    same(ImageProcessor(config)(image), reference(config, image))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode):
    same(ImageProcessor(SMALL)(picture((50, 37), mode)), reference(SMALL, picture((50, 37), mode)))


def test_a_palette_with_a_transparent_colour():
    image = picture((50, 37), "P")
    image.info["transparency"] = 3
    same(ImageProcessor(SMALL)(image.copy()), reference(SMALL, image.copy()))


def test_equals_openai():
    """Its _transform, with Pillow and NumPy: the crop's offset is rounded down here."""
    for size in (50, 38), (38, 51), (448, 448), (225, 224), (224, 300):
        image = picture(size)
        short, long = 224, int(224 * max(size) / min(size))
        resized = image.resize((short, long) if size[0] <= size[1] else (long, short),
                               Image.Resampling.BICUBIC)
        left, top = (resized.width - 224) // 2, (resized.height - 224) // 2
        x = np.asarray(resized.crop((left, top, left + 224, top + 224)), np.float32) / 255
        mean, std = (np.float32(row) for row in (
            (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
        np.testing.assert_allclose(ImageProcessor()(image)[0], (x - mean) / std, rtol=0, atol=3e-7)


def test_several_pictures():
    images = [picture(size, mode) for size, mode in [((50, 37), "RGB"), ((60, 41), "L")]]
    ours = ImageProcessor(SMALL)(images)
    assert ours.shape == (2, 40, 40, 3)
    for one, image in zip(ours, images):
        same(one, ImageProcessor(SMALL)(image)[0])


@pytest.mark.parametrize("whole", [False, True])
def test_folders(whole, tmp_path):
    """transformers' own, ours in transformers, and that of a processor with a tokenizer."""
    config = SMALL | {"image_mean": [0.5, 0.4, 0.3]}
    theirs = transformers.CLIPImageProcessorPil(**config)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    if whole:
        write_json(tmp_path / "processor_config.json",
                   {"image_processor": json.loads(file.read_text()), "processor_class": "x"})
        file.unlink()
    processor = ImageProcessor.from_folder(tmp_path)
    expected = reference(config, picture((50, 37)))
    same(processor(picture((50, 37))), expected)
    (tmp_path / "ours").mkdir()
    processor.save(tmp_path / "ours")
    again = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path / "ours")
    same(again(picture((50, 37)), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1),
         expected)


# ---- refusals -----------------------------------------------------------------------------------

@pytest.mark.parametrize("config, message", [
    ({"size": 0}, "size must be a positive whole number up to 8192, or an object, not 0"),
    ({"size": "224"}, "size must be"), ({"size": {"shortest_edge": 224.5}}, "size must be a whole"),
    ({"size": {"longest_edge": 224}}, "size must be a whole number, or an object of shortest_edge"),
    ({"crop_size": {"height": 3}}, "crop_size must be a whole number, or an object of height and"),
    ({"crop_size": {"shortest_edge": 3}}, "crop_size must be"),
    ({"resample": 9}, "resample must be a whole number from 0 to 5"),
    ({"image_mean": [0.5]}, "image_mean must be"), ({"image_std": 0}, "image_std must be"),
    ({"image_std": [1, 1, 0]}, "image_std must be"), ({"do_resize": 1}, "do_resize must be true"),
    ({"rescale_factor": float("nan")}, "rescale_factor must be"),
    ({"do_pad": True}, "do_pad = true is not supported"),
    ({"use_square_size": True}, "use_square_size = true is not supported"),
    ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type = .* is not supported"),
])
def test_refused_configs(config, message):
    with pytest.raises(TinyldmError, match=message):
        ImageProcessor(config)


@pytest.mark.parametrize("images, message", [
    ([np.zeros((4, 4, 3))], "image must be a PIL image, not a ndarray"), ("a.png", "not a str"),
    (5, "not a int"), ([], "expected one picture at least, got none"),
    (picture((1, 400000)), "is too narrow"),
    ([picture((5, 5)), picture((5, 6))], "must have one size after preprocessing, not .*5x5, 5x6"),
])
def test_refused_pictures(images, message):
    config = {} if "narrow" in message else {"do_resize": False, "do_center_crop": False}
    with pytest.raises(TinyldmError, match=message):
        ImageProcessor(config)(images)


def test_bad_folders(tmp_path, recwarn):
    with pytest.raises(TinyldmError, match="preprocessor_config.json"):
        ImageProcessor.from_folder(tmp_path)
    write_json(tmp_path / "processor_config.json", {"image_processor": [1]})
    with pytest.raises(TinyldmError, match="must have an object image_processor"):
        ImageProcessor.from_folder(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", {"size": -1})
    with pytest.raises(TinyldmError, match="does not describe an image processor that is supp"):
        ImageProcessor.from_folder(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", {"crop_pct": 0.9})
    ImageProcessor.from_folder(tmp_path)
    assert "keys that are unknown here and play no part (1: crop_pct)" in str(recwarn.pop().message)
