"""The names and shapes of published weight files."""
import json
from pathlib import Path

import pytest

from tinyldm.models import (
    AutoencoderKL,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    UNet2DConditionModel,
)

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
MODELS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel,
          "text_encoder_2": CLIPTextModelWithProjection}
SD15, SD21 = "stable-diffusion-v1-5", "stable-diffusion-2-1 (768, v-prediction)"
SDXL = "stable-diffusion-xl-base-1.0"
KEYS = {SD15: "keys_diffusers_sd15.txt", SD21: "keys_diffusers_sd21.txt",
        SDXL: "keys_diffusers_sdxl.txt"}
with_lists = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"no key lists at {REFERENCE}")


def published_shapes(path, component):
    """The rows `component <tab> key <tab> shape` of a key list."""
    rows = (line.split("\t") for line in path.read_text().splitlines() if not line.startswith("#"))
    return {key: tuple(json.loads(shape)) for part, key, shape in rows if part == component}


def config_of(model, component):
    return json.loads((REFERENCE / "configs.json").read_text())[model][component]["config"]
