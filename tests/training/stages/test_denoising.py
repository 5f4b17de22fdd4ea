"""The hybrid loss through whole models, by finite differences; DiT's first weights; classes."""
from types import SimpleNamespace

import numpy as np
import pytest

from tests.support.models import PIXELS, random_weights
from tests.support.pixel_models import DIT, write_classes
from tests.support.tolerance import assert_allclose, within
from tinyldm.diffusion import variational
from tinyldm.diffusion.schedule import Schedule
from tinyldm.errors import TinyldmError
from tinyldm.models import DiTTransformer2DModel, UNet2DModel
from tinyldm.training.data.classes import find_classes
from tinyldm.training.data.pictures import PictureFolder
from tinyldm.training.objectives import DiffusionLoss, HybridLoss, drop_captions, generators
from tinyldm.training.optim import initialise_dit
from tinyldm.training.stages.denoising import Batch, Denoising

STEP = 1e-4             # with smaller ones the decoder's term is mostly rounding


def models():
    """{name: model, its labels}, in float64 with a variance."""
    unet = UNet2DModel(PIXELS | {"out_channels": 6, "num_class_embeds": 4})
    dit = DiTTransformer2DModel(DIT | {"in_channels": 3, "out_channels": 6, "sample_size": 8,
                                       "num_embeds_ada_norm": 3})
    for model in (unet, dit):
        model.load_state_dict(random_weights(model, 1, np.float64))
    return {"UNet": unet, "DiT": dit}


@pytest.mark.parametrize("name", ["UNet", "DiT"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_hybrid_loss_by_finite_differences(name, prediction_type, rng):
    """The mean in the bound stays that of the unmoved weights: its gradient is stopped. At t = 0,
    in the middle and at the end; parameters of every kind of layer, and all at once."""
    model = models()[name]
    schedule = Schedule.from_config({"beta_schedule": "squaredcos_cap_v2",
                                     "prediction_type": prediction_type})
    loss = HybridLoss(DiffusionLoss(schedule))
    x_start = rng.integers(0, 256, (4, 8, 8, 3)) / 127.5 - 1
    noise, t = rng.standard_normal(x_start.shape), np.array([0, 3, 500, 800])
    batch = Batch(x_start, schedule.add_noise(x_start, noise, t), t, noise, np.array([0, 3, 1, 2]))
    denoising = Denoising(model, SimpleNamespace(), None, loss, 0, labels=[0])
    report = denoising.part_loss(batch, 1.0, range(4), 1.0)
    first = denoising.predict(batch.x_t, t, batch.labels)

    def moved():
        output = denoising.predict(batch.x_t, t, batch.labels)
        simple = ((output[..., :3] - (noise if prediction_type == "epsilon" else
                                      v_of(loss.process, x_start, noise, t))) ** 2).mean()
        held = np.concatenate([first[..., :3], output[..., 3:]], axis=-1)
        terms, _ = variational.loss(loss.process, held, x_start, noise, batch.x_t, t, "kl")
        return simple + terms.mean()                    # T / 1000 is 1
    assert_allclose(report["loss"], moved(), rtol=1e-12)
    named = list(model.named_parameters())
    for chosen in [named, *([pair] for pair in named)]:
        directions = [rng.standard_normal(parameter.shape) for _, parameter in chosen]
        slope = sum((parameter.grad * d).sum() for (_, parameter), d in zip(chosen, directions))

        one, two = (difference(moved, chosen, directions, step) for step in (STEP, 2 * STEP))
        within(abs((4 * one - two) / 3 - slope), 1e-5 * (abs(slope) + 0.1), chosen[0][0])


def difference(moved, named, directions, step):
    """The centred difference of moved() along directions of the parameters."""
    values, start = [], [parameter.data for _, parameter in named]
    for sign in (1, -1):
        for (_, parameter), data, d in zip(named, start, directions):
            parameter.data = data + sign * step * d
        values.append(moved())
    for (_, parameter), data in zip(named, start):
        parameter.data = data
    return (values[0] - values[1]) / (2 * step)


def v_of(process, x_start, noise, t):
    a, s = process.scales_like(x_start, t)
    return a * noise - s * x_start


@pytest.mark.parametrize("kind", [DiffusionLoss, lambda s: HybridLoss(DiffusionLoss(s))])
def test_parts_of_a_batch_add_up(kind, rng):
    schedule = Schedule.from_config({})
    loss = kind(schedule)
    x_start, noise = rng.standard_normal((2, 5, 4, 4, 3)).clip(-1, 1)
    output = rng.standard_normal((5, 4, 4, 3 if kind is DiffusionLoss else 6))
    arrays = output, x_start, noise, np.array([0, 4, 300, 700, 999])
    whole, gradient, expected = loss(*arrays)
    parts = [loss(*(array[rows] for array in arrays), len(range(5)[rows]) / 5)
             for rows in (slice(0, 2), slice(2, 5))]
    assert_allclose(sum(part[0] for part in parts), whole, rtol=1e-12)
    assert_allclose(sum(part[2] for part in parts), expected, rtol=1e-12)
    assert_allclose(np.concatenate([part[1] for part in parts]), gradient, rtol=1e-12)


def test_the_profile_of_a_model_with_a_variance_is_its_squared_error(rng):
    simple = DiffusionLoss(Schedule.from_config({}))
    x_start = rng.standard_normal((2, 4, 4, 3))
    found = HybridLoss(simple).profile(lambda x, t: np.concatenate([x, 9 + x], axis=-1), x_start)
    assert found == simple.profile(lambda x, t: x, x_start)


# ---- DiT's first weights ------------------------------------------------------------------------

def test_a_new_dit_is_the_identity(rng):
    """adaLN-Zero: each block passes its tokens on, and the output is 0."""
    dit = DiTTransformer2DModel(DIT | {"in_channels": 8, "sample_size": 8,
                                       "num_embeds_ada_norm": 3, "num_attention_heads": 8})
    initialise_dit(dit, rng)
    tokens, t = rng.standard_normal((2, 16, 64)), rng.standard_normal((2, 256))
    for block in dit.transformer_blocks:
        np.testing.assert_array_equal(block(tokens, t, np.array([0, 3])), tokens)
    x = rng.standard_normal((2, 8, 8, 8)).astype(np.float32)
    assert not dit(x, np.array([5, 900]), np.array([0, 3])).any()
    spread = {name: parameter.data.std() for name, parameter in dit.named_parameters()}
    block = "transformer_blocks.0."
    for name, expected in {                             # Xavier: 2 / (fan_in + fan_out)
            "pos_embed.proj.weight": (2 / (32 + 64)) ** 0.5,
            block + "attn1.to_q.weight": (2 / 128) ** 0.5,
            block + "ff.net.0.proj.weight": (2 / (64 + 256)) ** 0.5,
            block + "norm1.emb.class_embedder.embedding_table.weight": 0.02,
            block + "norm1.emb.timestep_embedder.linear_1.weight": 0.02,
            block + "norm1.emb.timestep_embedder.linear_2.weight": 0.02}.items():
        assert spread[name] == pytest.approx(expected, rel=0.1), name
    zero = {name for name, value in spread.items() if not value and not name.endswith("bias")}
    assert zero == {"proj_out_1.weight", "proj_out_2.weight",
                    *(f"transformer_blocks.{i}.norm1.linear.weight" for i in range(2))}


# ---- classes ------------------------------------------------------------------------------------

def test_classes_by_name_and_by_folder(tmp_path):
    folder = write_classes(tmp_path / "pictures", 4)
    names, labels = find_classes(PictureFolder(folder, 16, caption=""), "names")
    assert names == ["cat", "dog", "emu"] and labels == [0, 0, 1, 2]    # items in order of names
    write_classes(folder / "zoo", 2)
    write_classes(folder / "ark", 1)
    for file in folder.glob("*.png"):
        file.unlink()
    names, labels = find_classes(PictureFolder(folder, 16, caption=""), "folders")
    assert names == ["ark", "zoo"] and labels == [0, 1, 1]


def test_one_class_is_none(tmp_path):
    pictures = PictureFolder(write_classes(tmp_path / "pictures", 1), 16, caption="")
    with pytest.raises(TinyldmError, match="finds only the class 'cat': leave it out"):
        find_classes(pictures, "names")


def test_dropped_labels():
    labels = drop_captions(list(range(1000)), 0.1, generators(0, 0, 1000), 9999)
    assert labels.count(9999) == pytest.approx(100, abs=30)
    assert all(label in (i, 9999) for i, label in enumerate(labels))
