"""LoRA files: the names of real ones; pictures against diffusers, and sums against torch."""
import copy
import math
from collections import Counter

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import is_peft_available

from tests.support import small_pipelines, strict
from tests.support.addons import (
    PARTS,
    XL_PARTS,
    assert_same_weights,
    kohya,
    make_lora,
    merge,
    public,
    weights,
    write,
)
from tests.support.drawing import Reference, assert_same_drawing, ours
from tests.support.keys import CONFIGS, MODELS, original_rows, published_shapes
from tests.support.reference import to_ours
from tests.support.tolerance import assert_allclose
from tinyldm.checkpoints import components
from tinyldm.checkpoints.addons.lora import layers_by_spelling, target_of
from tinyldm.errors import TinyldmError
from tinyldm.layers import file_shape
from tinyldm.pipelines.loading import load

with_peft = pytest.mark.skipif(not is_peft_available(), reason="diffusers reads LoRAs with peft")
OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


# ---- random LoRAs, each layer {(part, name in diffusers): (down, up, alpha)} ------------------

def peft(pairs):
    return {f"{part}.{public(part, name)}.lora_{letter}.weight": tensor
            for (part, name), pair in pairs.items() for letter, tensor in zip("AB", pair)}


def diffusers_newer(pairs):
    words = {"unet": "lora", "text_encoder": "lora_linear_layer"}
    return {f"{part}.{public(part, name)}.{words[part]}.{way}.weight": tensor
            for (part, name), pair in pairs.items() for way, tensor in zip(("down", "up"), pair)}


def diffusers_oldest(pairs):
    tensors = {}
    for (part, name), pair in pairs.items():
        block, _, layer = public(part, name.replace("to_out.0", "to_out")).rpartition(".")
        block += ".processor" if part == "unet" else ""
        for way, tensor in zip(("down", "up"), pair):
            tensors[f"{part}.{block}.{OLD_TEXT.get(layer, layer)}_lora.{way}.weight"] = tensor
    return tensors


NO_ALPHAS = {"alphas": (None,)}
LAYOUTS = {
    # layout: (the function that names the tensors, options of make_lora)
    "kohya": (kohya, {}), "kohya without alphas": (kohya, NO_ALPHAS), "peft": (peft, NO_ALPHAS),
    "diffusers, newer": (diffusers_newer, NO_ALPHAS | {"layers": "attn"}),
    "diffusers, oldest": (diffusers_oldest, NO_ALPHAS | {"layers": "attn"}),
}


# ---- pictures -------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_draws_as_torch_merges(layout, folder, original, reference, tmp_path):
    names, options = LAYOUTS[layout]
    pairs = make_lora(reference.pipe, **options)
    pipe = load(folder)
    pipe.load_lora(write(names(pairs), tmp_path / "style.safetensors"), 0.8)
    merge(reference.pipe, pairs, 0.8)
    assert_same_drawing(ours(pipe), theirs := reference())
    assert abs(theirs[1].astype(int) - original()[1]).mean() > 5, "the LoRA changes nothing"


@with_peft
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_draws_as_diffusers(layout, folder, reference, tmp_path):
    names, options = LAYOUTS[layout]
    if "alphas" not in options:                         # with several, diffusers misses layers
        options = options | {"ranks": (4,), "alphas": (3.0,)}
    file = write(names(make_lora(reference.pipe, **options)), tmp_path / "style.safetensors")
    pipe = load(folder)
    pipe.load_lora(file, 0.8)
    reference.pipe.load_lora_weights(file)
    reference.pipe.fuse_lora(lora_scale=0.8)
    assert_same_drawing(ours(pipe), reference())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("names", [kohya, peft])
def test_stable_diffusion_xl(names, tmp_path):
    """With both of its text encoders."""
    folder = small_pipelines.sdxl(tmp_path / "xl")
    reference, pipe = Reference(folder), load(folder)
    pairs = make_lora(reference.pipe, "attn", alphas=(None,), parts=XL_PARTS)
    pipe.load_lora(write(names(pairs), tmp_path / "style.safetensors"), 0.8)
    merge(reference.pipe, pairs, 0.8)
    assert_same_drawing(ours(pipe), reference(guidance_scale=7.5))


SETTINGS = [
    {"lora_alpha": 6, "alpha_pattern": {"attn2.to_q": 1.5, "to_q": 9, "q_proj": 2}},
    {"lora_alpha": 2, "alpha_pattern": {}, "use_rslora": True}]


def alpha_of(settings, name, rank):
    """Computed by hand: the pattern's attn2.to_q comes before its to_q."""
    pattern = settings["alpha_pattern"]
    alpha = settings["lora_alpha"]
    if pattern and name.endswith(("to_q", "q_proj")):
        alpha = 1.5 if name.endswith("attn2.to_q") else 9 if name.endswith("to_q") else 2
    return alpha * rank ** 0.5 if settings.get("use_rslora") else alpha


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")     # of the other part
@pytest.mark.parametrize("settings", SETTINGS, ids=["patterns", "rslora"])
def test_alphas_of_the_header_that_diffusers_writes(settings, folder, reference, tmp_path):
    pairs = make_lora(reference.pipe, "attn", ranks=(4,))
    layers = {part: {f"{name}.lora_{letter}.weight": tensor.contiguous()
                     for (place, name), pair in pairs.items() if place == part
                     for letter, tensor in zip("AB", pair)} for part in PARTS}
    config = {"r": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj",
                                         "v_proj", "out_proj"], **settings}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path, layers["unet"], layers["text_encoder"], unet_lora_adapter_metadata=config,
        text_encoder_lora_adapter_metadata=config)
    file, = tmp_path.glob("*.safetensors")
    pipe = load(folder)
    pipe.load_lora(file)
    if is_peft_available():
        theirs = copy.deepcopy(reference)
        theirs.pipe.load_lora_weights(file)
        theirs.pipe.fuse_lora()
        assert_same_drawing(ours(pipe), theirs())
    merge(reference.pipe, {(part, name): (*pair[:2], alpha_of(settings, name, 4))
                           for (part, name), pair in pairs.items()}, 1)
    assert_same_weights(pipe, reference.pipe)


def test_the_oldest_files_without_a_prefix_change_the_unet(folder, reference, tmp_path):
    pairs = make_lora(reference.pipe, "attn", **NO_ALPHAS)
    pairs = {place: pair for place, pair in pairs.items() if place[0] == "unet"}
    tensors = {name.removeprefix("unet."): tensor
               for name, tensor in diffusers_oldest(pairs).items()}
    pipe = load(folder)
    pipe.load_lora(write(tensors, tmp_path / "pytorch_lora_weights.bin"))
    merge(reference.pipe, pairs, 1)
    assert_same_weights(pipe, reference.pipe)


@pytest.mark.parametrize("shapes", ["1x1 convolutions for matrices", "matrices for convolutions"])
def test_matrices_and_1x1_convolutions_are_the_same(shapes, small_folder, tmp_path):
    """Stable Diffusion 2's projections are matrices, 1's are convolutions; some files mix them."""
    reference, pipe = Reference(small_folder), load(small_folder)
    pairs = make_lora(reference.pipe, "proj_in" if "for convolutions" in shapes else "attn1")
    assert pairs
    merge(reference.pipe, pairs, 1)
    shape = [1, 1] if shapes.startswith("1x1") else []
    pairs = {place: (*(tensor.reshape(*tensor.shape[:2], *shape) for tensor in pair), alpha)
             for place, (*pair, alpha) in pairs.items()}
    pipe.load_lora(write(kohya(pairs), tmp_path / "style.safetensors"))
    assert_same_weights(pipe, reference.pipe)


# ---- several, none, undone ------------------------------------------------------------------

def test_two_loras_of_different_weights(folder, reference, tmp_path):
    pipe = load(folder)
    for seed, weight, layers in [(1, 0.7, "attn"), (2, -0.4, "")]:
        pairs = make_lora(reference.pipe, layers, seed=seed)
        pipe.load_lora(write(kohya(pairs), tmp_path / f"{seed}.safetensors"), weight)
        merge(reference.pipe, pairs, weight)
    assert_same_weights(pipe, reference.pipe)
    assert_same_drawing(ours(pipe), reference())


def test_weight_0_changes_nothing_and_the_negative_undoes(small, small_folder, tmp_path):
    pairs = make_lora(Reference(small_folder).pipe)
    file = write(kohya(pairs), tmp_path / "style.safetensors")
    before = weights(small)
    small.load_lora(file, 0)
    assert all(np.array_equal(array, before[place]) for place, array in weights(small).items())
    small.load_lora(file, 0.6)
    changed = [place for place, array in weights(small).items()
               if not np.allclose(array, before[place], atol=1e-3)]
    assert len(changed) == len(pairs)
    small.load_lora(file, -0.6)
    for place, array in weights(small).items():
        assert_allclose(array, before[place], atol=1e-6)


# ---- dtypes and devices ---------------------------------------------------------------------

@pytest.mark.parametrize("low_memory", [False, True])
def test_large_weights_in_float16_are_widened_where_they_change(low_memory, tmp_path, monkeypatch):
    monkeypatch.setattr(components, "LARGE", 1)
    folder = small_pipelines.toy(tmp_path / "half", half=True)
    files = {file: file.read_bytes() for file in folder.rglob("*.safetensors")}
    pipe, reference = load(folder, low_memory=low_memory), Reference(folder)
    pairs = make_lora(reference.pipe, "attn")
    pipe.load_lora(write(kohya(pairs), tmp_path / "style.safetensors"))
    merge(reference.pipe, pairs, 1)
    changed = {(part, f"{public(part, name)}.weight") for part, name in pairs}
    for place, array in weights(pipe).items():
        assert place not in changed or array.dtype == np.float32, place
    assert any(array.dtype == np.float16 for array in weights(pipe).values())
    assert_same_drawing(ours(pipe), reference())
    assert all(file.read_bytes() == content for file, content in files.items())


def test_float64(small_folder, tmp_path):
    reference, pipe = Reference(small_folder), load(small_folder, dtype="float64")
    pairs = {place: (*(tensor.double() for tensor in pair), alpha)
             for place, (*pair, alpha) in make_lora(reference.pipe).items()}
    reference.pipe.to(torch.float64)
    pipe.load_lora(write(kohya(pairs), tmp_path / "style.safetensors"))
    merge(reference.pipe, pairs, 1)
    for name, parameter in pipe.unet.named_parameters():
        theirs = to_ours(reference.pipe.unet.state_dict()[name])
        assert parameter.data.dtype == np.float64
        assert_allclose(parameter.data, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_on_a_device(dtype, small_folder, tmp_path):
    pairs = make_lora(Reference(small_folder).pipe)
    file = write(kohya(pairs), tmp_path / "style.safetensors")
    host = load(small_folder)
    host.load_lora(file, 0.5)
    with strict.installed():
        device = load(small_folder, "cuda", dtype)
        device.load_lora(file, 0.5)
        for place, array in weights(device).items():
            assert isinstance(array, strict.Array) and array.dtype == dtype
            assert_allclose(array.get(), weights(host)[place], rtol=2e-3, atol=1e-4)


# ---- the names of real files ----------------------------------------------------------------

def real_model(name):
    """{part: our model of a published config}, without weights."""
    return {part: build(CONFIGS[name][part]) for part, build in MODELS.items()
            if part in CONFIGS[name] and part != "vae"}


def is_trained(part, name, shape):
    """Whether kohya's trainer makes a pair for it, if convolutions are not asked for."""
    return len(shape) > 1 and name.endswith(".weight") and (
        ".attentions." in name if part == "unet" else ".self_attn." in name or ".mlp." in name)


def assert_found(places, layers, name, shape):
    """A file's name finds our weight of the public name and shape."""
    found, layer = layers[target_of(places)]
    assert found == name.removesuffix(".weight")
    assert file_shape(layer.weight) == shape


def test_every_name_of_a_kohya_file_for_sd15_finds_its_weight():
    layers, counts = layers_by_spelling(real_model("SD 1.5")), Counter()
    for part in PARTS:
        for name, shape in published_shapes("SD 1.5", part).items():
            if is_trained(part, name, shape):
                counts[part] += 1
                flat = name.removesuffix(".weight").replace(".", "_")
                assert_found(PARTS[part] + flat, layers, name, shape)
    assert counts == {"unet": 192, "text_encoder": 72}


def test_every_name_of_a_kohya_file_for_sdxl_finds_its_weight():
    """Its UNet has the original names; all weights are tried, also convolutions' and norms'."""
    layers, counts = layers_by_spelling(real_model("SDXL")), Counter()
    start = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    for part, theirs, _, name, shape, what in original_rows("sdxl"):
        if (part in start and what != "drop" and name.endswith(".weight")
                and "embeddings" not in name):
            counts[part] += is_trained(part, name, shape)
            flat = (theirs.removeprefix("model.diffusion_model.") if part == "unet" else name
                    ).removesuffix(".weight").replace(".", "_")
            assert_found(start[part] + flat, layers, name, shape)
    assert counts == {"unet": 722, "text_encoder": 72, "text_encoder_2": 192}


# ---- what is refused ------------------------------------------------------------------------

FAR = torch.zeros(2, 8)
UP, DOWN = "lora_unet_conv_in.lora_up.weight", "lora_unet_conv_in.lora_down.weight"
QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
LATE = "lora_unet_time_embedding_linear_1"                  # after the query in a file
KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"


def pair(name, down, up, **more):
    return {f"{name}.lora_down.weight": torch.ones(down), f"{name}.lora_up.weight": torch.ones(up),
            **{f"{name}.{key}": value for key, value in more.items()}}


GOOD = pair(QUERY, (2, 8), (8, 2))
BAD = [
    ({"conv_in.weight": FAR}, "is no LoRA: expected .* found 1: conv_in.weight"),
    ({}, "is no LoRA: expected .* found none"),
    ({"lora_unet_conv_in.alpha": FAR}, "is no LoRA"),
    (pair(KEY, (2, 768), (8, 2)), "was made for Stable Diffusion 1 .context of width 768., "
                                  "but this is a model .context of width 8."),
    (pair(KEY, (2, 1024), (8, 2)), "made for Stable Diffusion 2 .context of width 1024"),
    (pair("lora_unet_output_blocks_1_1_transformer_blocks_9_attn2_to_v", (2, 2048), (8, 2)),
     "made for Stable Diffusion XL .context of width 2048"),
    (pair(KEY, (2, 99), (8, 2)), "was made for a model .context of width 99"),
    (pair(QUERY, (2, 320), (320, 2)), r"another model: shapes that do not fit are 1: mid_block.*"
     r"attn1.to_q \(expected \(8, 8\), found up \(320, 2\) and down \(2, 320\)\)"),
    (pair(QUERY, (2, 8), (8, 3)), "shapes that do not fit"),
    (pair(QUERY, (0, 8), (8, 0)), "shapes that do not fit"),
    (pair(QUERY, (8,), (8,)), "shapes that do not fit"),
    (pair(QUERY, (), ()), "shapes that do not fit"),
    (pair(QUERY, (2, 8), (8, 2), alpha=torch.ones(2)), "shapes that do not fit"),
    (pair("lora_unet_conv_in", (2, 4, 1, 1), (8, 2, 1, 1)), "shapes that do not fit"),
    (peft({("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"): (FAR, FAR.T)}),
     r"has two sets of matrices for one layer .2: unet.mid_block.*to_q.lora_A.weight"),
    ({UP: torch.zeros(8, 2, 1, 1)}, f"only a part for 1: {UP}"),
    ({DOWN: torch.zeros(2, 4, 3, 3)}, f"only a part for 1: {DOWN}"),
    ({"lora_unet_conv_in.alpha": torch.ones(())}, "a part for 1: lora_unet_conv_in.alpha"),
    (pair("lora_unet_conv_in", (2, 4, 3, 3), (8, 2, 1, 1), alpha=torch.tensor(math.nan)),
     "lora_unet_conv_in.alpha holds NaN"),
    ({f"{LATE}.lora_down.weight": torch.ones(2, 8),
      f"{LATE}.lora_up.weight": torch.full((32, 2), math.inf)}, f"{LATE}.lora_up.weight holds NaN"),
    *((pair("lora_unet_conv_in", (2, 4, 3, 3), (8, 2, 1, 1)) | {f"lora_unet_conv_in.{key}": FAR},
       message) for key, message in [
        ("lora_mid.weight", r"do not fit are 1: conv_in .expected .* and mid \(2, 8\)"),
        ("hada_w1_a", "only a part for 3: .*hada_w1_a"), ("lokr_w1", "only a part for 3"),
        ("diff_b", r"do not fit are 1: conv_in .expected \(8,\), found .*diff_b \(2, 8\)"),
        ("diff", r"do not fit are 1: conv_in .expected \(8, 4, 3, 3\), found .*diff \(2, 8\)"),
        ("dora_scale", "is a DoRA"), ("lora_magnitude_vector", "is a DoRA"),
        ("lora_magnitude_vector.default.weight", "is a DoRA"), ("oft_blocks", "an OFT or BOFT"),
        ("oft_diag", "an OFT or BOFT"), ("oft_R.default.weight", "an OFT or BOFT"),
        ("boft_R", "an OFT or BOFT"), ("a1.weight", "is a GLoRA"), ("b2.weight", "is a GLoRA"),
        ("on_input", r"is an \(IA\)\^3"), ("ia3_l", r"is an \(IA\)\^3"), ("lora_E", "an AdaLoRA"),
        ("up_list.0", "is a DyLoRA"), ("lora_B.bias", "a LoRA with biases"),
        ("lora_B.default.bias", "a LoRA with biases")]),
]


@pytest.mark.parametrize("tensors, message", BAD)
def test_what_does_not_fit_is_refused_and_changes_nothing(tensors, message, small, tmp_path):
    if "is no LoRA" not in message:
        tensors = GOOD | tensors                        # nothing is merged, not even what fits
    before = weights(small)
    file = write(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(TinyldmError, match=message) as error:
        small.load_lora(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert all(array is before[place] for place, array in weights(small).items())


@pytest.mark.parametrize("weight", [math.nan, math.inf, "1", None])
def test_a_weight_that_is_no_number(weight, small, tmp_path):
    with pytest.raises(TinyldmError, match="weight must be a finite number"):
        small.load_lora(write(GOOD, tmp_path / "style.safetensors"), weight)


@pytest.mark.parametrize("header", [
    "{", "[]", "[" * 100000, '{"unet.lora_alpha": "much"}', '{"unet.lora_alpha": NaN}',
    '{"unet.lora_alpha": 1%s}' % ("0" * 400), '{"unet.alpha_pattern": {"to_q": null}}',
    '{"unet.alpha_pattern": 5}'])
def test_a_header_that_makes_no_sense(header, small, tmp_path):
    file = write(GOOD, tmp_path / "style.safetensors", {"lora_adapter_metadata": header})
    with pytest.raises(TinyldmError, match="JSON object|must give .* a number as alpha"):
        small.load_lora(file)


def test_a_file_that_is_missing(small, tmp_path):
    with pytest.raises(TinyldmError, match="style.safetensors is missing"):
        small.load_lora(tmp_path / "style.safetensors")
