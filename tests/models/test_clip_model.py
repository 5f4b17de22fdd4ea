"""CLIP as a whole against transformers on random weights: logits, loss and all gradients."""
import copy
import math

import numpy as np
import pytest
import torch
import transformers

import tinyldm
from tests.support import strict
from tests.support.keys import digest
from tests.support.models import WHOLE_CLIPS, make
from tests.support.pairs import whole_clip_pair
from tests.support.reference import assert_same_gradients, nchw, nhwc
from tests.support.tolerance import assert_close, within
from tinyldm import backend, ops
from tinyldm.checkpoints.components import save_model
from tinyldm.errors import TinyldmError
from tinyldm.files import read_json, write_json
from tinyldm.layers import Tape, file_shape
from tinyldm.models import CLIPModel

PUBLISHED = {   # changes of the default config, tensors, numbers, digest of the list
    "B/32": ({}, 398, 151_277_313, "6abb568bec0fcd43"),
    "L/14": ({"projection_dim": 768,
              "text_config": {"hidden_size": 768, "intermediate_size": 3072,
                              "num_attention_heads": 12},
              "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14,
                                "num_hidden_layers": 24, "num_attention_heads": 16}},
             590, 427_616_513, "0703b86965ad9759"),
}


def call(reference, x, ids, **options):
    return reference(torch.from_numpy(ids.copy()), x, **options)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("name", WHOLE_CLIPS)
def test_loss_and_gradients(name, count):
    """With return_loss=True: the gradient of everything, logit_scale too; of one pair it is 0."""
    reference, module, images, ids = whole_clip_pair(WHOLE_CLIPS[name], torch.float64, count)
    x = nchw(images).requires_grad_()
    theirs = call(reference, x, ids, return_loss=True)
    tape = Tape()
    logits = module.forward(images, ids, tape)
    assert_close(logits, theirs.logits_per_image.detach().numpy(), 1e-10, "logits")
    loss, cache = ops.contrastive(logits)
    within(abs(loss - theirs.loss.item()), 1e-12)
    theirs.loss.backward()
    dimages = module.backward(ops.contrastive_backward(1.0, cache), tape)
    assert not tape.entries
    if count == 1:
        assert loss == 0 and not any(parameter.grad.any() for parameter in module.parameters())
        return
    assert abs(reference.logit_scale.grad) > 1e-3
    assert_same_gradients(reference, module)
    assert_close(dimages, nhwc(x.grad), 1e-6, "dimages")


@pytest.mark.parametrize("name", WHOLE_CLIPS)
def test_logits_of_any_number_of_texts(name):
    reference, module, images, ids = whole_clip_pair(WHOLE_CLIPS[name], torch.float64, 5)
    x = nchw(images[:2]).requires_grad_()
    theirs = call(reference, x, ids).logits_per_image
    tape = Tape()
    logits = module(images[:2], ids, tape)
    dy = np.random.default_rng(3).standard_normal((2, 5))
    theirs.backward(torch.from_numpy(dy))
    dimages = module.backward(dy, tape)
    assert_same_gradients(reference, module)
    assert_close(dimages, nhwc(x.grad), 1e-6, "dimages")
    np.testing.assert_array_equal(logits, module(images[:2], ids))


@pytest.mark.parametrize("name", WHOLE_CLIPS)
def test_float32_and_embeddings(name):
    reference, module, images, ids = whole_clip_pair(WHOLE_CLIPS[name], torch.float32, 3)
    with torch.no_grad():
        theirs = call(reference, nchw(images), ids).logits_per_image.numpy()
        pictures = reference.get_image_features(nchw(images)).pooler_output.numpy()
        texts = reference.get_text_features(torch.from_numpy(ids.copy())).pooler_output.numpy()
    for limit, plain in (1e-3, False), (1e-4, True):
        with backend.plain(plain):
            assert_close(module(images, ids), theirs, limit, "logits")
            assert_close(module.encode_image(images), pictures, limit, "image_embeds")
            assert_close(module.encode_text(ids), texts, limit, "text_embeds")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_on_strict_arrays(dtype):
    """What CuPy would refuse is refused; in float16 the numbers are near."""
    module = make("CLIPModel as L/14")
    images = np.random.default_rng(1).standard_normal((3, 12, 12, 3))
    ids = np.random.default_rng(1).integers(3, 99, (3, 77))
    expected = module(images, ids)
    with strict.installed() as xp:
        for parameter in module.parameters():
            parameter.data = strict.Array(parameter.data.astype(dtype))
        tape = Tape()
        logits = module(strict.Array(images.astype(dtype)), strict.Array(ids), tape)
        assert logits.dtype == dtype
        assert_close(logits.get().astype(np.float64), expected, 0.03)
        loss, cache = ops.contrastive(logits)
        dimages = module.backward(ops.contrastive_backward(1.0, cache), tape)
        assert isinstance(dimages, xp.ndarray)
        assert all(parameter.grad.dtype == dtype for parameter in module.parameters())
        module.clamp_scale()
        assert module.logit_scale.data.dtype == dtype


def test_the_scale_is_at_most_100():
    module = make("CLIPModel as L/14")
    for dtype in (np.float32, np.float64):
        for before, after in (3.5, 3.5), (4.7, math.log(100)), (1e3, math.log(100)), (-1.0, -1.0):
            module.logit_scale.data = np.array(before, dtype)
            module.clamp_scale()
            assert module.logit_scale.data == dtype(after)
            assert module.logit_scale.data.shape == () and module.logit_scale.data.dtype == dtype


# ---- names and configs ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", PUBLISHED)
def test_names_are_those_of_the_published_files(name):
    """openai/clip-vit-base-patch32 and openai/clip-vit-large-patch14."""
    config, tensors, numbers, expected = PUBLISHED[name]
    rows = [("clip", key, file_shape(parameter))
            for key, parameter in CLIPModel(config).named_parameters()]
    assert len(rows) == tensors and sum(math.prod(shape) for *_, shape in rows) == numbers
    assert digest(rows) == expected
    with torch.device("meta"):
        reference = transformers.CLIPModel(transformers.CLIPConfig(**config))
    assert {key: tuple(x.shape) for key, x in reference.named_parameters()} == {
        key: shape for _, key, shape in rows}


def test_older_files_have_each_config_twice():
    """text_config_dict wins, as in transformers, and so does the outer projection_dim."""
    config = dict(WHOLE_CLIPS["as L/14"], vision_config_dict=None,
                  text_config_dict=WHOLE_CLIPS["as H/14, old"]["text_config"])
    with torch.device("meta"):
        reference = transformers.CLIPModel(     # which writes into the dicts it gets
            transformers.CLIPConfig(**copy.deepcopy(config)))
    assert {key: file_shape(x) for key, x in CLIPModel(config).named_parameters()} == {
        key: tuple(x.shape) for key, x in reference.named_parameters()}


@pytest.mark.parametrize("changes, message", [
    ({"projection_dim": "6"}, "projection_dim must be a positive whole number"),
    ({"text_config": [1]}, "text_config must be an object"),
    ({"text_config": {"hidden_act": "relu"}}, 'text_config: hidden_act must be "quick_gelu" or'),
    ({"vision_config": {"num_attention_heads": 7}}, "vision_config: num_attention_heads must div"),
    ({"text_config": {"vocab_size": 10, "eos_token_id": 10}}, "text_config: eos_token_id must be"),
    ({"quantization_config": {"bits": 4}}, "quantization_config = .* is not supported"),
])
def test_refused_configs(changes, message):
    with pytest.raises(TinyldmError, match=message):
        CLIPModel(changes)


def test_unknown_keys_of_the_halves_are_named(tmp_path, recwarn):
    module = make("CLIPModel as L/14")
    save_model(module, tmp_path, np.float32)
    config = read_json(tmp_path / "config.json")
    config["vision_config"]["wings"], config["text_config"]["tail"], config["ears"] = 1, 2, 3
    write_json(tmp_path / "config.json", config)
    tinyldm.load_model(tmp_path)
    assert "has keys that are unknown here and play no part (3: ears, tail, wings)" in str(
        recwarn.pop().message)


# ---- folders ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", WHOLE_CLIPS)
def test_folders_of_both(name, tmp_path):
    reference, module, images, ids = whole_clip_pair(WHOLE_CLIPS[name], torch.float32)
    reference.save_pretrained(tmp_path / "theirs")
    loaded = tinyldm.load_model(tmp_path / "theirs")
    np.testing.assert_array_equal(loaded(images, ids), module(images, ids))
    save_model(module, tmp_path / "ours", np.float32)
    theirs, report = transformers.CLIPModel.from_pretrained(tmp_path / "ours",
                                                            output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        np.testing.assert_array_equal(call(theirs, nchw(images), ids).logits_per_image,
                                      call(reference, nchw(images), ids).logits_per_image)


@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection",
                                  "CLIPVisionModel", "CLIPVisionModelWithProjection"])
def test_one_half_of_a_file_of_both(kind, tmp_path):
    """The half that a config names, from weights of both halves, as transformers loads it."""
    reference, _, images, ids = whole_clip_pair(WHOLE_CLIPS["as L/14"], torch.float32)
    reference.save_pretrained(tmp_path)
    config = WHOLE_CLIPS["as L/14"]["text_config" if "Text" in kind else "vision_config"]
    write_json(tmp_path / "config.json", config | {"architectures": [kind], "projection_dim": 6})
    module = tinyldm.load_model(tmp_path)
    assert type(module).__name__ == kind
    names = {name for name, _ in module.named_parameters()}
    assert names <= set(reference.state_dict())
    for name, parameter in module.named_parameters():
        assert file_shape(parameter) == tuple(reference.state_dict()[name].shape)
