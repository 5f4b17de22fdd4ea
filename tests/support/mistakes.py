"""Mistakes in calls from Python, and the TinyldmError that each raises, also with python -O.

    python -O -m tests.support.mistakes         # prints the mistakes with another answer
"""
import re
import warnings
from pathlib import Path

import numpy as np

import tinyldm

PROMPT = "a big red star on a blue background"
ARRAY = "latents must be an array of numbers, not a "
SHAPE = r"latents must have the shape \(images, height, width, 8\), not "
IMAGES = r"images must have the shape \(images, height, width, 3\), with sides .* multiples of 4, "
A_PATH = r"must be a path, a str or a pathlib.Path, not "

# what -> (expression, what is said); `pipe` is the bundled model, `draw` one step of it
MISTAKES = {
    "no latents": ("pipe.decode([])", SHAPE + r"\(0,\)"),
    "latents of no picture": ("pipe.decode(np.zeros((0, 8, 8, 8)))", SHAPE + r"\(0, 8, 8, 8\)"),
    "latents None": ("pipe.decode(None)", "latents must"),
    "latents are text": ("pipe.decode('x')", ARRAY + "str"),
    "one picture's latents": ("pipe.decode(np.zeros((8, 8, 4)))", SHAPE + r"\(8, 8, 4\)"),
    "channels come first": ("pipe.decode(np.zeros((1, 8, 16, 16)))", SHAPE + r"\(1, 8, 16, 16\)"),
    "latents of NaN": ("pipe.decode(np.full((1, 4, 4, 8), np.nan))", "decoded to NaN"),
    "complex latents": ("pipe.decode(np.zeros((1, 4, 4, 8), complex))", ARRAY + "ndarray"),
    "latents for a drawing are text": ("draw(latents='x')", ARRAY + "str"),
    "ragged latents": ("draw(latents=[[1], [2, 3]])", ARRAY + "list"),
    "latents are a dict": ("draw(latents={1: 2})", ARRAY + "dict"),
    "latents of another shape": ("draw(latents=np.zeros((1, 4, 16, 16)))", "latents must be fin"),
    "images come first": ("pipe.encode(np.zeros((1, 3, 64, 64)), np.zeros((1, 16, 16, 8)))",
                          IMAGES + r"not \(1, 3, 64, 64\)"),
    "no images": ("pipe.encode([], [])", IMAGES + r"not \(0,\)"),
    "an odd side": ("pipe.encode(np.zeros((1, 63, 64, 3)), np.zeros((1, 16, 16, 8)))", IMAGES),
    "noise comes first": ("pipe.encode(np.zeros((1, 64, 64, 3)), np.zeros((1, 8, 16, 16)))",
                          r"noise must have the shape \(images, 16, 16, 8\) for these images"),
    "no pixels": ("tinyldm.to_pil('x')", "images must be an array of numbers .* not a str"),
    "pixels of NaN": ("tinyldm.to_pil(np.full((1, 2, 2, 3), np.nan))", "not NaN in "),
    "pixels come first": ("tinyldm.to_pil(np.zeros((1, 3, 8, 8)))", r"3\), not \(1, 3, 8, 8\)"),
    "a list of no pictures": ("tinyldm.to_pil([])", "images must be numbers from -1 to 1 of"),
    "save to None": ("tinyldm.save(pipe, None)", "the folder " + A_PATH + "None"),
    "save to a number": ("tinyldm.save(pipe, 3)", "the folder " + A_PATH + "3"),
    "save to nothing": ("tinyldm.save(pipe, '')", "the folder must be a path, but '' is empty"),
    "save to a NUL": (r"tinyldm.save(pipe, 'a\0b')", "the folder must be a path, .* holds a NUL"),
    "save to half a pair": (r"tinyldm.save(pipe, 'a\ud800')", "the folder " + A_PATH),
    "save no pipeline": ("tinyldm.save('folder', pipe)", "the folder " + A_PATH),
    "save nothing": ("tinyldm.save(None, folder)", "a pipeline and then a folder, not a NoneType"),
    "no model": ("tinyldm.load_model(None)", "a model " + A_PATH + "None"),
    "a model of a NUL": (r"tinyldm.load_model('a\0')", "holds a NUL"),
    "a LoRA None": ("pipe.load_lora(None)", "None"),
    "a LoRA of a NUL": (r"pipe.load_lora('a\0')", "NUL"),
    "a word of a NUL": (r"pipe.load_textual_inversion('a\0')", "NUL"),
    "a UNet that is a number": ("setattr(pipe, 'unet', 3)", "the UNet must be a model or a fun"),
    "a shape of text": ("tinyldm.noise.randn('x', 1)", "a shape is a tuple of whole numbers"),
    "a shape below 0": ("tinyldm.noise.randn((2, -1), 1)", r"numbers from 0, not \(2, -1\)"),
    "a shape of a fraction": ("tinyldm.noise.randn((2.5,), 1)", r"numbers from 0, not \(2.5,\)"),
    "no shape": ("tinyldm.noise.randn(None, 1)", "numbers from 0, not None"),
    "a seed of text": ("draw(seed='x')", "seed"),
    "no sampler of that name": ("draw(sampler='foo')", "sampler"),
    "half a step": ("pipe(PROMPT, num_inference_steps=2.5)", "steps"),
    "a strength alone": ("draw(strength=0.5)", "needs an image"),
    "an image that is a path": ("draw(image='in.png')", "image must be a PIL image, not a str"),
    "guidance that is text": ("draw(guidance_scale='7')", "guidance_scale must be a finite number"),
    "parameters that are a path": ("pipe.unet.load_state_dict('x')", "expects a dict of arrays"),
    "parameters that lack": ("pipe.unet.load_state_dict({})", "missing: .* conv_in.weight"),
}


def said(expression, pipe, folder):
    """What the TinyldmError of an expression says; anything else it does is the answer's repr."""
    names = {"pipe": pipe, "np": np, "tinyldm": tinyldm, "PROMPT": PROMPT, "folder": folder,
             "draw": lambda **options: pipe(PROMPT, num_inference_steps=1, **options)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return f"nothing: {eval(expression, names)!r:.99}"
    except tinyldm.TinyldmError as error:
        return str(error)
    except Exception as error:
        return f"not by a TinyldmError: {error!r}"


def main():
    pipe, folder = tinyldm.load(), Path("never written")
    assert False, "this runs without asserts"  # noqa: B011
    for name, (expression, expected) in MISTAKES.items():
        answer = said(expression, pipe, folder)
        if not re.search(expected, answer):
            print(f"{name}: {answer}")
    assert not folder.exists()


if __name__ == "__main__":
    main()
