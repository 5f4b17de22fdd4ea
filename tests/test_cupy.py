"""The way through CuPy, without a GPU: the names in the source, and everything on strict arrays.

What runs here ran on the stand-in of strict.py, never on a device: rules, dtypes and numbers, and
nothing of speed. The ops are compared by `check_op`, case by case, in tests/ops. test_gpu.py
compares the numbers of a device, where there is one.
"""
import ast
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import strict
from tests.support.gpu import LARGE, PROMPT, draw, sampled
from tests.support.models import CLIPS, UNETS, UNETS_2D, VAES, class_labels, vae_config
from tests.support.pictures import hole, picture
from tests.support.schedulers import SD15
from tests.support.small_pipelines import change_json, dit, inpainting, lcm, sdxl
from tests.support.sources import PACKAGE, SOURCES
from tests.support.tolerance import assert_allclose, assert_same_pixels, within
from tinyldm import Between, backend, layers, ops
from tinyldm.cli.draw import main
from tinyldm.cli.profiler import Profiler
from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.diffusion.schedule import Schedule
from tinyldm.errors import TinyldmError
from tinyldm.layers import Tape
from tinyldm.models import AutoencoderKL, CLIPTextModel, UNet2DConditionModel, UNet2DModel
from tinyldm.pipelines.loading import load
from tinyldm.training.objectives import diffusion_loss, vae_loss
from tinyldm.training.optim import AdamW, initialise


@pytest.fixture(autouse=True)
def xp():
    with strict.installed() as cupy, backend.plain():
        yield cupy


# ---- the names in the source ----------------------------------------------------------------

def names_taken(source):
    """Every dotted name taken from xp, self._xp, get_xp(...) or cupy."""
    def is_library(node):
        return (isinstance(node, ast.Name) and node.id in ("xp", "cupy")
                or isinstance(node, ast.Attribute) and node.attr == "_xp"
                or isinstance(node, ast.Call) and getattr(node.func, "id", "") == "get_xp")

    for node in ast.walk(ast.parse(source)):
        path = []
        while isinstance(node, ast.Attribute) and not is_library(node):
            path.insert(0, node.attr)
            node = node.value
        if path and is_library(node):
            yield ".".join(path)


needs_cupy = pytest.mark.skipif(strict.CUPY is None, reason="CuPy is not installed")


@needs_cupy
def test_cupy_has_every_name():
    taken = {(name, file) for file in SOURCES
             for name in names_taken((PACKAGE / file).read_text(encoding="utf-8"))}
    assert not [pair for pair in sorted(taken) if not strict.exists(pair[0])]
    assert {"add.at", "exp", "concatenate", "cuda.runtime.getDeviceCount"} <= dict(taken).keys()


@needs_cupy
@pytest.mark.parametrize("source, name", [
    ("with xp.errstate(): pass", "errstate"), ("get_xp(x).maximum.reduce(x)", "maximum.reduce"),
    ("self._xp.nditer", "nditer"), ("cupy.linalg.multi_dot([a, b])", "linalg.multi_dot"),
    ("y = -xp.multiply.at(x, i, 2)", "multiply.at"),
])
def test_a_name_that_cupy_lacks_is_seen(source, name):
    assert name in names_taken(source) and not strict.exists(name)


def test_every_op_has_a_case():
    """Each with its derivative goes through check_op, which runs it on strict arrays."""
    cases = (Path(__file__).parent / "ops").glob("test_*.py")
    nodes = [node for file in cases for node in ast.walk(ast.parse(file.read_text()))]
    named = {node.value for node in nodes if isinstance(node, ast.Constant)}
    named |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names = {name for name, op in vars(ops).items() if callable(op)}
    assert "silu" in names
    assert not [name for name in names if not {name, name.removesuffix("_backward")} & named]


# ---- models ---------------------------------------------------------------------------------

def unet(config, array, rng):
    module = UNet2DConditionModel(config)
    inputs = (array(rng.standard_normal((2, 7, 9, config["in_channels"]))), array([3, 981]) + 0.3,
              array(rng.standard_normal((2, 7, config["cross_attention_dim"]))))

    def run(tape):
        y = module.forward(*inputs, tape)
        dlatents, dcontext = module.backward(array(rng.standard_normal(y.shape)), tape)
        return {"y": y}, {"dlatents": dlatents, "dcontext": dcontext}
    return module, run


def unet_2d(config, array, rng):
    module = UNet2DModel(config)
    latents = array(rng.standard_normal((2, 8, 12, config.get("in_channels", 3))))
    labels = class_labels(config, rng)
    more = {} if labels is None else {"class_labels": array(labels)}

    def run(tape):
        y = module.forward(latents, array([3, 981]) + 0.3, tape, **more)
        dlatents, _ = module.backward(array(rng.standard_normal(y.shape)), tape)
        return {"y": y}, {"dlatents": dlatents}
    return module, run


def vae(config, array, rng):
    module = AutoencoderKL(dict(vae_config(config), sample_size=8))     # half a side is a tile
    images = array(rng.standard_normal((2, 16, 16, 3)))

    def run(tape):
        mean, logvar = module.encode(images, tape)
        z = array(rng.standard_normal(mean.shape))      # not mean, which is rounded already
        y = module.decode(z, tape)
        dmean = module.decode_backward(array(rng.standard_normal(y.shape)), tape)
        dimages = module.encode_backward(dmean, 0.1 * logvar, tape)
        tiled = module.decode_tiled(z)
        return ({"mean": mean, "logvar": logvar, "y": y, "tiled": tiled},
                {"dmean": dmean, "dimages": dimages})
    return module, run


def clip(config, array, rng):
    module = CLIPTextModel(config)
    ids = array(rng.integers(0, 97, (2, 77)))

    def run(tape):
        y = module.forward(ids, tape)
        module.backward(array(rng.standard_normal(y.shape)), tape)
        return {"y": y}, {}
    return module, run


def random_weights(module, array, rng):
    initialise(module, rng)
    for parameter in module.parameters():               # off zero, where last layers start
        parameter.data = array(parameter.data + 0.1 * rng.standard_normal(parameter.shape))


def results(model, config, library, dtype):
    """(outputs, gradients) of a random model and random inputs, by name, float32 on the host.

    All numbers are rounded to dtype; NumPy then computes in float32.
    """
    kind = np.float32 if library is np else dtype

    def array(x):
        x = np.asarray(x)
        return library.asarray(x.astype(dtype).astype(kind) if x.dtype.kind == "f" else x)

    rng = np.random.default_rng(0)
    module, run = model(config, array, rng)
    random_weights(module, array, rng)
    tape = Tape()
    outputs, gradients = run(tape)
    gradients |= {name: parameter.grad for name, parameter in module.named_parameters()}
    assert not tape.entries
    for name, x in (outputs | gradients).items():
        assert isinstance(x, library.ndarray) and x.dtype == kind, f"{name} is {x.dtype}"
    return [{name: backend.to_host(x).astype(np.float32) for name, x in group.items()}
            for group in (outputs, gradients)]


MODELS = [pytest.param(model, config, id=f"{model.__name__}, {name}")
          for model, configs in ((unet, UNETS), (unet_2d, UNETS_2D), (vae, VAES), (clip, CLIPS))
          for name, config in configs.items()]
every_model = pytest.mark.parametrize("model, config", MODELS)


@every_model
def test_models_in_float32(model, config, xp):
    """NumPy's numbers, to the last bit."""
    for expected, ours in zip(results(model, config, np, np.float32),
                              results(model, config, xp, np.float32)):
        for name, x in ours.items():
            np.testing.assert_array_equal(x, expected[name], name)


@every_model
def test_models_in_float16(model, config, xp):
    """Close to float32 of the same weights; PyTorch's float16 strays about as far."""
    def size(x):
        return np.sqrt((x * x).mean())

    for allowed, expected, ours in zip((0.01, 0.05), results(model, config, np, np.float16),
                                       results(model, config, xp, np.float16)):
        for name, x in ours.items():
            weight = name.replace("bias", "weight")     # of many a bias the gradient is 0
            scale = max(size(expected[key]) for key in (name, weight) if key in expected)
            error = size(x - expected[name]) / scale
            within(error, allowed, name)


BASES = {layers.Module, layers.Sequence, layers.WeightedOp}
# Of Inception: tests/models/test_inception.py; of a discriminator:
# tests/training/stages/test_autoencoder.py.
ELSEWHERE = {layers.Pool, layers.BatchNorm}


def test_the_models_use_every_layer():
    rng = np.random.default_rng(0)
    used = {type(part) for model, config in ((unet, UNETS["as SD 1"]), (vae, VAES["two levels"]),
                                             (clip, CLIPS["as SD 1"]),
                                             (unet_2d, UNETS_2D["as ADM"]))
            for _, part in layers.named_modules(model(config, np.asarray, rng)[0])}
    assert used >= {layer for layer in vars(layers).values()
                    if isinstance(layer, type) and issubclass(layer, layers.Module)
                    and not layer.__name__.startswith("_")} - BASES - ELSEWHERE


# ---- samplers -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(name, xp):
    """The same states as on the host, in float32."""
    for ours, expected in zip(sampled(name, xp), sampled(name, np), strict=True):
        for array, same in ((ours.latents, expected.latents), (ours.pred_x0, expected.pred_x0)):
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array.get(), same)


# ---- a whole picture ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pipes():
    """The bundled model on the host and, in both dtypes, on the device."""
    with strict.installed():
        return {"cpu": load(), **{dtype: load(device="cuda", dtype=dtype)
                                  for dtype in ("float32", "float16")}}


@pytest.mark.parametrize("options", [
    {}, {"sampler": "euler_ancestral", "num_images": 2, "negative_prompt": "blue"},
    {"sampler": "euler", "guidance_scale": 1, "width": 48, "height": 32},
    {"image": picture(0, (64, 64)), "strength": 0.7, "num_images": 2},
    {"image": picture(0, (64, 64)), "mask": hole((64, 64)), "sampler": "heun"},
    {"image": Between(picture(0, (64, 64)), picture(1, (64, 64)), 0.3),
     "seed": Between(1, 2, 0.5), "mask": hole((64, 64)), "strength": 0.7, "sampler": "unipc"},
], ids=lambda options: " ".join(options) or "nothing")
def test_a_picture(options, pipes):
    expected, images = draw(pipes["cpu"], **options)
    latents, same = draw(pipes["float32"], **options)
    np.testing.assert_array_equal(latents, expected)
    np.testing.assert_array_equal(same, images)
    latents, close = draw(pipes["float16"], **options)
    assert latents.dtype == np.float32                  # the sampler's sums
    assert_same_pixels(close, images, 4)


@pytest.mark.parametrize("scheduler", [{}, {"_class_name": "DDPMScheduler",
                                            "variance_type": "learned_range"}], ids=str)
def test_dit(scheduler, tmp_path):
    """A label in place of a prompt; also the variance that a model learned."""
    folder = dit(tmp_path / "dit")
    change_json(folder / "scheduler" / "scheduler_config.json", **scheduler)
    host, device, half = load(folder), *(load(folder, "cuda", dtype)
                                         for dtype in ("float32", "float16"))
    expected, images = draw(host, prompt="umbrella")
    latents, same = draw(device, prompt="umbrella")
    np.testing.assert_array_equal(latents, expected)
    np.testing.assert_array_equal(same, images)
    within(abs(draw(half, prompt="umbrella")[1] - images).mean(), 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("make", [sdxl, lcm, inpainting], ids=lambda make: make.__name__)
def test_other_kinds(make, tmp_path):
    """Two text encoders and sizes; imitated guidance; a mask."""
    folder, options = make(tmp_path / "weights"), {}
    if make is inpainting:
        options = {"image": picture(), "mask": hole()}
    with strict.installed():
        host, device, half = load(folder), *(load(folder, "cuda", dtype)
                                             for dtype in ("float32", "float16"))
    expected, images = draw(host, prompt="red cat", negative_prompt="", **options)
    latents, same = draw(device, prompt="red cat", negative_prompt="", **options)
    np.testing.assert_array_equal(latents, expected)
    np.testing.assert_array_equal(same, images)
    _, close = draw(half, prompt="red cat", negative_prompt="", **options)
    within(abs(close - images).mean(), 3)


def test_the_fast_picture_is_the_same(pipes):
    with backend.plain(False):
        _, fast = draw(pipes["cpu"])
    assert_same_pixels(draw(pipes["float32"])[1], fast)


def test_latents_of_the_host_are_moved(pipes):
    latents = np.random.default_rng(0).standard_normal((1, 16, 16, 8), np.float32)
    expected, ours = (pipes[name] for name in ("cpu", "float32"))
    np.testing.assert_array_equal(draw(ours, latents=latents)[1],
                                  draw(expected, latents=latents)[1])
    np.testing.assert_array_equal(ours.decode(latents).get(), expected.decode(latents))


def test_the_host_waits_once_a_step(pipes, monkeypatch):
    """To ask whether the latents are finite; all else only queues work."""
    def waits(steps):
        monkeypatch.setattr(strict.Array, "waits", 0)
        list(pipes["float32"].stream(PROMPT, num_inference_steps=steps))
        return strict.Array.waits
    assert waits(5) - waits(2) == 3


def test_float32_on_request(tmp_path, pipes):
    """Without a word the GPU stores float16; the command draws what the pipeline draws."""
    assert load(device="cuda").unet.conv_in.weight.data.dtype == np.float16
    out = tmp_path / "out.png"
    command = [PROMPT, "--steps", "1", "--output", str(out), "--device", "cuda"]
    drawn = []
    for options, dtype in (([], "float16"), (["--dtype", "float32"], "float32")):
        assert main(command + options) == 0
        drawn.append(np.asarray(Image.open(out)))
        expected = pipes[dtype](PROMPT, num_inference_steps=1)[0]
        np.testing.assert_array_equal(drawn[-1], expected)
    assert (drawn[0] != drawn[1]).any()


def test_the_profiler(pipes):
    """It waits for the device at every layer, to read the clock after the work."""
    waits = strict.Array.waits
    with Profiler(pipes["float16"]) as profile:
        pipes["float16"](PROMPT, num_inference_steps=1)
    ops_seen = profile.tables["by op"]
    assert ops_seen["attention"].flop > 0 and "group_norm_silu" in ops_seen
    assert strict.Array.waits - waits > sum(row.calls for row in ops_seen.values())


@pytest.mark.parametrize("cupy, message", [
    (None, "needs CuPy, which is not installed: pip install"),
    (lambda: 0, "needs an NVIDIA GPU, and CuPy finds none: use --device cpu"),
    (lambda: 1 / 0, r"CuPy finds none \(division by zero\): use --device cpu"),
], ids=["no CuPy", "no GPU", "no driver"])
def test_what_is_missing_is_named(cupy, message, monkeypatch):
    if cupy is None:
        monkeypatch.setitem(sys.modules, "cupy", None)
    else:
        monkeypatch.setattr(strict.Library.cuda.runtime, "getDeviceCount", cupy)
    with pytest.raises(TinyldmError, match=message):
        load(device="cuda")


def test_arrays_are_moved_both_ways(xp):
    host, device = np.ones(3, np.float32), xp.asarray(np.zeros(2))
    for like, kind in ((host, np.ndarray), (device, xp.ndarray)):
        for array in (host, device):
            moved = backend.asarray(array, like=like)
            assert isinstance(moved, kind) and moved.dtype == array.dtype


# ---- training -------------------------------------------------------------------------------

def train(library):
    """Two steps of both losses -> the reports, the parameters, the average, the state."""
    rng = np.random.default_rng(0)

    def array(x):
        return library.asarray(x, np.float32 if x.dtype.kind == "f" else None)

    parts = [CLIPTextModel(CLIPS["as SD 1"]), AutoencoderKL(vae_config(VAES["two levels"])),
             UNet2DConditionModel(dict(UNETS["as SD 2"], cross_attention_dim=24))]
    for part in parts:
        random_weights(part, array, rng)
    text_encoder, autoencoder, denoiser = parts
    optimizer = AdamW([pair for part in parts for pair in part.named_parameters()])
    images, latents = (array(rng.uniform(-1, 1, (2, 8, 8, C))) for C in (3, 4))
    ids, reports = array(rng.integers(0, 97, (2, 77))), []
    for _ in range(2):
        reports += vae_loss(autoencoder, images, rng, 0.5).values()
        reports += diffusion_loss(text_encoder, denoiser, Schedule.from_config(SD15), latents, ids,
                                  rng, 0.5).values()
        reports.append(optimizer.step(0.01))
    optimizer.load_state(optimizer.state())
    return [float(x) for x in reports], optimizer.state()


def test_training(xp):
    """NumPy's numbers again; the state goes through the host and back."""
    (reports, state), (same_reports, same_state) = train(np), train(xp)
    assert reports == same_reports
    for name in AdamW.STATE:
        assert isinstance(same_state[name], np.ndarray)
        np.testing.assert_array_equal(same_state[name], state[name], name)


# ---- float16 --------------------------------------------------------------------------------

@pytest.mark.parametrize("ours, expected", LARGE)
def test_large_numbers_in_float16(ours, expected):
    """What is stored fits float16; sums, squares, exponentials and scores on the way do not."""
    assert_allclose(np.squeeze(ours()), expected, rtol=2e-3, atol=1e-6)
