"""The record of a drawing, for every pipeline: its picture, its arrays, what it leaves out."""
import numpy as np
import pytest
from PIL import Image

import tinyldm
from tests.support import strict
from tests.support.pixel_models import write_model
from tests.support.small_pipelines import (
    CONFIGURATIONS,
    cascade,
    dit,
    inpainting,
    lcm,
    sdxl,
    upscaler,
)
from tests.support.small_unclip import unclip
from tinyldm import backend
from tinyldm.errors import TinyldmError
from tinyldm.layers import named_modules
from tinyldm.xray import drawing
from tinyldm.xray import record as module

PICTURE = Image.fromarray(np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3))
MASK = Image.fromarray(np.eye(12, dtype=np.uint8) * 255)
KINDS = {builder.__name__: (builder, {}) for builder in (*CONFIGURATIONS, sdxl, lcm, unclip)} | {
    "inpainting": (inpainting, {"image": PICTURE, "mask": MASK}),
    "upscaler": (upscaler, {"image": PICTURE}),
}


def recorded(pipe, prompt, gradients=True, **options):
    """-> the Record, after a check that its picture is the pipeline's."""
    options = {"num_inference_steps": 2, "seed": 5, "sampler": "ddim"} | options
    record = tinyldm.xray(pipe, prompt, gradients=gradients, **options)
    named = {} if prompt == "" else {"prompt": prompt} if pipe.tokenizers else {"label": prompt}
    image, = pipe(**named, **options)
    np.testing.assert_array_equal(np.asarray(record.image), np.asarray(image))
    for name, array in record.arrays.items():
        assert np.isfinite(array).all(), name
        assert array.dtype == {"images": np.uint8, "without": np.uint8,
                               "gradient_steps": np.int64}.get(name, np.float32), name
    return record


@pytest.mark.parametrize("kind", KINDS)
def test_pipelines_with_text(kind, tmp_path):
    build, options = KINDS[kind]
    pipe = tinyldm.load(build(tmp_path / "folder"))
    record = recorded(pipe, "a red cat!", **options)
    S, h, w, C = record["x_t"].shape
    assert S == 2 and record["images"].shape == (2, *np.asarray(record.image).shape)
    assert len(record.tokens) == 77 == len(record["context"])
    assert record.tokens[:6] == ["<start>", "a", "red", "cat", "!", "<end>"]
    assert [word.text for word in record.words] == ["a", "red", "cat", "!"]
    attentions = [array for name, array in record.arrays.items() if "attention/" in name]
    assert len(attentions) > 3
    for array in attentions:
        assert array.shape[0] == 2 and array.shape[-1] == 77
        np.testing.assert_allclose(array.sum(axis=-1), 1, rtol=1e-5)
    assert record.blocks[0].name == "conv_in" and record.blocks[-1].name == "conv_out"
    assert record["activation_mean"].shape == record["activation_std"].shape == (
        2, len(record.blocks))
    for i, block in enumerate(record.blocks):
        own = record[f"activation/{block.name}"]
        assert own.shape == (2, *block.shape)
        assert record[f"gradient/{block.name}"].shape == (2, *block.shape)
        np.testing.assert_allclose(record["activation_std"][1, i], own[1].std(), rtol=1e-4)
    assert record["activation/up_blocks.0"] is record["activation/up_blocks.0.upsamplers.0"]
    assert record["word_gradient"].shape == (2, 77, min(h, 8), min(w, 8))
    assert ("uncond" in record.arrays) == (kind != "lcm")
    assert ("embedding_gradient" in record.arrays) == (kind not in ("sdxl", "unclip"))
    assert ("without" in record.arrays) == (kind not in ("sdxl", "unclip", "upscaler",
                                                         "inpainting"))
    assert bool(record.left_out) == (kind in ("sdxl", "unclip", "upscaler", "inpainting", "lcm"))


@pytest.mark.parametrize("kind, label", [("plain", ""), ("guided", 2), ("dit", 1)])
def test_pipelines_without_text(kind, label, tmp_path):
    record = recorded(tinyldm.load(write_model(tmp_path / "model", kind)), label)
    assert record.words == record.tokens == record.boxes == []
    assert not [name for name in record.arrays if "attention/" in name or "word" in name]
    assert any(line.startswith("words: this pipeline reads no text") for line in record.left_out)
    for block in record.blocks:
        assert record[f"gradient/{block.name}"].shape == (2, *block.shape)
    assert len(record.blocks) == 2 if kind == "dit" else len(record.blocks) > 5
    assert abs(record.check["claimed"] / record.check["measured"] - 1) < 1e-5
    with pytest.raises(TinyldmError, match="has no array 'context': it has .*left_out"):
        record["context"]


def test_names_of_classes(tmp_path):
    pipe = tinyldm.load(dit(tmp_path / "folder"))
    record = recorded(pipe, "golden retriever")
    assert record["uncond"].shape == record["cond"].shape == record["x_t"].shape


def test_the_arrays_fit_together(small):
    """Forward process, guidance and DDIM's step, from the arrays alone."""
    record = recorded(small, "a cat", guidance_scale=4.0, num_inference_steps=3)
    a = record["alpha_bar"][:, None, None, None] ** 0.5
    s = (1 - record["alpha_bar"][:, None, None, None]) ** 0.5
    np.testing.assert_allclose(a * record["x_start"] + s * record["noise"], record["x_t"],
                               atol=1e-5)
    guided = record["uncond"] + 4 * (record["cond"] - record["uncond"])
    np.testing.assert_allclose(guided, record["model_output"], atol=1e-5)
    np.testing.assert_array_equal(record["noise"], record["model_output"])  # epsilon prediction
    following = a[1:] * record["x_start"][:-1] + s[1:] * record["noise"][:-1]
    np.testing.assert_allclose(following, record["x_t"][1:], atol=1e-5)
    noise = tinyldm.noise.randn((1, 4, 4, 4), 5)[0].transpose(1, 2, 0)
    np.testing.assert_array_equal(record["x_t"][0], noise)
    np.testing.assert_allclose(record["context"], small.encode_prompt("a cat")[0], atol=1e-6)
    states = [*small.stream("a cat", seed=5, num_inference_steps=3, sampler="ddim",
                            guidance_scale=4.0)]
    np.testing.assert_array_equal(record["x_start"], [state.pred_x0[0] for state in states])
    assert record["timesteps"].tolist() == [state.timestep for state in states]


@pytest.mark.parametrize("sampler", ["euler", "heun", "pndm", "dpmpp_2m_karras", "ddpm", None])
def test_samplers(small, sampler):
    record = recorded(small, "a cat", sampler=sampler, guidance_rescale=0.5, gradients=False,
                      num_inference_steps=4)
    a = record["alpha_bar"][:, None, None, None] ** 0.5
    s = (1 - record["alpha_bar"][:, None, None, None]) ** 0.5
    x_start = (record["x_t"] - s * record["model_output"]) / a
    if sampler != "pndm":                               # averages over several predictions
        np.testing.assert_allclose(x_start, record["x_start"], atol=0.02 * abs(x_start).max())
    assert record.sampler == (sampler or "ddim")


def test_colours_are_the_best_linear_map():
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 8, 8, 4)).astype(np.float32)
    weight, bias = 0.05 * rng.standard_normal((4, 3)), np.array([0.4, 0.5, 0.6])
    colours = latents @ weight + bias                   # (2,8,8,3)
    images = (colours * 255).round().astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    found = module.best_colours(latents, images)
    np.testing.assert_allclose(found["weight"], weight, atol=1e-3)
    np.testing.assert_allclose(found["bias"], bias, atol=1e-3)


def test_what_is_large_is_left_out(small, monkeypatch):
    everything = recorded(small, "a cat", num_inference_steps=3)
    monkeypatch.setattr(module, "SMALL", 8)             # its maps are 4x4 and 2x2
    monkeypatch.setattr(drawing, "SMALL", 8)
    monkeypatch.setattr(module, "HEADS", 3)
    record = recorded(small, "a cat", num_inference_steps=3)
    fine = [name for name in everything.arrays if "attention/" in name
            and everything[name].shape[2] == 4]
    coarse = [name for name in everything.arrays if "attention/" in name and name not in fine]
    assert fine and not set(fine) & record.arrays.keys()
    for name in coarse:
        np.testing.assert_allclose(record[name], everything[name].mean(axis=1, keepdims=True),
                                   rtol=1e-5)
    full = everything["activation/conv_in"]             # (3,4,4,8)
    np.testing.assert_allclose(record["activation/conv_in"], full.reshape(3, 2, 2, 2, 2, 8).mean(
        axis=(2, 4)), atol=1e-5)
    np.testing.assert_array_equal(record["activation_std"], everything["activation_std"])
    np.testing.assert_array_equal(record["images"][-1], everything["images"][-1])
    first = (record["x_start"][0] @ record.colours["weight"] + record.colours["bias"]).clip(0, 1)
    np.testing.assert_array_equal(record["images"][0][::4, ::4], (first * 255).round())
    assert not {"word_gradient", "embedding_gradient", "without"} & record.arrays.keys()
    assert record["gradient/conv_in"].shape == (3, 4, 4, 8) and not record.check
    for what in ("attention of maps", "single heads", "activations of maps", "decoded pictures",
                 "word_gradient"):
        assert any(line.startswith(what) for line in record.left_out), what


def test_a_function_in_place_of_the_unet(small):
    small.unet = lambda latents, timesteps, context: latents
    record = recorded(small, "a cat")
    assert record.blocks == [] and not [name for name in record.arrays if "/" in name]
    assert any("a function is in the network's place" in line for line in record.left_out)


def test_nothing_is_left_behind(small):
    small.unet.parameters()[0].trainable = False
    before = small("a cat", num_inference_steps=2)[0]
    recorded(small, "a cat")
    np.testing.assert_array_equal(small("a cat", num_inference_steps=2)[0], before)
    parameters = small.unet.parameters() + small.text_encoder.parameters()
    assert [parameter.trainable for parameter in parameters] == [False] + [True] * (
        len(parameters) - 1)
    assert all(parameter.grad is None for parameter in parameters)
    assert not [name for name, layer in named_modules(small.unet) if "backward" in vars(layer)]


def test_without_gradients(small):
    record = recorded(small, "a cat", gradients=False)
    assert not [name for name in record.arrays if "gradient" in name or name == "without"]
    assert record.left_out == ["gradients and the pictures without each word: gradients=False"]


@pytest.mark.filterwarnings("ignore:.*is read in 2 chunks")
def test_a_long_and_weighted_prompt(small):
    record = recorded(small, "a (red:1.5) cat, " * 20)
    assert len(record.tokens) == len(record["context"]) > 77
    assert record.tokens.count("<start>") == len(record.tokens) // 77
    assert record.words[-2].text == "cat" and len(record.words) == 80
    assert record["word_gradient"].shape[1] == len(record.tokens)
    assert "embedding_gradient" not in record.arrays
    assert any("a prompt of one chunk without weights" in line for line in record.left_out)


@pytest.mark.parametrize("options, message", [
    ({"num_images": 2}, "of one picture, not of 2"), ({"seed": [1, 2]}, "must have one for each"),
    ({"prompt": ["a", "b"]}, "of one prompt, a text"), ({"prompt": None}, "of one prompt, a text"),
    ({"widht": 64}, "did you mean width"), ({"sampler": "no"}, "sampler"),
    ({"num_inference_steps": 0}, "from 1 to 1000"), ({"label": 3}, "there is no option 'label'"),
])
def test_bad_input(small, options, message):
    with pytest.raises(TinyldmError, match=message):
        tinyldm.xray(small, **{"prompt": "a cat"} | options)


def test_what_is_not_one_network(tmp_path):
    with pytest.raises(TinyldmError, match="expects a pipeline, as tinyldm.load gives it, not a s"):
        tinyldm.xray("a cat")
    with pytest.raises(TinyldmError, match="of one network, but .* draws with two"):
        tinyldm.xray(tinyldm.load(cascade(tmp_path / "folder")), "a cat")
    pipe = tinyldm.load(write_model(tmp_path / "model", "plain"))
    with pytest.raises(TinyldmError, match="guidance_scale"):
        tinyldm.xray(pipe, guidance_scale=3.0)


@pytest.mark.parametrize("dtype, share", [("float32", 1e-3), ("float16", 0.1)])
def test_on_a_device(small_folder, dtype, share):
    """On strict arrays, which allow what CuPy allows: the record is the host's."""
    options = {"prompt": "a cat", "num_inference_steps": 2}
    with backend.plain():
        expected = tinyldm.xray(tinyldm.load(small_folder), **options)
        with strict.installed():
            found = tinyldm.xray(tinyldm.load(small_folder, device="cuda", dtype=dtype), **options)
            maps = tinyldm.attention_maps(tinyldm.load(small_folder, device="cuda"), **options)
    assert found.arrays.keys() == expected.arrays.keys() and not found.left_out
    for name, array in found.arrays.items():
        assert type(array) is np.ndarray, name
        if name != "without" and array.dtype == np.float32:
            scale = abs(expected[name]).max() + 1e-12
            np.testing.assert_allclose(array, expected[name], atol=share * scale, err_msg=name)
    assert abs(found.check["claimed"] / found.check["measured"] - 1) < 1e-4
    assert type(maps["cat"]) is np.ndarray


def test_the_module_is_the_function():
    import tinyldm.xray

    assert callable(tinyldm.xray) and tinyldm.xray.__name__ == "tinyldm.xray"
    assert "xray" in dir(tinyldm)
