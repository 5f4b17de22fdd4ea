"""Memory grows with the number of tokens, not with its square; low_memory needs less."""
import mmap
import time
import tracemalloc
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import threadpoolctl
from PIL import Image

import tinyldm
from tests.support.arrays import normal
from tests.support.drawing import Reference, assert_same_drawing, ours
from tests.support.models import UNETS, VAES, fill, spoil, vae_config
from tests.support.small_pipelines import euler_ancestral, sd1, smallest
from tests.support.tolerance import assert_close
from tinyldm import backend, ops
from tinyldm.checkpoints import load_model
from tinyldm.cli.draw import main
from tinyldm.models import AutoencoderKL, UNet2DConditionModel
from tinyldm.pipelines import loading

GROWTH = 4.2                        # allowed for 4 times the tokens; with their square it is 16
both_paths = pytest.mark.parametrize("path", [nullcontext, backend.plain], ids=["fast", "plain"])


def peak(run):
    """The peak of bytes held, above what was held before; scratch memory counts too."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---- as the picture grows -------------------------------------------------------------------

@both_paths
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_attention_grows_with_the_tokens(path, backward):
    def held(tokens):
        x = normal(1, tokens, 32)
        _, cache = ops.attention(x, x, x, 2)
        return peak(lambda: ops.attention_backward(x, cache) if backward
                    else ops.attention(x, x, x, 2))

    with path():
        small, large = held(1024), held(4096)
    assert large <= GROWTH * small
    assert large < 2 * 4096 ** 2 * 4, "all scores at once"


@both_paths
def test_the_unet_grows_with_the_tokens(path):
    unet, context = fill(UNet2DConditionModel(UNETS["as SD 1"])), normal(1, 7, 12)

    def held(size):
        latents = normal(1, size, size, 4)
        return peak(lambda: unet(latents, np.array([500]), context))

    with path():
        small, large = held(32), held(64)
    assert large <= GROWTH * small
    assert large < 2 * 64 ** 4 * 4, "all scores at once"


@both_paths
def test_tiles_take_little_more_than_one_of_them(path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")          # else chance says how many hold scratch
    vae = fill(AutoencoderKL(vae_config(dict(VAES["four levels"], block_out_channels=[32] * 4,
                                             sample_size=128))))
    with path(), threadpoolctl.threadpool_limits(1, "blas"):
        one, nine = normal(1, 16, 16, 4), normal(1, 40, 40, 4)
        vae.decode(one)                                 # which makes the kernels' scratch memory
        held = peak(lambda: vae.decode(one))
        assert peak(lambda: vae.decode_tiled(nine)) <= 2 * held
        assert peak(lambda: vae.decode(nine)) >= 4 * held


# ---- low_memory -----------------------------------------------------------------------------

def test_low_memory_draws_as_diffusers_with_tiles(tmp_path):
    folder = sd1(tmp_path / "sd1")                      # a tile is 64x64 pixels
    pipe, reference = loading.load(folder, low_memory=True), Reference(folder)
    reference.pipe.vae.enable_tiling()
    for options in ({}, {"width": 112, "height": 136}):
        assert_same_drawing(ours(pipe, **options), reference(**options))


def test_the_command_takes_it(tmp_path):
    folder, path = smallest(tmp_path / "smallest"), tmp_path / "out.png"
    assert main(["a cat", "--weights", str(folder), "--steps", "2", "--low-memory", "--width", "60",
                 "--output", str(path)]) == 0
    expected, = loading.load(folder, low_memory=True)("a cat", num_inference_steps=2, width=60)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(expected))


def test_low_memory_gives_freed_memory_back(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(loading, "keep_freed_memory", lambda: called.append(True))
    folder = smallest(tmp_path / "smallest")
    assert loading.load(folder, low_memory=True).low_memory and not called
    assert not loading.load(folder).low_memory and called


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_in_a_tile_is_traced_to_its_layer(tmp_path):
    pipe = loading.load(smallest(tmp_path / "smallest"), low_memory=True)
    spoil(pipe.vae, "decoder.conv_in.bias")
    with pytest.raises(tinyldm.TinyldmError, match="picture 0 .* decoder.conv_in of Autoenc"):
        pipe.decode(normal(1, 11, 9, 4))


@pytest.mark.parametrize("make, dtype", [(sd1, np.float32), (euler_ancestral, np.float16)])
def test_low_memory_leaves_weights_in_the_map(make, dtype, tmp_path):
    """The same numbers, and every weight with the file's dtype is a view of the memory map."""
    folder = make(tmp_path / "folder")
    usual, low = (load_model(folder / "unet", dtype, low) for low in (False, True))
    for (name, expected), parameter in zip(usual.named_parameters(), low.parameters()):
        np.testing.assert_array_equal(parameter.data, expected.data, name)
        base = parameter.data
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base.obj, mmap.mmap), name
    inputs = (normal(1, 8, 8, 4).astype(dtype), np.array([500]), normal(1, 7, 32).astype(dtype))
    assert_close(low(*inputs), usual(*inputs), 1e-5 if dtype == np.float32 else 1e-2)


def test_low_memory_refuses_what_is_not_finite(tmp_path):
    folder = smallest(tmp_path / "smallest")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["conv_in.weight"][0, 0, 0, 0] = np.nan
    safetensors.numpy.save_file(tensors, file)
    for dtype in (np.float32, np.float64):              # mapped, converted
        with pytest.raises(tinyldm.TinyldmError, match="conv_in.weight holds NaN"):
            loading.load(folder, dtype=dtype, low_memory=True)


# ---- scratch memory -------------------------------------------------------------------------

@pytest.fixture
def traced():
    """-> how many bytes tinyldm's kernels and backend hold that they asked for in this test."""
    def held():
        files = [f"{Path(backend.__file__).parent}/{name}" for name in ("backend.py", "kernels/*")]
        traces = tracemalloc.take_snapshot().filter_traces(
            [tracemalloc.Filter(True, file) for file in files])
        return sum(trace.size for trace in traces.traces)
    backend.free_scratch()
    tracemalloc.start()
    yield held
    tracemalloc.stop()


def test_scratch_memory_is_given_back(traced):
    x, weight = normal(1, 64, 64, 32), normal(3, 3, 32, 32)
    with backend.plain(False):
        ops.conv2d(x, weight, padding=(1, 1))
    assert traced() > 1e6
    backend.free_scratch()
    assert_little(traced)


def assert_little(traced):
    for _ in range(100):                # a worker thread drops its last task a moment later
        if traced() < 1e5:
            break
        time.sleep(0.05)
    assert traced() < 1e5


def test_a_drawing_leaves_no_scratch_memory(traced):
    pipe = tinyldm.load()
    pipe("a red circle", num_inference_steps=1)
    assert_little(traced)


def test_low_memory_decodes_without_the_unets_scratch_memory(monkeypatch):
    pipe = tinyldm.load(low_memory=True)
    decode, seen = pipe.vae.decode_tiled, []
    monkeypatch.setattr(pipe.vae, "decode_tiled",
                        lambda z: seen.append(len(backend._scratch)) or decode(z))
    pipe("a red circle", num_inference_steps=1)
    assert seen == [0]
