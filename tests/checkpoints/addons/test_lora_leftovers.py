"""LoRA files as people bring them: something beside the LoRA, other prefixes, numbers too large."""
import json
import math
import struct

import numpy as np
import pytest
import torch

from tests.support import small_pipelines, strict
from tests.support.addons import (
    WORD,
    assert_same_weights,
    make_lora,
    merge,
    public,
    vectors,
    weights,
    write,
)
from tests.support.drawing import Reference
from tests.support.tolerance import assert_allclose
from tinyldm import TinyldmError
from tinyldm.pipelines.loading import load

QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
D = 8                                                   # of both layers


def pair(name, ways=("lora_down", "lora_up"), rank=2, **more):
    """Names joined by dots; ones for numbers."""
    return {f"{name}.{ways[0]}.weight": torch.ones(rank, D),
            f"{name}.{ways[1]}.weight": torch.ones(D, rank),
            **{f"{name}.{key}": value for key, value in more.items()}}


KOHYA = "lora_unet_" + QUERY.replace(".", "_")
PLAIN = pair(KOHYA)


def change(pipe, file, weight=1.0):
    """What a file adds to {place: weight}, tables of words aside."""
    before = weights(pipe)
    pipe.load_lora(file, weight)
    return {place: array - before[place] for place, array in weights(pipe).items()
            if array is not before[place] and "token_embedding" not in place[1]}


# ---- what is beside the LoRA ------------------------------------------------------------------

BESIDE = {
    "te1's projection": pair("lora_te1_text_projection"),
    "a text encoder that is not here": pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"),
    "layers that are not here": pair("lora_unet_up_blocks_9_attentions_0_proj_in"),
    "a bias where there is none": {f"{KOHYA}.diff_b": torch.ones(D)},
    "a name in free form": {"scribble": torch.ones(2)},
    "an optimiser": {"optimizer.state.0.exp_avg": torch.ones(2), "step": torch.ones(1)},
    "whole layers that peft keeps": {f"{QUERY}.base_layer.weight": torch.ones(D, D)},
    "half a pair for a layer that is not here": {
        "lora_te2_text_projection.lora_up.weight": torch.ones(D, 2)},
    "OneTrainer's output vectors": {"bundle_emb.pot.clip_l_out": torch.ones(1, D)},
    "another shape of what is no LoRA": {"note": torch.ones(())}}


@pytest.mark.parametrize("what", BESIDE)
def test_what_fits_is_added_and_one_note_names_the_rest(what, small, tmp_path, recwarn):
    file = write(PLAIN | BESIDE[what], tmp_path / "style.safetensors")
    added = change(small, file)
    assert added.keys() == {("unet", f"{QUERY}.weight")}
    assert_allclose(added["unet", f"{QUERY}.weight"], np.full((D, D), 2.0), atol=1e-6)
    warning, = recwarn.list
    first = next(iter(BESIDE[what])) if "bias" not in what else f"{QUERY}.bias"
    assert f"no place for {len(BESIDE[what])}: {first}" in str(warning.message)
    assert str(file) in str(warning.message)


@pytest.mark.parametrize("tensors, message", [
    (pair("lora_unet_double_blocks_0_img_attn_qkv"), "match nothing here are 2: lora_unet_double"),
    (pair("lora_unet_double_blocks_0_img_attn_qkv") | pair(f"lora_te1_{TEXT.replace('.', '_')}"),
     "match nothing here are 2: lora_unet_double"),     # Flux has the same text encoder
    (pair("transformer.single_transformer_blocks.0.attn.to_q", ("lora_A", "lora_B")),
     "match nothing here are 2: transformer.single"),
    (pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"), "match nothing here are 2: lora_te2"),
    (PLAIN | pair(f"lora_te_{TEXT.replace('.', '_')}", rank=2, diff_b=torch.ones(3)),
     r"do not fit are 1: .*self_attn.q_proj .expected \(8,\), found .*diff_b \(3,\)")])
def test_a_lora_for_another_model(tensors, message, small, tmp_path):
    before = weights(small)
    with pytest.raises(TinyldmError, match=f"was made for another model: .*{message}"):
        small.load_lora(write(tensors, tmp_path / "style.safetensors"))
    assert all(array is before[place] for place, array in weights(small).items())


@pytest.mark.parametrize("tensors, kind", [
    ({"lllite_unet_middle_block_1_attn1_to_q.up.0.weight": torch.ones(2, 2)},
     "a ControlNet-LLLite"),
    ({"768.0.linear.0.weight": torch.ones(2, 2)}, "a hypernetwork"),
    ({"unet:0:up": torch.ones(2, 2), "unet:0:down": torch.ones(2, 2)}, "a LoRA of the first kind"),
    ({"ip_adapter.1.to_k_ip.weight": torch.ones(2, 2)}, "an IP-Adapter"),
    ({f"{KOHYA}.oft_blocks": torch.ones(2, 2, 2)}, "an OFT or BOFT"),
    ({f"base_model.model.{QUERY}.vera_lambda_b": torch.ones(2)}, "a VeRA"),
    ({f"{KOHYA}.a1.weight": torch.ones(2, 2)}, "a GLoRA"),
    ({f"{KOHYA}.on_input": torch.ones(()), f"{KOHYA}.weight": torch.ones(2)}, r"an \(IA\)\^3")])
def test_relatives_are_refused_by_their_names(tensors, kind, small, tmp_path):
    with pytest.raises(TinyldmError, match=f"style.safetensors is {kind}"):
        small.load_lora(write(tensors, tmp_path / "style.safetensors"))


def test_a_hypernetwork_of_the_web_interface(small, tmp_path):
    """A pickle, whose keys are numbers: no tensor in it has a name."""
    content = {768: ({"linear.0.weight": torch.ones(2, 2)},) * 2, "layer_structure": [1, 2, 1],
               "activation_func": "linear", "name": "x", "step": 5}
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(TinyldmError, match="x.pt is a hypernetwork, which is not supported"):
        small.load_lora(tmp_path / "x.pt")


@pytest.mark.parametrize("name, kind", [
    ("emb_params", "textual inversion"), ("first_stage_model.a", "VAE"),
    ("model.diffusion_model.input_blocks.0.0.weight", "single file")])
def test_a_file_of_another_kind(name, kind, small, tmp_path):
    file = write({name: torch.ones(1, D)}, tmp_path / "style.safetensors")
    with pytest.raises(TinyldmError, match=f"is no LoRA but of the kind {kind}: expected pairs"):
        small.load_lora(file)


# ---- words that come with it ------------------------------------------------------------------

@pytest.mark.parametrize("key", ["string_to_param.*", "emb_params", "clip_l", "te1", ""])
def test_a_bundled_word_is_learned(key, folder, tmp_path, recwarn):
    pipe, word = load(folder), "my.word"
    first = len(pipe.tokenizer)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    size = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight.shape[0]
    tensors = {f"{layer}.lora_down.weight": torch.ones(2, size),
               f"{layer}.lora_up.weight": torch.ones(size, 2),
               ".".join(filter(None, ["bundle_emb", word, key])): vectors(3),
               f"bundle_emb.{word}.string_to_token.*": torch.ones(1)}
    file = write(tensors, tmp_path / "style.safetensors")
    assert len(change(pipe, file)) == 1 and not recwarn.list
    assert pipe.tokenizer.ids("a my.word")[1:] == [first, first + 1, first + 2]
    table = pipe.text_encoder.text_model.embeddings.token_embedding.weight.data
    np.testing.assert_array_equal(table[first:], vectors(3))
    assert len(change(pipe, file, -1)) == 1             # the LoRA is undone, the word stays
    warning, = recwarn.list
    assert "no place for 1: the word my.word, which the vocabulary has" in str(warning.message)
    assert len(pipe.tokenizer) == first + 3


def test_a_bundled_word_for_both_encoders_of_sdxl(tmp_path):
    pipe = load(small_pipelines.sdxl(tmp_path / "xl"))
    layer = "lora_te2_text_projection"
    P, width = pipe.text_encoder_2.text_projection.weight.shape
    file = write({f"{layer}.lora_down.weight": torch.ones(2, width),
                  f"{layer}.lora_up.weight": torch.ones(P, 2),
                  "bundle_emb.xq-toy.clip_g": vectors(2, 24),
                  "bundle_emb.xq-toy.clip_l": vectors(2, 16)}, tmp_path / "style.safetensors")
    projection, first = pipe.text_encoder_2.text_projection.weight, len(pipe.tokenizer)
    before = projection.data
    pipe.load_lora(file)
    assert_allclose(projection.data - before, np.full((P, width), 2), atol=1e-5)
    for tokenizer, model, size in [(pipe.tokenizer, pipe.text_encoder, 16),
                                   (pipe.tokenizer_2, pipe.text_encoder_2, 24)]:
        assert tokenizer.ids("xq-toy") == [first, first + 1]
        table = model.text_model.embeddings.token_embedding.weight.data
        np.testing.assert_array_equal(table[first:], vectors(2, size))


@pytest.mark.parametrize("tensors, message", [
    ({"bundle_emb.a.emb_params": vectors(2, 1024)}, "made for Stable Diffusion 2"),
    ({"bundle_emb.a.emb_params": vectors(2, D) / 0}, "emb_params holds NaN"),
    ({"bundle_emb.a.emb_params": vectors(2, D)[None]}, "is no textual inversion"),
    ({"bundle_emb.a.clip_l": vectors(2, D), "bundle_emb.a.clip_g": vectors(2, 12)},
     "vectors for 2 text encoders")])
def test_a_bundled_word_that_does_not_fit_changes_nothing(tensors, message, small, tmp_path):
    before = weights(small), len(small.tokenizer)
    with pytest.raises(TinyldmError, match=message):
        small.load_lora(write(PLAIN | tensors, tmp_path / "style.safetensors"))
    assert len(small.tokenizer) == before[1]
    assert all(array is before[0][place] for place, array in weights(small).items())


# ---- names ------------------------------------------------------------------------------------

@pytest.mark.parametrize("ways", [("lora_A", "lora_B"), ("lora_A.default", "lora_B.default"),
                                  ("lora_A.my_style-2", "lora_B.my_style-2"),
                                  ("lora_down", "lora_up"), ("lora.down", "lora.up")])
@pytest.mark.parametrize("start, part", [
    ("", "unet"), ("unet.", "unet"), ("base_model.model.", "unet"), ("lycoris_", "unet"),
    ("unet.base_model.model.", "unet"), ("base_model.model.unet.", "unet"), ("module.", "unet"),
    ("_orig_mod.", "unet"), ("diffusion_model.", "unet"), ("lora_unet_", "unet"),
    ("", "text_encoder"), ("text_encoder.", "text_encoder"), ("te.", "text_encoder"),
    ("te1.", "text_encoder"), ("base_model.model.", "text_encoder"), ("clip_l.", "text_encoder"),
    ("text_encoder.base_model.model.", "text_encoder"), ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder")])
def test_prefixes_and_adapter_names(start, part, ways, small, tmp_path):
    layer = QUERY if part == "unet" else TEXT
    name = start + (layer.replace(".", "_") if start.endswith("_") else layer)
    added = change(small, write(pair(name, ways), tmp_path / "style.safetensors"))
    assert added.keys() == {(part, f"{layer}.weight")}
    assert_allclose(added[part, f"{layer}.weight"], np.full((D, D), 2.0), atol=1e-6)


def test_a_folder_that_peft_saved_names_the_part(tmp_path):
    """Both text encoders of SDXL have the same layers: only the folder says which is meant."""
    pipe = load(small_pipelines.sdxl(tmp_path / "xl"))
    folder = tmp_path / "style" / "text_encoder_2"
    folder.mkdir(parents=True)
    file = write({f"base_model.model.{TEXT}.lora_A.weight": torch.ones(2, 24),
                  f"base_model.model.{TEXT}.lora_B.weight": torch.ones(24, 2)},
                 folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 1}))
    layer = pipe.text_encoder_2.text_model.encoder.layers[0].self_attn.q_proj
    before = layer.weight.data
    pipe.load_lora(file)
    assert_allclose(layer.weight.data - before, np.ones((24, 24)), atol=1e-6)


# ---- alpha, and peft's config beside ------------------------------------------------------------

@pytest.mark.parametrize("alpha, expected", [
    (torch.tensor(4), 4.0), (torch.tensor(4, dtype=torch.int32), 4.0), (torch.tensor([4.0]), 4.0),
    (torch.tensor(4.0, dtype=torch.bfloat16), 4.0), (torch.tensor(4.0).double(), 4.0),
    (torch.tensor(-4.0), -4.0), (torch.tensor(0.0), 0.0)])
def test_an_alpha_of_any_number_type(alpha, expected, small, tmp_path):
    added = change(small, write(pair(KOHYA, alpha=alpha), tmp_path / "style.safetensors"))
    assert_allclose(added["unet", f"{QUERY}.weight"], np.full((D, D), expected), atol=1e-6)


@pytest.mark.parametrize("ways, alpha", [
    (("lora_A", "lora_B"), "alpha"), (("lora_A.default", "lora_B.default"), "alpha.default"),
    (("lora.down", "lora.up"), "lora.alpha"), (("lora.down", "lora.up"), "alpha")])
def test_an_alpha_under_other_names(ways, alpha, small, tmp_path):
    tensors = pair(f"unet.{QUERY}", ways) | {f"unet.{QUERY}.{alpha}": torch.tensor(6.0)}
    added = change(small, write(tensors, tmp_path / "style.safetensors"))
    assert_allclose(added["unet", f"{QUERY}.weight"], np.full((D, D), 6.0), rtol=1e-6)


@pytest.mark.parametrize("config, expected", [
    ({"r": 2, "lora_alpha": 4}, 4.0), ({"lora_alpha": 3, "alpha_pattern": {"attn1.to_q": 8}}, 8.0),
    ({"lora_alpha": 4, "use_rslora": True}, 4 * 2 ** 0.5), ({}, 2.0),
    ({"lora_alpha": 4, "alpha_pattern": {r".*attn1\.to_q": 8}}, 8.0),
    ({"lora_alpha": 4, "alpha_pattern": {r"^mid_block.*to_q": 8}}, 8.0),
    ({"lora_alpha": 4, "alpha_pattern": {r"^blocks.*to_q": 8, "to_(k|q)": 6}}, 6.0),
    ({"peft_type": "LORA", "lora_alpha": -1, "alpha_pattern": {"to_k": 8}}, -1.0)])
def test_the_config_beside_an_adapter(config, expected, small, tmp_path):
    file = write(pair(f"base_model.model.{QUERY}", ("lora_A", "lora_B")),
                 tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    added = change(small, file)
    assert_allclose(added["unet", f"{QUERY}.weight"], np.full((D, D), expected), rtol=1e-6)


@pytest.mark.parametrize("pattern", [
    "(a+)+x", "(.*)*x", ".*.*.*.*x", "(.|.)" * 40 + "x", "(", "[a"])
def test_patterns_that_could_take_for_ever_or_are_none(pattern, small, tmp_path):
    file = write(pair(f"base_model.model.{QUERY}", ("lora_A", "lora_B")),
                 tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"alpha_pattern": {pattern: 8}}))
    with pytest.raises(TinyldmError, match="is no simple regular expression: write the layers'"):
        change(small, file)


def test_without_its_config_alpha_is_the_rank_and_a_note_says_so(small, tmp_path):
    file = write(pair(f"base_model.model.{QUERY}", ("lora_A", "lora_B")),
                 tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="adapter_config.json is missing, so the alpha of adap"):
        added = change(small, file)
    assert_allclose(added["unet", f"{QUERY}.weight"], np.full((D, D), 2.0), atol=1e-6)


@pytest.mark.parametrize("config, message", [
    ("{", "adapter_config.json must be a JSON object"), ("[]", "must be a JSON object"),
    ("[" * 100000, "must be a JSON object"), ('{"peft_type": "OFT"}', "is peft's OFT"),
    ('{"peft_type": "FOURIERFT"}', "is peft's FOURIERFT"), ('{"peft_type": ["LORA"]}', "is peft's"),
    ('{"init_lora_weights": "pissa_niter_4"}', "weights that its training changed"),
    ('{"lora_alpha": "much"}', "a number as alpha"), ('{"lora_alpha": NaN}', "a number as alpha"),
    ('{"lora_alpha": null}', "a number as alpha"), ('{"alpha_pattern": 5}', "a number as alpha"),
    ('{"lora_alpha": 1%s}' % ("0" * 500), "a number as alpha")])
def test_a_config_that_makes_no_sense(config, message, small, tmp_path):
    file = write(pair(QUERY, ("lora_A", "lora_B")), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(TinyldmError, match=message):
        small.load_lora(file)


@pytest.mark.parametrize("config", [
    {"r": 0}, {"r": -2}, {"r": "2"}, {"r": 2, "alpha": [1]}, {"r": 2, "rank_pattern": {"to_q": 0}},
    {"r": 1e-320, "alpha": 1e300}, {"r": 2, "rank_pattern": [2]}, {"r": -2, "use_rslora": True}])
def test_a_rank_in_a_config_that_makes_no_sense(config, small, tmp_path):
    """A LoKr of whole matrices has no other rank."""
    file = write({f"{QUERY}.lokr_w1": torch.ones(2, 2), f"{QUERY}.lokr_w2": torch.ones(4, 4)},
                 tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(TinyldmError, match="a number as alpha and one above 0 as rank|too large"):
        small.load_lora(file)


def test_one_layer_under_two_spellings(small, tmp_path):
    """Both name the same layer, so one of the two sets would be lost."""
    tensors = pair(f"lora_te_{TEXT.replace('.', '_')}") | pair(
        f"text_encoder.{TEXT.removeprefix('text_model.')}", ("lora_A", "lora_B"))
    with pytest.raises(TinyldmError, match="has two sets of matrices for one layer .2: text_enc"):
        small.load_lora(write(PLAIN | tensors, tmp_path / "style.safetensors"))


# ---- numbers that become too large, shapes that make no sense ---------------------------------

LATE = pair("lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q")
TOO_LARGE = {
    "alpha": (pair(KOHYA, alpha=torch.tensor(1e300).double()), 1.0),
    "a negative alpha": (pair(KOHYA, alpha=torch.tensor(-1e300).double()), 1.0),
    "numbers": ({name: tensor * 1e30 for name, tensor in PLAIN.items()}, 1.0),
    "the weight": (PLAIN, 1e300),
    "weight and alpha": (pair(KOHYA, alpha=torch.tensor(1e30)), 1e300),
    "infinity less infinity": ({name: tensor * 1e30 for name, tensor in PLAIN.items()} | {
        f"{KOHYA}.diff": torch.full((D, D), -3e38)}, -1.0),
    "a difference": ({f"{KOHYA}.diff": torch.full((D, D), 3e38)}, 2.0)}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("what", TOO_LARGE)
def test_what_would_overflow_changes_nothing(what, dtype, small_folder, tmp_path):
    """Other layers of the file fit, and come before and after; none of them is changed."""
    tensors, weight = TOO_LARGE[what]
    file = write(LATE | tensors, tmp_path / "style.safetensors")
    pipe = load(small_folder, dtype=dtype)
    before = weights(pipe)
    with pytest.raises(TinyldmError, match=rf"with the weight .* makes numbers in {QUERY}.weight "
                                           rf"that are too large for {dtype}|too large for"):
        pipe.load_lora(file, weight)
    assert all(array is before[place] for place, array in weights(pipe).items())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_float16_holds_65504_at_most(device, small_folder, tmp_path):
    file = write(pair(KOHYA, alpha=torch.tensor(30000.0)), tmp_path / "style.safetensors")
    with strict.installed():
        pipe = load(small_folder, device, "float16")
        pipe.load_lora(file, 2)                         # 60,000
        before = weights(pipe)
        with pytest.raises(TinyldmError, match="too large for float16"):
            pipe.load_lora(file, 0.5)
        assert all(array is before[place] for place, array in weights(pipe).items())
    wide = load(small_folder)
    wide.load_lora(file, 2.5)


@pytest.mark.parametrize("weight", [math.inf, -math.inf, math.nan, 10 ** 400])
def test_a_weight_that_is_not_finite(weight, small, tmp_path):
    with pytest.raises(TinyldmError, match="weight must be a finite number"):
        small.load_lora(write(PLAIN, tmp_path / "style.safetensors"), weight)


def header(entries, numbers=b""):
    """A safetensors file with any header."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def entry(shape, stop=4, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, stop]}


DOWN, UP, ALPHA = (f"{KOHYA}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha"))


@pytest.mark.parametrize("entries", [
    {ALPHA: entry([1] * 65)}, {ALPHA: entry([1] * 64)}, {ALPHA: entry([1] * 5000)},
    {ALPHA: entry([0], 0)}, {ALPHA: entry([2], 8)}, {ALPHA: entry([], 1, "BOOL")},
    {ALPHA: entry([], 1, "U8")}, {DOWN: entry([0, 8], 0)}, {DOWN: entry([0, 2 ** 62], 0)},
    {DOWN: entry([2 ** 62, 0], 0)}, {DOWN: entry([], 4)}, {DOWN: entry([1] * 65)},
    {UP: entry([1] * 65)}, {DOWN: entry([1, 8], 32)}, {UP: entry([8, 3], 96)},
    {UP: entry([8, 2, 2, 2], 256)}, {DOWN: entry([2, 8], 16, "U8")},
    {f"{KOHYA}.hada_w1_a": entry([1] * 65)}, {f"{KOHYA}.lokr_t2": entry([1] * 3)},
    {f"lora_unet_input_blocks_{'1' * 5000}_0_x.lora_up.weight": entry([1])} | {
        DOWN: entry([0, 8], 0)},
    {f"lora_unet_{'1_' * 3000}.lora_up.weight": entry([1]), UP: entry([0, 0], 0)},
    {"a.a" * 100000 + ".lora_up.weight": entry([1]), UP: entry([0, 0], 0)}])
def test_shapes_that_make_no_sense_are_one_line(entries, small, tmp_path):
    places, numbers = {}, b""
    plain = {DOWN: entry([2, 8], 64), UP: entry([8, 2], 64)}
    for name, place in (plain | entries).items():
        size = place["data_offsets"][1]
        places[name] = place | {"data_offsets": [len(numbers), len(numbers) + size]}
        numbers += b"\0" * size
    file = tmp_path / "style.safetensors"
    file.write_bytes(header(places, numbers))
    before = weights(small)
    with pytest.raises(TinyldmError) as error:
        small.load_lora(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 3000
    assert all(array is before[place] for place, array in weights(small).items())


# ---- several -------------------------------------------------------------------------------------

def test_a_lora_twice_adds_it_twice(small_folder, tmp_path):
    reference, pipe = Reference(small_folder).pipe.to(torch.float32), load(small_folder)
    pairs = make_lora(reference, "attn")
    file = write({f"{part}.{public(part, name)}.lora_{letter}.weight": tensor
                  for (part, name), (*both, _) in pairs.items()
                  for letter, tensor in zip("AB", both)}, tmp_path / "style.safetensors")
    pipe.load_lora(file, 0.3)
    pipe.load_lora(file, 0.4)
    merge(reference, {place: (*both, None) for place, (*both, _) in pairs.items()}, 0.7)
    assert_same_weights(pipe, reference)


def test_the_command_line_says_what_is_left_out_and_draws(small_folder, tmp_path, capsys):
    from tinyldm.cli.draw import main

    file = write(PLAIN | BESIDE["te1's projection"], tmp_path / "style.safetensors")
    assert main([WORD, "--weights", str(small_folder), "--steps", "1", "--lora", f"{file}:0.5",
                 "--output", str(tmp_path / "out.png")]) == 0
    assert capsys.readouterr().err.count("has no place for 2: lora_te1_text_projection.lora_d") == 1
