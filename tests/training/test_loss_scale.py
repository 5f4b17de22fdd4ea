"""Mixed precision: the loss's scale against torch.amp.GradScaler, and a training with it."""
import numpy as np
import pytest
import torch

from tests.support.tolerance import assert_allclose, within
from tests.support.training import SIZE
from tinyldm import ops
from tinyldm.backend import widen
from tinyldm.errors import TinyldmError
from tinyldm.layers import SHARD, Parameter
from tinyldm.training.loop import Trainer
from tinyldm.training.loss_scale import LossScale
from tinyldm.training.optim import AdamW, NotFinite, Overflow

RATE, INTERVAL, CLIP = 1e-2, 3, 0.5


def batches(count):
    """Inputs (16,8) float16 and targets (16,3) float32, of very different sizes."""
    rng = np.random.default_rng(0)
    for size in 10.0 ** rng.uniform(-2, 1, count):
        yield rng.standard_normal((16, 8)).astype(np.float16), (size * rng.standard_normal(
            (16, 3))).astype(np.float32)


def weights():
    rng = np.random.default_rng(1)
    return [(0.5 * rng.standard_normal(shape)).astype(np.float32) for shape in ((8, 8), (3, 8))]


def ours(first, second, x, wanted, scale):
    """A perceptron in float16, and its gradients."""
    h, hidden = ops.linear(x, first.data)
    h, active = ops.silu(h)
    y, out = ops.linear(h, second.data)
    assert y.dtype == np.float16
    loss, cache = ops.mse(widen(y), wanted)
    dy = (ops.mse_backward(1.0, cache)[0] * scale).astype(np.float16)
    dh, dsecond, _ = ops.linear_backward(dy, out)
    _, dfirst, _ = ops.linear_backward(ops.silu_backward(dh, active), hidden)
    first.add_grad(dfirst)
    second.add_grad(dsecond)
    return float(loss)


@np.errstate(over="ignore", invalid="ignore")
def test_twenty_steps_with_the_decisions_of_torch():
    """Which gradients overflow, the scale after each, and so the weights. A batch that overflows is
    tried again."""
    named = [(f"{i}", Parameter(*w.shape)) for i, w in enumerate(weights())]
    for (_, parameter), w in zip(named, weights()):
        parameter.data = w
    scaling = LossScale(interval=INTERVAL)
    optimizer = AdamW(named, ema=None, decay_vectors=True, clip=CLIP, scaling=scaling)
    theirs = [torch.tensor(w, requires_grad=True) for w in weights()]
    their_optimizer = torch.optim.AdamW(theirs, lr=RATE)
    scaler = torch.amp.GradScaler("cpu", growth_interval=INTERVAL)
    scales = []
    for x, wanted in batches(20):
        updated = False
        while not updated:
            loss = ours(*(parameter for _, parameter in named), x, wanted, scaling.scale)
            try:
                norm = optimizer.step(RATE)
                updated = True
            except Overflow:
                pass
            before = scaler.get_scale()
            h = torch.nn.functional.silu(torch.tensor(x) @ theirs[0].half().T)
            squares = (((h @ theirs[1].half().T).float() - torch.tensor(wanted)) ** 2).mean()
            their_optimizer.zero_grad()
            scaler.scale(squares).backward()
            scaler.unscale_(their_optimizer)
            their_norm = torch.nn.utils.clip_grad_norm_(theirs, CLIP)
            scaler.step(their_optimizer)
            scaler.update()
            assert updated == (scaler.get_scale() >= before)
            assert scaling.scale == scaler.get_scale()
            assert scaling.good == scaler._get_growth_tracker()
            scales.append(scaling.scale)
        assert_allclose(loss, squares.item(), rtol=2e-3)
        assert_allclose(norm, their_norm.item(), rtol=1e-2)
    steps = np.sign(np.diff(scales))
    assert (steps > 0).sum() > 1 and (steps < 0).sum() > 2, "it must shrink and grow"
    assert scaling.skipped == len(scales) - 20 and optimizer.steps == 20
    flat = np.concatenate([w.detach().numpy().ravel() for w in theirs])
    assert optimizer.data.dtype == np.float32
    copies = np.concatenate([parameter.data.ravel() for _, parameter in named])
    assert copies.dtype == np.float16 and (copies == optimizer.data.astype(np.float16)).all()
    within(np.sqrt(((optimizer.data - flat) ** 2).mean()), 0.1 * RATE, "weights, rms")


def test_small_gradients_survive():
    """In float16 alone they are 0; and sums of float16 are made in float32."""
    tiny, scale = 1e-9, 2.0 ** 16
    assert np.float16(tiny) == 0
    parameter = Parameter(1)
    parameter.data = np.ones(1, np.float32)
    optimizer = AdamW([("x", parameter)], ema=None, clip=0, scaling=LossScale(scale))
    parameter.add_grad(np.full(1, tiny * scale, np.float16))
    assert_allclose(optimizer.step(0.1), tiny, rtol=1e-3)

    for shard in (0, 0, 1):                             # in a shard, and between shards
        token = SHARD.set(shard)
        parameter.add_grad(np.full(1, 60000, np.float16))
        SHARD.reset(token)
    assert parameter.grad.dtype == np.float32 and parameter.grad[0] == 180000


@pytest.mark.parametrize("terms", [1, 4, 5])
def test_the_scale_has_an_end(terms):
    """Where it is 1 a gradient that is infinite is an error, which names the parameter. The
    gradient of a sum of four numbers has the same end as that of their mean."""
    parameter = Parameter(1)
    parameter.data = np.ones(1, np.float32)
    optimizer = AdamW([("x", parameter)], ema=None, scaling=LossScale(2.0, terms=terms))
    assert optimizer.scaling.scale == 2.0 / (4 if terms > 1 else 1)
    for expected in (Overflow, NotFinite):
        parameter.add_grad(np.full(1, np.inf, np.float16))
        with pytest.raises(NotFinite, match="infinite") as caught:
            optimizer.step(0.1)
        assert caught.type is expected
    assert "of x" in str(caught.value) and optimizer.steps == 0
    largest = LossScale(2.0 ** 127, interval=1)
    largest.update(True)
    assert largest.scale == 2.0 ** 127


# ---- the loop ---------------------------------------------------------------------------------

def trainer_of(path, steps, ema=None, bad=()):
    """A trainer of float16 copies of a vector, and its batch_loss; the gradients of the batches in
    `bad` are not finite whatever the scale."""
    parameter = Parameter(SIZE)
    parameter.data = np.zeros(SIZE, np.float32)

    def optimizer(named):
        return AdamW(named, ema=ema, scaling=LossScale(2.0 ** 20, interval=4))
    loop = Trainer(path, [("x", parameter)], steps, 0.1, warmup=2, optimizer=optimizer)
    loop.seen = []

    def batch_loss(rng):
        loop.seen.append((loop.batch, loop.scale))
        difference = parameter.data - rng.standard_normal(SIZE, np.float32)
        scale = np.inf if loop.batch in bad else loop.scale
        parameter.add_grad((difference * scale).astype(np.float16))
        return {"loss": float((difference ** 2).sum())}
    return loop, batch_loss


def test_a_batch_is_tried_again(tmp_path):
    loop, batch_loss = trainer_of(tmp_path / "x.npz", 6)
    loop.train(batch_loss)
    tried = [batch for batch, _ in loop.seen]
    assert sorted(set(tried)) == list(range(6)) and tried == sorted(tried)
    skipped = loop.optimizer.scaling.skipped
    assert 2 < skipped == len(tried) - 6 and loop.step == 6 == len(loop.history)
    assert loop.seen[0][1] == 2.0 ** 20 and loop.seen[1][1] == 2.0 ** 19


def test_what_never_becomes_finite_ends_the_training(tmp_path):
    loop, batch_loss = trainer_of(tmp_path / "x.npz", 6, bad=(3,))
    with pytest.raises(TinyldmError, match="of x is NaN or infinite at step 3: take a smaller"):
        loop.train(batch_loss)
    assert loop.seen[-1] == (3, 1.0)
    again, batch_loss = trainer_of(tmp_path / "x.npz", 6)
    assert again.step == 3


def test_the_scale_goes_on(tmp_path):
    """3 + 5 updates are 8, bitwise; an average of the weights in float32 is what is written."""
    def ema(n):
        return 0.5
    whole, batch_loss = trainer_of(tmp_path / "whole.npz", 8, ema)
    whole.train(batch_loss)
    part, batch_loss = trainer_of(tmp_path / "part.npz", 3, ema)
    part.train(batch_loss)
    rest, batch_loss = trainer_of(tmp_path / "part.npz", 8, ema)
    parameter, written = rest.parameters[0], []
    view = parameter.data
    assert view.dtype == np.float16 and (view == part.optimizer.data.astype(np.float16)).all()
    rest.train(batch_loss, write=lambda: written.append(parameter.data.copy()))
    assert part.seen + rest.seen == whole.seen
    for name, array in whole.optimizer.state().items():
        np.testing.assert_array_equal(array, rest.optimizer.state()[name], name)
    assert written[-1].dtype == np.float32 and (written[-1] == rest.optimizer.ema).all()
    assert parameter.data is view
    rest.optimizer.adopt_average()
    np.testing.assert_array_equal(view, rest.optimizer.ema.astype(np.float16))
