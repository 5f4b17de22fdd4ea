"""The autoencoder's loss with all its terms: twenty steps of PyTorch, and differences."""
import numpy as np
import pytest
import torch

from tests.support.autoencoder import Reference, encoder_features, patch_gan, perceptual
from tests.support.models import VISIONS
from tests.support.pairs import vae_pair, vision_pair
from tests.support.reference import copy_weights, nchw, randomise, to_ours
from tests.support.tolerance import assert_allclose, within
from tinyldm.models.discriminator import PatchDiscriminator, initialise
from tinyldm.shapes import drawing
from tinyldm.tape import nbytes_of, observed
from tinyldm.training.optim import AdamW
from tinyldm.training.stages import adversarial
from tinyldm.training.stages.adversarial import Adversary
from tinyldm.training.stages.perceptual import EncoderFeatures, Perceptual, VisionFeatures
from tinyldm.training.stages.round_trip import AutoencoderLoss, psnr

RATE, START = 1e-4, 5
VAE = dict(in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=4,
           block_out_channels=[4, 8], layers_per_block=1)


def pair(dtype, **options):
    """A Reference, an AutoencoderLoss, and our (name, Parameter) pairs, of the same weights."""
    reference, vae = vae_pair(VAE, dtype)
    theirs = randomise(patch_gan(4).to(dtype), seed=1)
    theirs.main[-1].weight.data *= 100                  # so that the adaptive weight has no limit
    discriminator = copy_weights(theirs, PatchDiscriminator(channels=4))
    other, network = vae_pair(VAE | {"block_out_channels": [8, 4]}, dtype)
    ours = AutoencoderLoss(vae, perceptual=Perceptual(EncoderFeatures(network)),
                           adversary=Adversary(discriminator, START), **options)
    named = [*vae.named_parameters(),
             *((f"discriminator.{name}", p) for name, p in discriminator.named_parameters())]
    for _, parameter in named:
        parameter.data = parameter.data.copy()
    reference = Reference(reference, theirs, START, encoder_features(other), RATE,
                          squared=options.get("squared", False))
    return reference, ours, named


def batch(rng, dtype, size=3):
    images = drawing.batch(rng, size)[0][:, 8:56:2, 8:56:2].astype(dtype)       # 24x24 pixels
    return images, rng.standard_normal((size, 12, 12, 4)).astype(dtype)


# The losses relative to theirs; the weights by their root mean square in units of the learning
# rate, by which Adam moves a weight even where its gradient is nothing but rounding.
@pytest.mark.parametrize("dtype, squared, of_loss, of_weights", [
    (torch.float64, False, 1e-8, 1e-4), (torch.float32, True, 1e-3, 0.5)])
def test_twenty_steps(dtype, squared, of_loss, of_weights):
    """The discriminator begins at step 5; two optimisers there are one here."""
    reference, ours, named = pair(dtype, squared=squared)
    optimizer = AdamW(named, weight_decay=0, beta1=0.5, beta2=0.9, clip=0, ema=None)
    rng, kind = np.random.default_rng(0), np.float64 if dtype == torch.float64 else np.float32
    for step in range(20):
        images, noise = batch(rng, kind)
        report = ours(images, noise, step)
        norm = optimizer.step(RATE)
        losses, norms = reference.step(images, noise, step)
        assert_allclose(report["loss"], losses[0], rtol=of_loss)
        assert_allclose(norm, np.hypot(*norms), rtol=100 * of_loss)
        found = [report.get(name) for name in ("generator", "adaptive_weight", "discriminator")]
        if step < START:
            assert found == [None] * 3 and norms[1] == 0
        else:
            assert 0 < found[1] < 5000, "the limit must not hide the ratio"
            assert_allclose(found, losses[1:], rtol=20 * of_loss)
    published = dict(reference.vae.named_parameters()) | {
        f"discriminator.{name}": p for name, p in reference.discriminator.named_parameters()}
    apart = np.concatenate([(parameter.data - to_ours(published[name])).reshape(-1)
                            for name, parameter in named])
    assert np.sqrt((apart.astype(np.float64) ** 2).mean()) <= of_weights * RATE


def test_differences_of_the_whole():
    """Of the autoencoder with a fixed adaptive weight, and of the discriminator."""
    _, ours, named = pair(torch.float64, kl_weight=0.1)
    images, noise = batch(np.random.default_rng(1), np.float64)
    first = ours(images, noise, START)
    goals = {False: lambda report: report["loss"] + first["adaptive_weight"] * report["generator"],
             True: lambda report: report["discriminator"]}
    rng, h = np.random.default_rng(2), 1e-8             # small: |x| has a corner at every pixel
    for of_discriminator, goal in goals.items():
        chosen = [p for name, p in named if name.startswith("discriminator") == of_discriminator]
        moves = [rng.standard_normal(p.shape) for p in chosen]
        expected = sum((p.grad * move).sum() for p, move in zip(chosen, moves))
        values = []
        for sign in (1, -1):
            before = [p.data for p in chosen]
            for p, move in zip(chosen, moves):
                p.data = p.data + sign * h * move
            values.append(goal(ours(images, noise, START)))
            for p, data in zip(chosen, before):
                p.data = data
        assert_allclose((values[0] - values[1]) / (2 * h), expected, rtol=1e-4)
        for _, p in named:
            p.grad = None
        ours(images, noise, START)


def test_the_adaptive_weight_has_a_limit():
    _, ours, named = pair(torch.float64)
    for name, parameter in named:                       # a discriminator that says the same of all
        if name.startswith("discriminator.main.11"):
            parameter.data = 1e-9 * parameter.data
    images, noise = batch(np.random.default_rng(1), np.float64)
    report = ours(images, noise, START)
    assert report["adaptive_weight"] == 5000


@pytest.mark.parametrize("step", [0, START])
def test_the_loss_scale_is_that_of_all_gradients(step):
    """A power of 2: bitwise."""
    _, ours, named = pair(torch.float64, kl_weight=0.1)
    images, noise = batch(np.random.default_rng(1), np.float64)
    found = []
    for scale in (1.0, 1024.0):
        report = ours(images, noise, step, scale)
        found.append((report, [parameter.grad for _, parameter in named]))
        for _, parameter in named:
            parameter.grad = None
    (report, gradients), (other, scaled) = found
    assert report == other and ("adaptive_weight" in report) == bool(step)
    for one, times in zip(gradients, scaled):
        np.testing.assert_array_equal(1024 * one, times)


def test_a_length_that_overflows_spoils_the_gradient(monkeypatch):
    """Or, in float16, one of the two parts would be lost, and nobody would know."""
    _, ours, named = pair(torch.float64)
    images, noise = batch(np.random.default_rng(1), np.float64)
    for lengths in ([np.inf, 1.0], [1.0, np.inf]):
        monkeypatch.setattr(adversarial, "length", lambda *_, left=lengths: left.pop())
        ours(images, noise, START)
        assert np.isnan(dict(named)["decoder.conv_in.weight"].grad).all()


def test_tapes_are_empty_and_the_network_stays_frozen():
    _, ours, named = pair(torch.float64)
    images, noise = batch(np.random.default_rng(1), np.float64)
    for step in (0, START):
        for _, parameter in named:
            parameter.grad = None
        ours(images, noise, step)
        assert all(parameter.grad is not None for _, parameter in named)
        of_discriminator = [p.grad.any() for name, p in named if name.startswith("discriminator")]
        assert all(of_discriminator) if step else not any(of_discriminator)
        assert all(p.grad is None for p in ours.perceptual.network.parameters())
    assert all(parameter.trainable for _, parameter in named)


class Observed:
    """The bytes of tapes, wherever they get shorter."""

    def __init__(self):
        self.found = []

    def __call__(self, entries):
        self.found.append(sum(size for _, size in nbytes_of(entries)))


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("decoder_only", [False, True])
def test_the_estimate_of_memory(decoder_only, checkpoints, monkeypatch):
    """Against the tapes of a batch of two pictures, which are two shards, in one thread."""
    _, ours, _ = pair(torch.float32, decoder_only=decoder_only, checkpoints=checkpoints)
    perceptual, adversary, ours.perceptual, ours.adversary = (
        ours.perceptual, ours.adversary, None, None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    images, noise = batch(np.random.default_rng(1), np.float32, 2)
    images, noise = images.repeat(2, axis=1).repeat(2, axis=2), noise.repeat(2, 1).repeat(2, 2)

    # A shard's images are a view of the batch's, which its tape counts as a whole.
    others = 0 if decoder_only else images[0].nbytes
    alone = ours.memory(48, 2, checkpoints)
    assert all(parameter.grad is None for parameter in ours.vae.parameters())
    with observed(seen := Observed()):
        ours(images, noise, START)
    within(abs(alone / (max(seen.found) - others) - 1), 1e-3, "memory")
    ours.perceptual = perceptual
    with observed(seen := Observed()):
        perceptual(images[:1], images[:1], 1.0)
    more = ours.memory(48, 2, checkpoints)
    within(abs((more - alone) / max(seen.found) - 1), 1e-3, "perceptual")

    def adversary_between(parts, *arguments):
        """It runs when all round trips wait."""
        kept.append(sum(part.trip.tape.nbytes - others for part in parts))
        with observed(seen):
            adversary(parts, *arguments)
        return {}
    kept, seen, adversary_between.start = [], Observed(), START
    ours.perceptual, ours.adversary = None, adversary_between
    ours(images, noise, START)
    ours.adversary = adversary
    _, *learning = seen.found                           # the first is the generator's
    own = [p.grad for p in adversary.discriminator.parameters()]
    expected, found = kept[0] + sum(learning), ours.memory(48, 2, checkpoints)
    assert len(learning) == 2 and all(grad is not None for grad in own)
    if checkpoints:                                     # and then one block of one picture
        assert 0 < found - expected < alone
    else:
        within(abs(found / expected - 1), 1e-3, "with a discriminator")


@pytest.mark.parametrize("name", VISIONS)
@pytest.mark.parametrize("side", [8, 32])
def test_features_of_clip(name, side):
    """Smaller and larger pictures than CLIP's, their gradient by PyTorch."""
    theirs, ours, _ = vision_pair(VISIONS[name], torch.float64)
    rng = np.random.default_rng(0)
    output, images = rng.uniform(-1, 1, (2, 2, side, side, 3))
    p, doutput = Perceptual(VisionFeatures(ours))(output, images, 2.5)

    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    size, depth = VISIONS[name]["image_size"], VISIONS[name]["num_hidden_layers"]

    def features(x):
        x = torch.nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True)
        found = theirs((x / 2 + 0.5 - mean) / std, output_hidden_states=True)
        return [found.hidden_states[depth - depth // 2][:, 1:].transpose(1, 2),
                found.pooler_output[:, :, None]]
    tensor = nchw(output).requires_grad_()
    expected = perceptual(features, tensor, nchw(images)).mean()
    (2.5 * expected).backward()
    assert_allclose(float(p), expected.item(), rtol=1e-9)
    assert_allclose(doutput, tensor.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-7, atol=1e-12)


def test_peak_signal_to_noise_ratio():
    """20 dB: the error is a tenth of the range. The mean is over pictures, not over squares."""
    assert psnr(np.array([0.04])) == pytest.approx(20)
    assert psnr(np.array([0.04, 0.0004])) == pytest.approx(30)
    assert psnr(np.array([0.0])) < 200


@pytest.mark.parametrize("channels, layers", [(4, 1), (64, 3), (2, 5)])
def test_the_discriminators_parameters(channels, layers):
    """Names, shapes and the size of the answer as in PyTorch; the first weights' statistics."""
    theirs, ours = patch_gan(channels, layers), PatchDiscriminator(3, channels, layers)
    initialise(ours, np.random.default_rng(0))
    shapes = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert {name: array.shape for name, array in ours.state_dict().items()} == shapes
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3 * 2 ** layers, 3 * 2 ** layers + 16, 3))
    logits = ours(images.astype(np.float32))
    assert logits.shape == theirs(nchw(images.astype(np.float32))).permute(0, 2, 3, 1).shape
    weights = np.concatenate([p.data.ravel() for p in ours.parameters() if len(p.shape) == 4])
    assert abs(weights.std() / 0.02 - 1) < 0.2 and logits.dtype == np.float32
    norm = ours.main[-3]
    assert abs(norm.weight.data.mean() - 1) < 0.03 and not norm.bias.data.any()
