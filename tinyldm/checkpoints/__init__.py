"""Weight files <-> models: the only place that handles file formats, public names and layouts.

    folders.py      a whole pipeline, read from a folder or a file: by path, hub name, or bundled
    saving.py       a whole pipeline, written as a folder
    components.py   one component's folder (config.json and weights) <-> one model, strictly
    layout.py       the names and axes of weights in public files, and in the models
    places.py       what people call weights (a path, a hub name, a URL) -> the local path
    hub.py          downloads from the Hugging Face hub
    formats/        tensors in files: safetensors, torch files, pickles read as data
    single_file/    files in the original layout: which model they hold, and their names
    addons/         LoRAs and textual inversions, small files that change a loaded model
"""
from .addons.lora import merge_lora
from .addons.textual_inversion import add_word
from .addons.writing import write_embedding, write_lora
from .components import float_type, load_model, load_weights, save_model
from .folders import load_pipeline_parts
from .formats.reading import read_tensors
from .formats.safetensors_file import read_safetensors, write_safetensors
from .places import kind_of, resolve, resolve_addon, resolve_vae
from .saving import save, write_pipeline
from .single_file.statements import check_prediction_type
