"""Weight files in and out: the one place that knows formats, public names and file layouts.

    stored.py             a tensor in a file, not read yet
    safetensors_file.py   one file of tensors, read lazily and written atomically
    torch_file.py         one file as torch.save writes it, read lazily by unpickle.py
    unpickle.py           a pickle read as data: nothing in it is executed
    reading.py            a file of either kind
    layout.py             what a file calls and how it orders a weight, against what a model does
    components.py         one component folder (config.json and weights) <-> one model, strictly
    ldm.py                the original names, of single files, against the public ones
    kinds.py              what a file of weights is, and the configs of a single file's model
    hub.py                what is needed of the Hugging Face hub, and its download
    folders.py            a whole pipeline: a folder or a file, by path, hub name, or bundled
    saving.py             a whole pipeline written as a folder
    lora.py               a small file that changes a loaded model's weights
    embedding.py          a small file that teaches a loaded model a word
"""
from .addons.lora import merge_lora
from .addons.textual_inversion import add_word
from .components import float_type, load_model, load_weights, save_model
from .folders import load_pipeline_parts, resolve
from .formats.reading import read_tensors
from .formats.safetensors_file import read_safetensors, write_safetensors
from .saving import save, write_pipeline

__all__ = ["add_word", "float_type", "load_model", "load_pipeline_parts", "load_weights",
           "merge_lora", "read_safetensors", "read_tensors", "resolve", "save", "save_model",
           "write_pipeline", "write_safetensors"]
