"""Small files with hostile names, shapes and numbers: one short line, in bounded time and memory.

The files are drawn from seeds, so that every run tries the same ones.
"""
import collections
import io
import json
import random
import re
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from tests.support.files import Toy, toy_tensors
from tests.support.pickles import Call, Outside, dump
from tinyldm.checkpoints import load_weights, read_tensors
from tinyldm.checkpoints.single_file.kinds import recognise
from tinyldm.errors import TinyldmError
from tinyldm.inspect.describe import describe

MEGABYTE = 1 << 20
HUGE = [2**62, 2**63, 2**64 - 1, 2**40, 10**400]


def bounded(function, *arguments):
    """Call it: whatever it raises is a short TinyldmError, and it takes little time and memory."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        return function(*arguments)
    except TinyldmError as error:
        lines = str(error).split("\n")
        assert len(lines) in (1, 4), lines              # 4: with the three lists
        assert all(map(str.isprintable, lines)) and max(map(len, lines)) <= 2000
        return error
    finally:
        assert time.process_time() - begin < 5
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 * MEGABYTE, f"{peak / MEGABYTE:.0f} MB"


def read_all(path):
    """Everything that a program does with a file before it trusts it."""
    stored = read_tensors(path)
    for tensor in stored.values():
        try:
            tensor.read(np.float32)
        except TinyldmError:
            pass
    return stored


def try_all(path):
    for function in (read_all, describe, lambda path: load_weights(Toy(), path),
                     lambda path: recognise(read_tensors(path), path)):
        bounded(function, path)
    return bounded(read_all, path)


def safetensors_bytes(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(shape, start=0, stop=0, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


# ---- safetensors ----------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [
    [0, 2**62], [2**62, 0], [0, 2**62, 2**62], [2**62, 4, 0], [2**63, 0], [2**64, 0], [-1, 0],
    [0, -1], [-2, -2], [0.5], [4.0], ["4"], [None], [[4]], [1e400, 0], [True], None, {}, "", 4,
    [10**5000, 0], [0] * 65, [0] * 5000, [2**31, 2**31, 0], [2**62]])
def test_shapes_of_an_empty_tensor(shape, tmp_path):
    header = {"conv_in.weight": entry(shape)}
    try:
        header = json.dumps(header).encode()
    except ValueError:                                  # Python writes no number that long
        header = json.dumps({"conv_in.weight": entry([0])}).replace(
            "[0]", "[1" + "0" * 5000 + ", 0]", 1).encode()
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header))
    assert isinstance(try_all(tmp_path / "a.safetensors"), TinyldmError)


@pytest.mark.parametrize("axes, legal", [(8, True), (9, False), (64, False), (65, False)])
def test_a_number_of_many_axes(axes, legal, tmp_path):
    """An alpha in 65 pairs of brackets."""
    header = {"lora_unet_x.alpha": entry([1] * axes, 0, 4)}
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, b"\0\0\x80?"))
    found = try_all(tmp_path / "a.safetensors")
    if legal:
        assert found["lora_unet_x.alpha"].read(np.float32).reshape(-1) == [1]
    else:
        assert re.search(f"x.alpha has {axes} axes, more than the 8", str(found))


@pytest.mark.parametrize("offsets", [
    [[0, 4], [0, 4]], [[0, 8], [4, 12]], [[4, 8], [8, 12]], [[4, 0], [0, 4]], [[0, 4], [4, 2**62]],
    [[-4, 0], [0, 4]], [[0, 4.0], [4, 8]], [[0, 4, 8], [4, 8]], [[0], [4, 8]], [None, [0, 4]],
    [[2**63, 2**63 + 4], [0, 4]], [[0, 4], [8, 12]]])
def test_places_in_the_file(offsets, tmp_path):
    header = {name: entry([1]) | {"data_offsets": pair} for name, pair in zip("ab", offsets)}
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, bytes(8)))
    assert isinstance(try_all(tmp_path / "a.safetensors"), TinyldmError)


@pytest.mark.parametrize("name", [
    f"model.diffusion_model.input_blocks.{'9' * 5000}.0.weight", f"{'9' * 5000}",
    f"lora_unet_down_blocks_{'1' * 5000}_x.lora_down.weight", "x" * MEGABYTE, "\u0663" * 5000,
    f"cond_stage_model.transformer.resblocks.{'7' * 900}.x", "a" * 1000, "\0", "\x1b[2J\n\u202e"])
def test_names(name, tmp_path):
    header = {name: entry([1], 0, 4), "model.diffusion_model.input_blocks.0.0.weight":
              entry([1, 4, 1, 1], 4, 20)}
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, bytes(20)))
    found = try_all(tmp_path / "a.safetensors")
    assert isinstance(found, TinyldmError) == (len(name) > 1000)


@pytest.mark.parametrize("dtype", ["", "F32\n", "X" * 10_000, "F4", "F6_E2M3", "F8_E8M0", "C64",
                                   "\x1b[2J", None, 3, [], "I8", "BOOL", "U64"])
def test_dtypes(dtype, tmp_path):
    header = {"conv_in.weight": entry([8], 0, 8, dtype)}
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, bytes(8)))
    try_all(tmp_path / "a.safetensors")


@pytest.mark.parametrize("header", [
    b"{}", b"{", b"[]", b"null", b"1", b'"a"', b'{"a": 1}', b'{"a": {}}', b'{"__metadata__": 1}',
    b'{"__metadata__": {"a": 1}}', b'{"a": NaN}', b'{"a":' * 50_000, b'{"\\ud800": {}}',
    b"\xff\xff",
    b"{" + b" " * 100_000 + b"}", b'{"a": {"dtype": "F32", "dtype": "F16"}}',
    b'{"__metadata__": {"x": "' + b"\\u001b[2J" * 9999 + b'"}}'])
def test_headers(header, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header))
    try_all(tmp_path / "a.safetensors")


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 100_000_001])
def test_lengths_of_headers(length, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"a": 1}' * 9)
    assert isinstance(try_all(tmp_path / "a.safetensors"), TinyldmError)


# ---- torch's files --------------------------------------------------------------------------

def torch_file(path, content, data=bytes(24)):
    """Write an archive like torch.save, from the bytes of a pickle or from an object."""
    if not isinstance(content, bytes):
        content = dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/data/0", data)
    return path


def tensor(shape=(2, 3), strides=(3, 1), offset=0, count=6, new=None):
    storage = Outside("storage", torch.FloatStorage if new is None else torch.UntypedStorage, "0",
                      "cpu", count)
    rebuild = torch._utils._rebuild_tensor_v2 if new is None else torch._utils._rebuild_tensor_v3
    return Call(rebuild, storage, offset, shape, strides, False, collections.OrderedDict(),
                *([] if new is None else [new]))


@pytest.mark.parametrize("wrong", [
    {"shape": (0, 2**62)}, {"shape": (2**62, 0)}, {"shape": (2**62, 2**62)}, {"shape": (-2, 3)},
    {"shape": (2.0, 3)}, {"shape": (10**6000, 0)}, {"shape": (True, 3)}, {"shape": ("2", 3)},
    {"shape": None}, {"shape": (0,) * 65, "strides": (1,) * 65}, {"strides": (2**62, 1)},
    {"strides": (-3, 1)}, {"strides": (3, 10**6000)}, {"strides": (3, 0.5)}, {"strides": (4, 1)},
    {"strides": (3,)}, {"strides": (0, 0), "shape": (2**31, 2**31)}, {"offset": 1}, {"offset": -1},
    {"offset": 2**62}, {"offset": 10**6000}, {"offset": None}, {"count": 7}, {"count": 2**62},
    {"count": -6}, {"count": 6.0}, {"count": 10**6000}, {"shape": (0, 3), "offset": 7},
    {"shape": (0, 3), "strides": (2**62, 2**62)}, {"new": torch.float8_e8m0fnu, "count": 24},
    {"new": torch.uint64, "count": 24}, {"new": "torch.uint16", "count": 24},
    {"new": torch.float8_e4m3fn, "count": 25}, {"new": torch.float8_e4m3fn, "count": 24,
                                                "shape": (5, 5), "strides": (5, 1)}])
def test_views_that_a_pickle_claims(wrong, tmp_path):
    path = torch_file(tmp_path / "a.pt", {"w": tensor(**wrong)})
    assert isinstance(try_all(path), TinyldmError)


def test_overlapping_views_are_no_more_than_their_storage(tmp_path):
    path = torch_file(tmp_path / "a.pt", {"w": tensor((2, 3), (1, 1)), "x": tensor((6,), (0,))})
    assert try_all(path)["w"].read(np.float32).shape == (2, 3)


def binary_text(length):
    return b"X" + length.to_bytes(4, "little") + b"a" * length


@pytest.mark.parametrize("pickled", [
    binary_text(MEGABYTE) + b"\x94" + b"h\0h\0\x93" * 10_000 + b".",            # long names
    binary_text(400) + b"\x94" + b"h\0" + b"2\x93" * 9999 + b".",               # ever longer ones
    b"]\x94" + b"(h\0h\0e" * 9999 + b".", b"(" * 20_000 + b".", b"]" * 20_000 + b".",
    b"\x80\x04" + b"]\x94" + b"(h\0h\0l\x94" * 9999 + b".",                     # 2**9999 items
    b"\x8b\xff\xff\xff\x7f" + b"1" * 99, b"\x8a\xff" + b"\xff" * 255 + b".", b"L" + b"9" * MEGABYTE,
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f" + b"x", b"I" + b"9" * 5000 + b"\n.",
    b"j\xff\xff\xff\xff.",
    b"r\xff\xff\xff\x7f}.", b"}(" + b"Nh\0" * 9999 + b"u.", b"", b".", b"N.", b"\0" * 99])
def test_pickles_that_would_grow(pickled, tmp_path):
    assert isinstance(try_all(torch_file(tmp_path / "a.pt", pickled)), TinyldmError)


def test_zips_with_huge_declared_sizes(tmp_path):
    path = torch_file(tmp_path / "a.pt", {"w": tensor()})
    whole = bytearray(path.read_bytes())
    places = [match.start() for match in re.finditer(b"PK\1\2", whole)]
    for place in places:
        for value in (2**31, 2**32 - 2, 2**32 - 1, 2**24 + 1):
            damaged = bytearray(whole)
            damaged[place + 20:place + 28] = value.to_bytes(4, "little") * 2
            path.write_bytes(damaged)
            assert isinstance(try_all(path), TinyldmError)


# ---- mutations ------------------------------------------------------------------------------

def sources(tmp_path):
    tensors = {name: tensor.half() for name, tensor in toy_tensors().items()}
    tensors |= {"lora_unet_mid_block.lora_down.weight": torch.ones(2, 2),
                "lora_unet_mid_block.alpha": torch.tensor(1.0),
                "eight": torch.ones(3).to(torch.float8_e4m3fn)}
    torch.save(tensors, tmp_path / "a.pt")
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in tensors.items():
        numbers = array.view(torch.uint8).numpy() if name == "eight" else array.numpy()
        dtype = {torch.float16: "F16", torch.float32: "F32"}.get(array.dtype, "F8_E4M3")
        header[name] = entry(list(array.shape), len(data), len(data) + numbers.nbytes, dtype)
        data += numbers.tobytes()
    return header, data, (tmp_path / "a.pt").read_bytes()


VALUES = [*HUGE, -1, 0, 0.5, None, True, "x", "\x1b[2J\n", [], {}, [0, 2**62], ["\u202e"], [[1]],
          "9" * 5000, "y" * 100_000, [1] * 65]
NAMES = ["\x1b]0;x\x07", "z" * 100_000, "a\nb", "8" * 5000, ""]


def mutated(value, draw):
    """A copy of a JSON value with something in it replaced, doubled or left out."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        name, copy = draw.choice(list(value)), dict(value)
        match draw.randrange(6):
            case 0:
                copy[draw.choice(NAMES)] = copy[name]
            case 1:
                del copy[name]
            case _:
                copy[name] = mutated(value[name], draw)
        return copy
    if isinstance(value, list) and value and draw.random() < 0.7:
        i = draw.randrange(len(value))
        return [*value[:i], mutated(value[i], draw), *value[i + draw.randrange(2):]]
    return draw.choice(VALUES)


def flipped(data, draw, reach):
    """A copy with bytes changed, and in a third of the cases cut, doubled or with another's end."""
    data = bytearray(data)
    for _ in range(draw.randrange(1, 5)):
        data[draw.randrange(min(reach, len(data)))] = draw.choice([0, 0xff, draw.randrange(256)])
    match draw.randrange(9):
        case 0:
            del data[draw.randrange(len(data)):]
        case 1:
            i = draw.randrange(len(data))
            data[i:i] = data[i // 2:i]
        case 2:
            i = draw.randrange(len(data))
            data[i:i + draw.randrange(40)] = b""
    return bytes(data)


@pytest.mark.parametrize("seed", range(12))
def test_mutations(seed, tmp_path):
    """A few hundred damaged files: only short lines, in bounded time."""
    draw = random.Random(seed)
    header, data, pickled = sources(tmp_path)
    with zipfile.ZipFile(io.BytesIO(pickled)) as archive:
        program = archive.read("a/data.pkl")
    for number in range(12):
        path = tmp_path / f"m{number % 3}.safetensors"
        other = header
        for _ in range(draw.randrange(1, 4)):
            other = mutated(other, draw)
            other = other if isinstance(other, dict) else {"a": other}
        path.write_bytes(safetensors_bytes(json.dumps(other)[:2 * MEGABYTE].encode(), data))
        try_all(path)
        whole = safetensors_bytes(header, data)
        path.write_bytes(flipped(whole, draw, len(whole) - len(data)))
        try_all(path)
        path.write_bytes(flipped(pickled, draw, len(pickled)))
        try_all(path)
        try_all(torch_file(path, flipped(program, draw, len(program))))
