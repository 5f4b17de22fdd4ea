"""Files that are something else under the name of weights: a line says what they are."""
import io
import json
import pickle
import re
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

from tinyldm.checkpoints import read_tensors
from tinyldm.checkpoints.formats.foreign import QUANTISED, quantised
from tinyldm.errors import TinyldmError


def picture(format):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, format)
    return file.getvalue()


def archive(**files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in files.items():
            zipped.writestr(name.replace("__", "/"), content)
    return file.getvalue()


def tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tarred:
        tarred.addfile(tarfile.TarInfo("model.ckpt"))
    return file.getvalue()


def array(save):
    file = io.BytesIO()
    save(file, np.ones(3))
    return file.getvalue()


OLD = io.BytesIO()
torch.save({"w": torch.ones(2)}, OLD, _use_new_zipfile_serialization=False)
ZEROS = bytes(5000)
FOREIGN = {
    "GGUF": (b"GGUF\x03\0\0\0" + ZEROS, "is a GGUF file, .* llama.cpp: use the file of float16"),
    "old GGML": (b"tjgg\1\0\0\0" + ZEROS, "is a GGUF file"),
    "a web page": (b"<!DOCTYPE html><html>Sign in</html>" + ZEROS, "is a web page, not weights: "
                   "download the file itself"),
    "a page after a mark": (b"\xef\xbb\xbf\n <html lang='en'>", "is a web page, not weights"),
    "an error page in XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
                             "is a web page, not weights"),
    "a server's answer": (b'{"error": "unauthorized"}', "is a server's answer, error: unauthorized,"
                          " not weights: download the file itself"),
    "a server's message": (b'\n{"status": 404, "message": "Not\\u001b[2J found\\n"}',
                           r"a server's answer, message: Not\?\[2J found"),
    "JSON": (b'[{"class_type": "KSampler"}]', "is a JSON text, not weights"),
    "long JSON": (b'{"a": "' + b"x" * 3_000_000 + b'"}', "is a JSON text, not weights"),
    "deep JSON": (b"[" * 100_000, "is a JSON text, not weights"),
    "an index of shards": (b'{"metadata": {}, "weight_map": {"a": "b.bin"}}',
                           "is only the index of several files of weights: name the folder"),
    "a config": (b'{"_class_name": "UNet2DConditionModel"}', "is a JSON config, .* its folder"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
                  "Git LFS's pointer to them: run `git lfs pull`, or download the file itself"),
    "a text": (b"Entry not found", "is a text, which begins 'Entry not found': download the file"),
    "a text of others": ("Fichier non trouvé à l'adresse".encode(), "begins .Fichier non trouvé"),
    "ONNX": (b"\x08\x07\x12\x07pytorch\x1a\x052.0.1:" + ZEROS, "is an ONNX model: use the file of"),
    "ONNX without a producer": (b"\x08\x08:\xd0\x95\x1e\n" + ZEROS, "is an ONNX model"),
    "OpenVINO": (b'<?xml version="1.0"?>\n<net name="Model0" version="11">', "an OpenVINO model"),
    "Keras": (b"\x89HDF\r\n\x1a\n" + ZEROS, "is an HDF5 file, as Keras and TensorFlow write it"),
    "TensorRT": (b"ftrt\0\0\0\0" + ZEROS, "is a TensorRT engine"),
    "TensorFlow Lite": (b"\x1c\0\0\0TFL3" + ZEROS, "is a TensorFlow Lite model"),
    "NumPy": (array(np.save), "is an array of NumPy"),
    "NumPy's archive": (array(np.savez), r"holds 0 pickles .*: it is an archive of NumPy's arrays"),
    "a zip of weights": (archive(model__a__ckpt=b"x", **{"sd/v1.safetensors": b"x"}), "it is a zip "
                         "archive that holds sd/v1.safetensors: unpack it, and name that file"),
    "another zip": (archive(readme=b"x"), r"it is a zip archive of something else \(readme\)"),
    "an empty zip": (archive(), "holds 0 pickles"),
    "Keras 3": (archive(**{"config.json": b"{}", "model.weights.h5": b""}),
                "it is a model of Keras"),
    "7z": (b"7z\xbc\xaf'\x1c\0\4" + ZEROS, "is a 7z archive: unpack it, and name the file"),
    "RAR": (b"Rar!\x1a\x07\1\0" + ZEROS, "is a RAR archive: unpack it"),
    "gzip": (b"\x1f\x8b\x08\0" + ZEROS, "is a gzip archive: unpack it"),
    "tar": (tar(), "is a tar archive: unpack it"), "PDF": (b"%PDF-1.7\n" + ZEROS, "a PDF document"),
    "PNG": (picture("PNG"), r"is a picture, not weights: name a file of weights \(--image takes"),
    "JPEG": (picture("JPEG"), "is a picture"), "WebP": (picture("WEBP"), "is a picture"),
    "GIF": (picture("GIF"), "is a picture"), "BMP": (picture("BMP"), "is a picture"),
    "TIFF": (picture("TIFF"), "is a picture"), "HEIC": (b"\0\0\0\x18ftypheic" + ZEROS, "a picture"),
    "a film": (b"\0\0\0\x18ftypmp42" + ZEROS, "is a film or a sound"),
    "a program": (b"\x7fELF\2\1\1" + ZEROS, "is a program, not weights"),
    "a script": (b"#!/bin/sh\nrm -rf x\n", "is a program, not weights"),
    "a pickle": (pickle.dumps({"a": [1]}), "is a bare pickle"),
    "a pickle of Python 2": (pickle.dumps({"a": [1]}, 0), "is a bare pickle"),
    "a pickle of protocol 1": (pickle.dumps([1, 2], 1), "is a bare pickle"),
    "a pickle that calls": (b"cposix\nsystem\n(S'touch x'\ntR.", "is a bare pickle"),
    "an old torch": (OLD.getvalue(), "a torch older than 1.6.*load it with torch and save it"),
    "zeros": (ZEROS, "begins with zeros, as downloads that broke off leave it: get it again"),
    "nothing": (b"", "is empty, a truncated or corrupt download: get it again"),
    "noise": (bytes(range(255, 0, -1)) * 9, "missing, truncated or corrupt"),
}


def refused(path, pattern):
    with pytest.raises(TinyldmError) as error:
        read_tensors(path)
    text = str(error.value)
    assert re.search(pattern, text), text
    assert str(path) in text and text.isprintable() and len(text) < 600 + len(str(path))


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt", ".bin", ".pt"])
@pytest.mark.parametrize("content, pattern", FOREIGN.values(), ids=FOREIGN)
def test_the_first_bytes_tell(content, pattern, ending, tmp_path):
    path = tmp_path / f"model{ending}"
    path.write_bytes(content)
    refused(path, pattern)


@pytest.mark.parametrize("name, pattern", [
    ("model.onnx", "an ONNX model"), ("flax_model.msgpack", "a file of Flax"),
    ("unet.engine", "TensorRT"), ("saved_model.pb", "a TensorFlow model"),
    ("model.safetensors.part", "is a download that is not finished: wait for its end"),
    ("model.crdownload", "a download that is not finished"),
    ("0ff.incomplete", "a download that is not finished")])
def test_the_name_tells_where_the_bytes_do_not(name, pattern, tmp_path):
    (tmp_path / name).write_bytes(bytes(range(255, 0, -1)) * 9)
    refused(tmp_path / name, pattern)


def test_the_numbers_of_openvino(tmp_path):
    (tmp_path / "openvino_model.bin").write_bytes(np.linspace(3, 4, 999).tobytes())
    (tmp_path / "openvino_model.xml").write_text("<net/>")
    refused(tmp_path / "openvino_model.bin", "holds the numbers of an OpenVINO model")


def test_an_unfinished_download(tmp_path):
    """The first half of a file under its own name: how much is there. Whole, any name will do."""
    safetensors.numpy.save_file({"w": np.ones(1000, np.float32)}, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[:2000])
    refused(tmp_path / "half.safetensors", rf"truncated .*\(it has 2,000 of {len(whole):,} bytes\)")
    (tmp_path / "a.part").write_bytes(whole[:2000])
    refused(tmp_path / "a.part", "not finished")
    (tmp_path / "a.part").write_bytes(whole)
    assert read_tensors(tmp_path / "a.part").keys() == {"w"}


def test_lora_embedding_and_vae_say_the_same(tmp_path):
    import tinyldm

    pipe = tinyldm.load()
    for content, pattern in (FOREIGN["an old torch"], (b"GGUF" + b"\0" * 99, "is a GGUF file"),
                             (b"<!doctype html>", "is a web page, not weights")):
        (tmp_path / "a.safetensors").write_bytes(content)
        said = set()
        for read in (pipe.load_lora, pipe.load_textual_inversion, tinyldm.load,
                     lambda path: tinyldm.load(vae=path)):
            with pytest.raises(TinyldmError, match=pattern) as error:
                read(tmp_path / "a.safetensors")
            said.add(str(error.value))
        assert len(said) == 1


# ---- quantised weights ----------------------------------------------------------------------

LAYER = "model.diffusion_model.input_blocks.1.1.proj_in"


@pytest.mark.parametrize("names, how", [
    (["qweight", "qzeros", "scales", "g_idx"], "GPTQ or AWQ"),
    (["qweight", "qzeros", "scales"], "GPTQ or AWQ"),
    (["weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"],
     "bitsandbytes"), (["weight", "SCB", "weight_format"], "bitsandbytes"),
    (["qweight", "wscales", "smooth_factor", "lora_down"], "SVDQuant"),
    (["weight", "scale_weight"], "scales beside 8-bit numbers, ComfyUI's scaled fp8"),
    (["weight", "weight_scale", "input_scale"], "scales beside 8-bit"),
    (["weight._data", "weight._scale"], "optimum-quanto")])
@pytest.mark.parametrize("save", [safetensors.numpy.save_file, torch.save])
def test_quantised_weights(names, how, save, tmp_path):
    path = tmp_path / "a.safetensors"
    make = np.ones if save is safetensors.numpy.save_file else torch.ones
    save({"other.weight": make(2), **{f"{LAYER}.{name}": make(2) for name in names}}, path)
    refused(path, rf"holds weights quantised by {how}.* \({LAYER}\.\w.*\), which is not supported: "
            "use the file of float16")


def test_no_published_name_looks_quantised():
    """Neither the single files' and folders' names nor those of LoRAs and of training scripts."""
    from tests.support.keys import original_rows, published_shapes

    names = [name for table in ("sd1", "sd2", "sdxl", "sdxl_refiner")
             for _, name, *_ in original_rows(table)]
    names += published_shapes("SD 1.5", "unet").keys() | published_shapes("SD 1.5", "vae").keys()
    names += ["lora_unet_a.alpha", "lora_unet_a.dora_scale", "logit_scale", "v_pred", "ztsnr",
              "alphas_cumprod", "model_ema.decay", "denoiser.sigmas", "lora_te_a.lora_mid.weight"]
    assert len(names) > 4000 and quantised(names) == "" and len(QUANTISED) > 3


def test_a_pickled_answer_runs_nothing(tmp_path):
    """JSON with an entry of any kind under `error`."""
    (tmp_path / "a.ckpt").write_text(json.dumps({"error": [{"x": ["y" * 10_000] * 99}]}))
    refused(tmp_path / "a.ckpt", "a server's answer, error: ")
