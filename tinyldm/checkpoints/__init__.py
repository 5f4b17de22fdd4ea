"""Weight files in and out: the one place that knows formats, public names and file layouts.

    safetensors_file.py   one file of tensors, read lazily and written atomically
    layout.py             what a file calls and how it orders a weight, against what a model does
    components.py         one component folder (config.json and weights) <-> one model, strictly
    folders.py            a whole pipeline folder, by path, hub name, or the bundled one
"""
from .components import load_model, load_weights, save_model
from .folders import load_pipeline_parts, resolve
from .safetensors_file import read_safetensors, write_safetensors

__all__ = ["load_model", "load_pipeline_parts", "load_weights", "read_safetensors", "resolve",
           "save_model", "write_safetensors"]
