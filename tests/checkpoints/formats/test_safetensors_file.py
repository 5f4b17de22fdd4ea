"""safetensors files: each dtype that torch writes, strict names and shapes, damage, memory."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.support.files import Toy, assert_holds, in_file_layout, toy_tensors
from tinyldm.checkpoints import (
    load_weights,
    read_safetensors,
    read_tensors,
    write_safetensors,
)
from tinyldm.errors import TinyldmError


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_every_stored_dtype_loads_into_every_dtype(stored, dtype, tmp_path):
    tensors = toy_tensors(stored)
    if stored is torch.bfloat16:                        # includes one that float16 cannot hold
        tensors["proj.bias"] = torch.tensor([1.1, -2.5, 3e-30, 0.0]).bfloat16()
    safetensors.torch.save_file(tensors, tmp_path / "toy.safetensors")
    toy = Toy()
    load_weights(toy, tmp_path / "toy.safetensors", dtype)
    if stored is torch.float64:
        for name, array in in_file_layout(toy).items():
            assert np.array_equal(array, tensors[name].numpy().astype(dtype)), name
    else:
        assert_holds(toy, tensors, dtype)


FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@pytest.mark.parametrize("format", FLOAT8)
@pytest.mark.parametrize("end", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_value_of_an_8_bit_float(format, end, dtype, tmp_path):
    """All 256 bytes against torch; those that are not finite are refused like in other dtypes."""
    every = torch.arange(256, dtype=torch.uint8).view(FLOAT8[format])
    finite = every[every.float().isfinite()]
    save = safetensors.torch.save_file if end == "safetensors" else torch.save
    save({"w": finite.reshape(2, -1), "all": every}, tmp_path / f"a.{end}")
    stored = read_tensors(tmp_path / f"a.{end}")
    assert stored["w"].format == format
    found, expected = stored["w"].read(dtype), finite.double().numpy().reshape(2, -1)
    assert found.dtype == dtype and np.array_equal(found, expected)
    assert np.array_equal(np.signbit(found), np.signbit(expected))              # also of 0
    with pytest.raises(TinyldmError, match="the tensor all holds NaN"):
        stored["all"].read(dtype)


def test_a_model_in_8_bit_floats(tmp_path):
    """Convolutions keep their axes, and what has no dtype asked for becomes float32."""
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in toy_tensors().items()}
    safetensors.torch.save_file(tensors, tmp_path / "toy.safetensors")
    torch.save(tensors, tmp_path / "toy.pt")
    for file in ("toy.safetensors", "toy.pt"):
        for dtype in (None, np.float32, np.float16):
            toy = Toy()
            load_weights(toy, tmp_path / file, dtype)
            assert_holds(toy, tensors, dtype or np.float32)


def test_reading_is_lazy_and_writing_to_a_weight_leaves_the_file_alone(tmp_path):
    file = tmp_path / "toy.safetensors"
    safetensors.torch.save_file(toy_tensors(), file)
    before = file.read_bytes()
    stored = read_safetensors(file)
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tuple(tensor.shape) for name, tensor in toy_tensors().items()}
    toy = Toy()
    load_weights(toy, file)
    toy.proj.weight.data += 1                           # a view of the map: copy-on-write
    assert np.array_equal(toy.proj.weight.data, toy_tensors()["proj.weight"].numpy() + 1)
    assert file.read_bytes() == before


def test_unaligned_tensors_are_read(tmp_path):
    """Headers need not be padded: numbers may start at any byte."""
    tensors = toy_tensors()
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 4 + 1)
    (tmp_path / "toy.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    toy = Toy()
    load_weights(toy, tmp_path / "toy.safetensors")
    assert_holds(toy, tensors)


def test_truncated_files_are_named(tmp_path):
    file = tmp_path / "toy.safetensors"
    safetensors.torch.save_file(toy_tensors(), file)
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 3, 8, header // 2, header, header + 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(TinyldmError, match=f"{file} .*truncated"):
            load_weights(Toy(), file)
    file.write_bytes(whole + b"\0")
    with pytest.raises(TinyldmError, match=str(file)):
        load_weights(Toy(), file)


def test_every_flipped_bit_of_the_header_is_an_error_or_harmless(tmp_path):
    """Never a traceback, never wrong weights; only changes of the metadata go unnoticed."""
    file = tmp_path / "toy.safetensors"
    tensors = toy_tensors()
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    whole = file.read_bytes()
    harmless = 0
    for bit in range(8 * (8 + int.from_bytes(whole[:8], "little"))):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        toy = Toy()
        try:
            load_weights(toy, file)
        except TinyldmError as error:
            assert str(file) in str(error)
        else:
            harmless += 1
            assert_holds(toy, tensors)
    assert harmless < 200


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(value, stored, tmp_path):
    tensors = toy_tensors(stored)
    tensors["conv.weight"][3, 1, 2, 0] = value
    safetensors.torch.save_file(tensors, tmp_path / "toy.safetensors")
    with pytest.raises(TinyldmError, match=r"toy.safetensors: the tensor conv.weight holds NaN"):
        load_weights(Toy(), tmp_path / "toy.safetensors")


def test_numbers_too_large_for_float16_are_named_and_large_float32_load(tmp_path):
    tensors = toy_tensors()
    tensors["proj.weight"].fill_(3e38)                  # only their sum overflows
    safetensors.torch.save_file(tensors, tmp_path / "toy.safetensors")
    load_weights(Toy(), tmp_path / "toy.safetensors")
    with pytest.raises(TinyldmError, match="proj.weight .*float16"):
        load_weights(Toy(), tmp_path / "toy.safetensors", np.float16)


def test_other_dtypes_are_named(tmp_path):
    tensors = toy_tensors() | {"proj.bias": torch.zeros(4, dtype=torch.int8)}
    safetensors.torch.save_file(tensors, tmp_path / "toy.safetensors")
    with pytest.raises(TinyldmError, match="proj.bias has dtype I8"):
        load_weights(Toy(), tmp_path / "toy.safetensors")
    with pytest.raises(TinyldmError, match="int32"):
        load_weights(Toy(), tmp_path / "toy.safetensors", np.int32)


def test_three_lists(tmp_path):
    file = tmp_path / "toy.safetensors"
    tensors = toy_tensors()
    tensors["proj.weight"] = tensors["proj.weight"].T.contiguous()
    tensors["conv.weights"] = tensors.pop("conv.weight")
    tensors |= {f"extra.{i:02}": torch.zeros(1) for i in range(11)}
    safetensors.torch.save_file(tensors, file)
    toy = Toy()
    with pytest.raises(TinyldmError) as error:
        load_weights(toy, file)
    first, missing, unexpected, wrong = str(error.value).splitlines()
    assert str(file) in first and "Toy" in first
    assert missing == "  missing: 1: conv.weight"
    assert unexpected.startswith("  unexpected: 12: ") and unexpected.endswith(" and 4 more")
    assert wrong == "  wrong shape: 1: proj.weight (expected (4, 6), found (6, 4))"
    assert all(parameter.data is None for parameter in toy.parameters())


def test_names_of_tensors_make_no_lines_and_no_megabytes(tmp_path):
    file = tmp_path / "toy.safetensors"
    names = ["a\n  missing: none", "b\x1b[31m", "c\u202e", "d" * 1000]
    safetensors.torch.save_file(toy_tensors() | {name: torch.zeros(1) for name in names}, file)
    with pytest.raises(TinyldmError) as error:
        load_weights(Toy(), file)
    lines = str(error.value).split("\n")
    assert len(lines) == 4 and all(map(str.isprintable, lines)) and max(map(len, lines)) <= 2000
    assert lines[2].startswith("  unexpected: 4: a missing: none, b?[31m, c?, dddd")
    safetensors.torch.save_file({"d" * 1_000_000: torch.zeros(1)}, file)
    with pytest.raises(TinyldmError, match="the tensor ddd.*ddd has a name of 1000000 characters, "
                       "more than the 1000 that any model needs: use another file") as error:
        load_weights(Toy(), file)
    assert len(str(error.value)) < 1000


def test_convolution_in_our_layout_is_a_wrong_shape(tmp_path):
    tensors = toy_tensors()
    tensors["conv.weight"] = tensors["conv.weight"].permute(2, 3, 1, 0).contiguous()
    safetensors.torch.save_file(tensors, tmp_path / "toy.safetensors")
    found = re.escape("conv.weight (expected (7, 5, 3, 3), found (3, 3, 5, 7))")
    with pytest.raises(TinyldmError, match=found):
        load_weights(Toy(), tmp_path / "toy.safetensors")


def test_writing_is_atomic(tmp_path, monkeypatch):
    file = tmp_path / "toy.safetensors"
    write_safetensors({"a": np.arange(6.0, dtype=np.float32).reshape(2, 3).T}, file)
    assert torch.equal(safetensors.torch.load_file(file)["a"], torch.arange(6.0).reshape(2, 3).T)
    before = file.read_bytes()

    def full_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tinyldm.checkpoints.formats.safetensors_file.save_file", full_disk)
    with pytest.raises(TinyldmError, match="cannot write .*No space left"):
        write_safetensors({"a": np.zeros(9)}, file)
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["toy.safetensors"]
    with pytest.raises(TinyldmError, match="cannot write"):
        write_safetensors({}, tmp_path / "absent" / "toy.safetensors")


PEAK = """
import sys
from tinyldm.checkpoints import load_weights
from tinyldm.layers import Conv2d, Linear, Module

class Big(Module):
    def __init__(self):
        self.convs = [Conv2d(256, 256) for _ in range(10)]      # 2.25 MiB each in float32
        self.linears = [Linear(512, 1024) for _ in range(14)]   # 2 MiB each

def memory(word):
    status = open("/proc/self/status")
    return next(int(line.split()[1]) for line in status if line.startswith(word)) / 1024

model = Big()
from threadpoolctl import ThreadpoolController                  # imported by worker threads
before = memory("VmRSS")
load_weights(model, sys.argv[1])
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_loading_holds_no_second_copy(stored, tmp_path):
    tensors = {}
    for i in range(10):
        tensors |= {f"convs.{i}.weight": torch.ones(256, 256, 3, 3),
                    f"convs.{i}.bias": torch.ones(256)}
    for i in range(14):
        tensors |= {f"linears.{i}.weight": torch.ones(1024, 512),
                    f"linears.{i}.bias": torch.ones(1024)}
    size = sum(tensor.numel() for tensor in tensors.values()) * 4 / 2**20       # as float32
    file = tmp_path / "big.safetensors"
    safetensors.torch.save_file({name: tensor.to(stored) for name, tensor in tensors.items()}, file)
    run = subprocess.run([sys.executable, "-c", PEAK, str(file)], cwd=Path(__file__).parents[3],
                         env=os.environ | {"OMP_NUM_THREADS": "2"},     # one tensor per thread
                         capture_output=True, text=True, check=True)
    print(f"{stored}: peak {float(run.stdout):.1f} MiB for {size:.1f} MiB of weights")
    assert float(run.stdout) < 1.2 * size
