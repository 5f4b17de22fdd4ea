"""openai's UNets of Improved DDPM and guided diffusion: recognised, read, and the same numbers."""
import re

import numpy as np
import pytest
import safetensors.numpy
import torch

import tinyldm
from tests.support.arrays import read_only
from tests.support.keys import digest
from tests.support.original_iddpm import UNetModel
from tests.support.reference import nchw, nhwc, randomise
from tests.support.tolerance import assert_close, assert_same_pixels, within
from tinyldm import backend
from tinyldm.checkpoints.formats.reading import read_tensors
from tinyldm.checkpoints.layout import fitted
from tinyldm.checkpoints.places import kind_of
from tinyldm.checkpoints.single_file import iddpm
from tinyldm.diffusion.process import Process, kept_timesteps
from tinyldm.diffusion.samplers.shared import to_ints
from tinyldm.diffusion.variational import bits_per_dimension, reverse
from tinyldm.errors import TinyldmError
from tinyldm.layers import Tape, file_shape
from tinyldm.models import UNet2DModel

IMPROVED = {"width": 32, "mult": (1, 2), "layers": 2, "attention": (1,)}
ADM = IMPROVED | {"mult": (1, 4), "layers": 1, "head_channels": 64, "updown": True, "classes": 5}
SMALL = {
    "improved": IMPROVED,
    "improved with classes": IMPROVED | {"classes": 5, "layers": 1, "attention": (0, 1)},
    "one head": IMPROVED | {"heads": 1, "scale_shift": False, "attention": ()},
    "grey, a fixed variance": IMPROVED | {"colours": 1, "out": 1, "mult": (1, 1), "layers": 1},
    "ADM": ADM,
    "ADM without attention beside the middle": ADM | {"attention": (), "layers": 2},
    "ADM 64, the new order": ADM | {"mult": (1, 2, 3, 4), "attention": (3,), "new_order": True},
    "ADM 128, 4 heads": ADM | {"mult": (1, 1, 2, 3, 4), "attention": (3, 4), "head_channels": None},
}


def original(name, dtype=torch.float32):
    model = randomise(UNetModel(**SMALL[name])).to(dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.data += 1
    return model


def state(model):
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def write(path, tensors):
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
    return path


def inputs(name, dtype=np.float64):
    options, rng = SMALL[name], np.random.default_rng(1)
    size = 2 ** len(options["mult"])
    latents = rng.standard_normal((2, size, size, options.get("colours", 3))).astype(dtype)
    labels = read_only([4, 1]) if "classes" in options else None
    return read_only(latents), read_only(np.array([.25, 970.5], dtype)), labels


@pytest.mark.parametrize("name", SMALL)
def test_numbers_and_gradients(name, tmp_path):
    """The gradients are compared in the file's own layout: they are read as another model's."""
    reference = original(name, torch.float64)
    torch.save(reference.state_dict(), tmp_path / "ema.pt")
    module = tinyldm.load_model(tmp_path / "ema.pt", dtype=np.float64)
    latents, timesteps, labels = inputs(name)
    x = nchw(latents).requires_grad_()
    their_labels = None if labels is None else torch.from_numpy(labels.copy())
    theirs = reference(x, torch.from_numpy(timesteps.copy()), their_labels)
    tape = Tape()
    ours = module(latents, timesteps, tape, class_labels=labels)
    assert_close(ours, nhwc(theirs), 1e-10, "output")

    dy = read_only(np.random.default_rng(2).standard_normal(ours.shape))
    theirs.backward(nchw(dy))
    assert_close(module.backward(dy, tape).latents, nhwc(x.grad), 1e-6, "dlatents")
    assert not tape.entries
    gradients = {key: p.grad.numpy() for key, p in reference.named_parameters()}
    expected = tinyldm.load_model(write(tmp_path / "gradients.safetensors", gradients),
                                  dtype=np.float64)
    for (key, parameter), (_, their) in zip(module.named_parameters(), expected.named_parameters(),
                                            strict=True):
        allowed = 1e-6 * abs(their.data).max() + 1e-12
        within(abs(parameter.grad - their.data).max(), allowed, key)


@pytest.mark.parametrize("name", SMALL)
def test_float32(name, tmp_path):
    reference = original(name)
    module = tinyldm.load_model(write(tmp_path / "x.safetensors", state(reference)))
    latents, timesteps, labels = inputs(name, np.float32)
    with torch.no_grad():
        theirs = nhwc(reference(nchw(latents), torch.from_numpy(timesteps.copy()),
                                None if labels is None else torch.from_numpy(labels.copy())))
    assert_close(module(latents, timesteps, class_labels=labels), theirs, 1e-3, "fast")
    with backend.plain():
        assert_close(module(latents, timesteps, class_labels=labels), theirs, 1e-4, "plain")


def test_the_wrong_order_of_q_k_and_v_is_another_picture(tmp_path):
    file = write(tmp_path / "x.safetensors", state(original("ADM")))
    module = tinyldm.load_model(file)
    other = dict(module.named_parameters())
    name, tensor = "mid_block.attentions.0.qkv.weight", read_tensors(file)[
        "middle_block.1.qkv.weight"]
    tensor = tensor._replace(shape=tensor.shape[:2], strides=tensor.strides[:2])
    right, wrong = (iddpm._matrices(name, tensor, 2, is_new) for is_new in (False, True))
    for key in right:
        assert (right[key].read(np.float32) == other[key].data).all()
        assert (wrong[key].read(np.float32) != other[key].data).any()


# ---- the published files ------------------------------------------------------------------------

THREE = {"layers": 3, "attention": (1, 2)}              # of 32x32 pixels, at 16 and 8
PUBLISHED = {
    "cifar10": (dict(width=128, mult=(1, 2, 2, 2), **THREE), 446, 52_546_438, "7296e7e468465be0",
                (32, 4000, True)),
    "imagenet64": (dict(width=128, mult=(1, 2, 3, 4), layers=3, attention=(2, 3)), 450,
                   121_063_942, "e98f1562894f95a8", (64, 4000, True)),
    "imagenet64, classes": (dict(width=192, mult=(1, 2, 3, 4), layers=3, attention=(2, 3),
                                 classes=1000), 451, 273_049_350, None, (64, 4000, False)),
    "bedroom": (dict(width=128, mult=(1, 1, 2, 2, 4, 4), layers=2, attention=(4,), heads=1,
                     scale_shift=False), 426, 113_676_678, None, (256, 1000, False)),
    "adm64": (dict(width=192, mult=(1, 2, 3, 4), layers=3, attention=(1, 2, 3), head_channels=64,
                   updown=True, classes=1000), 541, 295_904_454, "3a55b98a9f28c286",
              (64, 1000, False)),
    "adm256": (dict(width=256, mult=(1, 1, 2, 2, 4, 4), layers=2, attention=(3, 4, 5),
                    head_channels=64, updown=True), 566, 552_814_086, None, (256, 1000, False)),
}


class Shape:
    """In place of a StoredTensor: what is read of a file that is not there."""

    def __init__(self, shape):
        self.shape, self.strides, self.path, self.name, self.format = shape, shape, "", "", "F32"
        self.fits_float16 = False

    def rows(self, first, last):
        return Shape((last - first, *self.shape[1:]))

    def _replace(self, shape, strides):
        return Shape(shape)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name):
    """Names and shapes as listed; every one of them finds its place in a UNet2DModel."""
    options, tensors, numbers, listed, (size, T, rescaled) = PUBLISHED[name]
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape)
                  for key, tensor in UNetModel(**options).state_dict().items()}
    assert len(shapes) == tensors
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == numbers
    assert listed in (None, digest([("model", *item) for item in shapes.items()]))
    config, found = iddpm.unet({key: Shape(shape) for key, shape in shapes.items()}, "file")
    ours = {key: file_shape(parameter) for key, parameter in UNet2DModel(config).named_parameters()}
    assert {key: tensor.shape for key, tensor in found.items()} == ours
    told, settings = iddpm.drawing(config)
    assert config["sample_size"] == size and told["num_train_timesteps"] == T
    assert settings.get("_rescale_timesteps", False) == rescaled
    assert told["variance_type"] == "learned_range"
    cosine = name not in ("bedroom", "adm256")
    assert told["beta_schedule"] == ("squaredcos_cap_v2" if cosine else "linear")
    heads = {key: block.attentions[0].num_heads for key, block in enumerate(
        UNet2DModel(config).down_blocks) if block.attentions}
    width = options["width"]
    assert heads == {level: options.get("heads", 4) if "head_channels" not in options
                     else options["mult"][level] * width // 64 for level in options["attention"]}


# ---- what does not fit --------------------------------------------------------------------------

def without(*names):
    return lambda tensors: {name: x for name, x in tensors.items() if name not in names}


def replaced(name, change):
    return lambda tensors: {**tensors, name: change(tensors[name])}


QKV, FIRST = "input_blocks.4.1.qkv.weight", "input_blocks.0.0.weight"


@pytest.mark.parametrize("change, message", [
    (without("input_blocks.4.1.qkv.bias"), "missing: .*down_blocks.1.attentions.0.to_q.bias"),
    (without("output_blocks.1.0.in_layers.0.weight"), "missing: .*up_blocks.0.resnets.1.norm1"),
    (without("out.2.weight"), "unknown kind of model|UNet"),
    (without("input_blocks.1.0.out_layers.3.weight"), "holds only a part of a UNet"),
    (lambda x: {k: v for k, v in x.items() if "output" not in k}, "holds only a part of a UNet"),
    (replaced(QKV, lambda x: x[:90]), "wrong shape|missing: .*to_q"),
    (replaced(QKV, lambda x: np.float32(3).reshape(())), "missing: .*to_q"),
    (replaced(FIRST, lambda x: np.repeat(x, 2, 1)), "6 channels.*upsamplers are not supported"),
    (replaced(FIRST, lambda x: x[0]), "holds only a part of a UNet"),
    (replaced("time_embed.0.weight", lambda x: np.repeat(x, 2, 1)), "narrower than its embedding"),
    (replaced("out.2.bias", lambda x: x * np.nan), "holds NaN"),
    (lambda x: {**x, "extra.weight": np.zeros(3, np.float32)}, "unexpected: .*extra.weight"),
    (lambda x: {**x, "middle_block.7.weight": np.zeros(3, np.float32)}, "unexpected: .*block.7"),
    (lambda x: {**x, "output_blocks.99.0.weight": np.zeros(3, np.float32)}, "only a part of|unexp"),
    (lambda x: {**x, "input_blocks.0.1.weight": np.zeros(3, np.float32)}, "unexpected"),
])
def test_files_that_do_not_fit(change, message, tmp_path):
    file = write(tmp_path / "x.safetensors", change(state(original("improved"))))
    with pytest.raises(TinyldmError) as error:
        tinyldm.load_model(file)
    assert re.search(message, str(error.value).replace("\n", " ")), error.value


def test_wrapped_names_and_leftovers(tmp_path):
    tensors = {f"module.{name}": tensor for name, tensor in state(original("ADM")).items()}
    tensors["betas"] = np.zeros(3, np.float32)
    file = write(tmp_path / "x.safetensors", tensors)
    module = tinyldm.load_model(file)
    config, found = iddpm.unet(read_tensors(file), file)
    assert fitted(found, dict(module.named_parameters())).keys() == found.keys() - {"betas"}
    assert config["num_class_embeds"] == 5 and config["attention_head_dim"] == 64


# ---- drawing ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def improved(tmp_path_factory):
    """A file of the kind of Improved DDPM, its network in torch, and the pipeline."""
    reference = original("improved")
    reference.out[2].weight.data *= 0.3
    file = tmp_path_factory.mktemp("iddpm") / "ema_0.9999_500000.pt"
    torch.save(reference.state_dict(), file)
    return file, reference, tinyldm.load(file, dtype=np.float64)


def test_draws_as_its_authors_code(improved):
    """Respaced steps of 4000, x_start clipped, the variance between beta~ and beta; the network
    sees t / 4. Ours has the schedule in float32, so the last steps round otherwise."""
    _, reference, pipe = improved
    reference = reference.double()
    process = Process.cosine(4000, rescale_timesteps=True).respaced(10)
    size = pipe.size[0]
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 3, size, size, generator=generator).double()
    assert (x == noise).all()
    states = list(pipe.stream(seed=3, num_inference_steps=10))
    for t in reversed(range(10)):
        step = np.array([t])
        with torch.no_grad():
            output = nhwc(reference(x, torch.tensor(process.model_timesteps(step, x.numpy()))))
        p = reverse(process, output, nhwc(x), step)
        z = torch.randn(1, 3, size, size, generator=generator).double() if t else 0 * x
        x = nchw(p.mean + np.exp(p.logvar / 2) * nhwc(z))
        assert states[9 - t].timestep == process.timesteps[t]
        assert_close(states[9 - t].latents, nhwc(x), 1e-3, f"step {t}")
    assert_same_pixels(pipe.decode(states[-1].latents) * 127.5, np.clip(nhwc(x), -1, 1) * 127.5)


@pytest.mark.parametrize("steps", [25, 250])
def test_linspace_steps_are_the_respaced_ones(steps, improved):
    ours = to_ints(improved[2].schedule.timesteps(steps, "leading"))
    assert list(ours)[::-1] == kept_timesteps(4000, steps).tolist()


def test_the_pipeline_of_a_file_and_of_its_folder(improved, tmp_path):
    file, _, pipe = improved
    assert kind_of(file) == pipe.kind == "DDPMPipeline"
    assert pipe.rescale_timesteps and pipe.num_inference_steps == 250
    assert pipe.schedule.num_train_timesteps == 4000
    tinyldm.save(pipe, tmp_path / "folder", dtype=np.float64)
    again = tinyldm.load(tmp_path / "folder", dtype=np.float64)
    for sampler in (None, "ddim"):
        first, second = (list(p.stream(seed=1, num_inference_steps=3, sampler=sampler))[-1].latents
                         for p in (pipe, again))
        assert (first == second).all()


def test_a_vae_has_no_place(improved):
    with pytest.raises(TinyldmError, match="has no VAE: leave vae out"):
        tinyldm.load(improved[0], vae=improved[0])


def test_bits_per_dimension_of_a_loaded_model(improved):
    """The sum is what the torch network gives."""
    _, reference, pipe = improved
    process = Process.of(pipe.schedule, pipe.rescale_timesteps).respaced("5")
    pictures = np.random.default_rng(0).integers(0, 256, (2, *pipe.size, 3)) / 127.5 - 1

    def theirs(x_t, timesteps):
        with torch.no_grad():
            return nhwc(reference.double()(nchw(x_t), torch.from_numpy(timesteps.copy())))
    ours, expected = (bits_per_dimension(predict, process, [pictures],
                                         np.random.default_rng(1).standard_normal)
                      for predict in (pipe.unet, theirs))
    within(abs(ours.terms - expected.terms), 1e-9 * expected.terms + 1e-9)
    assert ours.total > 0
