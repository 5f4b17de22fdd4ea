"""CLIP's original files: recognised, read, and the same numbers as their authors' class."""

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import tinyldm
from tests.support.models import WHOLE_CLIPS
from tests.support.original_clip import OriginalCLIP
from tests.support.pairs import whole_clip_pair
from tests.support.reference import nchw, nhwc, randomise
from tests.support.tolerance import assert_close, within
from tinyldm.checkpoints.components import save_model
from tinyldm.checkpoints.single_file.clip import original_arrays
from tinyldm.errors import TinyldmError
from tinyldm.files import write_json
from tinyldm.layers import Tape, file_shape
from tinyldm.models import CLIPModel

OPEN_CLIP = {"act": nn.GELU, "sizes": False}
# open_clip's ViT-H-14 made narrow; what the rules look at stays: 16 heads of 80.
H14 = OPEN_CLIP | {"width": 1280, "heads": 16, "layers": 1, "hidden": 40}


def original(dtype=torch.float32, **changes):
    return randomise(OriginalCLIP(**changes).to(dtype)).eval()


def inputs(size=12):
    rng = np.random.default_rng(1)
    ids = rng.integers(3, 97, (3, 20))
    ids[[0, 1, 2], [5, 9, 19]] = 98
    return rng.standard_normal((2, size, size, 3)), ids


def same_logits(module, reference, relative=1e-10, dtype=np.float64):
    images, ids = inputs(module.settings.vision.image_size)
    with torch.no_grad():
        theirs = reference(nchw(images.astype(dtype)), torch.from_numpy(ids)).numpy()
    assert_close(module(images.astype(dtype), ids), theirs, relative)


@pytest.mark.parametrize("changes", [
    {}, {"patch": 3, "width": 128, "heads": 2, "text_layers": 2}, {"size": 16, "embed": 9}, H14],
    ids=str)
def test_numbers_and_gradients(changes, tmp_path):
    reference = original(torch.float64, **changes)
    torch.save(reference.state_dict(), tmp_path / "clip.pt")
    module = tinyldm.load_model(tmp_path / "clip.pt", dtype=np.float64)
    images, ids = inputs(changes.get("size", 12))
    x = nchw(images).requires_grad_()
    theirs = reference(x, torch.from_numpy(ids))
    tape = Tape()
    logits = module(images, ids, tape)
    assert_close(logits, theirs.detach().numpy(), 1e-10, "logits")
    dy = np.random.default_rng(2).standard_normal(logits.shape)
    theirs.backward(torch.from_numpy(dy))
    assert_close(module.backward(dy, tape), nhwc(x.grad), 1e-6, "dimages")
    grads = original_arrays({name: np.asarray(p.grad.transpose(3, 2, 0, 1) if p.grad.ndim == 4
                                              else p.grad) for name, p in
                             module.named_parameters()})
    for name, parameter in reference.named_parameters():
        size = abs(parameter.grad).max().item()
        within(abs(grads[name] - parameter.grad.numpy()).max(), 1e-6 * size + 1e-12, name)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_program_that_openai_published(tmp_path):
    """A TorchScript archive in float16, with whole numbers beside the weights."""
    reference = original().half()
    script = torch.jit.trace(reference.float(), (torch.zeros(1, 3, 12, 12),
                                                 torch.zeros(1, 20, dtype=torch.long)))
    torch.jit.save(script.half(), tmp_path / "ViT-B-32.pt")
    module = tinyldm.load_model(tmp_path / "ViT-B-32.pt")
    assert type(module) is CLIPModel and module.dtype == np.float32
    assert module.settings.vision.hidden_act == module.settings.text.hidden_act == "quick_gelu"
    same_logits(module, reference.float(), 1e-4, np.float32)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_open_clip_files(prefix, tmp_path, recwarn):
    """Training writes a state_dict in a dict. Without a config beside it, a note names the gelu."""
    reference = original(**OPEN_CLIP)
    state = {prefix + name: tensor for name, tensor in reference.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "epoch_3.pt")
    same_logits(tinyldm.load_model(tmp_path / "epoch_3.pt"), reference, 1e-4, np.float32)
    assert "does not say its activation: gelu is taken" in str(recwarn.pop().message)
    module = tinyldm.load_model(tmp_path / "epoch_3.pt", defaults={"hidden_act": "quick_gelu"})
    assert module.settings.text.hidden_act == "quick_gelu" and not recwarn.list


@pytest.mark.parametrize("quick", [True, False, None])
def test_open_clip_folders(quick, tmp_path, recwarn):
    """open_clip_config.json says the activation and the heads."""
    act = {} if quick else {"act": nn.GELU}
    reference = original(**{"sizes": False, "heads": 2, "text_heads": 4, **act})
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "open_clip_model.safetensors")
    config = {"vision_cfg": {"head_width": 32}, "text_cfg": {"heads": 4}}
    write_json(tmp_path / "open_clip_config.json",
               {"model_cfg": config | ({} if quick is None else {"quick_gelu": quick})})
    for path in tmp_path, tmp_path / "open_clip_model.safetensors":
        same_logits(tinyldm.load_model(path), reference, 1e-4, np.float32)
    assert not recwarn.list


@pytest.mark.parametrize("name", ["b32", "l14"])
def test_names_of_the_published_files(name):
    """Every name and shape of openai's files, there and back: without weights."""
    config = {"b32": {}, "l14": {
        "projection_dim": 768, "text_config": {"hidden_size": 768, "num_attention_heads": 12,
                                               "intermediate_size": 3072},
        "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14,
                          "num_hidden_layers": 24, "num_attention_heads": 16}}}[name]
    shapes = {key: file_shape(x) for key, x in CLIPModel(config).named_parameters()}
    arrays = {key: np.broadcast_to(np.float16(0), shape) for key, shape in shapes.items()}
    found = original_arrays(arrays)
    layers = {"b32": (12, 12), "l14": (24, 12)}[name]
    assert len(found) == 7 + 1 + 5 + 12 * sum(layers) + 1
    with torch.device("meta"):
        reference = OriginalCLIP(
            224, *{"b32": (32, 768, 12, 12, 3072, 512), "l14": (14, 1024, 24, 16, 4096, 768)}[name],
            text_layers=12, text_heads=8, vocabulary=49408, length=77, sizes=False,
            embed={"b32": 512, "l14": 768}[name])
    assert {key: array.shape for key, array in found.items()} == {
        key: tuple(x.shape) for key, x in reference.named_parameters()}


@pytest.mark.parametrize("name", WHOLE_CLIPS)
def test_there_and_back(name, tmp_path):
    """transformers -> the original -> transformers, bit for bit."""
    reference, module, images, ids = whole_clip_pair(WHOLE_CLIPS[name], torch.float32)
    arrays = original_arrays(module.state_dict())
    torch.save({key: torch.from_numpy(array.copy()) for key, array in arrays.items()},
               tmp_path / "clip.pt")
    act = WHOLE_CLIPS[name]["text_config"]["hidden_act"]
    again = tinyldm.load_model(tmp_path / "clip.pt", defaults={"hidden_act": act})
    for key, array in module.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[key], array, key)
    save_model(again, tmp_path / "folder", np.float32)
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "folder")
    for key, tensor in reference.state_dict().items():
        assert torch.equal(theirs.state_dict()[key], tensor), key
    assert theirs.config.text_config.hidden_act == act


# ---- files that do not fit -----------------------------------------------------------------------

def without(*names):
    return lambda state: {key: x for key, x in state.items() if key not in names}


@pytest.mark.parametrize("change, message", [
    (without("visual.proj"), "holds only a part of a CLIP"),
    (without("visual.conv1.weight"), "holds only a part of a CLIP"),
    (without("visual.class_embedding"), "image half is not a vision transformer"),
    (lambda state: state | {"visual.proj": torch.zeros(6)}, "holds only a part of a CLIP"),
    (lambda state: state | {"visual.wing": torch.zeros(6)}, "unexpected: 1: visual.wing"),
    (without("ln_final.bias"), "missing: 1: text_model.final_layer_norm.bias"),
    (lambda state: state | {"visual.positional_embedding": torch.zeros(9, 64)},
     "wrong shape: 1: vision_model.embeddings.position_embedding.weight"),
    (lambda state: state | {"visual.positional_embedding": torch.zeros(1, 64)}, "image_size must"),
    (lambda state: state | {"token_embedding.weight": torch.zeros(99, 50)}, "wrong shape"),
    (without("visual.transformer.resblocks.0.attn.in_proj_bias"), "missing: 3: vision_model"),
])
def test_bad_files(change, message, tmp_path):
    torch.save(change(original().state_dict()), tmp_path / "clip.pt")
    with pytest.raises(TinyldmError, match=message) as error:
        tinyldm.load_model(tmp_path / "clip.pt")
    assert "clip.pt" in str(error.value)


@pytest.mark.parametrize("config", [{}, {"model_cfg": 3}, {"model_cfg": {"vision_cfg": {}}},
                                    {"model_cfg": {"vision_cfg": {"head_width": 0},
                                                   "text_cfg": {}}}], ids=str)
def test_bad_configs_beside_files(config, tmp_path):
    torch.save(original().state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    write_json(tmp_path / "open_clip_config.json", config)
    with pytest.raises(TinyldmError, match="open_clip_config.json must have an object model_cfg"):
        tinyldm.load_model(tmp_path)


def test_load_says_what_reads_a_clip(tmp_path):
    torch.save(original().state_dict(), tmp_path / "clip.pt")
    save_model(tinyldm.load_model(tmp_path / "clip.pt"), tmp_path / "folder")
    for path in "clip.pt", "folder":
        with pytest.raises(TinyldmError, match="load_model"):
            tinyldm.load(tmp_path / path)
