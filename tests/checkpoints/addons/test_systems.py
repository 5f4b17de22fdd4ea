"""Add-ons on the systems besides Stable Diffusion: against diffusers, or one line."""
import copy

import diffusers
import numpy as np
import pytest
from diffusers.utils import is_peft_available
from PIL import Image

from tests.support import small_pipelines, small_unclip
from tests.support.addons import (
    WORD,
    assert_same_weights,
    kohya,
    make_lora,
    merge,
    vectors,
    weights,
    write,
)
from tests.support.models import random_weights
from tests.support.pictures import picture
from tinyldm.cli.draw import main
from tinyldm.errors import TinyldmError
from tinyldm.models import UNet2DModel
from tinyldm.pipelines.ddpm import DDPM
from tinyldm.pipelines.dit import DiT
from tinyldm.pipelines.loading import load

with_peft = pytest.mark.skipif(not is_peft_available(), reason="diffusers reads LoRAs with peft")
LOW = picture(size=(8, 8))
# A function that makes the folder, and options of a drawing.
SYSTEMS = {"upscaler": (small_pipelines.upscaler, {"image": LOW}),
           "unclip": (small_unclip.unclip, {"prior_num_inference_steps": 1}),
           "unclip, of a picture": (small_unclip.unclip_img2img, {"image": LOW})}


def peft(pairs):
    return {f"{part}.{'text_model.' * (part == 'text_encoder')}{name}.lora_{letter}.weight": tensor
            for (part, name), pair in pairs.items() for letter, tensor in zip("AB", pair)}


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request, tmp_path_factory):
    make, options = SYSTEMS[request.param]
    folder = make(tmp_path_factory.mktemp("system"))
    diffusers.utils.logging.set_verbosity_error()
    return folder, diffusers.DiffusionPipeline.from_pretrained(folder), options


@pytest.mark.parametrize("names", [peft, kohya])
def test_a_lora(names, system, tmp_path):
    folder, reference, options = system
    reference = copy.deepcopy(reference)
    pairs = make_lora(reference, "attn", alphas=(None,), ranks=(4,))
    assert {part for part, _ in pairs} == {"unet", "text_encoder"}
    file = write(names(pairs), tmp_path / "style.safetensors")
    pipe = load(folder)
    before = weights(pipe)
    pipe.load_lora(file, 0.8)
    merge(reference, pairs, 0.8)
    assert_same_weights(pipe, reference)
    changed = {place for place, data in weights(pipe).items() if data is not before[place]}
    assert len(changed) == len(pairs)
    pipe("cat", num_inference_steps=1, **options)


@with_peft
def test_a_lora_as_the_public_pipeline_adds_it(system, tmp_path):
    folder, reference, _ = system
    reference = copy.deepcopy(reference)
    file = write(peft(make_lora(reference, "attn", alphas=(None,), ranks=(4,))),
                 tmp_path / "style.safetensors")
    pipe = load(folder)
    pipe.load_lora(file, 0.8)
    reference.load_lora_weights(file)
    reference.fuse_lora(lora_scale=0.8)
    reference.unload_lora_weights()                     # what is fused stays
    assert_same_weights(pipe, reference)


def test_a_lora_of_a_cascade_changes_its_base(tmp_path):
    pipe = load(small_pipelines.cascade(tmp_path / "cascade"))
    base, second = pipe.unet.state_dict(), pipe.super_res.state_dict()
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    O, I = base[f"{name}.weight"].shape
    file = write({f"unet.{name}.lora_A.weight": vectors(2, I),
                  f"unet.{name}.lora_B.weight": vectors(2, O).T}, tmp_path / "a.safetensors")
    pipe.load_lora(file)
    changed = {key for key, value in pipe.unet.state_dict().items() if (value != base[key]).any()}
    assert changed == {f"{name}.weight"}
    assert all((value == second[key]).all() for key, value in pipe.super_res.state_dict().items())


def test_a_learned_word(system, tmp_path):
    folder, _, options = system
    pipe = load(folder)
    pipe.load_textual_inversion(write({WORD: vectors(width=24)}, tmp_path / "a.safetensors"))
    assert len(pipe.tokenizer.row([])[0]) == 77
    with_word, without = (pipe(prompt, num_inference_steps=1, **options)[0].tobytes()
                          for prompt in (f"a {WORD}", "a"))
    assert with_word != without


def test_other_systems_say_so_in_one_line():
    config = {"sample_size": 8, "block_out_channels": [8], "layers_per_block": 1,
              "norm_num_groups": 4, "down_block_types": ["DownBlock2D"],
              "up_block_types": ["UpBlock2D"]}
    unet = UNet2DModel(config)
    unet.load_state_dict(random_weights(unet, 1))
    pipe = DDPM(unet, {"_class_name": "DDPMScheduler"})
    for method in (pipe.load_lora, pipe.load_textual_inversion):
        with pytest.raises(TinyldmError, match="DDPM .*takes no .*: leave it out") as error:
            method("file.safetensors")
        assert "\n" not in str(error.value)
    assert not DiT.takes_addons and not DDPM.takes_addons


def test_the_command_adds_a_lora_to_the_upscaler(tmp_path):
    folder = small_pipelines.upscaler(tmp_path / "upscaler")
    pipe = load(folder)
    layer = pipe.unet.mid_block.resnets[0].time_emb_proj.weight
    file = write({f"unet.mid_block.resnets.0.time_emb_proj.lora_{letter}.weight": tensor
                  for letter, tensor in (("A", vectors(2, layer.shape[1])),
                                         ("B", vectors(2, layer.shape[0]).T))},
                 tmp_path / "style.safetensors")
    LOW.save(tmp_path / "low.png")
    given = ["cat", "--weights", str(folder), "--image", str(tmp_path / "low.png"), "--steps", "1"]
    for lora in ([], ["--lora", f"{file}:0.5"]):
        assert main([*given, *lora, "--output", str(tmp_path / f"{len(lora)}.png")]) == 0
    plain, changed = (np.asarray(Image.open(tmp_path / f"{n}.png")) for n in (0, 2))
    assert np.array_equal(plain, np.asarray(pipe("cat", LOW, num_inference_steps=1)[0]))
    pipe.load_lora(file, 0.5)
    assert np.array_equal(changed, np.asarray(pipe("cat", LOW, num_inference_steps=1)[0]))
    assert not np.array_equal(plain, changed)
