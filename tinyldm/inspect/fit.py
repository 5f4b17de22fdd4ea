"""Lines on what a single file says of itself, and on how the tensors of a file fit its models."""
from ..checkpoints.folders import fit_file, lacking
from ..checkpoints.formats.safetensors_file import read_metadata
from ..checkpoints.layout import fitted, ignored
from ..checkpoints.single_file.alone import LABELS, one_component
from ..checkpoints.single_file.kinds import SINGLE_FILE, layout_of, recognise
from ..checkpoints.single_file.names import EMA_WORD
from ..checkpoints.single_file.statements import read_statements
from ..errors import TinyldmError, shorten
from ..layers import misfits

# of modelspec.*
HEADER = ("title", "architecture", "resolution", "encoder_layer", "trigger_phrase")


def describe_fit(path, stored):
    """Lines on a file with {name: StoredTensor}; none for a file that is no part of a pipeline."""
    content = layout_of(stored)[1]
    try:
        if content == SINGLE_FILE:
            return describe_single_file(path, stored)
        if content in ("UNet", "VAE", "text encoder", "DiT"):
            return describe_alone(path, stored)
    except TinyldmError as error:
        return [f"  not read: {error}"] if content == SINGLE_FILE else []
    return []


def describe_single_file(path, stored):
    """What it predicts, what it lacks, what does not fit. Raises TinyldmError if it is unknown."""
    said = read_statements(stored, path)
    kind = recognise(stored, path, said.prediction_type)
    models, parameters, tensors = fit_file(stored, kind, said)
    usual = kind.scheduler.get("prediction_type", "epsilon")
    predicts = [f"{what} ({who})" for what, who in said.predictions + said.unknown] or [
        f"{usual} (the file does not say it)"]
    lines = [f"  the model predicts: {', '.join(predicts)}"]
    if said.zero_terminal_snr:
        lines.append("  schedule: zero terminal SNR")
    if said.few_steps:
        lines.append(f"  few steps: its name or title says {', '.join(said.few_steps)}")
    if any(EMA_WORD.search(name) for name in stored):
        lines.append("  averaged weights: --ema takes those of the UNet")
    absent = lacking(models, tensors)
    lines += [f"  lacks: {LABELS[part]}{', which --vae names' * (part == 'vae')}"
              for part in absent]
    wanted = {name: parameter for name, parameter in parameters.items()
              if name.partition(".")[0] not in absent}
    return [*describe_header(path), *lines, *lists(wanted, tensors, stored)]


def describe_alone(path, stored):
    """What does not fit the one component. Raises TinyldmError if it is unknown."""
    alone = one_component(stored, path)
    parameters = dict(alone.model(alone.config).named_parameters())
    uses = {"AutoencoderKL": "--vae puts it into a pipeline",
            "DiTTransformer2DModel": "--vae gives it a VAE to draw with"}
    use = uses.get(alone.model.__name__, "no config")
    return [*describe_header(path), f"  one component: {alone.model.__name__} ({use})",
            *lists(parameters, fitted(alone.tensors, parameters), stored)]


def describe_header(path):
    """What the metadata says of the model, in the words of its author."""
    metadata = read_metadata(path)
    return [f"  {key.replace('_', ' ')}: {metadata[f'modelspec.{key}']}"
            for key in HEADER if metadata.get(f"modelspec.{key}")]


def lists(parameters, tensors, stored):
    """Lines on how {name: tensor} fills {name: parameter}, and what of `stored` plays no part."""
    found = zip(("missing", "unexpected", "wrong shape"), misfits(parameters, tensors))
    left_out = ignored(stored, tensors.values())
    return [*(f"  {what}: {shorten(names)}" for what, names in found),
            *([f"  left out, as it is no weight: {shorten(left_out)}"] if left_out else [])]
