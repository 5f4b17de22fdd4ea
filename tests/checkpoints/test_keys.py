"""Our models have exactly the parameters of the published weight files, by name and shape.

A parameter is only a shape until it is loaded, so building the real models costs nothing.
"""
import math

import pytest

from tests.support import sd15
from tests.support.keys import CONFIGS, DIGESTS, MODELS, digest, original_rows, published_shapes
from tinyldm.layers import file_shape

TOTALS = {
    "SD 1.5": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "SD 1.5 inpainting": {"unet": 859_535_364}, "LCM Dreamshaper 7": {"unet": 859_602_884},
    "SD 2.1": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "SD-Turbo": {"unet": 865_910_724}, "SDXL-Turbo": {"unet": 2_567_463_684},
    "SDXL": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480,
             "text_encoder_2": 694_659_840},
    "SD x4 upscaler": {"unet": 473_398_020, "vae": 55_325_927, "text_encoder": 340_387_840},
}
PARTS = [(model, part) for model in CONFIGS for part in MODELS if part in CONFIGS[model]]


def shapes(module):
    return {name: file_shape(parameter) for name, parameter in module.named_parameters()}


def total(all_shapes):
    return sum(map(math.prod, all_shapes.values()))


@pytest.mark.parametrize("model, part", PARTS)
def test_names_and_shapes_are_the_published_ones(model, part):
    ours, published = shapes(MODELS[part](CONFIGS[model][part])), published_shapes(model, part)
    assert ours.keys() == published.keys()
    for name, shape in published.items():
        assert ours[name] == shape, f"{name}: {ours[name]} here, {shape} published"
    assert total(ours) == TOTALS.get(model, {}).get(part, total(published))


@pytest.mark.parametrize("name", DIGESTS)
def test_the_published_names_are_those_of_real_files(name):
    if name in CONFIGS:
        rows = [(part, *item) for model, part in PARTS if model == name
                for item in published_shapes(model, part).items()]
    else:
        rows = [row if row[-1] != "drop" else row[1:2] for row in original_rows(name)]
    assert digest(rows) == DIGESTS[name]


@pytest.mark.parametrize("part, config", [("unet", sd15.UNET), ("vae", sd15.VAE),
                                          ("text_encoder", sd15.TEXT_ENCODER)])
def test_sd15_has_the_published_number_of_parameters(part, config):
    assert total(shapes(MODELS[part](config))) == TOTALS["SD 1.5"][part]
