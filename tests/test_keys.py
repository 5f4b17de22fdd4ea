"""Our models have exactly the parameters of the published weight files, by name and shape.

The lists are of Stable Diffusion 1.5's and 2.1's files. A parameter is only a shape until it is
loaded, so building the real models costs nothing.
"""
import json
import math
from pathlib import Path

import pytest

from tinyldm.checkpoints.layout import file_shape
from tinyldm.models import AutoencoderKL, CLIPTextModel, UNet2DConditionModel

from . import sd15

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
MODELS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
SD15, SD21 = "stable-diffusion-v1-5", "stable-diffusion-2-1 (768, v-prediction)"
KEYS = {SD15: "keys_diffusers_sd15.txt", SD21: "keys_diffusers_sd21.txt"}
TOTALS = {
    SD15: {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    SD21: {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
}


def shapes(module):
    return {name: file_shape(parameter) for name, parameter in module.named_parameters()}


def published_shapes(path, component):
    """The rows `component <tab> key <tab> shape` of a key list."""
    rows = (line.split("\t") for line in path.read_text().splitlines() if not line.startswith("#"))
    return {key: tuple(json.loads(shape)) for part, key, shape in rows if part == component}


def total(all_shapes):
    return sum(map(math.prod, all_shapes.values()))


@pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"no published key lists at {REFERENCE}")
@pytest.mark.parametrize("component", MODELS)
@pytest.mark.parametrize("model", KEYS)
def test_names_and_shapes_are_the_published_ones(model, component):
    configs = json.loads((REFERENCE / "configs.json").read_text())
    ours = shapes(MODELS[component](configs[model][component]["config"]))
    published = published_shapes(REFERENCE / KEYS[model], component)
    assert ours.keys() == published.keys()
    for name, shape in published.items():
        assert ours[name] == shape, f"{name}: {ours[name]} here, {shape} published"
    assert total(ours) == total(published) == TOTALS[model][component]


@pytest.mark.parametrize("component, config", [("unet", sd15.UNET), ("vae", sd15.VAE),
                                               ("text_encoder", sd15.TEXT_ENCODER)])
def test_sd15_has_the_published_number_of_parameters(component, config):
    assert total(shapes(MODELS[component](config))) == TOTALS[SD15][component]
