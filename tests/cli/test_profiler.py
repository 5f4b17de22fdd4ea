"""The profile of a run: times add up, arithmetic equals torch's count, memory is known."""
import re
import threading
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from tests.support.extra import library, torch
from tests.support.models import CLIPS, UNETS, VAES
from tests.support.pairs import clip_pair, unet_pair, vae_pair
from tests.support.reference import nchw
from tinyldm import layers
from tinyldm.cli import profiler as profiling
from tinyldm.cli.draw import main
from tinyldm.cli.profiler import Profiler
from tinyldm.errors import TinyldmError
from tinyldm.layers import Linear, Module
from tinyldm.pipelines.loading import load

TITLES = ["by stage", "by block", "by op"]
MB = 10**6


@pytest.fixture
def pipe(weights):
    return load(weights)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until the test says clock.now += seconds."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(profiling, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


class Layer(Module):
    """Calls the function it is given, then the layers inside it."""

    def __init__(self, own, *inner):
        self.own, self.inner = own, list(inner)

    def forward(self, x=None):
        result = self.own()
        for layer in self.inner:
            layer()
        return result


# ---- time -----------------------------------------------------------------------------------

def test_every_second_belongs_to_one_row_of_each_table(clock):
    def waits(seconds):
        def wait():
            clock.now += seconds
        return wait

    first, second = Layer(waits(3)), Layer(waits(20), Layer(waits(100)), Layer(waits(200)))
    holder = SimpleNamespace(model=Layer(waits(1), first, second, first), other=Layer(waits(1000)))
    with Profiler(holder) as profile:
        clock.now += 0.25
        holder.model()
        with profile.stage("another time"):
            clock.now += 0.5
            holder.model()
            holder.other()
    seconds = {title: {name: (row.calls, row.seconds) for name, row in table.items()}
               for title, table in profile.tables.items()}
    assert profile.seconds == 2 * 327 + 1000.75
    assert seconds == {
        "by stage": {"the rest": (1, 0.25), "model": (1, 327), "another time": (1, 1327.5)},
        "by block": {"outside the models": (1, 0.75), "model": (2, 654), "other": (1, 1000)},
        "by op": {"outside the models": (1, 0.75), "additions, the rest": (2, 42),
                  "layer": (9, 1612)}}


def test_a_pipeline(pipe):
    plain, = pipe("a cat", num_inference_steps=2)
    with Profiler(pipe) as profile:
        profiled, = pipe("a cat", num_inference_steps=2)
    assert np.array_equal(np.asarray(plain), np.asarray(profiled))
    stages, blocks, ops = profile.tables.values()
    assert list(stages) == ["the rest", "text_encoder", "unet", "vae"]
    assert {"text_encoder", "unet", "unet.conv_in", "unet.down_blocks.0", "unet.mid_block",
            "unet.up_blocks.1", "vae.decoder", "vae.decoder.up_blocks.2"} < set(blocks)
    assert not any("encoder." in name for name in blocks if "vae.decoder" not in name)
    assert {"linear", "conv 3x3", "conv 1x1", "conv 3x3 /2", "attention", "group_norm",
            "group_norm_silu", "layer_norm", "silu", "geglu", "quick_gelu", "upsample", "concat",
            "embedding", "additions, the rest", "outside the models"} == set(ops)
    assert stages["unet"].calls == blocks["unet.conv_in"].calls == 2
    assert stages["text_encoder"].calls == 2            # the negative prompt is read too
    for table in (stages, blocks, ops):
        assert sum(row.seconds for row in table.values()) == pytest.approx(profile.seconds)
        assert sum(row.flop for row in table.values()) == sum(row.flop for row in ops.values())
    assert not layers._hooks.get()


# ---- arithmetic -----------------------------------------------------------------------------

def theirs(run):
    """{op: flop}, {module's path: flop} of a run of the reference, counted by torch."""
    # torch does not count the kernel that it uses for attention on a CPU.
    attention = library("torch.nn.attention")
    counter = library("torch.utils.flop_counter").FlopCounterMode(display=False)
    with torch.no_grad(), attention.sdpa_kernel(attention.SDPBackend.MATH), counter:
        run()
    counts = counter.get_flop_counts()
    ops = {str(op).removeprefix("aten."): flop for op, flop in counts.pop("Global").items()}
    blocks = {path.partition(".")[2]: sum(flop.values()) for path, flop in counts.items()}
    return {"linear": ops.get("mm", 0) + ops["addmm"], "conv": ops.get("convolution", 0),
            "attention": ops["bmm"]}, blocks


def assert_same_arithmetic(module, run, reference_run):
    with Profiler(module) as profile:
        run()
    ours = {"linear": 0, "conv": 0, "attention": 0}
    for name, row in profile.tables["by op"].items():
        if row.flop:
            ours[name.split()[0]] += row.flop
    ops, blocks = theirs(reference_run)
    assert ours == ops
    for name, row in profile.tables["by block"].items():
        if row.flop and name in blocks:
            assert row.flop == blocks[name], name
    assert sum(row.flop for row in profile.tables["by stage"].values()) == sum(ops.values())


@pytest.mark.parametrize("name", UNETS)
def test_unet_arithmetic(name):
    reference, module, latents, timesteps, context = unet_pair(UNETS[name], torch.float32, (7, 9))
    inputs = nchw(latents), torch.from_numpy(timesteps.copy()), torch.from_numpy(context.copy())
    assert_same_arithmetic(module, lambda: module(latents, timesteps, context),
                           lambda: reference(*inputs))


@pytest.mark.parametrize("name", VAES)
def test_vae_arithmetic(name):
    reference, module = vae_pair(VAES[name], torch.float32)
    z = np.ones((1, 5, 7, 4), np.float32)
    images = np.ones((2, 24, 16, 3), np.float32)
    assert_same_arithmetic(module, lambda: module.decode(z), lambda: reference.decode(nchw(z)))
    assert_same_arithmetic(module, lambda: module.encode(images),
                           lambda: reference.encode(nchw(images)))


@pytest.mark.parametrize("name", CLIPS)
def test_clip_arithmetic(name):
    reference, module = clip_pair(CLIPS[name], torch.float32)
    ids = np.arange(2 * 77).reshape(2, 77) % 97
    assert_same_arithmetic(module, lambda: module(ids), lambda: reference(torch.from_numpy(ids)))


def test_a_layer_is_counted_once(pipe):
    flop = []
    for owners in [(pipe,), (pipe, pipe.unet), (pipe.text_encoder, pipe.unet, pipe.vae)]:
        with Profiler(*owners) as profile:
            pipe("a cat", num_inference_steps=1)
        flop.append(sum(row.flop for row in profile.tables["by op"].values()))
    assert flop[0] == flop[1] == flop[2] > 0


# ---- memory ---------------------------------------------------------------------------------

def holds(megabytes):
    return np.ones(megabytes * MB, np.uint8)


def test_peak_memory_of_a_known_pattern():
    kept = []

    def uses_and_keeps():
        holds(30)
        kept.append(holds(10))

    def in_workers():
        workers = [threading.Thread(target=lambda: kept.append(holds(4))) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    holder = SimpleNamespace(model=Layer(lambda: holds(5), Layer(uses_and_keeps)),
                             other=Layer(in_workers, Layer(lambda: holds(1))))
    with Profiler(holder) as profile:
        weights = holds(100)
        holder.model()
        holder.other()
        with profile.stage("saving"):
            holds(50)
        del weights
    rows = profile.tables["by stage"]
    for name, peak, added in [("the rest", 122, 122), ("model", 135, 35), ("other", 123, 13),
                              ("saving", 172, 50)]:
        assert rows[name].peak == pytest.approx(peak * MB, abs=MB / 10), name
        assert rows[name].added == pytest.approx(added * MB, abs=MB / 10), name
    assert profile.tables["by block"]["model"].added == rows["model"].added
    assert not tracemalloc.is_tracing()


def test_what_a_layer_leaves_is_not_added_by_the_op_around_it():
    kept = []

    class Wide(Module):
        def forward(self):
            kept.append(holds(10))

    class Outer(Module):
        def __init__(self):
            self.inner = Wide()

        def forward(self):
            self.inner()
            holds(2)
            self.inner()

    module = Outer()
    with Profiler(module) as profile:
        module()
    assert profile.tables["by stage"]["Outer"].added == pytest.approx(20 * MB, abs=MB / 10)
    for op, added in [("wide", 10), ("additions, the rest", 2)]:
        assert profile.tables["by op"][op].added == pytest.approx(added * MB, abs=MB / 10), op


def test_memory_is_traced_in_a_models_first_run_only():
    traced = []
    holder = SimpleNamespace(model=Layer(lambda: traced.append(tracemalloc.is_tracing())),
                             other=Layer(lambda: traced.append(tracemalloc.is_tracing())))
    with Profiler(holder) as profile:
        kept = holds(20)
        holder.model()
        holds(40)
        for layer in (holder.model, holder.model, holder.other):
            layer()
    assert traced == [True, False, False, True]
    for stage, peak in [("model", len(kept)), ("the rest", 60 * MB), ("other", len(kept))]:
        assert profile.tables["by stage"][stage].peak == pytest.approx(peak, abs=MB / 10), stage

    tracemalloc.start()
    try:
        with Profiler(holder):
            holder.model()
            holder.model()
        assert traced[-1] and tracemalloc.is_tracing()  # it was on before, so it stays on
    finally:
        tracemalloc.stop()


# ---- layers are left as they were -----------------------------------------------------------

def test_layers_are_restored_after_an_error(pipe):
    def fails():
        raise ValueError("stop")

    pipe.unet.mid_block.resnets[0].conv1.forward = lambda *inputs: fails()
    with pytest.raises(ValueError, match="stop"), Profiler(pipe) as profile:
        pipe("a cat", num_inference_steps=2)
    assert profile.tables["by block"]["unet.mid_block"].calls == 1
    assert sum(row.seconds for row in profile.tables["by op"].values()) == pytest.approx(
        profile.seconds)
    assert not layers._hooks.get()
    assert not tracemalloc.is_tracing()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_blame_and_another_profiler_inside(pipe):
    bias = pipe.unet.mid_block.resnets[0].conv1.bias
    bias.data = bias.data * np.nan
    with Profiler(pipe) as outer:
        with pytest.raises(TinyldmError, match="is mid_block.resnets.0.conv1"):
            pipe("a cat", num_inference_steps=1)        # which hooks the layers itself
        with Profiler(pipe) as inner:
            pipe.encode_prompt("a cat")
        pipe.encode_prompt("a cat")
    assert outer.tables["by stage"]["unet"].calls == 2
    assert outer.tables["by stage"]["text_encoder"].calls == 4
    assert inner.tables["by stage"]["text_encoder"].calls == 1
    assert not layers._hooks.get()


def test_other_threads_are_not_counted(pipe):
    pictures = []

    def draw():
        pictures.append(pipe("a cat", num_inference_steps=1)[0])

    draw()
    with Profiler(pipe) as profile:
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()
    assert list(profile.tables["by stage"]) == ["the rest"]
    assert np.array_equal(*map(np.asarray, pictures))


@pytest.mark.parametrize("owner", [SimpleNamespace(model="unet"), pytest])
def test_nothing_to_profile(owner):
    with pytest.raises(TinyldmError, match="expects models or a pipeline, not "), Profiler(owner):
        pass
    assert not tracemalloc.is_tracing()


# ---- what is printed ------------------------------------------------------------------------

def test_the_tables_are_aligned():
    linear = Linear(1000, 500)
    linear.weight.data, linear.bias.data = np.ones((500, 1000)), np.ones(500)
    with Profiler(linear) as profile:
        linear(np.ones((2000, 1000)))
    lines = str(profile).split("\n")
    assert max(map(len, lines)) <= 100
    row = next(line for line in lines if line.startswith("linear "))
    head = lines[0]
    assert len(row) == len(head)
    assert row.split()[1] == "1" and row.split()[6] == "2.00"       # GFLOP
    calls, gflop = (head.index(word) + len(word) for word in ("calls", "GFLOP"))
    assert row[:calls].endswith(" 1") and row[:gflop].endswith(" 2.00")


def test_the_command_prints_three_tables(weights, tmp_path, capsys):
    paths = [tmp_path / "plain.png", tmp_path / "profiled.png"]
    arguments = ["a cat", "--weights", str(weights), "--steps", "2", "--output"]
    assert main([*arguments, str(paths[0])]) == 0
    assert "by stage" not in capsys.readouterr().err
    assert main([*arguments, str(paths[1]), "--profile"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{paths[1]}\n"
    assert paths[0].read_bytes() == paths[1].read_bytes()

    tables = said.err[said.err.index("by stage"):].split("\n\n")
    assert [table[:9].strip() for table in tables[:3]] == TITLES
    assert re.findall(r"^\w[\w ]*?(?=  )", tables[0], re.M) == [
        "by stage", "the rest", "loading", "reading the prompt", "drawing", "decoding", "saving"]
    assert "unet.down_blocks.0 " in tables[1] and "attention " in tables[2]
    for table in tables[:3]:
        shares = [float(share) for share in re.findall(r"(\d+\.\d)%", table)]
        assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))


def test_the_command_with_bad_input(weights, capsys):
    assert main(["a cat", "--weights", str(weights), "--steps", "0", "--profile"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and re.search(r"error: .*from 1 to 1000, not 0\n$", said.err)
    assert "by stage" not in said.err and not tracemalloc.is_tracing()
