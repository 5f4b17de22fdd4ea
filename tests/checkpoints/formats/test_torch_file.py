"""Files of torch.save: tinyldm reads what torch writes, and executes nothing of any pickle.

The payload of each hostile pickle would make a file. As a control, Python's own pickle reads it,
and the file is made.
"""
import collections
import os
import pathlib
import pickle
import random
import shutil
import subprocess
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

import tinyldm
from tests.support.files import (
    Toy,
    assert_holds,
    diffusers_unet,
    diffusers_vae,
    toy_tensors,
    transformers_clip,
)
from tests.support.pickles import Call, Outside, dump
from tests.support.reference import reference_names
from tests.support.small_pipelines import smallest, with_old_vae_names
from tinyldm.checkpoints import load_model, load_weights, read_tensors
from tinyldm.checkpoints.formats import unpickle
from tinyldm.errors import TinyldmError

MEGABYTE = 1 << 20


# ---- what torch writes ----------------------------------------------------------------------

@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_every_stored_dtype_loads_into_every_dtype(stored, dtype, tmp_path):
    tensors = toy_tensors(stored)
    torch.save(tensors, tmp_path / "toy.bin")
    toy = Toy()
    load_weights(toy, tmp_path / "toy.bin", dtype)
    for name, array in dict(toy.named_parameters()).items():
        theirs = tensors[name].double().numpy()
        theirs = theirs.transpose(2, 3, 1, 0) if theirs.ndim == 4 else theirs
        assert np.array_equal(array.data, theirs.astype(dtype)), name


def test_views_of_shared_storages_and_parameters(tmp_path):
    """Slices, transposed and expanded tensors, all inside one storage, as torch keeps them."""
    base = torch.randn(6, 10)
    tensors = {"base": base, "slice": base[2:5, 1::3], "transposed": base.T, "row": base[4],
               "scalar": base[1, 1], "expanded": base[:, :1].expand(6, 3), "empty": base[:0],
               "parameter": torch.nn.Parameter(torch.randn(3, 2)), "half": torch.randn(3, 3).half()}
    torch.save(tensors, tmp_path / "views.pt")
    stored = read_tensors(tmp_path / "views.pt")
    assert list(stored) == list(tensors)
    for name, tensor in tensors.items():
        theirs = tensor.detach().float().numpy()
        assert stored[name].shape == theirs.shape
        for contiguous in (True, False):
            assert np.array_equal(stored[name].read(np.float32, contiguous=contiguous), theirs)
    assert np.array_equal(stored["transposed"].rows(2, 5).read(np.float32), base.T[2:5].numpy())
    assert np.array_equal(stored["slice"].transposed().read(np.float32), base[2:5, 1::3].T.numpy())


class Scripted(torch.nn.Module):
    """Modules in modules, a buffer, a whole number, a list: what TorchScript may hold."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(),
                                         torch.nn.LayerNorm(4))
        self.register_buffer("size", torch.tensor(224))
        self.w = torch.nn.Parameter(torch.randn(2, 3))
        self.sizes = [1, 2]

    def forward(self, x):
        return self.inner(x @ self.w.T @ self.w) + self.size + len(self.sizes)


@pytest.mark.parametrize("make", [torch.jit.script,
                                  lambda module: torch.jit.trace(module, torch.randn(1, 3))])
def test_the_weights_of_a_torchscript_program(make, tmp_path):
    """OpenAI's CLIP is one. Its code, which torch compresses, stays unread."""
    module = Scripted().half().float()
    torch.jit.save(make(module), tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert any("/code/" in entry.filename for entry in archive.infolist())
    stored = read_tensors(tmp_path / "x.pt")
    assert stored.keys() == module.state_dict().keys()
    assert stored["size"].format == "I64"
    for name, tensor in module.named_parameters():
        assert np.array_equal(stored[name].read(np.float32), tensor.detach().numpy()), name
        assert stored[name].name == name


def script(layers):
    """The pickle of a TorchScript module that holds one twice, which holds one twice, and so on."""
    made = b"c__torch__\nM\n)\x81q%c}X\1\0\0\0xK\1sb"            # a module in the memo, BUILD
    nest = (b"c__torch__\nM\n)\x81}(X\1\0\0\0ah%cX\1\0\0\0bh%cubq%c")
    code = made % b"\0" + b"0"
    for i in range(layers):
        code += nest % (bytes([i % 200]), bytes([i % 200]), bytes([(i + 1) % 200])) + b"0"
    return b"\x80\2" + code + b"h" + bytes([layers % 200]) + b"."


def test_modules_of_torchscript_that_never_end(tmp_path):
    """2^100 modules in a small file, and names of thousands of letters."""
    assert not read_tensors(write(tmp_path / "a.pt", script(100)))
    with pytest.raises(TinyldmError, match="are nested deeper than any model's"):
        read_tensors(write(tmp_path / "b.pt", script(1000)))
    own = b"\x80\2c__torch__\nM\n)\x81q\0}X\1\0\0\0xh\0sb."           # holds itself
    assert not read_tensors(write(tmp_path / "c.pt", own))


def test_whole_numbers_are_read_as_what_they_are_and_never_as_weights(tmp_path):
    kinds = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
             "U8": torch.uint8, "BOOL": torch.bool}
    torch.save({name: torch.ones(2, dtype=kind) for name, kind in kinds.items()}, tmp_path / "x.pt")
    for name, tensor in read_tensors(tmp_path / "x.pt").items():
        assert tensor.format == name and tensor.stop - tensor.start == 2 * kinds[name].itemsize
        with pytest.raises(TinyldmError, match=f"the tensor {name} has dtype {name}"):
            tensor.read(np.float32)


def test_new_dtypes_name_themselves(tmp_path):
    kinds = {"U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64}
    torch.save({name: torch.ones(6, dtype=kind)[2:] for name, kind in kinds.items()},
               tmp_path / "x.pt")
    for name, tensor in read_tensors(tmp_path / "x.pt").items():
        assert tensor.format == name and tensor.stop - tensor.start == 4 * kinds[name].itemsize
    torch.save({"w": torch.ones(6).to(torch.float8_e8m0fnu)}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "the dtype 'torch.float8_e8m0fnu' of a tensor is not supported")


class Callback:
    """An object of a training script. If its state were set, that would make a file."""

    def __init__(self, path):
        self.path = path

    def __setstate__(self, state):
        pathlib.Path(state["path"]).touch()


class Settings(dict):
    """A dictionary with attributes, as Lightning keeps hyperparameters."""


def test_what_lightning_keeps_beside_the_weights_is_dropped(tmp_path):
    tensors = toy_tensors()
    settings = Settings(a=1, nested={"b": torch.zeros(3)})
    settings.name = "x"
    state = collections.OrderedDict(tensors)
    state._metadata = {"": {"version": 1}}
    torch.save({
        "epoch": 3, "global_step": 470000, "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {Callback: {"best": np.float64(0.1), "dirpath": pathlib.Path("x")},
                      "other": Callback(tmp_path / "made")},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{}]}],
        "lr_schedulers": [], "hyper_parameters": settings, "layer": torch.nn.Linear(2, 2),
        "sets": {1, (2, 3)}, "frozen": frozenset("ab"), "raw": b"\xff", "size": torch.Size([1]),
        "default": collections.defaultdict(list, a=[1]), "array": np.zeros(3), (1, 2): 3,
    }, tmp_path / "last.ckpt")
    toy = Toy()
    load_weights(toy, tmp_path / "last.ckpt")
    assert_holds(toy, tensors)
    assert not (tmp_path / "made").exists()
    with open(tmp_path / "last.ckpt", "rb") as file:    # the control: torch does it
        torch.load(file, weights_only=False)
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_python_3(protocol, tmp_path):
    tensors = toy_tensors()
    torch.save({"state_dict": collections.OrderedDict(tensors), "x": {1, 2}}, tmp_path / "x.pt",
               pickle_protocol=protocol)
    toy = Toy()
    load_weights(toy, tmp_path / "x.pt")
    assert_holds(toy, tensors)


def test_archives_beyond_four_gigabytes(tmp_path):
    """Some float32 checkpoints need 64-bit offsets. This file has a hole, so it takes no space."""
    path = tmp_path / "large.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("large/data.pkl", dump({"w": tensor()}))
        archive.start_dir = 5 << 30                     # where the next entry goes
        archive.writestr("large/data/0", np.arange(6, dtype=np.float32).tobytes())
    assert path.stat().st_size > 5 << 30
    weight = read_tensors(path)["w"].read(np.float32)
    assert np.array_equal(weight, np.arange(6).reshape(2, 3))


# ---- folders that hold only pickles ---------------------------------------------------------

@pytest.mark.parametrize("make", [diffusers_unet, diffusers_vae, transformers_clip])
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_component_folder_with_a_pickle_only(make, variant, tmp_path):
    reference = make()
    if variant:
        reference = reference.half()
    reference.save_pretrained(tmp_path)
    file, = tmp_path.glob("*.safetensors")
    file.unlink()
    stem = "pytorch_model" if make is transformers_clip else "diffusion_pytorch_model"
    torch.save(dict(reference_names(reference)), tmp_path / f"{stem}{variant}.bin")
    assert_holds(load_model(tmp_path), dict(reference_names(reference)))


def test_safetensors_come_first(tmp_path):
    unet = diffusers_unet()
    unet.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    assert_holds(load_model(tmp_path), unet.state_dict())


def test_shards_of_pickles_and_old_vae_names(tmp_path):
    vae = diffusers_vae()
    vae.save_pretrained(tmp_path / "vae")
    with_old_vae_names(tmp_path)
    file, = (tmp_path / "vae").glob("*.safetensors")
    tensors = list(safetensors.torch.load_file(file).items())
    file.unlink()
    shards = {"a.bin": dict(tensors[::2]), "b.bin": dict(tensors[1::2])}
    for name, shard in shards.items():
        torch.save(shard, tmp_path / "vae" / name)
    (tmp_path / "vae" / "diffusion_pytorch_model.bin.index.json").write_text(
        str({"weight_map": {key: name for name, shard in shards.items() for key in shard}}
            ).replace("'", '"'))
    assert_holds(load_model(tmp_path / "vae"), vae.state_dict())


def test_a_pipeline_of_pickles_only(tmp_path):
    folder = smallest(tmp_path / "pipeline")
    pipe = tinyldm.load(folder)
    for file in folder.glob("*/*.safetensors"):
        stem = "pytorch_model" if file.stem == "model" else file.stem
        torch.save(safetensors.torch.load_file(file), file.with_name(f"{stem}.bin"))
        file.unlink()
    pickled = tinyldm.load(folder)
    for part in ("text_encoder", "unet", "vae"):
        stored = dict(getattr(pickled, part).named_parameters())
        for name, parameter in getattr(pipe, part).named_parameters():
            assert np.array_equal(stored[name].data, parameter.data), name
    write(folder / "unet" / "diffusion_pytorch_model.bin", dump({"w": Call(os.system, "exit")}))
    with pytest.raises(TinyldmError, match="diffusion_pytorch_model.bin: its pickle calls '.*system"
                       "', which no weights need, so nothing of it was run"):
        tinyldm.load(folder)


# ---- hostile pickles ------------------------------------------------------------------------

def tensor(key="0", count=6, shape=(2, 3), strides=(3, 1), offset=0, kind=torch.FloatStorage,
           device="cpu", word="storage"):
    return Call(torch._utils._rebuild_tensor_v2, Outside(word, kind, key, device, count), offset,
                shape, strides, False, collections.OrderedDict())


def write(path, data, storages=None, compression=zipfile.ZIP_STORED, **more):
    """Write an archive like torch.save: a pickle's bytes, and storages {key: bytes}."""
    storages = {"0": np.arange(6, dtype=np.float32).tobytes()} if storages is None else storages
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
        for name, content in more.items():
            archive.writestr(f"archive/{name}", content)
    return path


def refused(path, match):
    """Reading the file gives an error of one line, and needs little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(TinyldmError, match=match) as error:
            read_tensors(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 700 + len(str(path))
    assert peak < 4 * MEGABYTE + 100 * path.stat().st_size, f"{peak / MEGABYTE:.1f} MB at the peak"


def test_the_archives_of_these_tests_are_as_torch_makes_them(tmp_path):
    path = write(tmp_path / "good.pt", dump({"w": tensor()}), version=b"3\n")
    expected = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(torch.load(path, weights_only=True)["w"].numpy(), expected)
    assert np.array_equal(read_tensors(path)["w"].read(np.float32), expected)


def payloads(made):
    """{the name of the called function: an object whose pickle makes the file `made`}."""
    touch, source = f"touch {made}", f"open({str(made)!r}, 'w')"
    return {
        "os.system|posix.system|nt.system": Call(os.system, touch),
        "builtins.eval|__builtin__.eval": Call(eval, source),
        "builtins.exec|__builtin__.exec": Call(exec, source),
        "io.open|_io.open|__builtin__.open": Call(open, str(made), "w"),
        "subprocess.Popen|commands.Popen": Call(subprocess.Popen, ["touch", str(made)]),
        "builtins.getattr|__builtin__.getattr": Call(Call(getattr, pathlib.Path(made), "touch")),
        "builtins.map|__builtin__.map|itertools.imap|builtins.list|__builtin__.list":
            Call(list, Call(map, eval, [source])),
        "shutil.copy": Call(shutil.copy, __file__, str(made)),
    }


@pytest.mark.parametrize("protocol", [1, 2, 4, 5])
@pytest.mark.parametrize("number", range(8))
def test_nothing_that_a_pickle_calls_runs(number, protocol, tmp_path):
    made = tmp_path / "made"
    name, payload = list(payloads(made).items())[number]
    name = name.replace(".", r"\.")
    with_weights = {"w": tensor(), "state_dict": {"w": tensor(), "x": payload}}
    refused(write(tmp_path / "x.ckpt", dump(with_weights, protocol)), f"calls '({name})'")
    # As a key, an argument of another call, a state, a part of a reference to the outside.
    for nested in ({payload: 1}, Call(collections.OrderedDict, payload),
                   Call(collections.OrderedDict, state={"x": payload}), [[(payload,)]],
                   Call(torch._utils._rebuild_parameter, payload, False, {}),
                   Call(os.getcwd, Call(os.getcwd, payload)), tensor(shape=payload),
                   tensor(key=payload)):
        refused(write(tmp_path / "x.ckpt", dump({"w": nested}, protocol)), f"calls '({name})'")
    assert not made.exists()
    process = pickle.loads(dump(payload, protocol))     # the control
    if isinstance(process, subprocess.Popen):
        process.wait()
    assert made.exists()


SYSTEM = b"cposix\nsystem\n"


@pytest.mark.parametrize("data, match", [
    (b"(S'touch MADE'\niposix\nsystem\n.", "calls 'posix.system'"),             # INST
    (b"(" + SYSTEM + b"S'touch MADE'\no.", "calls 'posix.system'"),             # OBJ
    (SYSTEM + b"(S'touch MADE'\ntR.", "calls 'posix.system'"),
    (b"\x80\x04\x8c\x05posix\x8c\x06system\x93(S'touch MADE'\ntR.", "calls 'posix.system'"),
    (SYSTEM + b"q\x000h\x00(S'touch MADE'\ntR.", "calls 'posix.system'"),       # by the memo
    (SYSTEM + b"(S'touch MADE'\nt\x81}b(S'touch MADE'\ntR.", "calls an object"),
    (b"c__builtin__\ngetattr\n(cos\nS'system'\ntR.", "damaged|calls"),
    (b"\x80\x02\x82\x01.", "instruction EXT1"), (b"P1\n.", "instruction PERSID"),
    (b"\x80\x05\x97.", "instruction NEXT_BUFFER"),
    (b"ccollections\nOrderedDict\n(S'x'\ntR.", "damaged"),
    (b"S'x'\n(tR.", "calls an object"), (b"I1\n(tR.", "calls an object"),
    (b"carchive\ndata\xff\n(tR.", "damaged|calls"),
])
def test_pickles_written_by_hand(data, match, tmp_path):
    made = tmp_path / "made"
    data = data.replace(b"MADE", str(made).encode())
    refused(write(tmp_path / "x.bin", data), match)
    assert not made.exists()


def test_what_is_made_without_a_call_is_inert(tmp_path):
    """NEWOBJ and BUILD: Python's pickle would call __new__ and __setstate__ of any class."""
    made = str(tmp_path / "made").encode()
    start = b"\x80\x02}X\x01\x00\x00\x00wc" + __name__.encode() + b"\nCallback\n)\x81"
    state = b"}X\x04\x00\x00\x00pathX" + len(made).to_bytes(4, "little") + made + b"sb"
    items = b"(X\x01\x00\x00\x00aK\x01u(K\x01e"         # items that are set and appended
    assert read_tensors(write(tmp_path / "x.pt", start + state + items + b"s.")) == {}
    assert not (tmp_path / "made").exists()
    pickle.loads(start + state + b"s.")
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("change", [
    {"shape": (1 << 40, 3)}, {"shape": (1 << 62, 1 << 62)}, {"shape": (2, 4), "strides": (1, 1)},
    {"shape": (1 << 40,), "strides": (0,)}, {"shape": (7,), "strides": (0,)}, {"offset": 1},
    {"offset": -1}, {"offset": 1 << 63}, {"offset": "0"}, {"offset": 0.0}, {"strides": (-3, 1)},
    {"strides": (3, -1)}, {"strides": (1 << 62, 1)}, {"strides": (1,)}, {"shape": (-2, -3)},
    {"shape": (True, 6)}, {"shape": (2.0, 3)}, {"shape": "ab"}, {"shape": None}, {"strides": None},
    {"shape": (1,) * 9, "strides": (1,) * 9}, {"shape": (0,), "strides": (1,), "offset": 7},
    {"count": 5}, {"count": 7}, {"count": 1 << 40}, {"count": -6}, {"count": 6.0}, {"count": "6"},
    {"key": "1"}, {"key": "../data.pkl"}, {"key": 0}, {"key": None}, {"kind": "FloatStorage"},
    {"kind": torch.DoubleStorage}, {"kind": os.system}, {"word": "tensor"},
], ids=str)
def test_tensors_that_do_not_fit_their_storage(change, tmp_path):
    refused(write(tmp_path / "x.pt", dump({"w": tensor(**change)})),
            "pickle is damaged|the storage '0' is a '(posix|nt|os).system', supported are")


def doubled(depth, make):
    """Instructions for an object that holds another twice, which holds another twice, ..."""
    return make + b"q\x00" + b"".join(
        b"0(h\x00h\x00" + kind + b"q\x00" for kind in [b"l" if make == b"]" else b"t"] * depth)


@pytest.mark.parametrize("data, match", [
    (b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x.", "damaged"),         # BINBYTES8
    (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x.", "damaged"),         # BYTEARRAY8
    (b"\x80\x04\x8d" + (1 << 62).to_bytes(8, "little") + b"x.", "damaged"),         # BINUNICODE8
    (b"\x80\x02\x8b\xff\xff\xff\x7fx.", "damaged"), (b"\x80\x02\x8b\xff\xff\xff\xff.", "damaged"),
    (b"\x80\x04\x95" + (1 << 62).to_bytes(8, "little") + b"N.", "not a NoneType"),  # FRAME
    (b"Nr\xff\xff\xff\x7f.", "not a NoneType"), (b"Np2000000000\n.", "not a NoneType"),
    (b"I" + b"9" * 5000 + b"\n.", "damaged|not a int"),
    (b"L" + b"9" * 5000 + b"L\n.", "damaged|not a int"),
    (doubled(60, b"]") + b".", "not a list"), (doubled(60, b")") + b".", "not a tuple"),
    (b"}" + doubled(60, b")") + b"K\x01s0}.", "0x1"),
    (doubled(60, b"]") + b"q\x01c_\n_\nh\x01R.", "calls '_._'"),
    (doubled(60, b"]") + b"q\x01(tR.", "calls an object"),
    (doubled(60, b")") + b"(h\x00h\x00h\x00h\x00h\x00tQ.", "damaged"),
    (b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + doubled(60, b"]") + b"Nh\x00tQ.",
     "damaged"),
    (b"ctorch._utils\n_rebuild_tensor_v2\n(" + doubled(60, b"]") + b"h\x00h\x00h\x00tR.",
     "damaged"),
    (b"]" * 200_000 + b"a" * 199_999 + b".", "not a list"),
    (b"(" * 100_000 + b".", "damaged"), (b"", "damaged"), (b".", "damaged"), (b"0.", "damaged"),
    (b"h\x00.", "damaged"), (b"t.", "damaged"), (b"}K\x01u.", "damaged"), (b"\xff.", "damaged"),
    (b"N", "damaged"), (b"]K\x01s.", "damaged"), (b"}K\x01a.", "damaged"), (b"N" * 100, "damaged"),
    (b"}(K\x01u.", "damaged"), (b"\x80\x02K", "damaged"),
])
def test_pickles_that_are_small_and_would_be_huge(data, match, tmp_path):
    if match == "0x1":                                  # a key that takes forever to hash
        assert read_tensors(write(tmp_path / "x.bin", data)) == {}
    else:
        refused(write(tmp_path / "x.bin", data), match)


def test_a_dictionary_that_holds_itself(tmp_path):
    loop = {"w": tensor()}
    loop["state_dict"] = loop
    assert list(read_tensors(write(tmp_path / "x.pt", dump(loop)))) == ["w"]


def test_instructions_are_counted(tmp_path):
    data = b"}" * (unpickle.MOST_INSTRUCTIONS + 1) + b"."
    path = write(tmp_path / "x.bin", data)
    tracemalloc.start()
    with pytest.raises(TinyldmError, match="more than 1048576 instructions"):
        read_tensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 128 * MEGABYTE, f"{peak / MEGABYTE:.0f} MB"


def test_a_pickle_that_is_too_large(tmp_path):
    path = write(tmp_path / "x.bin", bytes((16 << 20) + 1))
    refused(path, "its pickle has 16777217 bytes")


# ---- hostile archives -----------------------------------------------------------------------

def test_zip_bombs(tmp_path):
    refused(write(tmp_path / "a.pt", bytes(64 * MEGABYTE), compression=zipfile.ZIP_DEFLATED),
            "'archive/data.pkl' is compressed")
    path = tmp_path / "b.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", dump({"w": tensor(count=16 * MEGABYTE)}))
        archive.writestr("archive/data/0", bytes(64 * MEGABYTE), zipfile.ZIP_DEFLATED)
    refused(path, "'archive/data/0' is compressed")
    path = tmp_path / "c.pt"                            # refused, although it would not be read
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", dump({}))
        archive.writestr("archive/other", bytes(16 * MEGABYTE), zipfile.ZIP_LZMA)
    refused(path, "'archive/other' is compressed")


def directory(data, name):
    """The place in the archive's directory that describes the entry `name`."""
    return data.rindex(name.encode(), 0, len(data)) - 46


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/data/0"])
@pytest.mark.parametrize("size", [1 << 31, (1 << 32) - 2, 1 << 20])
def test_entries_that_claim_to_be_larger_than_the_file(name, size, tmp_path):
    path = write(tmp_path / "x.pt", dump({"w": tensor(count=size // 4)}))
    data = bytearray(path.read_bytes())
    place = directory(data, name)
    data[place + 20:place + 28] = size.to_bytes(4, "little") * 2        # stored, and unpacked
    path.write_bytes(data)
    refused(path, "truncated or corrupt|more than the 16777216")


@pytest.mark.parametrize("place, value", [(42, b"\0\0\0\x80"), (42, b"\5\0\0\0"), (8, b"\1\0")])
def test_entries_that_lie_elsewhere_or_are_encrypted(place, value, tmp_path):
    path = write(tmp_path / "x.pt", dump({"w": tensor()}))
    data = bytearray(path.read_bytes())
    start = directory(data, "archive/data/0") + place
    data[start:start + len(value)] = value
    path.write_bytes(data)
    refused(path, "truncated or corrupt|compressed or encrypted")


def test_entries_without_a_header_of_their_own(tmp_path):
    path = write(tmp_path / "x.pt", dump({"w": tensor()}))
    data = bytearray(path.read_bytes())
    place = directory(data, "archive/data/0")
    data[int.from_bytes(data[place + 42:place + 46], "little")] ^= 1
    path.write_bytes(data)
    refused(path, "truncated or corrupt .*no entry 'archive/data/0'")


def test_entries_on_top_of_each_other(tmp_path):
    """Many storages, all at the same megabyte of the file."""
    path = tmp_path / "x.pt"
    tensors = {f"w{i}": tensor(str(i), MEGABYTE, (MEGABYTE,), (1,), kind=torch.ByteStorage)
               for i in range(10)}
    write(path, dump(tensors), {str(i): bytes(MEGABYTE if i == 0 else 0) for i in range(10)})
    data = bytearray(path.read_bytes())
    first = directory(data, "archive/data/0")
    for i in range(1, 10):
        place = directory(data, f"archive/data/{i}")
        data[place + 16:place + 28] = data[first + 16:first + 28]       # checksum and sizes
        data[place + 42:place + 46] = data[first + 42:first + 46]       # where it begins
    path.write_bytes(data)
    refused(path, "truncated or corrupt .*entries of .* bytes in a file of")


def test_other_archives(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("picture.png", b"")
    refused(path, "holds 0 pickles")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("b/data.pkl", b"N.")
    refused(path, "holds 2 pickles")
    refused(write(path, dump({"w": tensor()}), byteorder=b"big"), "byte order 'big'")
    assert read_tensors(write(path, dump({"w": tensor()}), byteorder=b"little"))
    refused(write(path, dump([tensor()])), "must hold tensors by name, not a list")
    with pytest.raises(TinyldmError, match="missing"):
        read_tensors(tmp_path / "nowhere.ckpt")


def test_truncated_files(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save(toy_tensors(), path)
    whole = path.read_bytes()
    for length in [*range(0, 200, 7), *range(200, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(path, "truncated or corrupt|missing, truncated")


def test_changed_bytes_are_an_error_or_other_numbers(tmp_path):
    """Never a traceback. No checksum covers the archive's names and its directory."""
    path = tmp_path / "x.ckpt"
    torch.save(toy_tensors(), path)
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(1500):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            load_weights(Toy(), path)
        except TinyldmError as error:
            assert str(path) in str(error)


def test_changed_pickles_are_an_error_or_other_tensors(tmp_path):
    """With correct checksums: never a traceback, never numbers from outside of the storage."""
    data, draw = dump({"w": tensor(), "v": tensor(shape=(6,), strides=(1,))}), random.Random(0)
    for _ in range(3000):
        damaged = bytearray(data)
        for _ in range(draw.randrange(1, 4)):
            damaged[draw.randrange(len(data))] = draw.randrange(256)
        path = write(tmp_path / "x.pt", bytes(damaged))
        try:
            tensors = read_tensors(path)
        except TinyldmError as error:
            assert str(path) in str(error)
            continue
        for found in tensors.values():
            assert set(np.ravel(found.read(np.float32))) <= set(range(6))


# ---- not an archive -------------------------------------------------------------------------

def test_files_of_another_kind(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save(toy_tensors(), path, _use_new_zipfile_serialization=False)
    refused(path, "written by a torch older than 1.6.*save it again")
    made = tmp_path / "made"
    for protocol in (2, 4, 5):
        path.write_bytes(dump({"x": Call(os.system, f"touch {made}")}, protocol))
        refused(path, "is a bare pickle")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    refused(path, "git lfs pull")
    for content, match in [(b"", "empty, a truncated or corrupt"), (b"<!DOCTYPE html><html>",
                           "is a web page"), (b"cos\nsystem\n(S'touch x'\ntR.", "bare pickle"),
                           (b"\0" * 100, "begins with zeros"), (b"\1\2\3", "truncated or corrupt")]:
        path.write_bytes(content)
        refused(path, match)
    assert not made.exists()
