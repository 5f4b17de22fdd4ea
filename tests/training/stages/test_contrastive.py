"""CLIP's loss over shards, against the whole batch at once, transformers, finite differences."""
import math
from functools import partial

import numpy as np
import pytest
import torch
import transformers

from tests.support.captioned import write_captioned
from tests.support.small_clip import write_clip
from tests.support.tolerance import assert_allclose, within
from tinyldm import ops
from tinyldm.layers import Tape
from tinyldm.models import CLIPModel
from tinyldm.pipelines.zero_shot import ZeroShot
from tinyldm.tape import nbytes_of, observed
from tinyldm.training import memory
from tinyldm.training.data.pictures import PictureFolder
from tinyldm.training.options import parse
from tinyldm.training.report import read_log
from tinyldm.training.stages import clip as stages
from tinyldm.training.stages.contrastive import Pairs, initialise_clip

RATE, DECAY, CLIP = 1e-3, 0.2, 0.5


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("weights") / "clip")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_captioned(tmp_path_factory.mktemp("pictures") / "data")


def pairs_of(weights, pictures, dtype=np.float64, seed=0):
    clip = ZeroShot.load(weights, dtype)
    folder = PictureFolder(pictures, 12, center_crop=False, filter="bicubic")
    for parameter in clip.model.parameters():
        parameter.data = parameter.data.copy()
    return Pairs(clip, folder, seed)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()
            if parameter.grad is not None}


# ---- shards --------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [2, 3, 5, 9])
def test_shards_give_the_gradient_of_the_whole_batch(size, weights, pictures):
    pairs = pairs_of(weights, pictures)
    report = pairs.batch_loss(1, size)
    found = gradients(pairs.model)
    pairs.model.zero_grad()
    samples, tape = pairs.samples(1, size), Tape()
    ids = np.concatenate([pairs.clip.tokenizer(sample.caption) for sample in samples])
    logits = pairs.model(pairs.pixels(samples), ids, tape)
    loss, cache = ops.contrastive(logits)
    pairs.model.backward(ops.contrastive_backward(1.0, cache), tape)
    within(abs(report["loss"] - loss), 1e-13)
    assert report["expected"] == math.log(size)
    assert report["found"] == np.mean(logits.argmax(axis=1) == np.arange(size))
    assert found.keys() == gradients(pairs.model).keys() == dict(
        pairs.model.named_parameters()).keys()
    for name, gradient in gradients(pairs.model).items():
        within(abs(gradient - found[name]).max(), 1e-12 * max(1, abs(gradient).max()), name)


def test_threads_change_no_bit(weights, pictures, monkeypatch):
    found = []
    for threads in ("1", "2", "3", "8"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        pairs = pairs_of(weights, pictures, np.float32)
        found.append((pairs.batch_loss(0, 7), gradients(pairs.model)))
    for report, others in found[1:]:
        assert report == found[0][0]
        for name, gradient in others.items():
            np.testing.assert_array_equal(gradient, found[0][1][name])


def test_checkpoints_change_no_gradient(weights, pictures):
    pairs = pairs_of(weights, pictures)
    pairs.batch_loss(0, 5)
    plain = gradients(pairs.model)
    pairs.model.zero_grad()
    pairs.checkpoints = True
    pairs.batch_loss(0, 5)
    for name, gradient in gradients(pairs.model).items():
        np.testing.assert_array_equal(gradient, plain[name])


def test_the_loss_scale_is_that_of_all_gradients(weights, pictures):
    """A power of 2: bitwise."""
    pairs = pairs_of(weights, pictures)
    report, plain = pairs.batch_loss(0, 5), gradients(pairs.model)
    pairs.model.zero_grad()
    assert pairs.batch_loss(0, 5, 1024.0) == report
    for name, gradient in gradients(pairs.model).items():
        np.testing.assert_array_equal(gradient, 1024 * plain[name])


def test_finite_differences(weights, pictures):
    """One random direction in the space of all parameters, and the scale alone."""
    pairs, rng = pairs_of(weights, pictures), np.random.default_rng(1)
    pairs.batch_loss(0, 6)
    own = gradients(pairs.model)
    named = dict(pairs.model.named_parameters())
    every = {name: np.asarray(rng.standard_normal(p.shape)) for name, p in named.items()}
    for directions in every, {"logit_scale": np.ones(())}:
        losses = []
        for step in 1e-6, -1e-6:
            for name, direction in directions.items():
                named[name].data += step * direction
            losses.append(pairs.batch_loss(0, 6)["loss"])
            for name, direction in directions.items():
                named[name].data -= step * direction
        slope = sum((own[name] * direction).sum() for name, direction in directions.items())
        assert abs(slope) > 1e-3
        assert_allclose((losses[0] - losses[1]) / 2e-6, slope, rtol=1e-6)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_estimate_of_memory(checkpoints, weights, pictures, monkeypatch):
    """Against the tapes of a batch of four pairs: four shards, one after the other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pairs, kept, found = pairs_of(weights, pictures), [], []
    places = memory.places(partial(pairs.step, 4), 12, checkpoints)
    assert not gradients(pairs.model)
    pairs.checkpoints, whole = checkpoints, pairs.encode_backward

    def backward(*arguments):
        kept.append(arguments[-1].nbytes)
        whole(*arguments)
    pairs.encode_backward = backward
    with observed(lambda entries: found.append(sum(size for _, size in nbytes_of(entries)))):
        pairs.batch_loss(0, 4)
    within(abs(memory.waiting(places, memory.division(4))
               / (sum(kept) + max(found[1:]) - max(kept)) - 1), 1e-3, "memory")
    assert max(places) > places[0] or not checkpoints


def test_same_captions_are_counted(weights, tmp_path):
    folder = write_captioned(tmp_path / "data", 6)
    for i, text in enumerate(["cat", "cat", "cat", "dog", "dog", "red"]):
        (folder / f"{i}.txt").write_text(text)
    pairs = pairs_of(weights, folder)
    assert pairs.batch_loss(0, 6)["same_captions"] == 5
    assert pairs.same_pairs(6) == 4                     # 3 of cats, 1 of dogs
    drawn = [sum(a.caption == b.caption for i, a in enumerate(batch) for b in batch[:i])
             for batch in (pairs.samples(number, 3) for number in range(600))]
    within(abs(np.mean(drawn) - pairs.same_pairs(3)), 0.1)
    assert pairs_of(weights, write_captioned(tmp_path / "other")).same_pairs(4) == 0


# ---- twenty steps --------------------------------------------------------------------------------

CASES = {"both": ("both", 3.0), "a scale above its limit": ("both", math.log(100) + 0.01),
         "image": ("image", 3.0), "text (LiT)": ("text", 3.0)}


@pytest.mark.parametrize("case, dtype", [
    *((case, np.float64) for case in CASES), ("both", np.float32)])
def test_twenty_steps_as_in_transformers(case, dtype, weights, pictures, tmp_path, monkeypatch):
    """The command's loop against CLIPModel(return_loss=True), clip_grad_norm_ and torch's AdamW,
    given the same batches. The weights are compared in units of the learning rate, by which Adam
    moves them even where the gradient is nothing but rounding errors."""
    train, scale = CASES[case]
    exact = dtype == np.float64
    folder = tmp_path / "clip"
    clip = ZeroShot.load(weights, np.float64)
    clip.model.logit_scale.data = np.array(scale)
    clip.save(folder, np.float64)
    load = ZeroShot.load
    monkeypatch.setattr(ZeroShot, "load", lambda folder, dtype=dtype: load(folder, dtype))
    command = ["clip", "--weights", folder, "--data", pictures, "--output", tmp_path / "out",
               "--batch", 7, "--steps", 20, "--learning-rate", RATE, "--clip", CLIP, "--warmup", 0,
               "--schedule", "constant", "--train", train, "--held-out", 0, "--validate-every", 0,
               "--sample-every", 0]
    stage = stages.Stage(parse([*map(str, command)]))
    reference = transformers.CLIPModel.from_pretrained(
        folder, dtype=torch.float64 if exact else torch.float32)
    steps = list(torch_steps(reference, pairs_of(folder, pictures, dtype), train))
    stage.train()
    log = read_log(tmp_path / "out")
    assert len(log) == len(steps) == 20
    losses, norms, scales = (np.array(row) for row in zip(*steps))
    assert_allclose([line["loss"] for line in log], losses, rtol=1e-11 if exact else 1e-5)
    assert_allclose([line["gradient"] for line in log], norms, rtol=1e-9 if exact else 1e-3)
    assert_allclose([line["scale"] for line in log], np.exp(scales), rtol=1e-11 if exact else 1e-5)
    assert max(norms) > CLIP, "clipping must matter"
    assert (max(scales[1:]) > math.log(100) - 1e-6) == ("limit" in case)
    theirs = dict(reference.named_parameters())
    before = dict(pairs_of(folder, pictures, dtype).model.named_parameters())
    errors = []
    for name, parameter in stage.clip.model.named_parameters():
        own = parameter.data.transpose(3, 2, 0, 1) if parameter.data.ndim == 4 else parameter.data
        moved = abs(own - theirs[name].detach().numpy())
        if not parameter.trainable:
            np.testing.assert_array_equal(parameter.data, before[name].data)
            assert "text" in name if train == "image" else "vis" in name
        assert own.dtype == dtype
        errors.append(np.ravel(moved) / RATE)
    within((np.concatenate(errors) ** 2).mean() ** 0.5, 1e-7 if exact else 0.01, "weights, rms")


def torch_steps(model, pairs, train):
    """Twenty steps of a reference model -> the loss, the gradient's norm and the scale before."""
    kept = {"image": ("vis", "logit"), "text": ("text", "logit"), "both": ("",)}[train]
    trained = [p.requires_grad_(name.startswith(kept)) for name, p in model.named_parameters()]
    trained = [p for p in trained if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in trained if p.ndim > 1], "weight_decay": DECAY},
         {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}],
        lr=RATE, betas=(0.9, 0.98), eps=1e-6)
    for number in range(20):
        samples = pairs.samples(number, 7)
        ids = np.concatenate([pairs.clip.tokenizer(sample.caption) for sample in samples])
        scale = model.logit_scale.item()
        pixels = torch.from_numpy(np.ascontiguousarray(pairs.pixels(samples).transpose(0, 3, 1, 2)))
        loss = model(torch.from_numpy(ids), pixels, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        yield loss.item(), norm.item(), scale


# ---- new weights ---------------------------------------------------------------------------------

def test_new_weights_are_those_of_transformers():
    """The mean and the standard deviation of every parameter."""
    half = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3,
            "num_attention_heads": 2}
    config = {"projection_dim": 48, "text_config": half | {"vocab_size": 100, "eos_token_id": 99},
              "vision_config": half | {"image_size": 64, "patch_size": 8, "hidden_size": 96}}
    torch.manual_seed(0)
    reference = transformers.CLIPModel(transformers.CLIPConfig(**config))
    model = CLIPModel(config)
    initialise_clip(model, np.random.default_rng(0))
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        own, other = parameter.data, theirs[name].detach().numpy()
        assert own.dtype == np.float32
        if other.std() == 0:                            # norms, biases, the scale
            within(abs(own - other).max(), 1e-4, name)
        else:
            error = 6 / math.sqrt(own.size)             # of several standard errors
            within(abs(own.std() / other.std() - 1), error, name)
            within(abs(own.mean()), error * other.std(), name)
