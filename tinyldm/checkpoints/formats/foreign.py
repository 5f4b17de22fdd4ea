"""Files that are no weights in a format read here: what they are and what to do, by first bytes.

The downloads of the wild are often something else under the right name: a page that asks to sign
in, a server's answer, a pointer, a half file; or weights for another program.
"""
import json
import re

from ...errors import TinyldmError

HEAD = 4096                     # bytes that are enough to tell
UNFINISHED = (".part", ".partial", ".incomplete", ".crdownload", ".download", ".opdownload",
              ".aria2", ".!ut", ".tmp")
LINK = ("download the file itself: on the Hugging Face hub with the arrow beside its name, or a "
        "token for what needs one")
FLOATS = "use the file of float16 or float32 weights that it was made from, best a safetensors one"
UNPACK = "unpack it, and name the file of weights in it"
PICTURE = "name a file of weights (--image takes a picture)"
OTHER = "use another file, best a safetensors one"
# The first bytes -> what it is, what to do.
BEGINNINGS = tuple((re.compile(pattern, re.DOTALL), what, advice) for pattern, what, advice in (
    (rb"version https://git-lfs", "not the weights, but Git LFS's pointer to them",
     "run `git lfs pull`, or download the file itself"),
    (rb"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19\.", "a file that was written by a torch older "
     "than 1.6, which is not supported", "load it with torch and save it again, best as "
     "safetensors"),
    (rb"\x80[\x00-\x05]|\([dl]p\d|[\]}]q|c[\w.]+\r?\n\w+\r?\n",
     "a bare pickle, expected a zip as torch.save writes it, or a safetensors file", OTHER),
    (rb"GGUF|GGML|tjgg|lmgg|fmgg", "a GGUF file, with numbers quantised for llama.cpp", FLOATS),
    (rb"\x89HDF\r\n", "an HDF5 file, as Keras and TensorFlow write it", OTHER),
    (rb"[fp]trt", "a TensorRT engine, compiled for one GPU", FLOATS),
    (rb"\x08[\x01-\x1f](\x12.[\w.]{3}|:)", "an ONNX model", FLOATS),
    (rb"....TFL3", "a TensorFlow Lite model", FLOATS),
    (rb"\x93NUMPY", "an array of NumPy", OTHER),
    (rb"(\xef\xbb\xbf)?\s*<\?xml.{0,200}<net\b", "the description of an OpenVINO model", FLOATS),
    (rb"(\xef\xbb\xbf)?\s*<", "a web page, not weights", LINK),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|II\*\0|MM\0\*|8BPS|BM.{4}\0\0\0\0|....ftyp(avif|hei)",
     "a picture, not weights", PICTURE),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....(AVI|WAVE)|OggS|ID3", "a film or a sound, not weights",
     OTHER),
    (rb"7z\xbc\xaf'\x1c", "a 7z archive", UNPACK), (rb"Rar!\x1a", "a RAR archive", UNPACK),
    (rb"\x1f\x8b", "a gzip archive", UNPACK), (rb"BZh\d", "a bzip2 archive", UNPACK),
    (rb"\xfd7zXZ", "an xz archive", UNPACK), (rb"\x28\xb5\x2f\xfd", "a zstd archive", UNPACK),
    (rb".{257}ustar", "a tar archive", UNPACK),
    (rb"%PDF", "a PDF document, not weights", OTHER),
    (rb"\x7fELF|MZ.{60}|\xcf\xfa\xed\xfe|#!", "a program, not weights", OTHER),
    (rb"\0{64}", "a file that begins with zeros, as downloads that broke off leave it",
     "get it again"),
))
# Where the first bytes say nothing, the end of the name.
ENDS = {".onnx": "an ONNX model", ".msgpack": "a file of Flax", ".pb": "a TensorFlow model",
        ".engine": "a TensorRT engine", ".plan": "a TensorRT engine", ".trt": "a TensorRT engine",
        ".mlmodel": "a Core ML model", ".h5": "a file of Keras", ".tflite": "a TensorFlow model"}
# Names that quantising programs give to what belongs to a weight; the first that matches decides.
QUANTISED = tuple((re.compile(pattern), how) for pattern, how in (
    (r"\.(wscales|smooth_factor(_orig)?|wcscales)$", "SVDQuant (Nunchaku)"),
    (r"\.quant_state\.bitsandbytes|\.(absmax|quant_map|nested_absmax|SCB)$", "bitsandbytes"),
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"^scaled_fp8$|\.(scale_weight|comfy_quant)$",
     "scales beside 8-bit numbers, ComfyUI's scaled fp8"),
    (r"\.weight_scale(_2)?$",
     "scales beside 8-bit or 4-bit numbers"),
    (r"\.weight\._(data|scale|shift)$", "optimum-quanto"),
))


def is_picture(head):
    """Whether a file's first bytes are those of a picture, of any format."""
    known = next((advice for pattern, _, advice in BEGINNINGS if pattern.match(head)), None)
    return known is PICTURE


def refuse_foreign(path, head):
    """Raise TinyldmError if the first bytes, or else the name, tell that a file is something else.
    """
    for pattern, what, advice in BEGINNINGS:
        if pattern.match(head):
            raise TinyldmError(f"{path} is {what}: {advice}")
    if not head:
        raise TinyldmError(f"{path} is empty, a truncated or corrupt download: get it again")
    if re.match(rb"(\xef\xbb\xbf)?\s*[\[{]", head):
        raise TinyldmError(f"{path} is {json_text(path)}")
    if what := ENDS.get(path.suffix.lower()):
        raise TinyldmError(f"{path} is {what}: {FLOATS}")
    if path.suffix == ".bin" and path.with_suffix(".xml").is_file():
        raise TinyldmError(f"{path} holds the numbers of an OpenVINO model: {FLOATS}")
    start = head[:60].decode("utf-8", "ignore")         # a letter may be cut at the end
    whole = len(start.encode()) > min(len(head), 60) - 4
    if whole and re.fullmatch(r"[^\0-\x08\x0e-\x1f]{9,}", start):
        raise TinyldmError(f"{path} is a text, which begins {start!r}: {LINK}")


def json_text(path):
    """What a JSON text is, and what to do."""
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(1 << 20))
    except (OSError, ValueError, RecursionError):
        content = None
    content = content if isinstance(content, dict) else {}
    if "weight_map" in content:
        return "only the index of several files of weights: name the folder of its model"
    if content.keys() & {"_class_name", "architectures", "model_type", "_diffusers_version"}:
        return "a JSON config, not weights: name its folder"
    for key in ("error", "message", "detail"):
        if key in content:
            return f"a server's answer, {key}: {str(content[key])[:200]}, not weights: {LINK}"
    return f"a JSON text, not weights: {LINK}"


def refuse_quantised(path, names):
    """Raise TinyldmError if names of tensors tell that the weights beside them are quantised."""
    if how := quantised(names):
        raise TinyldmError(f"{path} holds weights quantised by {how}, which is not supported: "
                           f"{FLOATS}")


def quantised(names):
    """How the weights of these names are quantised, with a name that tells it; "" if they are not.
    """
    for pattern, how in QUANTISED:
        if found := next(filter(pattern.search, names), None):
            return f"{how} ({found})"
    return ""


def zip_content(names):
    """What a zip without torch's pickle is, from the names in it, and what to do."""
    names = [name for name in names if not name.endswith("/")]
    if weights := [name for name in names if name.endswith((".safetensors", ".ckpt", ".pt"))]:
        return f"a zip archive that holds {weights[0]}: unpack it, and name that file"
    if names and all(name.endswith(".npy") for name in names):
        return f"an archive of NumPy's arrays (.npz): {OTHER}"
    if "model.weights.h5" in names:
        return f"a model of Keras: {OTHER}"
    return f"a zip archive of something else ({', '.join(names[:3]) or 'empty'}): {OTHER}"
