"""CLIP's vision transformer against transformers on random weights: outputs and all gradients."""
import math

import numpy as np
import pytest
import torch
import transformers

import tinyldm
from tests.support import strict
from tests.support.arrays import read_only
from tests.support.models import VISIONS, random_weights, with_weights
from tests.support.pairs import vision_pair
from tests.support.reference import assert_same_gradients, nchw, nhwc, reference_names
from tests.support.tolerance import assert_close, within
from tinyldm import backend
from tinyldm.checkpoints.components import save_model
from tinyldm.errors import TinyldmError
from tinyldm.files import read_json, write_json
from tinyldm.layers import Tape, file_shape
from tinyldm.models import CLIPVisionModel, CLIPVisionModelWithProjection

PROJECTING = {name: dict(config, projection_dim=7) for name, config in VISIONS.items()}
ALL = VISIONS | {f"{name}, projecting": config for name, config in PROJECTING.items()}


def call(reference, x):
    """-> all hidden states, and the pooled or projected output."""
    y = reference(x, output_hidden_states=True)
    return y.hidden_states, y.image_embeds if hasattr(y, "image_embeds") else y.pooler_output


@pytest.mark.parametrize("skip", [0, 1, "all"])
@pytest.mark.parametrize("name", ALL)
def test_gradients(name, skip):
    reference, module, images = vision_pair(ALL[name], torch.float64)
    skip = ALL[name]["num_hidden_layers"] if skip == "all" else skip
    x = nchw(images).requires_grad_()
    states, pooled = call(reference, x)
    expected = states[-1 - skip], pooled
    tape = Tape()
    ours = module.forward(images, tape, skip=skip)
    rng = np.random.default_rng(2)
    dys = [read_only(rng.standard_normal(y.shape)) for y in ours]
    for what, y, same in zip(("hidden", "pooled"), ours, expected):
        assert_close(y, same.detach().numpy(), 1e-10, what)
    torch.autograd.backward(expected, [torch.from_numpy(dy.copy()) for dy in dys])
    dimages = module.backward(*dys, tape)
    assert not tape.entries
    assert_same_gradients(reference, module)
    assert_close(dimages, nhwc(x.grad), 1e-6, "dimages")
    for y, same in zip(ours, module.forward(images, skip=skip)):
        np.testing.assert_array_equal(y, same)


def test_without_a_gradient_of_the_hidden_state():
    reference, module, images = vision_pair(PROJECTING["as L/14"], torch.float64)
    tape = Tape()
    dy = read_only(np.random.default_rng(2).standard_normal(module(images, tape)[1].shape))
    call(reference, nchw(images))[1].backward(torch.from_numpy(dy.copy()))
    module.backward(None, dy, tape)
    assert not tape.entries
    assert_same_gradients(reference, module)


@pytest.mark.parametrize("name", ALL)
def test_float32(name):
    reference, module, images = vision_pair(ALL[name], torch.float32)
    with torch.no_grad():
        states, pooled = call(reference, nchw(images))
    for limit, plain in (1e-3, False), (1e-4, True):
        with backend.plain(plain):
            hidden, ours = module(images)
        assert_close(hidden, states[-1].numpy(), limit)
        assert_close(ours, pooled.numpy(), limit)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_on_strict_arrays(dtype):
    """What CuPy would refuse is refused; in float16 the numbers are near."""
    module = CLIPVisionModelWithProjection(PROJECTING["as L/14"])
    module = with_weights(module, random_weights(module, 0, dtype))
    images = np.random.default_rng(1).standard_normal((2, 12, 12, 3)).astype(dtype)
    with backend.plain():
        expected = module(images.astype(np.float32))
    with strict.installed() as xp:
        for parameter in module.parameters():
            parameter.data = strict.Array(parameter.data)
        tape = Tape()
        ys = module(strict.Array(images), tape)
        for y, same in zip(ys, expected):
            assert y.dtype == dtype
            assert_close(y.get().astype(np.float32), same, 0.03 if dtype == np.float16 else 1e-4)
        assert isinstance(module.backward(*ys, tape), xp.ndarray)
        assert all(parameter.grad.dtype == dtype for parameter in module.parameters())


def test_the_traps():
    """The norm before the layers counts; that after them sees the class token only."""
    module = vision_pair(VISIONS["as L/14"], torch.float32)[1]
    images = vision_pair(VISIONS["as L/14"], torch.float32)[2]
    hidden, pooled = module(images)
    vision = module.vision_model
    np.testing.assert_array_equal(vision.post_layernorm(hidden[:, 0]), pooled)
    first = module(images, skip=3)[0]                   # entry 0 of the hidden states
    np.testing.assert_array_equal(first, vision.pre_layrnorm(vision.embeddings(images)))
    moved = np.roll(images, 4, axis=2)                  # the patches of each row change places
    second = module(moved, skip=3)[0]
    within(abs(first[:, 0] - second[:, 0]).max(), 1e-6)     # the class token is the first
    assert abs(first[:, 1:] - second[:, 1:]).max() > 0.1


# ---- names, configs, folders --------------------------------------------------------------------

def test_names_of_l14():
    """SD's image encoder: 392 tensors, 303,966,208 numbers."""
    config = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                  num_attention_heads=16, patch_size=14, projection_dim=768)
    shapes = {name: file_shape(parameter) for name, parameter in
              CLIPVisionModelWithProjection(config).named_parameters()}
    assert len(shapes) == 392 and sum(map(math.prod, shapes.values())) == 303_966_208
    with torch.device("meta"):
        reference = transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**config))
    assert shapes == {name: tuple(x.shape) for name, x in reference_names(reference)}


def test_defaults_are_those_of_transformers():
    with torch.device("meta"):
        reference = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig())
    assert {name: file_shape(x) for name, x in
            CLIPVisionModelWithProjection({}).named_parameters()} == {
        name: tuple(x.shape) for name, x in reference_names(reference)}


@pytest.mark.parametrize("changes, message", [
    ({"num_attention_heads": 5}, "num_attention_heads must divide hidden_size, 24, but 5"),
    ({"hidden_act": "relu"}, 'hidden_act must be "quick_gelu" or "gelu"'),
    ({"patch_size": 13}, "patch_size must be at most image_size, 12, not 13"),
    ({"image_size": [12, 12]}, "image_size must be a positive whole number"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
    ({"num_channels": "3"}, "num_channels must be"), ({"layer_norm_eps": 0}, "layer_norm_eps must"),
    ({"projection_dim": 0}, "projection_dim must be"),
    ({"quantization_config": {}}, "quantization_config = {} is not supported"),
])
def test_refused_configs(changes, message):
    with pytest.raises(TinyldmError, match=message):
        CLIPVisionModelWithProjection(PROJECTING["as L/14"] | changes)


def test_inputs_that_do_not_fit():
    module = vision_pair(VISIONS["as L/14"], torch.float32)[1]
    with pytest.raises(AssertionError, match="images must be 12 high and wide"):
        module(np.zeros((1, 12, 8, 3), np.float32))
    with pytest.raises(AssertionError, match="skip = 4, but there are 3 layers"):
        module(np.zeros((1, 12, 12, 3), np.float32), skip=4)
    with pytest.raises(AssertionError, match="never filled"):
        CLIPVisionModel(VISIONS["as L/14"])(np.zeros((1, 12, 12, 3), np.float32))


@pytest.mark.parametrize("name", ["as L/14", "as L/14, projecting"])
def test_folders_of_both(name, tmp_path):
    """Ours in transformers, and transformers' here."""
    reference, module, images = vision_pair(ALL[name], torch.float32)
    reference.save_pretrained(tmp_path / "theirs")
    for y, same in zip(tinyldm.load_model(tmp_path / "theirs")(images), module(images)):
        np.testing.assert_array_equal(y, same)
    save_model(module, tmp_path / "ours", np.float32)
    theirs, report = type(reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for key, tensor in reference.state_dict().items():
        assert torch.equal(theirs.state_dict()[key], tensor), key


@pytest.mark.parametrize("habit", ["prefix", "no prefix", "both halves", "model_type only"])
def test_habits_of_files(habit, tmp_path):
    """With and without `vision_model.`, positions, CLIP's other half, a config without a class."""
    _, module, images = vision_pair(VISIONS["as L/14"], torch.float32)
    save_model(module, tmp_path, np.float32)
    arrays = module.state_dict()
    if habit == "no prefix":
        arrays = {name.removeprefix("vision_model."): array for name, array in arrays.items()}
    if habit == "both halves":
        arrays |= {name: np.zeros(2, np.float32) for name in (
            "text_model.final_layer_norm.weight", "text_projection.weight", "logit_scale",
            "visual_projection.weight")}
    arrays["vision_model.embeddings.position_ids"] = np.arange(10)[None]
    if habit == "model_type only":
        config = read_json(tmp_path / "config.json")
        write_json(tmp_path / "config.json", {key: value for key, value in config.items()
                                              if key != "architectures"})
    (tmp_path / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()},
               tmp_path / "pytorch_model.bin")
    np.testing.assert_array_equal(tinyldm.load_model(tmp_path)(images)[1], module(images)[1])


def test_a_file_that_does_not_fit(tmp_path):
    _, module, _ = vision_pair(VISIONS["as L/14"], torch.float32)
    save_model(module, tmp_path, np.float32)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", config | {"num_hidden_layers": 4, "patch_size": 3})
    with pytest.raises(TinyldmError, match="does not fit the CLIPVisionModel of its") as error:
        tinyldm.load_model(tmp_path)
    assert "encoder.layers.3" in str(error.value) and "patch_embedding" in str(error.value)
