"""Config files: every key of every file with every kind of bad value; and every public key known.

A wrong config is refused in one line when it is read. What is not refused draws finite numbers.
"""
import json
import math
import resource
import time

import numpy as np
import pytest

from tests.support.small_pipelines import sdxl, smallest
from tinyldm.checkpoints.folders import IndexConfig
from tinyldm.diffusion.schedule import SchedulerConfig
from tinyldm.errors import TinyldmError
from tinyldm.files import read_json
from tinyldm.models.clip import CLIPTextConfig, CLIPTextProjectionConfig
from tinyldm.models.unet import UNetConfig
from tinyldm.models.vae import VAEConfig
from tinyldm.pipelines.stable_diffusion import load

BAD = [None, "", "x", "1" * 5000, "\x1b[31m\n", True, -1, 0, 1, 0.5, 1e-300, 1e308, math.nan,
       math.inf, 10**9, 10**400, [], [1], [None], [[1]], [1] * 100, {}, {"a": {"b": [1]}}]
SECONDS, MEGABYTES = 1.0, 200       # of processor time for one case; of growth for all

KINDS = {"unet/config.json": UNetConfig, "vae/config.json": VAEConfig,
         "text_encoder/config.json": CLIPTextConfig,
         "scheduler/scheduler_config.json": SchedulerConfig,
         "model_index.json": IndexConfig}
XL_KINDS = {"text_encoder_2/config.json": CLIPTextProjectionConfig, "unet/config.json": UNetConfig}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {make: make(tmp_path_factory.mktemp(make.__name__)) for make in (smallest, sdxl)}


def keys_of(kind, file):
    """What the class knows, what the file has, and what decides on the class."""
    known = set(kind.__dataclass_fields__) | kind.CHANGES.keys()
    return sorted(known | read_json(file).keys() | {"_class_name", "architectures", "model_type"})


def outcome(folder):
    """"drawn" or the message. Whatever else happens fails the test."""
    try:
        pipe = load(folder)
        *_, state = pipe.stream("red cat", num_inference_steps=1)
        return "drawn" if np.isfinite(pipe.decode(state.latents)).all() else "not finite"
    except TinyldmError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make, name, kind", [
    *((smallest, *row) for row in KINDS.items()), *((sdxl, *row) for row in XL_KINDS.items())],
    ids=lambda value: getattr(value, "__name__", None))
def test_every_key_with_every_bad_value(folders, make, name, kind):
    file = folders[make] / name
    content, before = file.read_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config, failed = json.loads(content), []
    try:
        for key in keys_of(kind, file):
            for value in BAD:
                file.write_text(json.dumps({**config, key: value}))
                begin = time.process_time()
                try:
                    found = outcome(folders[make])
                except Exception as error:              # a traceback: the fault that is sought
                    found = repr(error)
                said = found.split("\n")[0]
                good = found == "drawn" or found.count("\n") == 3 * ("does not fit" in said) and (
                    "Error(" not in found and len(found) < 3000)
                if not good or time.process_time() - begin > SECONDS:
                    failed.append(f"{key} = {value!r:.40}: {found:.200}, "
                                  f"{time.process_time() - begin:.1f} s")
    finally:
        file.write_bytes(content)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert not failed, "\n".join([f"{len(failed)} cases", *failed[:40]])
    assert grown < MEGABYTES
