"""The record of one drawing: `tinyldm.xray(pipe, prompt)` -> Record, arrays by name.

The pipeline draws as always. A hook on the network keeps what it reads and predicts in every call,
hooks on its layers keep attention (attention.py) and activations. Then gradients of one prediction
(gradients.py) and what each word does (words.py) are computed. S calls, M tokens, latents (h,w,C):

    timesteps, alpha_bar        (S,)
    x_t, uncond, cond, model_output, x_start, noise     (S,h,w,C); model_output is the guided one
    images                      (S,H,W,3) uint8, x_start decoded
    context                     (M,D), one vector per token
    attention/LAYER             (S,heads,h_l,w_l,M), the softmax weights of the prompt's half
    activation/BLOCK            (S,h_l,w_l,c), the output for the prompt's half
    activation_mean, activation_std     (S,blocks), in the order of Record.blocks
    gradient/BLOCK, gradient_steps, word_gradient, embedding_gradient       see gradients.py
    attention_share, gradient_share, without                                see words.py

All are float32 on the host, unless said. Where a pipeline has less, or where all would be too much,
an array is missing or shorter, and a line of left_out says why.
"""
import inspect
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..backend import to_host
from ..diffusion.guidance import classifier_free, rescale
from ..diffusion.objective import to_x_start_and_noise
from ..diffusion.samplers.shared import sigmas_at
from ..errors import TinyldmError
from ..images import to_pil
from ..layers import forward_hooks, named_modules
from ..pipelines.preview import with_ones
from .attention import cross_attention_hooks, host_map
from .drawing import (
    SMALL,
    as_map,
    is_small,
    latents_size,
    one_picture,
    pooled,
    progress,
    read_prompt,
)
from .gradients import record_gradients
from .words import find_boxes, record_shares, record_without

# The parts of a network whose outputs are kept; an outer block's output is that of its last part.
BLOCKS = re.compile(r"conv_in|((down|up)_blocks\.\d+|mid_block)\.\w+\.\d+"
                    r"|transformer_blocks\.\d+|conv_norm_out|conv_out")
HEADS = 16 * 16             # positions: of larger maps of attention the mean of the heads is kept
PACKAGE = Path(__file__).parents[1]


class Block(NamedTuple):
    """A part of the network: its name, its class, the shape (h,w,c) of its output, its code."""

    name: str
    kind: str
    shape: tuple
    file: str           # such as tinyldm/models/unet.py
    line: int           # of its forward, or of its layers


@dataclass(repr=False)
class Record:
    """What xray returns. record["x_t"] is record.arrays["x_t"]: this file's docstring has all.

    tokens: the M texts of the prompt's tokens. words: [Word], with the range of each one's tokens.
    image: the drawn picture. boxes: [words.Box], its areas, for the bundled model's language.
    blocks: [Block], in the order of the forward. colours: {"weight" (C,3), "bias" (3,)}, the best
    linear map from latents to the colours of their pixels, from 0 to 1. check: {"claimed",
    "measured", "step", "distances", "responses"} and gradient_area: see gradients.py. left_out:
    lines.
    """

    prompt: Any
    seed: int
    sampler: str
    guidance_scale: float | None
    prediction_type: str
    described: str              # the pipeline, for people
    tokens: list = field(default_factory=list)
    words: list = field(default_factory=list)
    image: Any = None
    boxes: list = field(default_factory=list)
    blocks: list = field(default_factory=list)
    colours: dict = field(default_factory=dict)
    check: dict = field(default_factory=dict)
    gradient_area: str = ""
    left_out: list = field(default_factory=list)
    arrays: dict = field(default_factory=dict)

    def __getitem__(self, name):
        if name not in self.arrays:
            raise TinyldmError(f"the record has no array {name!r}: it has "
                               f"{', '.join(self.arrays)}; left_out says what is missing, and why")
        return self.arrays[name]

    def _repr_png_(self):                               # in a notebook
        return self.image._repr_png_()

    def __repr__(self):                                 # without the numbers of the arrays
        size = sum(array.nbytes for array in self.arrays.values()) / 1e6
        return (f"<Record of {self.prompt!r}, seed {self.seed}: {len(self.arrays)} arrays, "
                f"{size:.0f} MB>")


def xray(pipe, prompt="", *, seed=0, num_inference_steps=25, guidance_scale=None, sampler="ddim",
         negative_prompt="", gradients=True, **options):
    """Draw one picture of a prompt and keep what is computed on the way -> Record.

    prompt: of a pipeline with labels, the label; without either, leave it out. sampler: None takes
    the weights' own. gradients: False leaves out all that takes longer than drawing: gradients, and
    the pictures without each word. options: further ones of pipe.stream, such as width.
    The picture is that of pipe(prompt, ...) with the same options.
    Raises TinyldmError for options that pipe.stream refuses, for several pictures, and for a
    pipeline that draws with two networks.
    """
    request = one_picture(pipe, prompt, dict(
        options, seed=seed, num_inference_steps=num_inference_steps, sampler=sampler,
        guidance_scale=guidance_scale, negative_prompt=negative_prompt))
    schedule, network = pipe.schedule_for(request), getattr(pipe, pipe.network)
    record = Record(prompt, request.seeds()[0], request.sampler,
                    getattr(request, "guidance_scale", None), schedule.prediction_type,
                    pipe.described)
    if pipe.tokenizers:
        tokenizer, (ids, _) = next(iter(pipe.tokenizers.values())), read_prompt(pipe, prompt)
        record.tokens, record.words = tokenizer.texts(ids), tokenizer.words(ids)
    else:
        record.left_out.append("words: this pipeline reads no text, so it has no tokens, no "
                               "context and no attention to words")
    calls, states = _draw(record, pipe, request)
    _keep_predictions(record, request, schedule, calls, states)
    _decode(record, pipe, states, is_small(network, *latents_size(pipe, request)))
    record.boxes = find_boxes(record, pipe)
    if gradients:
        record_gradients(record, pipe, request, calls)
        record_without(record, pipe, request)
    else:
        record.left_out.append("gradients and the pictures without each word: gradients=False")
    record_shares(record)
    _name_outer_blocks(record)
    return record


# ---- drawing ----------------------------------------------------------------------------------

def _draw(record, pipe, request):
    """Draw with hooks -> [the network's inputs and its output], [State], one for each call."""
    network, calls, seen = getattr(pipe, pipe.network), [], _Seen(latents_size(pipe, request))

    def call(forward, *inputs, **options):
        output = forward(*inputs, **options)
        calls.append(options | {"output": output})
        return output

    layers = {name: layer for name, layer in named_modules(network) if BLOCKS.fullmatch(name)}
    hooks = {layer: partial(seen.block, name, layer) for name, layer in layers.items()}
    with (forward_hooks({network: call}), forward_hooks(hooks),
          forward_hooks(cross_attention_hooks(network, seen.attention))):
        states = [*progress("drawing", pipe.states(request), pipe.steps_made(request))]
    record.blocks, record.left_out = seen.blocks, [*record.left_out, *seen.left_out]
    record.arrays |= {name: np.stack(values) for name, values in seen.arrays.items()}
    for name in ("activation_mean", "activation_std"):
        if seen.blocks:
            record.arrays[name] = record.arrays[name].reshape(len(calls), len(seen.blocks))
    if not layers:
        record.left_out.append("activations, attention, gradients and the pictures without each "
                               "word: a function is in the network's place, whose layers nobody "
                               "knows")
    return calls, states


class _Seen:
    """What hooks have seen: arrays by name, lists with one for each call. size: the latents'."""

    def __init__(self, size):
        self.size, self.arrays, self.blocks, self.left_out = size, {}, [], []

    def attention(self, name, weights):                 # (heads,N,M)
        positions = weights.shape[1]
        if positions > SMALL:
            self._leave_out(f"attention of maps of more than {SMALL} positions, as it would fill "
                            "the memory: smaller maps are kept")
            return
        if positions > HEADS:
            self._leave_out(f"single heads of maps of more than {HEADS} positions: their mean is "
                            "kept")
            weights = weights.mean(axis=0, keepdims=True)
        self._keep(f"attention/{name}", host_map(weights, *self.size))

    def block(self, name, layer, forward, *inputs, **options):
        output = forward(*inputs, **options)
        own = as_map(np.asarray(to_host(output[-1]), np.float32))
        h, w, _ = own.shape
        if f"activation/{name}" not in self.arrays:
            self.blocks.append(Block(name, type(layer).__name__, own.shape, *_code(layer)))
        self._keep("activation_mean", own.mean())
        self._keep("activation_std", own.std())
        if h * w > SMALL:
            self._leave_out(f"activations of maps of more than {SMALL} positions in full: means of "
                            "squares are kept")
            side = SMALL ** 0.5 / max(h, w)
            own = pooled(own, max(1, int(h * side)), max(1, int(w * side)))
        self._keep(f"activation/{name}", own)
        return output

    def _keep(self, name, value):
        self.arrays.setdefault(name, []).append(value)

    def _leave_out(self, line):
        if line not in self.left_out:
            self.left_out.append(line)


def _code(layer):
    """The file and the line where a layer's class says what it does."""
    kind = type(layer)                                  # a Sequence has layers, an op's layer none
    own = vars(kind).get("forward") or vars(kind).get("layers") or kind
    file = Path(inspect.getsourcefile(own)).relative_to(PACKAGE.parent)
    return file.as_posix(), inspect.getsourcelines(own)[1]


def _name_outer_blocks(record):
    """Name the arrays of an outer block's last part after the outer block, too."""
    for what in ("activation", "gradient"):
        for block in record.blocks:
            outer = block.name.rpartition(".")[0].rpartition(".")[0]
            if outer and f"{what}/{block.name}" in record.arrays:
                record.arrays[f"{what}/{outer}"] = record.arrays[f"{what}/{block.name}"]


# ---- what was predicted -----------------------------------------------------------------------

def _keep_predictions(record, request, schedule, calls, states):
    C, arrays = states[-1].pred_x0.shape[-1], record.arrays
    kept = {name: [] for name in ("x_t", "uncond", "cond", "model_output", "x_start", "noise")}
    alpha_bars = [alpha_bar_at(schedule, state.timestep) for state in states]
    for call, state, alpha_bar in zip(calls, states, alpha_bars, strict=True):
        x_t = call["latents"][:1, ..., :C]
        *uncond, cond = (row[None] for row in call["output"][..., :C])
        output = classifier_free(*uncond, cond, record.guidance_scale) if uncond else cond
        if uncond and getattr(request, "guidance_rescale", 0):
            output = rescale(output, cond, request.guidance_rescale)
        _, noise = to_x_start_and_noise(schedule, output, x_t, alpha_bar ** 0.5,
                                        (1 - alpha_bar) ** 0.5)
        values = {"x_t": x_t, "cond": cond, "model_output": output, "x_start": state.pred_x0,
                  "noise": noise, **({"uncond": uncond[0]} if uncond else {})}
        for name, value in values.items():
            kept[name].append(np.asarray(to_host(value[0]), np.float32))
    arrays["timesteps"] = np.array([state.timestep for state in states], np.float32)
    arrays["alpha_bar"] = np.array(alpha_bars, np.float32)
    arrays |= {name: np.stack(values) for name, values in kept.items() if values}
    if not kept["uncond"]:
        record.left_out.append("uncond: without guidance the network makes one prediction")
    if "context" in calls[-1]:
        arrays["context"] = np.asarray(to_host(calls[-1]["context"][-1]), np.float32)


def alpha_bar_at(schedule, t):
    """alpha_bar at a whole or fractional timestep; between whole ones, sigma is interpolated."""
    if t == round(t):
        return float(schedule.alphas_cumprod[int(t)])
    return float(1 / (1 + sigmas_at(schedule, np.array([t]))[0] ** 2))


def _decode(record, pipe, states, small):
    """Fill in images, image and colours."""
    def picture(latents):
        return np.asarray(to_pil(pipe.decode(latents))[0])

    record.image = to_pil(pipe.decode(states[-1].latents))[0]
    shown = states if small else states[-1:]
    images = np.stack([picture(state.pred_x0)
                       for state in progress("decoding", shown, len(shown))])
    record.colours = best_colours(record["x_start"][-len(shown):], images)
    if not small:
        record.left_out.append("decoded pictures before the last one, which would take minutes: "
                               "images has the colours of the linear map")
        x_start, (_, H, W, _) = record["x_start"], images.shape
        colours = x_start @ record.colours["weight"] + record.colours["bias"]
        colours = (colours.clip(0, 1) * 255).round().astype(np.uint8)
        rows, columns = np.arange(H) * colours.shape[1] // H, np.arange(W) * colours.shape[2] // W
        images = np.concatenate([colours[:-1, rows][:, :, columns], images])
    record.arrays["images"] = images


def best_colours(latents, images):
    """The linear map from latents to the mean colours of their pixels, by least squares.

    latents (S,h,w,C), images (S,H,W,3) uint8 -> {"weight" (C,3), "bias" (3,)}, colours 0 to 1.
    """
    *_, h, w, C = latents.shape
    colours = pooled(images / np.float32(255), h, w).reshape(-1, 3)
    solution, *_ = np.linalg.lstsq(with_ones(latents.reshape(-1, C)), colours, rcond=None)
    return {"weight": solution[:C], "bias": solution[C]}
