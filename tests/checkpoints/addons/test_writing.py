"""LoRAs and textual inversions that we write: their names, and what others read in them."""
import hashlib
import json

import numpy as np
import peft
import pytest
import safetensors
import safetensors.torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.numpy import load_file

from tests.support import small_pipelines
from tests.support.addons import WORD, XL_PARTS, assert_same_weights, public, vectors
from tests.support.drawing import Reference, assert_same_pictures
from tests.support.keys import original_rows
from tests.support.tolerance import assert_allclose
from tinyldm.checkpoints.addons.writing import BASES, XL, kohya_name, write_embedding, write_lora
from tinyldm.checkpoints.single_file.names import original_unet_layer
from tinyldm.errors import TinyldmError
from tinyldm.layers import Conv2d, Linear, named_modules
from tinyldm.models.lora import LoRA
from tinyldm.pipelines.loading import load

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
ALL = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "fc1", "fc2",
       "conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv",
       "upsamplers.0.conv")


def make(pipe, targets=ATTENTION, rank=4, alpha=4.0, parts=("unet", "text_encoder")):
    """A LoRA of random numbers around the layers whose names end with targets."""
    rng, layers = np.random.default_rng(0), {}
    for part in parts:
        for name, layer in named_modules(getattr(pipe, part)):
            if isinstance(layer, Linear | Conv2d) and name.endswith(targets):
                lora = layers[f"{part}.{name}"] = LoRA(layer, rank, alpha)
                for matrix in (lora.lora_A, lora.lora_B):
                    shape = matrix.weight.shape
                    matrix.weight.data = (0.2 * rng.standard_normal(shape)).astype(np.float32)
    return layers


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory):
    return small_pipelines.sdxl(tmp_path_factory.mktemp("xl"))


def shapes(file):
    return {name: array.shape for name, array in load_file(file).items()}


def header(file):
    with safetensors.safe_open(file, "numpy") as opened:
        return opened.metadata()


def with_peft(pipe, targets, rank=4):
    """{part: what peft gives of its adapter around diffusers' model, with published names}."""
    found, config = {}, peft.LoraConfig(r=rank, target_modules=[*targets])
    for part in ("unet", "text_encoder"):
        model = peft.get_peft_model(getattr(pipe, part), config)
        found[part] = {public(part, name.removeprefix("base_model.model.")): tensor
                       for name, tensor in peft.get_peft_model_state_dict(model).items()}
    return found


# ---- names ----------------------------------------------------------------------------------

@pytest.mark.parametrize("targets", [ATTENTION, ALL], ids=["attention", "all"])
def test_names_and_shapes_are_those_that_diffusers_writes(targets, folder, reference, tmp_path):
    theirs = with_peft(reference.pipe, targets)
    StableDiffusionPipeline.save_lora_weights(tmp_path, theirs["unet"], theirs["text_encoder"])
    write_lora(tmp_path / "ours.safetensors", make(load(folder), targets))
    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert shapes(tmp_path / "ours.safetensors") == shapes(file)
    assert header(tmp_path / "ours.safetensors") == header(file) == {"format": "pt"}


@pytest.mark.parametrize("targets", [ATTENTION, ALL], ids=["attention", "all"])
def test_names_and_shapes_are_kohyas(targets, folder, reference, tmp_path):
    """Those to which diffusers converts, which calls the text encoder te1 in every model."""
    theirs = {f"{part}.{name}": tensor
              for part, tensors in with_peft(reference.pipe, targets).items()
              for name, tensor in tensors.items()}
    theirs = {name.replace("lora_te1_", "lora_te_"): tuple(tensor.shape)
              for name, tensor in convert_state_dict_to_kohya(theirs).items()}
    write_lora(tmp_path / "ours.safetensors", make(load(folder), targets), "kohya")
    assert shapes(tmp_path / "ours.safetensors") == theirs


def test_original_names_of_every_layer_of_stable_diffusion_xl():
    """In the published list of both layouts."""
    found = [(name.removeprefix("model.diffusion_model."), public)
             for part, name, _, public, *_ in original_rows("sdxl") if part == "unet"]
    layers = {(original.rpartition(".")[0], name.rpartition(".")[0]) for original, name in found
              if not original.startswith("label_emb") and "norm" not in name}
    assert len(layers) > 700
    assert [original_unet_layer(name) for _, name in layers] == [name for name, _ in layers]


def test_kohyas_names_of_stable_diffusion_xl():
    assert [kohya_name(name, XL) for name in (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.mid_block.attentions.0.proj_in", "unet.up_blocks.0.attentions.1.proj_out",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj")] == [
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_middle_block_1_proj_in", "lora_unet_output_blocks_1_1_proj_out",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"]


# ---- read again -----------------------------------------------------------------------------

@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("targets, alpha", [(ATTENTION, 4.0), (ALL, 1.0)],
                         ids=["attention", "all, of another alpha"])
def test_diffusers_and_ours_read_the_same(layout, targets, alpha, folder, reference, tmp_path):
    pipe = load(folder)
    layers = make(pipe, targets, alpha=alpha)
    write_lora(file := tmp_path / "style.safetensors", layers, layout)
    expected = {}
    for name, layer in layers.items():                  # W += alpha / rank * up @ down
        down, up = (matrix.weight.data for matrix in (layer.lora_A, layer.lora_B))
        change = (up @ down if down.ndim == 2 else
                  np.tensordot(down, up[0, 0], 1))       # (K,K,C,r) with (r,O)
        expected[name] = layer.weight.data + alpha / 4 * change
    fresh = load(folder)
    fresh.load_lora(file)
    for name, weight in expected.items():
        part, _, layer = name.partition(".")
        ours = dict(getattr(fresh, part).named_parameters())[f"{layer}.weight"]
        assert_allclose(ours.data, weight, atol=1e-5)
    reference.pipe.load_lora_weights(file)
    reference.pipe.fuse_lora()
    reference.pipe.unload_lora_weights()
    assert_same_weights(fresh, reference.pipe)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_stable_diffusion_xl_is_read_by_both(layout, xl_folder, tmp_path):
    pipe = load(xl_folder)
    layers = make(pipe, parts=("unet", "text_encoder", "text_encoder_2"))
    write_lora(file := tmp_path / "xl.safetensors", layers, layout, base=XL)
    fresh, theirs = load(xl_folder), Reference(xl_folder).pipe
    fresh.load_lora(file)
    theirs.load_lora_weights(file)
    theirs.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    theirs.unload_lora_weights()
    assert_same_weights(fresh, theirs, XL_PARTS)
    original = dict(load(xl_folder).unet.named_parameters())
    changed = [name for name, parameter in fresh.unet.named_parameters()
               if not np.array_equal(parameter.data, original[name].data)]
    assert len(changed) == sum(name.startswith("unet.") for name in layers)


# ---- the header, dtypes, errors -------------------------------------------------------------

def test_kohyas_header(folder, tmp_path):
    layers = make(load(folder), ATTENTION, rank=4, alpha=2.0)
    file = tmp_path / "my dog.safetensors"
    write_lora(file, layers, "kohya", {"ss_steps": "20", "modelspec.resolution": "512x512"},
               base="sd_v2_v")
    found = header(file)
    assert found["ss_v2"] == "True" and found["ss_base_model_version"] == "sd_v2_v"
    assert (found["ss_network_module"], found["ss_network_dim"], found["ss_network_alpha"],
            json.loads(found["ss_network_args"])) == ("networks.lora", "4", "2", {})
    assert found["ss_output_name"] == found["modelspec.title"] == "my dog"
    assert found["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert found["modelspec.prediction_type"] == "v" and found["ss_steps"] == "20"
    assert str(tmp_path) not in str(found)


def test_kohyas_hashes(folder, tmp_path):
    """By kohya's own way: torch's file with what training wrote, hashed without its header."""
    layers = make(load(folder), ALL, rank=64)
    file = tmp_path / "large.safetensors"
    write_lora(file, layers, "kohya", {"ss_steps": "20", "modelspec.author": "somebody"})
    found = header(file)
    training = {name: text for name, text in found.items() if name.startswith("ss_")}
    content = safetensors.torch.save(safetensors.torch.load_file(file), training)
    assert len(content) > 0x110000, "too small for the second hash"
    after = content[8 + int.from_bytes(content[:8], "little"):]
    assert found["sshs_model_hash"] == hashlib.sha256(after).hexdigest()
    assert after == file.read_bytes()[-len(after):]
    older = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    assert found["sshs_legacy_hash"] == older


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_float16(layout, folder, tmp_path):
    layers = make(load(folder))
    first, second, *_ = layers.values()
    first.lora_A.weight.data[0, :3] = 1e-9, -2e-9, 0    # two become 0, one was
    second.lora_A.weight.data[0, 0] = 2049              # rounded to 2048
    assert write_lora(tmp_path / "exact.safetensors", layers, layout) == (
        sum(matrix.weight.data.size for layer in layers.values()
            for matrix in (layer.lora_A, layer.lora_B)) + len(layers) * (layout == "kohya"), 0, 0)
    rounding = write_lora(tmp_path / "half.safetensors", layers, layout, dtype=np.float16)
    assert rounding.zeros == 2 and rounding.largest == 1
    assert {array.dtype for array in load_file(tmp_path / "half.safetensors").values()} == {
        np.dtype(np.float16)}
    before = (tmp_path / "half.safetensors").read_bytes()
    second.lora_A.weight.data[0, 0] = 1e6
    with pytest.raises(TinyldmError, match="not finite in float16.*take float32"):
        write_lora(tmp_path / "half.safetensors", layers, layout, dtype=np.float16)
    assert (tmp_path / "half.safetensors").read_bytes() == before


# ---- textual inversions ---------------------------------------------------------------------

@pytest.mark.parametrize("count", [1, 3])
def test_a_word_in_diffusers_layout(count, folder, reference, tmp_path):
    """Three things agree: the file of diffusers' script, what diffusers reads, what we read."""
    rows = vectors(count)
    safetensors.torch.save_file({WORD: rows}, tmp_path / "theirs.safetensors", {"format": "pt"})
    write_embedding(tmp_path / "ours.safetensors", WORD, {"text_encoder": rows.numpy()})
    assert (tmp_path / "ours.safetensors").read_bytes() == (
        tmp_path / "theirs.safetensors").read_bytes()
    pipe = load(folder)
    pipe.load_textual_inversion(tmp_path / "ours.safetensors")
    reference.pipe.load_textual_inversion(tmp_path / "ours.safetensors")
    text = f"a red {WORD}"
    context, _ = reference.pipe.encode_prompt(text, "cpu", 1, False)
    assert_allclose(pipe.encode_prompt(text), context.detach().numpy(), atol=1e-4)
    image, = pipe(text, num_inference_steps=5)
    assert_same_pictures(np.stack([np.asarray(image)]), reference(prompt=text)[1])


def test_a_word_in_kohyas_layout(folder, tmp_path):
    rows = vectors(2).numpy()
    file = tmp_path / "cat-toy.safetensors"
    write_embedding(file, "cat-toy", {"text_encoder": rows}, "kohya")
    assert shapes(file) == {"emb_params": (2, 32)}
    assert header(file)["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    pipe = load(folder)
    pipe.load_textual_inversion(file)                   # the word is the file's name
    ids = pipe.tokenizer.ids("cat-toy")
    table = pipe.text_encoder.text_model.embeddings.token_embedding.weight.data
    np.testing.assert_array_equal(table[ids], rows)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_word_of_stable_diffusion_xl(layout, xl_folder, tmp_path):
    rows = {"text_encoder": vectors(2, 16).numpy(), "text_encoder_2": vectors(2, 24).numpy()}
    file = tmp_path / "learned_embeds.safetensors"
    write_embedding(file, WORD, rows, layout, base=XL)
    expected = {"kohya": [{"clip_l": (2, 16), "clip_g": (2, 24)}],
                "diffusers": [{WORD: (2, 16)}, {WORD: (2, 24)}]}[layout]
    assert [shapes(path) for path in sorted(tmp_path.iterdir())] == expected
    pipe = load(xl_folder)
    pipe.load_textual_inversion(file, WORD)
    for part, tokenizer in (("text_encoder", pipe.tokenizer), ("text_encoder_2", pipe.tokenizer_2)):
        table = getattr(pipe, part).text_model.embeddings.token_embedding.weight.data
        np.testing.assert_array_equal(table[tokenizer.ids(WORD)], rows[part])


def test_every_base_has_an_architecture():
    assert set(BASES) == {"sd_v1", "sd_v1_v", "sd_v2", "sd_v2_v", XL}


def test_rows_that_are_not_finite(tmp_path):
    rows = np.full((1, 4), np.nan, np.float32)
    with pytest.raises(TinyldmError, match="not finite"):
        write_embedding(tmp_path / "a.safetensors", WORD, {"text_encoder": rows})
    assert not list(tmp_path.iterdir())
