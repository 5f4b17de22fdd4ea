"""A whole CLIP as a folder: random weights, the toy vocabulary, an image processor of 12 pixels."""
import numpy as np
from PIL import Image

from tests.support.arrays import read_only
from tests.support.models import WHOLE_CLIPS, random_weights, with_weights
from tests.support.words import END, write_settings, write_toy_vocabulary
from tinyldm.checkpoints.components import save_model
from tinyldm.image_processor import ImageProcessor
from tinyldm.models import CLIPModel

CONFIG = WHOLE_CLIPS["as L/14"]
CONFIG = CONFIG | {"text_config": CONFIG["text_config"] | {"eos_token_id": 33}}   # END's number


def write_clip(folder):
    module = CLIPModel(CONFIG)
    module = with_weights(module, random_weights(module, 0))
    module.logit_scale.data = read_only(np.float32(3.0))
    save_model(module, folder, np.float32)
    write_toy_vocabulary(folder)
    write_settings(folder, END)
    ImageProcessor({"size": {"shortest_edge": 12}, "crop_size": {"height": 12, "width": 12}}
                   ).save(folder)
    return folder


def pictures(count=3):
    rng = np.random.default_rng(5)
    return [Image.fromarray(rng.integers(0, 256, (20 + i, 17, 3), dtype=np.uint8))
            for i in range(count)]
