"""Where in the code the page's panels and parts stand: found when a page is made.

page.py -> places(sampler, reads_text)
"""
import inspect

from ..diffusion.guidance import classifier_free
from ..diffusion.objective import to_x_start_and_noise
from ..diffusion.samplers import SAMPLERS
from ..diffusion.samplers.shared import State
from ..images import to_pil
from ..models.blocks import Attention
from ..models.clip import CLIPTextTransformer
from ..models.unet import UNet2DConditionModel
from ..models.vae import AutoencoderKL
from ..noise import randn
from ..ops import attention, attention_backward
from ..pipelines.predictor import Predictor
from ..pipelines.stable_diffusion import StableDiffusion
from ..text.tokenizer import Tokenizer

PANELS = {
    "machine": [StableDiffusion.states, Predictor.__call__],
    "trajectory": [to_x_start_and_noise],
    "words": [Tokenizer.__call__, CLIPTextTransformer.forward, attention],
    "meaning": [Attention.backward, UNet2DConditionModel.backward],
    "unet": [UNet2DConditionModel.forward, UNet2DConditionModel.backward],
    "guidance": [classifier_free],
    "gradient": [attention_backward],
}
ANY_MODEL = {"trajectory", "gradient", "noise", "x_t", "x_start", "sampler", "picture"}


def places(sampler, reads_text):
    """Where the code of the panels and of the machine's parts is.

    -> {panel: [place]}, {part: place}, with place = {"name", "file", "line"}.

    reads_text: whether the model is one of Stable Diffusion's; of others only what all share.
    """
    panels = {panel: [place(thing) for thing in things] for panel, things in PANELS.items()}
    parts = {part: place(thing) for part, thing in _parts(sampler).items()}
    return tuple({name: own for name, own in found.items() if reads_text or name in ANY_MODEL}
                 for found in (panels, parts))


def _parts(sampler):
    return {"prompt": Tokenizer.__call__, "encoder": CLIPTextTransformer.forward, "noise": randn,
            "x_t": State, "picture": to_pil,
            "unet": UNet2DConditionModel.forward, "predictions": Predictor.__call__,
            "guidance": classifier_free, "x_start": to_x_start_and_noise,
            "sampler": SAMPLERS[sampler], "decoder": AutoencoderKL.decode}


def place(thing):
    """A function or class -> {"name", "file", "line"}, the file as the repository has it."""
    thing = inspect.unwrap(thing)
    lines, line = inspect.getsourcelines(thing)
    line += next(i for i, text in enumerate(lines) if not text.lstrip().startswith("@"))
    file = thing.__module__.replace(".", "/") + ".py"
    return {"name": thing.__qualname__, "file": file, "line": line}
