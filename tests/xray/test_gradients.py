"""Gradients of a response: against finite differences, and against torch's autograd."""
import numpy as np
import pytest
import torch

from tests.support.arrays import read_only
from tests.support.models import CLIPS, PIXELS, UNETS, fill
from tests.support.pairs import clip_pair, unet_pair
from tests.support.reference import nchw, nhwc
from tests.support.tolerance import assert_close
from tinyldm.diffusion.schedule import Schedule
from tinyldm.layers import forward_hooks, named_modules
from tinyldm.models import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from tinyldm.tape import nbytes_of, observed
from tinyldm.xray import drawing, gradients
from tinyldm.xray.gradients import (
    Prediction,
    block_gradients,
    check_slope,
    frozen,
    norms,
    through_text_encoder,
    token_gradients,
)
from tinyldm.xray.record import BLOCKS

ALPHA_BAR = 0.6
AREA = np.zeros((8, 8))
AREA[2:5, 3:8] = 0.5
DIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2,
       "in_channels": 4, "out_channels": 8, "sample_size": 8, "num_embeds_ada_norm": 3}
NETWORKS = {"with text": UNet2DConditionModel(UNETS["as SD 1"]),
            "pixels": UNet2DModel(PIXELS | {"sample_size": 8, "in_channels": 4,
                                            "out_channels": 4}),
            "transformer": DiTTransformer2DModel(DIT)}


def schedule(prediction_type):
    return Schedule.from_config({"prediction_type": prediction_type, "beta_schedule": "linear"})


def prediction(network, prediction_type="v_prediction", guided=True, context=None):
    """A Prediction in float64; the uncond row of its output is made up."""
    rng = np.random.default_rng(4)
    call = {"latents": rng.standard_normal((1, 8, 8, 4)), "timesteps": np.array([500.])}
    if isinstance(network, UNet2DConditionModel):
        D = network.settings.cross_attention_dim
        call["context"] = context if context is not None else rng.standard_normal((1, 7, D))
    if isinstance(network, DiTTransformer2DModel):
        call["class_labels"] = np.array([1])
    output = network(**call)
    other = rng.standard_normal(output.shape)
    call["output"] = np.concatenate([other, output] if guided else [output])
    call = {name: read_only(value) for name, value in call.items()}
    return Prediction(network, schedule(prediction_type), call, ALPHA_BAR, 4)


@pytest.mark.parametrize("kind, prediction_type, guided", [
    ("with text", "v_prediction", True), ("pixels", "epsilon", False),
    ("transformer", "sample", True)])
def test_gradients_of_every_block(kind, prediction_type, guided, rng):
    """Move one block's output a little: the response moves as its gradient says.

    A skip is read twice, below and on the way up: the gradient must hold both.
    """
    network = fill(NETWORKS[kind])
    own = prediction(network, prediction_type, guided)
    layers = {name: layer for name, layer in named_modules(network) if BLOCKS.fullmatch(name)}
    with frozen(network):
        gradients = block_gradients(own, AREA, layers)
    assert gradients.keys() == layers.keys() and len(layers) > 1
    direction = own.directions(AREA[None])
    for name, layer in layers.items():
        along = rng.standard_normal(gradients[name].shape)

        def moved(forward, *inputs, step, along=along, **options):
            output = forward(*inputs, **options)
            return output + step * along.reshape(output.shape)

        ends = []
        for step in (1e-4, -1e-4):
            with forward_hooks({layer: lambda *inputs, step=step, **options: moved(
                    *inputs, step=step, **options)}):
                ends.append(own.response(direction))
        slope = (ends[0] - ends[1]) / 2e-4
        assert abs(slope) > 1e-8                        # or the check would be blind
        np.testing.assert_allclose((gradients[name] * along).sum(), slope, rtol=1e-4, atol=1e-9,
                                   err_msg=name)        # gradients are kept in float32


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_large_network_runs_its_blocks_again(kind, monkeypatch):
    network = fill(NETWORKS[kind])
    layers = {name: layer for name, layer in named_modules(network) if BLOCKS.fullmatch(name)}
    kept, found = [], []
    for few in (10**9, 0):                              # parameters: small, and large
        monkeypatch.setattr(drawing, "FEW", few)
        with frozen(network), observed(lambda entries: kept.append(nbytes_of(entries))):
            found.append(block_gradients(prediction(network), AREA, layers))
    sizes = [sum(size for _, size in entries) for entries in (kept[0], kept[1])]
    assert sizes[1] < sizes[0]                          # the tape after the forward
    for name in layers:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
def test_token_gradients_equal_those_of_torch(prediction_type, monkeypatch):
    reference, module, latents, timesteps, context = unet_pair(
        UNETS["as SD 2"], torch.float64, (8, 4), batch=1)
    other = np.random.default_rng(5).standard_normal(latents.shape)
    a, s = ALPHA_BAR ** 0.5, (1 - ALPHA_BAR) ** 0.5

    def x_start(output, x_t):
        return {"v_prediction": lambda: a * x_t - s * output, "sample": lambda: output,
                "epsilon": lambda: (x_t - s * output) / a}[prediction_type]()

    theirs = torch.from_numpy(context.copy()).requires_grad_()
    output = reference(nchw(latents), torch.from_numpy(timesteps.copy()), theirs).sample
    predicted = x_start(output, nchw(latents))[0]       # (C,8,4)
    change = (predicted - x_start(nchw(other), nchw(latents))[0]).detach()
    expected = []
    for row in range(8):
        for column in range(4):
            d = change[:, row, column] / change[:, row, column].norm()
            response = (predicted[:, row, column] * d).sum()
            expected.append(torch.autograd.grad(response, theirs, retain_graph=True)[0][0].numpy())

    call = {"latents": latents, "timesteps": timesteps, "context": context,
            "output": np.concatenate([other, nhwc(output)])}
    own = Prediction(module, schedule(prediction_type), call, ALPHA_BAR, 4)
    monkeypatch.setattr(gradients, "AT_ONCE", 5 * 32)   # five rows at a time
    with frozen(module):
        found = token_gradients(own)                    # (32,7,D)
    assert_close(found, np.stack(expected), 1e-6, "token gradients")
    grid = norms(found, 8, 4)
    assert grid.shape == (7, 8, 4)
    np.testing.assert_allclose(grid[3, 5, 2], np.linalg.norm(expected[5 * 4 + 2][3]), rtol=1e-5)


def test_cells_of_a_larger_map_are_squares():
    """R of a cell is that of its 2 x 2 positions: a token's gradients of all cells are one area's.
    """
    network = fill(UNet2DConditionModel(UNETS["attention at the bottom"]))
    rng = np.random.default_rng(6)
    call = {"latents": rng.standard_normal((1, 16, 16, 4)), "timesteps": np.array([500.]),
            "context": rng.standard_normal((1, 3, 6)),
            "output": rng.standard_normal((2, 16, 16, 4))}
    own = Prediction(network, schedule("epsilon"), call, ALPHA_BAR, 4)
    with frozen(network):
        found = token_gradients(own)
        mask = np.zeros((1, 16, 16))
        mask[0, 4:6, 10:12] = 1
        _, expected = own.gradients(own.directions(mask))
    assert found.shape == (64, 3, 6)
    np.testing.assert_allclose(found[2 * 8 + 5], expected[0], rtol=1e-6, atol=1e-12)


def test_through_the_text_encoder_as_in_transformers(monkeypatch):
    torch.manual_seed(0)
    reference, module = clip_pair(CLIPS["as SD 1"], torch.float64)
    rng = np.random.default_rng(7)
    ids = rng.integers(0, module.settings.vocab_size, (1, 9))
    dcontext = rng.standard_normal((3, 9, module.settings.hidden_size))
    kept = []
    embedding = reference.get_input_embeddings()
    handle = embedding.register_forward_hook(
        lambda layer, inputs, output: kept.append(output.requires_grad_()))
    context = reference(torch.from_numpy(ids.copy())).last_hidden_state
    handle.remove()
    expected = [torch.autograd.grad((context * torch.from_numpy(dy)).sum(), kept[0],
                                    retain_graph=True)[0][0].numpy() for dy in dcontext]
    monkeypatch.setattr(gradients, "AT_ONCE", 2 * 9)    # two rows at a time
    with frozen(module):
        found = through_text_encoder(module, ids, dcontext)
    assert_close(found, np.stack(expected), 1e-6, "embeddings")
    assert (found[:, 0] != 0).any()                     # causal: the first token acts on all


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_checked_slope(kind):
    network = fill(NETWORKS[kind])
    with frozen(network):
        check = check_slope(prediction(network), AREA)
    assert check["step"] == 1e-3 and abs(check["claimed"]) > 1e-6
    np.testing.assert_allclose(check["claimed"], check["measured"], rtol=1e-5)
    distances, responses = check["distances"], check["responses"]
    assert len(distances) == len(responses) == 11
    np.testing.assert_allclose(distances[::-1], -distances, atol=1e-9)
    near = np.polyfit(distances[3:8], responses[3:8], 2)[1]     # the parabola's slope at 0
    np.testing.assert_allclose(near, check["claimed"], rtol=0.1)


def test_frozen_restores_what_was_trained():
    network = fill(NETWORKS["pixels"])
    network.zero_grad()
    first, *others = network.parameters()
    first.trainable = False
    with pytest.raises(ZeroDivisionError), frozen(network):
        assert not any(parameter.trainable for parameter in network.parameters())
        raise ZeroDivisionError
    assert not first.trainable and all(parameter.trainable for parameter in others)
    first.trainable = True
