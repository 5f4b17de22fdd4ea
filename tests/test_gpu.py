"""On a GPU against NumPy: every op, layer, model and sampler, and a whole picture.

Each test has two devices. The stand-in of support/strict.py runs everywhere, and so exercises these
tests; `gpu` is a CUDA device through CuPy, and is skipped without one:

    python -m pytest -m gpu
"""
import numpy as np
import pytest

from tests.support import models, small_pipelines, strict
from tests.support.checks import gradients_of
from tests.support.extra import no_gpu
from tests.support.gpu import PROMPT, sampled
from tests.support.pictures_to_train import write_pictures
from tests.support.tolerance import assert_allclose, assert_close, assert_same_pixels, within
from tinyldm import backend, layers, ops
from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.layers import Tape
from tinyldm.models.lora import LoRA
from tinyldm.pipelines.loading import load
from tinyldm.shapes import autoencoder, denoiser, recipe
from tinyldm.training.__main__ import main

# Of the standard deviation: forward and backward of one op, of a whole model.
OP = {np.float32: 1e-4, np.float16: 1e-2}
MODEL = {np.float32: 1e-3, np.float16: 5e-2}

both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float16])
both_paths = pytest.mark.parametrize("plain", [True, False], ids=["plain", "fast"])


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def xp(request):
    """The array library: CuPy, or what stands in for it."""
    if request.param == "gpu":
        if reason := no_gpu():
            pytest.skip(reason)
        yield __import__("cupy")
    else:
        with strict.installed() as cupy:
            yield cupy


def on(xp, array, dtype):
    array = np.asarray(array)
    return xp.asarray(array.astype(dtype) if array.dtype.kind == "f" else array)


def assert_near(ours, theirs, allowed, what):
    """Of a result whose true value is 0, such as a bias before a norm, only the size is asked."""
    ours = backend.to_host(ours).astype(np.float64)
    assert ours.shape == np.shape(theirs), what
    if theirs.std() > 1e-3:
        assert_close(ours, theirs, allowed, what)
    else:
        within(abs(ours - theirs), allowed, what)


# ---- ops ------------------------------------------------------------------------------------

ROWS, MAP = [(5, 48)], (2, 6, 10, 16)
FACTORS = np.linspace(-0.5, 0.5, 32).reshape(2, 16)
PIXELS = np.linspace(0, 255, 40).round().reshape(5, 8) / 127.5 - 1      # of 8 bits
CASES = [
    ("linear", [(5, 48), (24, 48), (24,)], {}), ("concat", [(5, 8), (5, 24)], {}),
    ("conv2d", [MAP, (3, 3, 16, 8), (8,)], {"padding": (1, 1)}),
    ("conv2d", [MAP, (3, 3, 16, 8), (8,)], {"padding": (0, 1), "stride": 2}),
    ("conv2d", [MAP, (1, 1, 16, 8), (8,)], {}), ("upsample_nearest", [MAP], {}),
    ("group_norm", [MAP, (16,), (16,)], {"num_groups": 4, "eps": 1e-5}),
    ("group_norm_silu", [MAP, (16,), (16,)], {"num_groups": 4, "eps": 1e-5}),
    ("layer_norm", [(2, 7, 48), (48,), (48,)], {"eps": 1e-5}),
    ("silu", ROWS, {}), ("gelu", ROWS, {}), ("quick_gelu", ROWS, {}), ("geglu", ROWS, {}),
    ("gelu_tanh", ROWS, {}), ("unpatchify", [(2, 4, 12)], {"patch_size": 2}),
    ("ada_layer_norm", [(2, 7, 48), (2, 48), (2, 48)], {"eps": 1e-6}),
    # With larger factors the roundings of weight and bias, which the factors multiply, are larger.
    ("ada_group_norm_silu", [MAP, (16,), (16,), FACTORS, FACTORS], {"num_groups": 4, "eps": 1e-5}),
    ("downsample_average", [MAP], {}),
    ("add_gated", [(2, 7, 48), (2, 7, 48), (2, 48)], {}),
    ("softmax", ROWS, {}), ("attention", [(2, 9, 32), (2, 77, 32), (2, 77, 32)], {"num_heads": 4}),
    ("attention", [(2, 9, 32)] * 3, {"num_heads": 4, "causal": True}),
    ("embedding", [np.array([[1, 3, 3]]), (5, 8)], {}),
    ("timestep_embedding", [(4,)], {"dim": 16, "flip_sin_to_cos": True, "freq_shift": 0}),
    ("mse", [(5, 8)] * 2, {}), ("l1", [(5, 8)] * 2, {}), ("kl_normal", [(5, 8)] * 2, {}),
    ("cross_entropy", [(5, 8), np.array([0, 7, 3, 3, 1])], {}),
    ("gaussian_kl", [(5, 8)] * 4, {}),
    # Of a standard deviation as trained models predict it: of 1, a bin's share would be rounding.
    ("discretized_log_likelihood", [PIXELS, 0.97 * PIXELS, np.linspace(-7, -5, 40).reshape(5, 8)],
     {}),
    ("unit", ROWS, {}), ("similarity", [(5, 8), (6, 8), np.array(0.5)], {}),
    ("contrastive", [(5, 5)], {}), ("scale_shift", [(5, 8), (8,), (8,)], {}),
    ("upsample_bilinear", [MAP], {"size": (12, 25)}),
    ("average_pool", [MAP], {"K": 3, "stride": 1, "padding": (1, 1)}),
    ("max_pool", [MAP], {"K": 3, "stride": 2, "padding": (0, 0)}),
    ("leaky_relu", ROWS, {}), ("hinge", [(5, 8), (5, 8)], {}),
    ("resize_bilinear", [MAP], {"size": (4, 25)}),
    ("batch_norm", [MAP, (16,), (16,)], {"eps": 1e-5}),
    ("batch_norm_relu", [MAP, (16,), (16,), (16,), np.linspace(0.5, 2, 16)], {"eps": 1e-3}),
]


def test_every_op_has_a_case():
    pairs = {name.removesuffix("_backward") for name in vars(ops) if name.endswith("_backward")}
    pairs -= {"split"}                                  # without arithmetic
    pairs -= {"linear_input", "conv2d_input"}           # of frozen layers, below
    assert pairs <= {name for name, *_ in CASES}


@both_paths
@both_dtypes
@pytest.mark.parametrize("name, shapes, params", CASES, ids=lambda value: str(value)[:40])
def test_ops(name, shapes, params, dtype, plain, xp, rng):
    arrays = [rng.standard_normal(shape) if isinstance(shape, tuple) else shape for shape in shapes]
    arrays = [x.astype(dtype) if x.dtype.kind == "f" else x for x in arrays]
    dys = []

    def run(move):
        inputs = list(map(move, arrays))
        y, cache = getattr(ops, name)(*inputs, **params)
        if not dys:                                     # of a loss 1
            dys.append(rng.standard_normal(y.shape).astype(dtype) if y.ndim else
                       np.float32(1))
        dy = move(dys[0]) if y.ndim else dys[0]
        return [y, *gradients_of(getattr(ops, f"{name}_backward"), dy, cache, inputs).values()]
    with backend.plain():
        expected = run(lambda x: x.astype(np.float64) if x.dtype.kind == "f" else x)
    with backend.plain(plain):
        found = run(xp.asarray)
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert_near(ours, theirs, OP[dtype], f"result {i}")


# ---- layers and models ----------------------------------------------------------------------

LAYERS = [
    (layers.Linear(8, 16), (3, 8)), (layers.Conv2d(8, 16), (1, 5, 5, 8)),
    (layers.GroupNorm(16, 4, 1e-5), MAP), (layers.GroupNormSiLU(16, 4, 1e-5), MAP),
    (layers.LayerNorm(8, 1e-5), (3, 8)), (layers.Activation("gelu"), (3, 8)),
    (layers.BatchNorm(16, 1e-5), MAP), (layers.Activation("leaky_relu"), (3, 8)),
    (layers.Upsample(), (1, 3, 3, 8)), (layers.Embedding(7, 8), np.array([[1, 3, 3]])),
    (layers.Conv2d(8, 16, stride=2, padding=(0, 1)), (1, 6, 5, 8)),
    (LoRA(layers.Linear(8, 16), 2, 3), (3, 8)), (LoRA(layers.Conv2d(8, 16), 2, 3), (1, 5, 5, 8)),
]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@both_dtypes
@pytest.mark.parametrize("layer, shape", LAYERS, ids=lambda value: type(value).__name__)
def test_layers(layer, shape, dtype, frozen, xp, rng):
    x = shape if isinstance(shape, np.ndarray) else rng.standard_normal(shape).astype(dtype)
    weights = {name: rng.standard_normal(parameter.shape).astype(dtype)
               for name, parameter in layer.named_parameters()}
    dys = []

    def run(move):
        for name, parameter in layer.named_parameters():
            parameter.data, parameter.grad = move(weights[name]), None
            parameter.trainable = not frozen
        tape = Tape()
        y = layer(move(x), tape)
        dys[:] = dys or [rng.standard_normal(y.shape).astype(dtype)]
        dx = layer.backward(move(dys[0]), tape)
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        assert len(grads) == (0 if frozen else len(weights))
        return [y, *([] if dx is None else [dx]), *grads]
    with backend.plain():
        expected = run(lambda x: x.astype(np.float64) if x.dtype.kind == "f" else x)
    for i, (ours, theirs) in enumerate(zip(run(xp.asarray), expected, strict=True)):
        assert_near(ours, theirs, OP[dtype], f"result {i}")


def forward_and_backward(name, move):
    """Outputs and the gradient of every parameter of a small model, by name."""
    module, arrays = models.make(name), models.inputs(name)
    for parameter in module.parameters():
        parameter.data = move(parameter.data)
    tape, rng = Tape(), np.random.default_rng(2)
    outputs = models.outputs(module, {what: move(x) for what, x in arrays.items()}, tape)
    models.backward(module, arrays, [move(rng.standard_normal(y.shape)) for y in outputs], tape)
    return ({f"output {i}": y for i, y in enumerate(outputs)},
            {key: parameter.grad for key, parameter in module.named_parameters()})


@both_dtypes
@pytest.mark.parametrize("name", models.cases())
def test_models(name, dtype, xp):
    expected = forward_and_backward(name, lambda x: np.asarray(x))
    for ours, theirs in zip(forward_and_backward(name, lambda x: on(xp, x, dtype)), expected):
        size = max(np.sqrt((x ** 2).mean()) for x in theirs.values())
        for key, x in ours.items():
            error = backend.to_host(x).astype(np.float64) - theirs[key]
            within(np.sqrt((error ** 2).mean()), MODEL[dtype] * size, key)


# ---- training -------------------------------------------------------------------------------

OF_WEIGHTS = {
    "lora": ["--train-text-encoder", "--checkpoints"],
    "textual-inversion": ["--token", "<s>", "--initializer", "cat"],
    "unet": ["--train-text-encoder", "--ema", "0.5"],
}
NEW = {
    "autoencoder": ["--channels", "4", "8", "--resolution", "24"],
    "clip": ["--resolution", "16", "--patch", "8", "--width", "32", "--layers", "1"],
    "ddpm": ["--resolution", "16"],
}


@pytest.mark.parametrize("stage, dtype", [
    *((stage, dtype) for stage in OF_WEIGHTS for dtype in (np.float32, np.float16)),
    *((stage, np.float32) for stage in NEW), ("ddpm", np.float16), ("autoencoder", np.float16),
    ("clip", np.float16)])
def test_training(stage, dtype, xp, tmp_path):
    """Two updates: their losses, and the gradients, whose average is what AdamW remembers."""
    own = (OF_WEIGHTS | NEW)[stage]
    if stage in OF_WEIGHTS:
        own = [*own, "--weights", small_pipelines.smallest(tmp_path / "weights")]
    pictures = write_pictures(tmp_path / "pictures", 3)

    def state(name, *more):
        command = [stage, "--data", pictures, "--output", tmp_path / name, "--steps", 2, "--batch",
                   2, "--validate-every", 0, *own, *more]
        assert main([*map(str, command)]) == 0
        with np.load(tmp_path / name / "state.npz") as file:
            return {name: file[name] for name in file.files}
    host, half = state("host"), dtype == np.float16
    with backend.plain(xp is strict.cupy):              # its kernels, in Python, are slow
        device = state("device", "--device", "cuda", *(["--dtype", "float16"] if half else []))
    assert_allclose(device["history"], host["history"], rtol=MODEL[dtype] / 10)
    error = np.linalg.norm(device["m"] - host["m"]) / np.linalg.norm(host["m"])
    within(error, MODEL[dtype], "the gradients")
    # CLIP's gradient is so large that the first scale is too much for float16.
    assert ((device["scaling"][2] == 0) != (stage == "clip")) if half else "scaling" not in device


def test_the_recipe(xp, tmp_path, monkeypatch):
    """The toy world's stages, one after the other."""
    monkeypatch.setattr(autoencoder, "BATCH", 2)
    for module, name, widths in ((autoencoder, "VAE", [8, 8, 8]), (denoiser, "UNET", [8, 8, 16])):
        monkeypatch.setattr(module, name, getattr(module, name) | {
            "block_out_channels": widths, "norm_num_groups": 4})
    stages = {"vae": [], "unet": ["--batch", "4", "--pool", "64"], "decoder": []}

    def states(name, *more):
        found, folder = {}, tmp_path / name
        for stage, own in stages.items():
            recipe.run([stage, "--run", str(folder), "--steps", "2", *own, *more])
            with np.load(folder / f"{stage}.npz") as file:
                found[stage] = {name: file[name] for name in file.files}
        return found
    host = states("host")
    with backend.plain(xp is strict.cupy):
        device = states("device", "--device", "cuda")
    for stage in stages:
        own, other = device[stage], host[stage]
        assert_allclose(own["history"], other["history"], rtol=1e-3)
        # Two updates: where a gradient is nothing but rounding, Adam moves by the learning rate.
        within(np.sqrt(((own["data"] - other["data"]) ** 2).mean()), 1e-4, f"{stage}, rms")


# ---- samplers and a picture -----------------------------------------------------------------

@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(name, xp):
    for ours, theirs in zip(sampled(name, xp), sampled(name, np), strict=True):
        assert_close(backend.to_host(ours.latents), theirs.latents, 1e-4, "latents")
        assert_close(backend.to_host(ours.pred_x0), theirs.pred_x0, 1e-4, "pred_x0")


@pytest.mark.parametrize("dtype, allowed", [("float32", 2), ("float16", 4)])
def test_a_picture(dtype, allowed, xp):
    expected, = load()(PROMPT, num_inference_steps=2, seed=1)
    picture, = load(device="cuda", dtype=dtype)(PROMPT, num_inference_steps=2, seed=1)
    assert_same_pixels(picture, expected, allowed)
