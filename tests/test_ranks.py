"""Several ranks: the same weights and pictures as one process, and what happens when one fails."""
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support import ranks as support
from tests.support.captioned import write_captioned
from tests.support.pictures_to_train import write_pictures
from tests.support.small_pipelines import smallest
from tinyldm import ranks
from tinyldm.layers import Parameter
from tinyldm.training import shards
from tinyldm.training.options import STAGES
from tinyldm.training.report import read_log

STATE = ("data", "m", "v")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    return smallest(root / "weights"), write_pictures(root / "pictures")


@pytest.fixture
def train(folders, tmp_path):
    """A function that trains a LoRA in so many ranks, and returns its file."""
    weights, pictures = folders

    def run(count, name, *more, steps=3):
        done = support.run(count, "tinyldm.training", "lora", "--weights", weights, "--data",
                           pictures, "--steps", steps, "--batch", 4, "--learning-rate", "1e-2",
                           "--output", tmp_path / f"{name}.safetensors", *more)
        assert done.returncode == 0, done.stderr
        return load_file(tmp_path / f"{name}.safetensors"), done
    return run


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], name)


def state(path):
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


# ---- the same as one process ------------------------------------------------------------------

def test_three_ranks_train_as_one_process_does(train):
    """To rounding: they cut a batch into other shards. But bitwise as three ranks did before."""
    (one, _), (three, _), (again, _) = (
        train(count, name, "--batch", "6", "--learning-rate", "1e-3", steps=2)
        for count, name in ((1, "one"), (3, "three"), (3, "again")))
    assert_same(three, again)
    assert any((one[name] != three[name]).any() for name in one)
    for name in one:
        np.testing.assert_allclose(three[name], one[name], atol=1e-6, err_msg=name)


def test_clip_gathers_the_embeddings_of_all_ranks(tmp_path):
    """Its loss is no sum over pictures. Two ranks: bitwise; three: to rounding."""
    pictures, found = write_captioned(tmp_path / "data", 12), {}
    for count in (1, 2, 3):
        done = support.run(count, "tinyldm.training", "clip", "--data", pictures, "--steps", 3,
                           "--batch", 8, "--resolution", 16, "--width", 32, "--layers", 1,
                           "--learning-rate", "1e-3", "--output", tmp_path / str(count))
        assert done.returncode == 0, done.stderr
        found[count] = load_file(tmp_path / str(count) / "model" / "model.safetensors")
    losses = [[line["loss"] for line in read_log(tmp_path / str(count)) if "loss" in line]
              for count in (1, 2, 3)]
    assert_same(found[1], found[2])
    np.testing.assert_allclose(losses, [losses[0]] * 3, rtol=1e-5)
    for name, array in found[1].items():
        np.testing.assert_allclose(found[3][name], array, atol=1e-6, err_msg=name)


def test_the_discriminator_sees_the_whole_batch(folders, tmp_path):
    """Its batch norm and the adaptive weight are of all ranks. Two: bitwise; three: to rounding."""
    for count in (1, 2, 3):
        done = support.run(count, "tinyldm.training", "autoencoder", "--data", folders[1],
                           "--steps", 3, "--batch", 6, "--channels", 4, 8, "--resolution", 24,
                           "--discriminator", 1, "--discriminator-channels", 4, "--output",
                           tmp_path / str(count))
        assert done.returncode == 0, done.stderr
    one, two, three = (state(tmp_path / count / "state.npz") for count in "123")
    for name in STATE:                                  # of both networks
        np.testing.assert_array_equal(one[name], two[name])
    apart = abs(one["data"] - three["data"])            # Adam moves rounding, too, by 1e-4
    assert apart.max() > 0 and (apart > 1e-6).mean() < 0.05
    logs = [[line for line in read_log(tmp_path / count) if "loss" in line] for count in "123"]
    for lines in zip(*logs):
        for name in lines[0].keys() - {"seconds", "latent_std"}:        # a mean over the ranks
            np.testing.assert_allclose([line[name] for line in lines], [lines[0][name]] * 3,
                                       rtol=1e-3, err_msg=name)


def test_the_toy_world_trains_as_in_one_process(tmp_path):
    """Both stages, bitwise: AdamW and Muon, and noise drawn by the shards."""
    for count in (1, 2):
        for _ in ("vae", "unet"):
            done = support.run(count, "tests.support.ranks", "shapes", tmp_path / str(count))
            assert done.returncode == 0, done.stderr
    for stage in ("vae", "unet"):
        one, two = (state(tmp_path / count / f"{stage}.npz") for count in "12")
        for name in (*STATE, "ema"):
            np.testing.assert_array_equal(one[name], two[name])
        np.testing.assert_allclose(one["history"], two["history"], rtol=1e-6)


# What each stage needs besides weights and pictures; the adversarial loss has its own optimiser.
COMMANDS = {
    "lora": ["--weights", "W", "--flip", "--caption-dropout", "0.3", "--accumulate", "2",
             "--train-text-encoder"],
    "textual-inversion": ["--weights", "W", "--token", "<s>", "--initializer", "cat"],
    "unet": ["--weights", "W", "--train-text-encoder"],
    "autoencoder": ["--channels", 4, 8, "--resolution", 24, "--discriminator", 1,
                    "--discriminator-channels", 4],
    "ddpm": ["--resolution", 16, "--variance", "learned"],
    "clip": ["--resolution", 16, "--patch", 8, "--width", 32, "--layers", 1],
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_as_in_one_process(stage, folders, tmp_path):
    """Bitwise, also CLIP's, whose loss is of the whole batch: two ranks add up the shards in the
    order of one process. The second rank is silent."""
    weights, pictures = folders
    more = [weights if word == "W" else word for word in COMMANDS[stage]]
    for count in (1, 2):
        done = support.run(count, "tinyldm.training", stage, "--data", pictures, "--steps", 2,
                           "--batch", 4, "--validate-every", 0, "--output",
                           tmp_path / str(count), *more)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 ranks, with 1 threads each") == 1
    assert done.stdout.count("checked: ") == 1
    one, two = (state(tmp_path / count / "state.npz") for count in "12")
    for name in {*one} - {"history", "settings"}:
        np.testing.assert_array_equal(one[name], two[name], name)
    np.testing.assert_allclose(one["history"], two["history"], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])   # also the loss's scale is resumed
def test_a_resume_with_another_number_of_ranks(dtype, train, tmp_path):
    whole, _ = train(1, "whole", "--dtype", dtype, steps=3)
    train(1, "part", "--dtype", dtype, steps=2)
    parts, _ = train(2, "part", "--dtype", dtype, "--resume", steps=3)
    assert_same(whole, parts)


def test_prior_pictures_are_shared_out(train, tmp_path):
    """Drawn by all ranks, each once; and all ranks then see all of them."""
    for count in (1, 2):
        found, _ = train(count, f"dog{count}", "--prior-data", tmp_path / f"class{count}",
                         "--prior-prompt", "a cat", "--prior-count", "2", steps=1)
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / f"class{count}").iterdir()}
                for count in (1, 2))
    assert one == two and len(one) == 4
    assert_same(*(load_file(tmp_path / f"dog{count}.safetensors") for count in (1, 2)))


@pytest.mark.parametrize("count", [2, 3])
def test_pictures_drawn_by_ranks(count, weights, tmp_path):
    """The files and the sheet of one process, bitwise; prompts come from standard input."""
    support.skip_with_open_mpi("5 never ends a rank's standard input")
    for number in (1, count):
        (tmp_path / str(number)).mkdir()
        done = support.run(number, "tinyldm", "-", "--count", 2, "--steps", 2, "--weights", weights,
                           "--output", tmp_path / str(number) / "x.png",
                           input="a red cat\na low dog\n")
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.split()) == [str(tmp_path / str(number) / f"x-{i}.png")
                                               for i in range(4)]
    one, other = ({file.name: file.read_bytes() for file in (tmp_path / number).iterdir()}
                  for number in ("1", str(count)))
    assert one == other and len(one) == 5


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("size", [1, 3, 4, 7, 64])
def test_the_shards_of_all_ranks_are_the_batch(size, count, monkeypatch):
    def run(rank):
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        monkeypatch.setattr(ranks, "size", lambda: count)
        return shards.over_shards(lambda rows, rng, share: (rows, rng.random(), share),
                                  [list(range(size))], np.random.default_rng(0))
    parts = [run(rank) for rank in range(count)]
    worked = [shard for part in parts for shard in part if shard[2]]
    assert sum((rows for rows, _, _ in worked), []) == [*range(size)]
    assert sum(share for _, _, share in worked) == pytest.approx(1)
    assert all(parts), "a rank without rows computes gradients of 0"
    if 4 % count == 0 or size <= 4:                     # the noise is that of one process
        monkeypatch.setattr(ranks, "size", lambda: 1)
        monkeypatch.setattr(ranks, "rank", lambda: 0)
        alone = shards.over_shards(lambda rows, rng, share: (rows, rng.random(), share),
                                     [list(range(size))], np.random.default_rng(0))
        assert worked == alone


@pytest.mark.parametrize("count", [2, 4])
def test_the_order_of_the_sum_is_that_of_ranks(count):
    """MPI adds two ranks, or two pairs of ranks."""
    parts = (np.random.default_rng(0).standard_normal((4, 1000)) * [[1], [1e3], [1e-3], [1]]
             ).astype(np.float32)

    def gradient(part):
        parameter = Parameter(1000)
        for shard in part:
            token = shards.SHARD.set(shard)
            parameter.add_grad(parts[shard])
            shards.SHARD.reset(token)
        return parameter.grad
    sums = [gradient(part) for part in np.split(np.arange(4), count)]
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2])]
    np.testing.assert_array_equal(sums[0], gradient(range(4)))


# ---- what fails -------------------------------------------------------------------------------

FAILURES = {
    "exception": (1, "rank 1: RuntimeError: the disk of rank 1 is gone\n"),
    "exit": (3, "rank 1: ended with status 3, and the others with it"),
    "nan": (2, "error: the loss is nan at step 5: take a smaller"),
    "gradient": (2, "error: the gradient of x is NaN or infinite at step 5: take a smaller"),
    "apart": (2, "error: the weights of rank 1 are others than those of rank 0 at step 100"),
    "signal": (130, "interrupted"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_rank_that_fails_ends_all(how, tmp_path):
    """What only rank 1 meets. The state is whole, and where all agree to stop it is the last."""
    code, said = FAILURES[how]
    begun = time.monotonic()
    done = support.run(2, "tests.support.ranks", "failing", tmp_path, how)
    assert done.returncode == code, done.stderr
    assert said in done.stderr and time.monotonic() - begun < support.TIMEOUT / 2
    assert done.stderr.count("error: ") == said.count("error: ")
    steps = {"nan": 5, "gradient": 5, "signal": 6, "apart": 100}.get(how, 4)
    kept = state(tmp_path / "x.npz")
    assert kept["steps"] == steps and len(kept["history"]) == steps


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc to find a rank's process in")
@pytest.mark.parametrize("sent, to", [("SIGKILL", 1), ("SIGKILL", 0), ("SIGINT", None),
                                      ("SIGTERM", None), ("SIGINT", 1)])
def test_signals(sent, to, tmp_path):
    """A killed rank ends the others; Ctrl-C and SIGTERM stop all after the same step, saved."""
    if to is None:
        support.skip_with_open_mpi("kills the ranks soon after its own signal")
    process = support.start(2, "tests.support.ranks", "waiting", tmp_path)
    try:
        end = time.monotonic() + support.TIMEOUT / 2
        while not (tmp_path / "x.npz").exists() or state(tmp_path / "x.npz")["steps"] < 3:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        target = process.pid if to is None else support.process_of(to, str(tmp_path))
        os.kill(target, getattr(signal, sent))
        said, _ = process.communicate(timeout=support.TIMEOUT / 2)
    finally:
        process.kill()
    kept = state(tmp_path / "x.npz")
    assert len(kept["history"]) == kept["steps"] >= 3
    if sent == "SIGKILL":
        assert process.returncode != 0 and kept["steps"] % 3 == 0
    else:
        assert process.returncode == (143 if sent == "SIGTERM" else 130), said
        assert ("terminated" if sent == "SIGTERM" else "interrupted") in said
    expected = support.trainer_of_steps(tmp_path / "whole", int(kept["steps"]))
    np.testing.assert_array_equal(kept["data"], expected)


def test_a_mistake_of_all_is_said_once(folders, tmp_path):
    weights, pictures = folders
    for more, said in ((["--rank", "0"], "--rank: expected a whole number"),
                       (["--batch", "1"], "--batch 1 leaves some of the 2 ranks without"),
                       (["--resume"], "there is no training to go on with")):
        done = support.run(2, "tinyldm.training", "lora", "--weights", weights, "--data", pictures,
                           "--batch", 2, "--output", tmp_path / "x", *more)
        assert done.returncode == 2
        lines = [line for line in done.stderr.splitlines() if "error: " in line]
        assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


# ---- the calls --------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [2, 3])
def test_the_calls(count):
    environment = support.environment()
    del environment["OMP_NUM_THREADS"]
    done = support.run(count, "tests.support.ranks", "exchange", env=environment)
    assert done.returncode == 0, done.stderr
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert done.stdout.splitlines() == [f"threads {max(1, cores // count)}", *(
        f"rank {rank} is right" for rank in range(count))]


def test_without_mpirun_nothing_of_it_is_imported():
    code = ("import sys; from tinyldm import ranks; assert ranks.size() == 1; x = [1]; "
            "assert ranks.stack(x) is x and ranks.gather(2) == [2] and ranks.first(int) == 0; "
            "ranks.add_up(x); ranks.leave_to_first(); assert ranks.program(lambda: 5) == 5; "
            "assert not {'mpi4py', 'numpy'} & {*sys.modules}")
    subprocess.run([sys.executable, "-c", code], check=True, env=support.environment())


@pytest.mark.parametrize("hidden, said", [
    (True, r"mpirun started 3 processes, but mpi4py cannot connect them \(.*\): pip install"),
    (False, "mpirun started 3 processes, but mpi4py sees 1, because it uses .*: start them with")])
def test_mpi4py_that_does_not_fit(hidden, said, tmp_path):
    """It is missing, or belongs to another MPI than mpirun."""
    support.command(1)                                  # skips
    if hidden:
        (tmp_path / "mpi4py.py").write_text("raise ImportError('no library')")
    environment = support.environment(OMPI_COMM_WORLD_SIZE="3")
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{support.ROOT}"
    done = subprocess.run([sys.executable, "-m", "tinyldm", "a cat"], env=environment,
                          capture_output=True, text=True, timeout=support.TIMEOUT, cwd=tmp_path)
    assert done.returncode == 2 and re.match(f"error: {said}", done.stderr), done.stderr
