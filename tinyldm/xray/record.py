"""The record of one drawing: `tinyldm.xray(pipe, prompt)` -> Record, arrays by name.

The pipeline draws as always. A hook on the network keeps what it reads and predicts at every call,
hooks on its layers keep attention (attention.py) and activations (here). Then gradients of one
prediction (gradients.py) and what each word does (words.py) are computed.

    timesteps, alpha_bar        (S,), one for each call of the network
    x_t, uncond, cond, model_output, x_start, noise     (S,h,w,C); model_output is the guided one
    images                      (S,H,W,3) uint8, x_start decoded
    context                     (M,D), one vector per token
    attention/LAYER             (S,heads,h_l,w_l,M), softmax weights of the prompt's half
    activation/BLOCK            (S,h_l,w_l,c), the output for the prompt's half
    activation_mean, activation_std     (S,blocks), of the whole maps, in the order of `blocks`
    gradient/BLOCK, gradient_steps      see gradients.py
    word_gradient, attention_share, gradient_share, without     see words.py

Where a pipeline has less, the array is missing and a line of `left_out` says why.
"""
import inspect
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..backend import to_host
from ..diffusion.guidance import classifier_free
from ..diffusion.objective import to_x_start_and_noise
from ..diffusion.samplers.shared import sigmas_at
from ..errors import TinyldmError
from ..images import to_pil
from ..layers import forward_hooks, named_modules
from .attention import cross_attention_hooks, host_map
from .drawing import latents_size, one_picture, progress, read_prompt
from .gradients import Prediction, gradient_steps, record_gradients
from .words import area_of, find_boxes, pictures_without, record_shares

SMALL = 32 * 32         # positions of a map: what is larger is averaged, shortened or left out
# The parts of a network whose outputs are kept; an outer block's output is its last part's.
BLOCKS = re.compile(r"conv_in|(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.\w+\.\d+"
                    r"|transformer_blocks\.\d+|conv_norm_out|conv_out")
PACKAGE = Path(__file__).parents[1]


class Block(NamedTuple):
    """A part of the network: its name, class, the shape (h,w,c) of its output, where its code is.
    """

    name: str
    kind: str
    shape: tuple
    file: str           # from the repository's root, such as tinyldm/models/unet.py
    line: int           # of its forward


@dataclass
class Record:
    """What xray returns. record["x_t"] is record.arrays["x_t"]; see this file's docstring.

    tokens: the M texts of the prompt's tokens. words: [Word], with the range of each one's tokens.
    boxes: [words.Box], areas of the picture, for the bundled model's language. blocks: [Block], in
    the order of the forward. colours: {"weight" (C,3), "bias" (3,)}, the best linear map from
    latents to the colours of their pixels, 0 to 1. check: {"claimed", "measured", "step"}, see
    gradients.py. left_out: lines.
    """

    prompt: Any
    seed: int
    sampler: str
    guidance_scale: float | None
    prediction_type: str
    described: str
    tokens: list = field(default_factory=list)
    words: list = field(default_factory=list)
    image: Any = None
    boxes: list = field(default_factory=list)
    gradient_area: str = ""
    blocks: list = field(default_factory=list)
    colours: dict = field(default_factory=dict)
    check: dict = field(default_factory=dict)
    left_out: list = field(default_factory=list)
    arrays: dict = field(default_factory=dict)

    def __getitem__(self, name):
        if name not in self.arrays:
            raise TinyldmError(f"the record has no array {name!r}: it has "
                               f"{', '.join(self.arrays)}; left_out says what is missing, and why")
        return self.arrays[name]

    def __repr__(self):                                 # without the numbers of the arrays
        size = sum(array.nbytes for array in self.arrays.values()) / 1e6
        return (f"<Record of {self.prompt!r}, seed {self.seed}: {len(self.arrays)} arrays, "
                f"{size:.0f} MB>")


def xray(pipe, prompt="", *, seed=0, num_inference_steps=25, guidance_scale=None, sampler="ddim",
         negative_prompt="", gradients=True, **options):
    """Draw one picture of a prompt and keep what is computed on the way -> Record.

    prompt: of a pipeline with labels, the label; without either, leave it out. gradients: False
    leaves out all that needs a backward. sampler: None takes the weights' own. options: further
    ones of pipe.stream, such as width. The picture is that of pipe(prompt, ...).
    Raises TinyldmError for options that pipe.stream refuses, and for several pictures.
    """
    request = one_picture(pipe, prompt, dict(
        options, seed=seed, num_inference_steps=num_inference_steps, sampler=sampler,
        guidance_scale=guidance_scale, negative_prompt=negative_prompt))
    schedule = pipe.schedule_for(request)
    record = Record(prompt, seed, request.sampler, getattr(request, "guidance_scale", None),
                    schedule.prediction_type, pipe.described)
    ids = None
    if pipe.tokenizers:
        ids, record.words, record.tokens = read_prompt(pipe, prompt)
    calls, states = _draw(record, pipe, request)
    _predictions(record, schedule, calls, states)
    _decode(record, pipe, states)
    record.boxes = find_boxes(record)
    if gradients:
        _gradients(record, pipe, schedule, calls, ids)
    record_shares(record)
    if ids is not None and len(ids) == 1:
        record.arrays["without"] = pictures_without(pipe, request, ids, record.words)
    return record


# ---- drawing ----------------------------------------------------------------------------------

def _draw(record, pipe, request):
    """Draw with hooks -> [the network's inputs and output] and [State], one for each call.

    Fills in attention, activations and blocks.
    """
    network, calls, states, maps = getattr(pipe, pipe.network), [], [], {}
    size = latents_size(pipe, request)

    def call(forward, *inputs, **options):
        output = forward(*inputs, **options)
        calls.append(options | {"output": output})
        return output

    def see_attention(name, weights):
        maps.setdefault(f"attention/{name}", []).append(host_map(weights, *size))

    def see_block(name, layer, forward, *inputs, **options):
        output = forward(*inputs, **options)
        own = np.asarray(to_host(output[-1]), np.float32)
        if own.ndim == 2:
            side = round(len(own) ** 0.5)
            own = own.reshape(side, side, -1)
        maps.setdefault(f"activation/{name}", []).append(own)
        if len(maps[f"activation/{name}"]) == 1:
            record.blocks.append(_block(name, layer, own.shape))
        return output

    layers = {name: layer for name, layer in named_modules(network) if BLOCKS.fullmatch(name)}
    hooks = {layer: partial(see_block, name, layer) for name, layer in layers.items()}
    with (forward_hooks({network: call}), forward_hooks(hooks),
          forward_hooks(cross_attention_hooks(network, see_attention))):
        for state in progress("drawing", pipe.states(request), pipe.steps_made(request)):
            states.append(state)
    for name, own in maps.items():
        record.arrays[name] = np.stack(own)
    _with_outer(record, "activation")
    for name, function in ("mean", np.mean), ("std", np.std):
        record.arrays[f"activation_{name}"] = np.stack(
            [function(record.arrays[f"activation/{block.name}"], axis=(1, 2, 3))
             for block in record.blocks], axis=1) if record.blocks else np.zeros((len(calls), 0))
    return calls, states


def _block(name, layer, shape):
    function = type(layer).forward
    file = Path(inspect.getsourcefile(function)).relative_to(PACKAGE.parent)
    return Block(name, type(layer).__name__, shape, file.as_posix(),
                 inspect.getsourcelines(function)[1])


def _gradients(record, pipe, schedule, calls, ids):
    network = getattr(pipe, pipe.network)
    h, w, C = record["x_t"].shape[1:]
    predictions = {step: Prediction(network, schedule, calls[step],
                                    float(record["alpha_bar"][step]), C)
                   for step in gradient_steps(len(calls)).tolist()}
    area = area_of(record.boxes[0].mask, h, w) if record.boxes else np.ones((h, w), np.float32)
    record.gradient_area = record.boxes[0].what if record.boxes else "the picture"
    layers = {block.name: dict(named_modules(network))[block.name] for block in record.blocks}
    encode = None if ids is None else (pipe.text_encoder, ids)
    record_gradients(record, network, layers, predictions, area, encode)
    _with_outer(record, "gradient")


def _with_outer(record, what):
    """Name the array of an outer block's last part after the outer block, too."""
    for block in record.blocks:
        outer = block.name.rpartition(".")[0].rpartition(".")[0]
        if outer:
            record.arrays[f"{what}/{outer}"] = record.arrays[f"{what}/{block.name}"]


# ---- what was predicted -----------------------------------------------------------------------

def _predictions(record, schedule, calls, states):
    C, arrays = states[-1].pred_x0.shape[-1], record.arrays
    kept = {name: [] for name in ("x_t", "uncond", "cond", "model_output", "x_start", "noise")}
    alpha_bars = [alpha_bar_at(schedule, state.timestep) for state in states]
    for call, state, alpha_bar in zip(calls, states, alpha_bars, strict=True):
        x_t = call["latents"][:1, ..., :C]
        *uncond, cond = (row[None] for row in call["output"][..., :C])
        output = classifier_free(*uncond, cond, record.guidance_scale) if uncond else cond
        _, noise = to_x_start_and_noise(schedule, output, x_t, alpha_bar ** 0.5,
                                        (1 - alpha_bar) ** 0.5)
        values = {"x_t": x_t, "cond": cond, "model_output": output, "x_start": state.pred_x0,
                  "noise": noise} | ({"uncond": uncond[0]} if uncond else {})
        for name, value in values.items():
            kept[name].append(np.asarray(to_host(value[0]), np.float32))
    arrays["timesteps"] = np.array([state.timestep for state in states], np.float32)
    arrays["alpha_bar"] = np.array(alpha_bars, np.float32)
    arrays |= {name: np.stack(values) for name, values in kept.items() if values}
    if not kept["uncond"]:
        record.left_out.append("no guidance: the network makes one prediction, so there is no "
                               "uncond, and cond is the model output")
    if context := calls[-1].get("context") is not None:
        arrays["context"] = np.asarray(to_host(calls[-1]["context"][-1]), np.float32)
    if not context:
        record.left_out.append("no text: this pipeline reads no prompt, so there are no tokens, "
                               "no attention to them and no words")


def alpha_bar_at(schedule, t):
    """alpha_bar at a whole or fractional timestep, by the samplers' sigma."""
    if t == round(t):
        return float(schedule.alphas_cumprod[int(t)])
    return float(1 / (1 + sigmas_at(schedule, np.array([t]))[0] ** 2))


def _decode(record, pipe, states):
    images = [np.asarray(to_pil(pipe.decode(state.pred_x0))[0])
              for state in progress("decoding", states, len(states))]
    record.arrays["images"] = np.stack(images)
    record.image = to_pil(pipe.decode(states[-1].latents))[0]
    record.colours = colours(record["x_start"], record["images"])


def colours(latents, images):
    """The linear map from latents to colours that is best on them, by least squares.

    latents (S,h,w,C), images (S,H,W,3) uint8 -> {"weight" (C,3), "bias" (3,)}, colours 0 to 1.
    """
    _, h, w, C = latents.shape
    pixels = pooled(images.astype(np.float32) / 255, h, w).reshape(-1, 3)
    ones = np.ones((len(pixels), 1), np.float32)
    solution, *_ = np.linalg.lstsq(np.hstack([latents.reshape(-1, C), ones]), pixels, rcond=None)
    return {"weight": solution[:C], "bias": solution[C]}


def pooled(maps, h, w):
    """(S,H,W,c) -> (S,h,w,c), means of squares."""
    S, H, W, c = maps.shape
    return maps.reshape(S, h, H // h, w, W // w, c).mean(axis=(2, 4))
