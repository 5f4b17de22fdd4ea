"""Our models have exactly the parameters of the published weight files, by name and shape.

The lists are from the files of Stable Diffusion 1.5, 2.1 and XL. The models that were made from
these have the same weights, or differ in one. A parameter is only a shape until it is loaded, so
building the real models costs nothing.
"""
import math

import pytest

from tests.support import sd15
from tests.support.keys import (
    KEYS,
    MODELS,
    REFERENCE,
    SD15,
    SD21,
    SDXL,
    config_of,
    published_shapes,
    with_lists,
)
from tinyldm.checkpoints.layout import file_shape
from tinyldm.models import UNet2DConditionModel

TOTALS = {
    SD15: {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    SD21: {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    SDXL: {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480,
           "text_encoder_2": 694_659_840},
}
# UNets made from one of those: which one, the weights that differ, the number of parameters.
MADE_OF = {
    "stable-diffusion-inpainting (v1-5)": (SD15, {"conv_in.weight": (320, 9, 3, 3)}, 859_535_364),
    "LCM_Dreamshaper_v7": (SD15, {"time_embedding.cond_proj.weight": (320, 256)}, 859_602_884),
    "stable-diffusion-2-inpainting": (SD21, {"conv_in.weight": (320, 9, 3, 3)}, None),
    "sd-turbo": (SD21, {}, 865_910_724),
    "stable-diffusion-xl-1.0-inpainting-0.1": (SDXL, {"conv_in.weight": (320, 9, 3, 3)}, None),
    "sdxl-turbo": (SDXL, {}, 2_567_463_684),
}


def shapes(module):
    return {name: file_shape(parameter) for name, parameter in module.named_parameters()}


def total(all_shapes):
    return sum(map(math.prod, all_shapes.values()))


def assert_same_shapes(ours, published):
    assert ours.keys() == published.keys()
    for name, shape in published.items():
        assert ours[name] == shape, f"{name}: {ours[name]} here, {shape} published"


@with_lists
@pytest.mark.parametrize("model, component",
                         [(model, component) for model in KEYS for component in TOTALS[model]])
def test_names_and_shapes_are_the_published_ones(model, component):
    ours = shapes(MODELS[component](config_of(model, component)))
    published = published_shapes(REFERENCE / KEYS[model], component)
    assert_same_shapes(ours, published)
    assert total(ours) == total(published) == TOTALS[model][component]


@with_lists
@pytest.mark.parametrize("model", MADE_OF)
def test_unets_made_of_others(model):
    origin, besides, count = MADE_OF[model]
    ours = shapes(UNet2DConditionModel(config_of(model, "unet")))
    assert_same_shapes(ours, published_shapes(REFERENCE / KEYS[origin], "unet") | besides)
    assert count in (None, total(ours))


@pytest.mark.parametrize("component, config", [("unet", sd15.UNET), ("vae", sd15.VAE),
                                               ("text_encoder", sd15.TEXT_ENCODER)])
def test_sd15_has_the_published_number_of_parameters(component, config):
    assert total(shapes(MODELS[component](config))) == TOTALS[SD15][component]
