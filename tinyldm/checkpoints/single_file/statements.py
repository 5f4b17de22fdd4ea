"""What a single file says of itself: marks among its tensors, and the metadata in its header.

A model that predicts v has the weights' names and shapes of one that predicts the noise. So the
file must say which it is, and there are several habits:

    v_pred, ztsnr                   empty tensors: it predicts v, with zero terminal SNR
    modelspec.prediction_type       v or epsilon; ComfyUI writes modelspec.predict_key
    modelspec.architecture          stable-diffusion-v2-768-v predicts v
    ss_v_parameterization, ss_zero_terminal_snr     kohya's; true or false
    scale_factor                    a number: the VAE's scaling_factor, measured by the training

Source: ComfyUI, comfy/supported_models.py and comfy_extras/nodes_model_merging.py;
https://github.com/Stability-AI/ModelSpec; kohya-ss/sd-scripts, library/sai_model_spec.py.
"""
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import TinyldmError, note
from ..formats.safetensors_file import read_metadata

PREDICTIONS = ("epsilon", "v_prediction", "sample")
WORDS = {"epsilon": "epsilon", "eps": "epsilon", "noise": "epsilon",
         "v": "v_prediction", "v_prediction": "v_prediction", "v-prediction": "v_prediction",
         "vpred": "v_prediction", "v_pred": "v_prediction", "velocity": "v_prediction",
         "sample": "sample", "x0": "sample", "true": "v_prediction", "false": "epsilon"}
NAMED_V = re.compile(r"v[-_ ]?(pred|param)", re.IGNORECASE)       # in a file's name
FEW_STEPS = re.compile(r"turbo|lightning|hyper|lcm|dmd2?|schnell", re.IGNORECASE)
HOW = "prediction_type= or --prediction-type decides otherwise"


class Statements(NamedTuple):
    """What a file says of itself."""

    predictions: list                                   # [(prediction type, who says so)]
    unknown: list                                       # the same, of words not in WORDS
    zero_terminal_snr: bool
    scale_factor: float | None
    few_steps: list                                     # words for models of few steps

    @property
    def prediction_type(self):
        """What the file says that the model predicts; None if it says nothing."""
        return self.predictions[0][0] if self.predictions else None


def read_statements(stored, path):
    """Statements of a file with {name: StoredTensor}. The most reliable one comes first."""
    metadata = read_metadata(path)
    marks = {name.rpartition(".")[2]: tensor for name, tensor in stored.items()}
    said = [("v", "its tensor v_pred")] if "v_pred" in marks else []
    said += [(metadata[key], f"{key} in its header") for key in (
        "modelspec.prediction_type", "modelspec.predict_key", "ss_v_parameterization")
        if metadata.get(key, "None") not in ("", "None")]
    architecture = metadata.get("modelspec.architecture", "")
    if match := re.fullmatch(r"stable-diffusion-v2-(512|768-v)", architecture):
        said.append(("v" if match[1] == "768-v" else "epsilon",
                     "modelspec.architecture in its header"))
    known = [(WORDS[word.lower()], who) for word, who in said if word.lower() in WORDS]
    scale = marks.get("scale_factor")
    return Statements(
        known, [(word, who) for word, who in said if word.lower() not in WORDS],
        "ztsnr" in marks or metadata.get("ss_zero_terminal_snr", "").lower() == "true",
        _scale(scale, path) if scale and scale.shape in ((), (1,)) else None,
        sorted({word.lower() for text in (Path(path).stem, metadata.get("modelspec.title", ""))
                for word in FEW_STEPS.findall(text)}))


def _scale(tensor, path):
    number = float(tensor.read(np.float32).item())
    if not 0 < number < 1e4:
        raise TinyldmError(f"{path}: its scale_factor, of the VAE, must be a number between 0 and "
                           f"10000, not {number:g}: use another file")
    return number


def check_prediction_type(asked):
    """Raise TinyldmError unless it is None or one of PREDICTIONS."""
    if asked is not None and asked not in PREDICTIONS:
        raise TinyldmError(f"prediction_type must be {', '.join(PREDICTIONS)} or None, "
                           f"not {asked!r}")


def told_scheduler(scheduler, statements, asked, path):
    """A kind's scheduler config with what the file says, or with what the user asked for."""
    said, scheduler = statements.prediction_type, dict(scheduler)
    usual = scheduler.get("prediction_type", "epsilon")
    kind = asked or said or usual
    scheduler["prediction_type"] = kind
    if statements.zero_terminal_snr and kind != "epsilon":
        scheduler["rescale_betas_zero_snr"] = True
    others = {f"{other} ({who})" for other, who in statements.predictions if other != kind}
    if asked and others:
        note(f"{path} says that the model predicts {', '.join(sorted(others))}: {asked} is used, "
             "as asked for")
    elif others:
        note(f"{path} contradicts itself: it says that the model predicts {said} "
             f"({statements.predictions[0][1]}) and {', '.join(sorted(others))}. {said} is used; "
             f"{HOW}")
    elif not asked and not said and statements.unknown:
        word, who = statements.unknown[0]
        note(f"{path} says that the model predicts {word!r} ({who}), which is unknown: {usual} is "
             f"used; {HOW}")
    elif not asked and not said and kind == "epsilon" and (
            statements.zero_terminal_snr or NAMED_V.search(Path(path).stem)):
        why = "its zero terminal SNR" if statements.zero_terminal_snr else "its name"
        note(f"{path} may predict v ({why} suggests so), but does not say it: {usual} is used; "
             f"{HOW}")
    return scheduler
