"""The original DiT's file: recognised, read, and the same numbers as its authors' class."""
import argparse
import re

import numpy as np
import pytest
import safetensors.numpy
import torch

import tinyldm
from tests.support.arrays import read_only
from tests.support.keys import digest
from tests.support.original_dit import OriginalDiT
from tests.support.reference import nchw, nhwc, randomise
from tests.support.tolerance import assert_close, within
from tinyldm.errors import TinyldmError
from tinyldm.inspect.__main__ import main as inspect
from tinyldm.layers import Tape
from tinyldm.models.dit import config_of

SMALL = {"depth": 2, "width": 64, "heads": 1, "patch": 2, "size": 8, "classes": 10}


def original(dtype=torch.float32, **changes):
    """Random weights, but the positions as they are."""
    model = OriginalDiT(**SMALL | changes)
    fixed = model.pos_embed.data.clone()
    model = randomise(model).to(dtype).eval()
    model.pos_embed.data = fixed.to(dtype)
    return model


def state(model):
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def write(path, tensors):
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
    return path


def inputs(channels=4, size=8):
    latents = np.random.default_rng(1).standard_normal((3, size, size, channels))
    return read_only(latents), read_only([0, 10, 999]), read_only([0, 10, 3])


@pytest.mark.parametrize("changes", [
    {}, {"patch": 4, "size": 16}, {"width": 128, "heads": 2, "out": 4},
    {"width": 1152, "heads": 16, "depth": 1, "patch": 4}], ids=str)
def test_numbers_and_gradients(changes, tmp_path):
    """The gradients of the blocks' embeddings add up to that of the file's one."""
    reference = original(torch.float64, **changes)
    torch.save(reference.state_dict(), tmp_path / "DiT.pt")
    module = tinyldm.load_model(tmp_path / "DiT.pt", dtype=np.float64)
    latents, timesteps, labels = inputs(size=(SMALL | changes)["size"])
    x = nchw(latents).requires_grad_()
    theirs = reference(x, torch.from_numpy(timesteps.copy()), torch.from_numpy(labels.copy()))
    tape = Tape()
    ours = module(latents, timesteps, labels, tape)
    assert_close(ours, nhwc(theirs), 1e-10, "output")
    dy = read_only(np.random.default_rng(2).standard_normal(ours.shape))
    theirs.backward(nchw(dy))
    assert_close(module.backward(dy, tape), nhwc(x.grad), 1e-6, "dlatents")
    expected = gradients(reference)
    found = dict.fromkeys(expected, 0)
    for name, parameter in module.named_parameters():
        block, _, embedding = name.partition(".norm1.emb.")
        found[embedding or block] = found[embedding or block] + parameter.grad
    for name, gradient in expected.items():
        within(abs(found[name] - gradient).max(), 1e-6 * abs(gradient).max() + 1e-12, name)


def gradients(reference):
    """The original's gradients under our names, q, k and v apart, in our order of axes."""
    names = {"x_embedder.proj": "pos_embed.proj", "t_embedder.mlp.0": "timestep_embedder.linear_1",
             "t_embedder.mlp.2": "timestep_embedder.linear_2",
             "y_embedder.embedding_table": "class_embedder.embedding_table",
             "final_layer.adaLN_modulation.1": "proj_out_1", "final_layer.linear": "proj_out_2"}
    inner = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0",
             "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
    found = {}
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            stem, _, kind = name.rpartition(".")
            gradient = parameter.grad.numpy()
            if gradient.ndim == 4:
                gradient = gradient.transpose(2, 3, 1, 0)
            block, _, part = stem.removeprefix("blocks.").partition(".")
            part = part if stem.startswith("blocks.") else ""
            if part == "attn.qkv":
                for word, third in zip("qkv", np.split(gradient, 3)):
                    found[f"transformer_blocks.{block}.attn1.to_{word}.{kind}"] = third
            elif part in inner:
                found[f"transformer_blocks.{block}.{inner[part]}.{kind}"] = gradient
            else:
                found[f"{names[stem]}.{kind}"] = gradient
    return found


def test_what_differs_from_diffusers(tmp_path):
    """With the same weights the outputs differ where the timestep is large: another divisor."""
    module = tinyldm.load_model(write(tmp_path / "x.safetensors", state(original())))
    assert module.config["freq_shift"] == 0 and module.config["norm_eps"] == 1e-6
    copied = type(module)({**module.config, "freq_shift": 1, "norm_eps": 1e-5})
    copied.load_state_dict(module.state_dict())
    latents, timesteps, labels = inputs()
    x = latents.astype(np.float32)
    ours, theirs = module(x, timesteps, labels), copied(x, timesteps, labels)
    near = [abs(a - b).max() / a.std() for a, b in zip(ours, theirs)]
    assert near[0] < 1e-3 and near[0] < near[1] < near[2] and near[2] > 0.05


def test_names_are_those_of_the_published_file():
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape)
                  for name, tensor in OriginalDiT(28, 1152, 16, 2).state_dict().items()}
    rows = [("dit", name, shape) for name, shape in shapes.items()]
    assert digest(rows) == "168d26a9fab8de73" and len(rows) == 292


@pytest.mark.parametrize("size, width, heads, patch, sample", [
    ("S", 384, 6, 4, 32), ("B", 768, 12, 8, 32), ("L", 1024, 16, 2, 32), ("XL", 1152, 16, 2, 64)])
def test_the_published_sizes_are_known_by_their_shapes(size, width, heads, patch, sample, tmp_path):
    """Only the number of blocks is made small."""
    model = OriginalDiT(1, width, heads, patch, sample)
    config = tinyldm.load_model(write(tmp_path / "x.safetensors", state(model))).config
    expected = config_of(size, patch, sample, num_layers=1, norm_eps=1e-6, freq_shift=0)
    assert config == expected


def test_files_of_a_training(tmp_path):
    """train.py writes two sets of weights, its optimizer and its arguments: the average counts."""
    trained, average = original(), original()
    average.final_layer.linear.bias.data += 1
    optimizer = torch.optim.AdamW(trained.parameters())
    trained(torch.zeros(1, 4, 8, 8), torch.tensor([1]), torch.tensor([1])).sum().backward()
    optimizer.step()
    torch.save({"model": trained.state_dict(), "ema": average.state_dict(),
                "opt": optimizer.state_dict(), "args": argparse.Namespace(model="DiT-XL/2")},
               tmp_path / "0400000.pt")
    module = tinyldm.load_model(tmp_path / "0400000.pt")
    np.testing.assert_array_equal(module.proj_out_2.bias.data,
                                  average.final_layer.linear.bias.detach())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_wrapped_names_and_float16(prefix, tmp_path):
    tensors = {prefix + name: tensor.astype(np.float16)
               for name, tensor in state(original()).items()}
    module = tinyldm.load_model(write(tmp_path / "x.safetensors", tensors))
    assert np.isfinite(module(*(x.astype(np.float32) if x.dtype == float else x
                                for x in inputs()))).all()


def without(*names):
    return lambda tensors: {name: x for name, x in tensors.items() if name not in names}


def replaced(name, change):
    return lambda tensors: {**tensors, name: change(tensors[name])}


QKV = "blocks.1.attn.qkv.weight"


@pytest.mark.parametrize("change, message", [
    (without(QKV), "does not fit .* missing: .*transformer_blocks.1.attn1.to_q.weight"),
    (without("final_layer.linear.weight"), "holds only a part of a DiT: get the whole file"),
    (without("y_embedder.embedding_table.weight"), "holds an unknown kind of model"),
    (without("blocks.0.mlp.fc1.bias"), "missing: .*transformer_blocks.0.ff.net.0.proj.bias"),
    (lambda tensors: {**tensors, "extra.weight": np.zeros(3, np.float32)},
     "unexpected: .*extra.weight"),
    (lambda tensors: {**tensors, "blocks.0.norm1.weight": np.zeros(64, np.float32)},
     "unexpected: .*blocks.0.norm1.weight"),
    (replaced(QKV, lambda x: x[:100]), "wrong shape: .*transformer_blocks.1.attn1.to_q"),
    (replaced(QKV, lambda x: np.float32(3).reshape(())), "missing: .*to_q"),
    (replaced("pos_embed", lambda x: x + 1), "its pos_embed is not DiT's table"),
    (replaced("pos_embed", lambda x: x[:, :7]), "64 channels and 7 tokens: expected"),
    (replaced("pos_embed", lambda x: x[0, 0]), "holds only a part of a DiT"),
    (replaced("x_embedder.proj.weight", lambda x: x[:60]), "60 channels and 16 tokens: expected"),
    (replaced("x_embedder.proj.weight", lambda x: x[0]), "holds only a part of a DiT"),
    (replaced("x_embedder.proj.weight", lambda x: x[:, :, :1]), "wrong shape: .*proj_out_2|pos_e"),
    (replaced("x_embedder.proj.bias", lambda x: x * np.nan), "holds NaN"),
    (lambda tensors: {**tensors, "blocks.9999.mlp.fc1.bias": np.zeros(256, np.float32)},
     "holds no DiT that is supported .num_layers must be"),
    (replaced("x_embedder.proj.weight", lambda x: x[:0]), "0 channels and 16 tokens: expected"),
    (replaced("x_embedder.proj.weight", lambda x: x[:, :, :0, :0]), "expected a multiple of 64"),
    (replaced("y_embedder.embedding_table.weight", lambda x: x[:0]), "num_embeds_ada_norm must be"),
    (replaced("final_layer.linear.weight", lambda x: x[:3]), "out_channels must be"),
    (lambda tensors: {**tensors, "pos_embed": np.zeros((1, 10**6, 1), np.float32),
                      "x_embedder.proj.weight": np.zeros((65536, 4, 1, 1), np.float32)},
     "its pos_embed is not DiT's table|not supported|sample_size must be"),
    (lambda tensors: {**tensors, "pos_embed": np.zeros((1, 90000, 1), np.float32),
                      "x_embedder.proj.weight": np.zeros((65536, 4, 1, 1), np.float32)},
     "its pos_embed is not DiT's table"),
])
def test_files_that_do_not_fit(change, message, tmp_path):
    file = write(tmp_path / "x.safetensors", change(state(original())))
    with pytest.raises(TinyldmError) as error:
        tinyldm.load_model(file)
    assert re.search(message, str(error.value).replace("\n", " ")), error.value


def test_inspect_tells_what_it_is(tmp_path, capsys):
    file = write(tmp_path / "x.safetensors", without("blocks.0.mlp.fc1.bias")(state(original())))
    assert inspect([str(file)]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert {"layout: original", "kind: DiT", "unexpected: none",
            "one component: DiTTransformer2DModel (--vae gives it a VAE to draw with)",
            "missing: 1: transformer_blocks.0.ff.net.0.proj.bias",
            "left out, as it is no weight: 1: pos_embed"} <= set(lines)
