"""For tests of the x-ray's page: a Record of random arrays with the shapes of the real one, and
what a page holds."""
import base64
import gzip
import json
import re
from types import SimpleNamespace

import numpy as np
from PIL import Image

WORDS = ("a", "big", "red", "star", "on", "a", "blue", "background")
LAYERS = {"down_blocks.0": 16, "down_blocks.1": 8, "mid_block": 4, "up_blocks.2": 16}
BLOCKS = {"conv_in": (16, 12), "down_blocks.0": (8, 12), "down_blocks.1": (4, 16),
          "mid_block": (4, 16), "up_blocks.0": (8, 16), "up_blocks.1": (16, 12),
          "conv_norm_out": (16, 12), "conv_out": (16, 4)}
STEPS, CHANNELS, HEADS = 5, 4, 2


def stand_in(words=WORDS, steps=STEPS, layers=LAYERS, blocks=BLOCKS, side=16, heads=HEADS, seed=0):
    """A Record whose latents obey the real equations and whose other arrays are random."""
    random = np.random.default_rng(seed)

    def normal(*shape):
        return random.standard_normal(shape, np.float32)

    alpha_bar = np.linspace(0.05, 0.99, steps).astype(np.float32)
    a, s = (x[:, None, None, None] for x in (np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)))
    x_t, uncond, cond = (normal(steps, side, side, CHANNELS) for _ in range(3))
    v = uncond + 6.5 * (cond - uncond)
    pixels = 4 * side
    arrays = {"timesteps": np.linspace(960, 0, steps).astype(np.int64), "alpha_bar": alpha_bar,
              "x_t": x_t, "uncond": uncond, "cond": cond, "model_output": v,
              "x_start": a * x_t - s * v, "noise": s * x_t + a * v,
              "images": random.integers(0, 256, (steps, pixels, pixels, 3), np.uint8),
              "context": normal(77, 8), "gradient_steps": np.array([0, steps - 1]),
              "word_gradient": abs(normal(2, 77, 8, 8)),
              "embedding_gradient": abs(normal(2, 77, 8, 8)),
              "without": random.integers(0, 256, (len(words), pixels, pixels, 3), np.uint8)}
    for block, size in layers.items():
        scores = np.exp(2 * normal(steps, heads, size, size, 77))
        arrays[f"attention/{block}.attentions.0.transformer_blocks.0.attn2"] = (
            scores / scores.sum(axis=-1, keepdims=True))
    for block, (size, channels) in blocks.items():
        arrays[f"activation/{block}"] = normal(steps, size, size, channels)
        arrays[f"gradient/{block}"] = normal(2, size, size, channels)
    for name, function in ("mean", np.mean), ("std", np.std):
        arrays[f"activation_{name}"] = np.stack(
            [function(arrays[f"activation/{block}"], axis=(1, 2, 3)) for block in blocks], axis=1)
    star = np.zeros((pixels, pixels), bool)
    star[pixels // 4:pixels // 2, pixels // 4:pixels // 2] = True
    shares = random.random((2, len(words), 2), np.float32)
    arrays |= {"attention_share": shares[0], "gradient_share": shares[1]}
    tokens = ["<start>", *words, *["<end>"] * (76 - len(words))]
    return SimpleNamespace(
        prompt=" ".join(words), seed=3, sampler="ddim", guidance_scale=6.5, tokens=tokens,
        prediction_type="v_prediction", described="Stable Diffusion", gradient_area="the star",
        blocks=[SimpleNamespace(name=block, kind="ResnetBlock2D", shape=(size, size, channels),
                                file="tinyldm/models/blocks.py", line=1)
                for block, (size, channels) in blocks.items()],
        words=[SimpleNamespace(text=word, tokens=range(i + 1, i + 2))
               for i, word in enumerate(words)],
        image=Image.fromarray(arrays["images"][-1]), left_out=[], arrays=arrays,
        boxes=[SimpleNamespace(what="the star", words=[1, 2, 3], mask=star),
               SimpleNamespace(what="the ground", words=[6, 7], mask=~star)],
        colours={"weight": normal(CHANNELS, 3), "bias": normal(3)},
        check={"claimed": 0.12345, "measured": 0.12346, "step": 1e-3})


def copied(record, **changes):
    return type(record)(**vars(record) | changes)


def facts_of(text):
    """The page -> the dict that page.js reads first."""
    return json.loads(re.search(r'<script id="facts"[^>]*>(.*?)</script>', text, re.S)[1])


def unpack(text):
    """The page -> {name: array in float32}, as page.js reads it."""
    packed = re.search(r'<script id="packed"[^>]*>(.*?)</script>', text, re.S)[1]
    data = gzip.decompress(base64.b64decode(packed))
    arrays = {}
    for name, where in facts_of(text)["arrays"].items():
        count = int(np.prod(where["shape"]))
        array = np.frombuffer(data, where["dtype"], count, where["offset"]).reshape(where["shape"])
        if array.itemsize == 1:
            array = np.cumsum(array, axis=0, dtype=array.dtype)
        arrays[name] = array * np.asarray(where.get("scale", 1), np.float32)
    return arrays
