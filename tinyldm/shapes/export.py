"""Stage 4: write the averaged weights as a folder in the public diffusers layout; and back.

`tinyldm.load(folder)`, diffusers, and every other program that reads such folders load it.
"""
import numpy as np

from ..checkpoints import load_model, write_pipeline
from ..errors import TinyldmError, note
from ..files import new_folder, read_json, write_json
from ..training.optim import AdamW, load_ema
from ..training.report import averages, new_figure, save_figure
from ..training.state import read_npz, write_npz
from .autoencoder import decoder_parameters, load_vae, trained
from .configs import GUIDANCE, LATENT_CHANNELS, OPTIMIZER, SCHEDULER, STEPS
from .denoiser import build, make_pool, named_parameters
from .vocabulary import LANGUAGE, write_tokenizer
from .widen import widen

STAGES = ("vae", "unet", "decoder")


def export(run, output):
    """Write the run's averaged weights, float16, and all configs into the folder `output`.

    It appears when it is complete. A pipeline that lies there is replaced as a whole; files of
    other names, such as a README, are kept.
    Raises TinyldmError where a stage has not been run, and where something else lies there.
    """
    for stage in ("vae", "unet"):
        trained(run, stage)
    with new_folder(output, marker="model_index.json") as folder:
        pool = make_pool(run)
        vae = load_vae(run, round(float(pool["scaling_factor"]), 6))
        text_encoder, unet = build(pool)
        load_ema(run / "unet.npz", named_parameters(text_encoder, unet))
        write_pipeline(folder, "StableDiffusionPipeline",
                       {"vae": vae, "text_encoder": text_encoder, "unet": unet},
                       {"tokenizer": write_tokenizer}, {"scheduler": SCHEDULER},
                       {"_num_inference_steps": STEPS, "_guidance_scale": GUIDANCE,
                        "_language": LANGUAGE, "requires_safety_checker": False}, np.float16)
        record = {stage: _history(run / f"{stage}.npz") for stage in STAGES
                  if (run / f"{stage}.npz").exists()}
        write_json(folder / "training.json", record, indent=None)
        plot_losses(record, folder / "loss.png")


def restore(weights, run):
    """Turn a folder that `export` wrote back into the state of a training, to continue it.

    The averaged weights become the trained ones. The optimiser's averages begin anew, with a
    warm-up. Models with fewer than LATENT_CHANNELS are widened, and their steps count from 0.
    Raises TinyldmError where `run` holds a training already, or anything else.
    """
    if any((run / f"{stage}.npz").exists() for stage in STAGES):
        raise TinyldmError(f"{run} holds a training already: name another folder with --run")
    record = _read_record(weights / "training.json")
    vae, text_encoder, unet = (load_model(weights / part)
                               for part in ("vae", "text_encoder", "unet"))
    if vae.settings.latent_channels < LATENT_CHANNELS:
        vae, unet = (widen(model, LATENT_CHANNELS) for model in (vae, unet))
        record = {stage: {"steps": 0, "loss": []} for stage in ("vae", "unet")}
    parameters = {"vae": vae.named_parameters(), "decoder": decoder_parameters(vae),
                  "unet": named_parameters(text_encoder, unet)}
    with new_folder(run) as folder:
        for stage in record:
            write_npz(folder / f"{stage}.npz", history=record[stage]["loss"],
                      begun=record[stage]["steps"], **AdamW(parameters[stage], **OPTIMIZER).state())


def _read_record(path):
    """{stage: {"steps": their number, "loss": its points}} of a file that `export` wrote."""
    record = read_json(path)
    for stage in ("vae", "unet", *record):
        try:
            steps, loss = record[stage]["steps"], np.asarray(record[stage]["loss"], np.float64)
            good = stage in STAGES and isinstance(steps, int) and steps >= 0
            good = good and (not loss.size or loss.shape[1:] == (2,)) and np.isfinite(loss).all()
        except (KeyError, TypeError, ValueError):
            good = False
        if not good:
            raise TinyldmError(f"{path} does not tell the steps and losses of stage {stage!r}: "
                               "--weights names a folder that export wrote")
    return record


def _history(path):
    """The number of a stage's steps, and its loss as about 100 points [step, mean loss]."""
    state = read_npz(path, {"history": (None, 2), "begun": (), "steps": ()})
    history, steps = state["history"], int(state["begun"] + state["steps"])
    loss = [[round(step), round(value, 5)] for step, value in averages(history).tolist()]
    return {"steps": steps, "loss": loss}


def plot_losses(record, path):
    """Plot the loss of every stage over its steps into a picture file, if matplotlib is there."""
    try:
        figure = new_figure(9, 3)
    except TinyldmError as error:
        note(f"{path.name} is left out: {error}")
        return
    for axes, (stage, values) in zip(figure.subplots(1, len(record)), record.items()):
        axes.plot(*zip(*values["loss"]))
        axes.set(xlabel="step", ylabel="loss", title=stage, yscale="log")
    save_figure(figure, path)
