"""A Record as one HTML page: template.html with page.css, the scripts and the arrays put into it.

    page(record) -> html        needs no other file and no network: it opens from file://

The arrays go into one gzip stream in base64, which page.js unpacks. To keep the page small, `Kept`
merges what nobody tells apart on a screen: see its methods. page.js computes the rest, such as
x_start, from what is kept.
__main__.py -> page -> xray.html
"""
import base64
import gzip
import html
import io
import json
import re
from importlib.resources import files

import numpy as np
from PIL import Image

from ..errors import TinyldmError
from ..images import grid
from ..pipelines.preview import with_ones
from .places import places

LARGEST = 3_000_000         # bytes of the page
STRIP, STRIP_SIDE = 8, 96   # pictures of the strip at the top, which needs no JavaScript
# What is kept, in the order of what is tried until the page is small enough: the most steps,
# whether the heads of the attention are kept apart, and the longest side of pictures.
KEPT = (25, True, 96), (25, False, 96), (13, False, 64), (7, False, 48), (3, False, 32)
LATENTS, MAP = 32, 16       # the longest side of latents, of maps
EXACT = 1e-3                # the largest error of x_start as a linear function
SCRIPTS = "page.js", "parts.js", "panels.js"
COMPONENTS = 3              # principal components of an activation: red, green, blue


def page(record):
    """Record -> the page, a str of at most LARGEST bytes in UTF-8.

    Raises TinyldmError if even the least of it is larger.
    """
    pictures = strip(record)
    for limits in KEPT:
        kept = Kept(record, *limits)
        text = fill(kept.facts, kept.arrays, pictures)
        if len(text.encode()) <= LARGEST:
            return text
    raise TinyldmError(f"the page would have {len(text.encode())} bytes, more than {LARGEST}: use "
                       "fewer steps, or a shorter prompt")


def fill(facts, arrays, pictures):
    """The template with everything in it -> html."""
    packed_places, packed = pack(arrays)
    # A prompt may hold </script>, which would end the element: as \u003c it cannot.
    data = json.dumps(facts | {"arrays": packed_places}, allow_nan=False).replace("<", "\\u003c")
    parts = {"style": read("page.css"), "script": "\n".join(map(read, SCRIPTS)),
             "facts": data, "packed": packed,
             "prompt": html.escape(facts["prompt"]), "strip": png(pictures),
             "strip_width": pictures.width, "strip_height": pictures.height,
             "about": html.escape(facts["about"]),
             "strip_alt": html.escape(f"The picture as predicted at {STRIP} steps, from a blur to: "
                                      f"{facts['prompt']}")}
    # One pass: what a prompt holds is never taken for a mark.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: str(parts[mark[1]]), read("template.html"))


def read(name):
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


class Kept:
    """What of a Record goes into the page: `facts` for JSON, and `arrays` by name.

    An array is raw uint8, float32, or a pair (integers, scale of the last axis): see `quantise`.
    """

    def __init__(self, record, most_steps, heads, side):
        self.record, self.arrays, self.merged = record, {}, []
        found = record.arrays
        total = len(found["timesteps"])
        self.steps = spread(total, most_steps)
        if len(self.steps) < total:
            self.merged.append(f"{len(self.steps)} of {total} steps are kept")
        self.facts = self._facts()
        pictures = {"images": found["images"][self.steps], "picture": [np.asarray(record.image)],
                    "without": found.get("without", ())}
        for name, images in pictures.items():
            if len(images):
                self.arrays[name] = np.stack([resized(image, side) for image in images])
        self._latents()
        self._attention(heads)
        self._blocks()
        self._words()

    def _facts(self):
        record, found = self.record, self.record.arrays
        alpha_bar = found["alpha_bar"][self.steps].astype(float)
        readers = readers_of(record)
        panels, parts = places(record.sampler, bool(readers))
        return {
            "prompt": title(record.prompt), "guidance_scale": record.guidance_scale,
            "about": about(record),
            "steps": [int(step) + 1 for step in self.steps],
            "of_steps": len(found["timesteps"]),
            "timesteps": [float(t) for t in found["timesteps"][self.steps]],
            "alpha_bar": alpha_bar.tolist(), "readers": readers,
            "prediction_type": record.prediction_type, "gradient_area": record.gradient_area,
            "panels": panels, "nodes": parts,
            "check": {name: np.asarray(value).tolist() for name, value in record.check.items()}
            if record.check else None,
            "left_out": [*record.left_out], "merged": self.merged,
        }

    def _latents(self):
        """x_t and the two predictions in float32; the page computes x_start, noise and guidance."""
        found = {name: self.record.arrays[name][self.steps]
                 for name in ("x_t", "uncond", "cond", "model_output", "x_start")
                 if name in self.record.arrays}
        self.facts["linear"] = [linear(*arrays) for arrays in
                                zip(found["x_t"], found["model_output"], found["x_start"])]
        exact = max(error for *_, error in self.facts["linear"]) < EXACT
        for name in ("x_t", "uncond", "cond", *([] if exact else ["x_start"])):
            if name in found:
                self.arrays[name] = self._shrunk("latents", found[name], LATENTS)
        self.facts["is_linear"] = exact
        if not exact:
            self.facts["left_out"].append("guidance by hand: this sampler clips x_start, so it is "
                                          "no linear function of the predictions")
        start = self._shrunk("latents", found["x_start"], LATENTS)
        if (weight := decoder(start, self.arrays["images"])) is not None:
            self.arrays["decoder"] = weight

    def _attention(self, heads):
        """Weights by layer: those of a word's tokens are added, and those of all padding."""
        added = np.zeros((len(self.record.tokens), len(self.facts["readers"])), np.float32)
        for i, reader in enumerate(self.facts["readers"]):
            added[reader["tokens"], i] = 1
        self.facts["layers"] = []
        for name, weights in family(self.record.arrays, "attention/"):
            weights = weights[self.steps] @ added                   # (S,heads,h,w,readers)
            if not heads:
                weights = weights.mean(axis=1, keepdims=True)
            weights = self._shrunk("attention", weights, MAP)
            self.arrays[f"attention/{name}"] = quantise(weights, np.uint8)
            self.facts["layers"].append(name)
        if self.facts["layers"]:
            self.merged.append("the attention to a word's tokens is added up, and so is that to "
                               "all padding")
            if not heads:
                self.merged.append("the attention is averaged over the heads")

    def _blocks(self):
        """Of each block: three principal components, and per step mean, std, gradient's size."""
        found = self.record.arrays
        self.facts["blocks"] = []
        for i, own in enumerate(self.record.blocks):
            name, x = own.name, np.asarray(found[f"activation/{own.name}"][self.steps], np.float32)
            block = {"name": name, "kind": own.kind, "shape": [int(n) for n in own.shape],
                     "place": {"name": own.kind, "file": own.file, "line": own.line},
                     "mean": rounded(found["activation_mean"][self.steps, i]),
                     "std": rounded(found["activation_std"][self.steps, i])}
            self.arrays[f"activation/{name}"] = quantise(
                components(self._shrunk("activations", x, MAP)), np.int8)
            if (gradient := found.get(f"gradient/{name}")) is not None:
                size = np.linalg.norm(np.asarray(gradient, np.float32), axis=-1)[..., None]
                block["gradient"] = rounded(np.sqrt((size ** 2).sum(axis=(1, 2, 3))))
                self.arrays[f"gradient/{name}"] = quantise(
                    self._shrunk("gradients", size, MAP), np.uint8)
            self.facts["blocks"].append(block)
        if self.facts["blocks"]:
            self.merged.append("of a block's channels, three principal components are kept")
            add_reads(self.facts["blocks"])
        self.facts["gradient_steps"] = [int(step) + 1 for step in found.get("gradient_steps", ())]

    def _words(self):
        """What a word does: gradients, boxes, shares."""
        record, found = self.record, self.record.arrays
        if "context" in found:
            rows = [found["context"][reader["tokens"]].mean(axis=0)
                    for reader in self.facts["readers"]]
            self.arrays["context"] = quantise(np.stack(rows), np.int8)              # (readers,D)
        for name in ("word_gradient", "embedding_gradient"):
            if name in found:                           # the norm over all tokens of a reader
                norms = [np.sqrt((found[name][:, reader["tokens"]] ** 2).sum(axis=1))
                         for reader in self.facts["readers"]]
                self.arrays[name] = quantise(np.stack(norms, -1), np.uint8)     # (G,8,8,readers)
        self.facts["boxes"] = []
        for box in record.boxes:
            mask = np.asarray(box.mask, bool)
            self.facts["boxes"].append({"what": box.what, "words": [int(i) for i in box.words],
                                        "edges": edges(mask), "area": float(mask.mean())})
        for name in ("attention_share", "gradient_share"):
            if name in found and record.boxes:
                self.facts[name] = [rounded(row) for row in found[name]]

    def _shrunk(self, what, array, side):
        """(S,…,h,w,c) -> the same with means over squares of cells, so that no side is longer."""
        times = -(-max(array.shape[-3:-1]) // side)
        if times == 1:
            return np.asarray(array, np.float32)
        said = f"{what} of large maps are averaged to at most {side} cells a side"
        if said not in self.merged:
            self.merged.append(said)
        h, w = (n // times for n in array.shape[-3:-1])
        cut = np.asarray(array[..., :h * times, :w * times, :], np.float32)
        return cut.reshape(*array.shape[:-3], h, times, w, times, -1).mean(axis=(-4, -2))


# ---- parts ------------------------------------------------------------------------------------

def spread(total, most):
    """Up to `most` of the numbers below `total`, evenly spread, the first and the last of them."""
    return np.unique(np.linspace(0, total - 1, min(total, most)).round().astype(int))


def title(prompt):
    """A prompt, as text or as the number of a class, or what stands in its place."""
    return prompt or "without a prompt" if isinstance(prompt, str) else f"class {prompt}"


def about(record):
    guidance = record.guidance_scale
    return (f"{record.described}, seed {record.seed}, {len(record.arrays['timesteps'])} steps of "
            f"{record.sampler}" + ("" if guidance is None else f", guidance scale {guidance:g}"))


def add_reads(blocks):
    """Add to each block of a UNet what it reads: the block before it, and on the way up a skip.

    A skip is the output of conv_in, of each layer of the way down, and of its downsampler.
    """
    skips = []
    for before, block, after in zip([None, *blocks], blocks, [*blocks[1:], None]):
        name = block["name"]
        block["reads"] = [before["name"] if before else "x_t"]
        if name.startswith("up_blocks") and ".resnets." in name and skips:
            block["reads"].append(skips.pop())
        layer_goes_on = after and ".resnets." in name and ".attentions." in after["name"]
        if name.startswith(("conv_in", "down_blocks")) and not layer_goes_on:
            skips.append(name)


def readers_of(record):
    """What attention is shown for: {text, kind, tokens, word}, in the order of the prompt.

    kind: word, start, end, padding, or other for a token that belongs to none of them.
    word: the index of a word in the record's arrays.
    """
    readers = [{"text": word.text, "kind": "word", "tokens": [*word.tokens], "word": i}
               for i, word in enumerate(record.words)]
    words = {token for reader in readers for token in reader["tokens"]}
    end = max(words, default=0) + 1
    others = [token for token in range(1, end) if token not in words]
    readers += [{"text": record.tokens[token], "kind": "other", "tokens": [token]}
                for token in others]
    readers.sort(key=lambda reader: reader["tokens"])
    readers.insert(0, {"text": "start", "kind": "start", "tokens": [0]})
    readers.append({"text": "end", "kind": "end", "tokens": [end]})
    readers.append({"text": "padding", "kind": "padding",
                    "tokens": [*range(end + 1, len(record.tokens))]})
    return [reader for reader in readers if reader["tokens"] and max(reader["tokens"])
            < len(record.tokens)]


def linear(x_t, model_output, x_start):
    """(a, b, largest error) of x_start = a x_t + b model_output, which holds for every kind of
    prediction: noise, v or x_start itself."""
    both = np.stack([x_t.ravel(), model_output.ravel()], 1).astype(float)
    (a, b), *_ = np.linalg.lstsq(both, x_start.ravel().astype(float), rcond=None)
    return [float(a), float(b), float(abs(both @ (a, b) - x_start.ravel()).max())]


def decoder(x_start, images):
    """The best linear decoder, by least squares: 3 x 3 cells of latents -> the pixels of the middle
    one.

    x_start (S,h,w,C), images (S,f h,f w,3) uint8 -> (9 C + 1, f f 3), the last row is the bias.
    None where a cell is no whole number of pixels. It is fitted to the second half of the steps:
    before, x_start is far from what the VAE was trained on, and colours are cut off at 0 and 255.
    """
    S, h, w, _ = x_start.shape
    f = images.shape[1] // h
    if images.shape[1:3] != (f * h, f * w):
        return None
    x, y = (array[S // 2:].astype(float) for array in (x_start, images))
    around = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
    parts = [around[:, i:i + h, j:j + w] for i in range(3) for j in range(3)]
    rows = with_ones(np.concatenate(parts, axis=-1))
    rows = rows.reshape(-1, rows.shape[-1])                             # (S h w, 9 C + 1)
    pixels = y.reshape(-1, h, f, w, f, 3).swapaxes(2, 3).reshape(len(rows), -1)
    square = rows.T @ rows
    square += 1e-4 * np.trace(square) / len(square) * np.eye(len(square))   # few steps, many rows
    return np.linalg.solve(square, rows.T @ pixels).astype(np.float32)


def components(x):
    """(S,h,w,c) -> (S,h,w,3), the first three principal components over all steps and cells."""
    rows = x.reshape(-1, x.shape[-1]).astype(float)
    rows = rows - rows.mean(axis=0)
    _, vectors = np.linalg.eigh(rows.T @ rows)
    vectors = vectors[:, ::-1][:, :COMPONENTS]
    # The sign of a component is arbitrary: its largest weight is positive here.
    vectors = vectors * np.sign(vectors[abs(vectors).argmax(axis=0), range(vectors.shape[1])])
    found = (rows @ vectors).reshape(*x.shape[:3], -1)
    return np.pad(found, [(0, 0)] * 3 + [(0, COMPONENTS - found.shape[-1])])


def quantise(array, dtype):
    """Array -> (integers, scale (last axis,)): array = integers * scale, within half a scale."""
    largest = np.iinfo(dtype).max
    scale = abs(array).max(axis=tuple(range(array.ndim - 1))) / largest
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    return (array / scale).round().clip(-largest, largest).astype(dtype), scale


def edges(mask):
    """(H,W) bool -> [left, top, right, bottom] of what is true, as shares of the sides."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return [0, 0, 0, 0]
    height, width = mask.shape
    return [float(columns[0] / width), float(rows[0] / height),
            float((columns[-1] + 1) / width), float((rows[-1] + 1) / height)]


def family(arrays, prefix):
    """The arrays whose names begin with prefix -> (rest of the name, array)."""
    return [(name.removeprefix(prefix), array) for name, array in arrays.items()
            if name.startswith(prefix)]


def rounded(values):
    return [float(f"{value:.4g}") for value in np.asarray(values, float)]


def resized(image, side):
    """(H,W,3) uint8 -> the same, with no longer sides."""
    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.BOX)
    return np.asarray(picture)


# ---- into the file ----------------------------------------------------------------------------

def pack(arrays):
    """{name: array or (integers, scale)} -> {name: where it lies}, base64 of the gzipped bytes."""
    where, parts, offset = {}, [], 0
    for name, array in arrays.items():
        array, scale = array if isinstance(array, tuple) else (array, None)
        where[name] = {"dtype": array.dtype.name, "shape": array.shape, "offset": offset}
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        if array.itemsize == 1:
            # Steps differ little from one to the next: their differences, modulo 256, need half
            # the space.
            start = np.zeros_like(array[:1], np.uint8)
            array = np.diff(array.view(np.uint8), axis=0, prepend=start)
        if scale is not None:
            where[name]["scale"] = [float(value) for value in scale]
        padding = -array.nbytes % 4                 # a Float32Array begins at a multiple of 4
        parts += [array.tobytes(), bytes(padding)]
        offset += array.nbytes + padding
    packed = gzip.compress(b"".join(parts), 6, mtime=0)
    return where, base64.b64encode(packed).decode()


def strip(record):
    """A few of the predicted pictures side by side -> a PIL image."""
    chosen = spread(len(record.arrays["images"]), STRIP)
    return grid([Image.fromarray(resized(record.arrays["images"][i], STRIP_SIDE)) for i in chosen],
                len(chosen), 2)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
