"""Gradients of one prediction, by the backward passes of this package.

What is differentiated is a response: how far the predicted x_start of an area of the picture lies
along what the prompt changes there,

    R = sum over the area of x_start * d,    d = (x_start - x_start_uncond) / its norm in the area

with x_start predicted from x_t and the prompt alone, without guidance; d counts as constant. Where
nothing is predicted without a prompt, d is x_start itself over its norm.

    gradient_steps          (G,), the calls of the network that are looked at
    gradient/BLOCK          (G,h_l,w_l,c), dR / d(the block's output), R of the record's
                            gradient_area: the first box, or the whole picture
    word_gradient           (G,M,8,8), the norm of d(R of a cell) / d(a token's vector), for each of
                            8 x 8 cells of the picture; the vector is the one the UNet reads
    embedding_gradient      (G,M,8,8), the same for the token's embedding, which the text encoder
                            reads; through it, a word acts on the vectors of all tokens after it
    Record.check            one slope along a random direction of the context (without text, of
                            x_t), in float64: `claimed` by backward, `measured` by the responses at
                            two points, a `step` before and after; and the curve, `responses` R at
                            `distances` along that direction

record.py -> record_gradients; words.py sums up the gradients of the words.
"""
from contextlib import contextmanager
from functools import partial

import numpy as np

from ..backend import get_xp, to_host, widen
from ..bad_layer import backward_hooks
from ..diffusion.objective import to_x_start_and_noise
from ..layers import Tape, named_modules
from ..models import CLIPTextModel
from .drawing import as_map, is_small, parts, pooled, progress, read_prompt

SHARES = 0.2, 0.5, 0.8              # of the calls, where gradients are taken
CELLS = 8                           # a side of the coarse picture
AT_ONCE = 32 * 256                  # positions of a batch, 32 rows of the bundled model
STEP = 1e-3                         # of the check's differences
FAR, POINTS = 0.2, 11               # its curve: so far either way, in norms of the input


def record_gradients(record, pipe, request, calls):
    """Fill in this file's arrays, check and gradient_area. calls: the network's inputs, output."""
    network, (_, h, w, C) = getattr(pipe, pipe.network), record["x_t"].shape
    if not record.blocks:                               # a function: it has no backward
        return
    box = next((box for box in record.boxes if box.mask.any()), None)
    record.gradient_area = box.what if box else "the picture"
    area = pooled(box.mask[..., None], h, w)[..., 0] if box else np.ones((h, w), np.float32)
    small, encode = is_small(network, h, w), _text_encoder(record, pipe, request)
    named = dict(named_modules(network))
    layers = {block.name: named[block.name] for block in record.blocks}
    steps = np.unique([int(len(calls) * share) for share in SHARES])
    found = {f"gradient/{name}": [] for name in layers}
    with frozen(*pipe.models.values()):
        for step in progress("gradients", steps, len(steps)):
            prediction = Prediction(network, pipe.schedule_for(request), calls[step],
                                    float(record["alpha_bar"][step]), C)
            for name, own in block_gradients(prediction, area, layers).items():
                found[f"gradient/{name}"].append(own)
            if small and record.words:
                dcontext = token_gradients(prediction)                  # (cells,M,D)
                found.setdefault("word_gradient", []).append(norms(dcontext, h, w))
                if encode:
                    dembedding = through_text_encoder(*encode, dcontext)
                    found.setdefault("embedding_gradient", []).append(norms(dembedding, h, w))
            if small and step == steps[len(steps) // 2]:
                record.check = check_slope(prediction, area)
    record.arrays["gradient_steps"] = steps
    record.arrays |= {name: np.stack(values) for name, values in found.items()}
    if not small:
        record.left_out.append("word_gradient, embedding_gradient, the pictures without each word "
                               "and the checked slope: they would take hours for a network and a "
                               "picture of this size")


def _text_encoder(record, pipe, request):
    """(text encoder, ids (1,M)) if the context is its last state for one plain row of tokens.

    Otherwise None, with a line in left_out.
    """
    if not record.words:
        return None
    ids, weights = read_prompt(pipe, record.prompt)
    plain = len(ids) == 1 and (weights == 1).all() and not request.clip_skip
    if plain and len(pipe.tokenizers) == 1 and isinstance(pipe.text_encoder, CLIPTextModel):
        return pipe.text_encoder, pipe.text_encoder.xp.asarray(ids)
    record.left_out.append("embedding_gradient and the pictures without a word: they need one text "
                           "encoder, and a prompt of one chunk without weights or clip_skip")
    return None


class Prediction:
    """One call of the network, for the prompt alone.

    call: the network's inputs by name, and its output; of a batch of two the last row is the
    prompt's. channels: C, of x_start.
    """

    def __init__(self, network, schedule, call, alpha_bar, channels):
        self.network, self.schedule, self.channels = network, schedule, channels
        self.is_small = is_small(network, *call["latents"].shape[1:3])
        self.inputs = {name: value[-1:] for name, value in call.items() if name != "output"}
        self.scales = alpha_bar ** 0.5, (1 - alpha_bar) ** 0.5
        x_starts = [widen(self.x_start(row[None], self.inputs["latents"]))
                    for row in call["output"]]
        self.change = x_starts[-1] - (x_starts[0] if len(x_starts) > 1 else 0)      # (1,h,w,C)

    def x_start(self, model_output, latents):
        C = self.channels
        return to_x_start_and_noise(self.schedule, model_output[..., :C], latents[..., :C],
                                    *self.scales)[0]

    def directions(self, areas):
        """Masks (n,h,w), from 0 to 1 -> d (n,h,w,C), each of norm 1, or 0 where nothing changes."""
        d = get_xp(self.change).asarray(areas, self.change.dtype)[..., None] * self.change
        norm = (d ** 2).sum(axis=(1, 2, 3), keepdims=True) ** 0.5
        return d / norm.clip(1e-12)

    def response(self, direction, **changes):
        """R, for one direction d (1,h,w,C) and inputs that are changed, such as context (1,M,D)."""
        inputs = self.inputs | changes
        return (self.x_start(self.network(**inputs), inputs["latents"]) * direction).sum()

    def gradients(self, directions, **changes):
        """d (n,h,w,C) -> dR / d(latents) and dR / d(context), (n,...) each; the latter may be None.
        """
        inputs = {name: value.repeat(len(directions), axis=0)
                  for name, value in (self.inputs | changes).items()}
        tape = Tape(checkpoints=not self.is_small)
        output = self.network(**inputs, tape=tape)
        # x_start is linear in output and latents: what it makes of d is d's gradient, too.
        dy, nothing = get_xp(output).zeros_like(output), 0 * directions
        dy[..., :self.channels] = self.x_start(directions, nothing)
        found = self.network.backward(dy, tape)
        dlatents = getattr(found, "latents", found)
        dlatents[..., :self.channels] += self.x_start(nothing, directions)      # used twice: add
        return dlatents, getattr(found, "context", None)


@contextmanager
def frozen(*modules):
    """Inside, no parameter is trained: a backward computes gradients of the inputs alone."""
    trained = [parameter for module in modules for parameter in module.parameters()
               if parameter.trainable]
    for parameter in trained:
        parameter.trainable = False
    try:
        yield
    finally:
        for parameter in trained:
            parameter.trainable = True


def block_gradients(prediction, area, layers):
    """A mask (h,w), {name: module} -> {name: dR / d(its output), (h_l,w_l,c)}."""
    found = {}

    def see(name, backward, dy, *rest):
        found[name] = as_map(np.asarray(to_host(dy[0]), np.float32))
        return backward(dy, *rest)

    with backward_hooks({layer: partial(see, name) for name, layer in layers.items()}):
        prediction.gradients(prediction.directions(area[None]))
    return found


def cell_counts(h, w):
    """How many rows and columns of cells a map is cut into."""
    return min(CELLS, h), min(CELLS, w)


def token_gradients(prediction):
    """d(R of a cell) / d(context), for each cell of the picture -> (cells,M,D)."""
    h, w = prediction.change.shape[1:3]
    rows, columns = map(parts, cell_counts(h, w), (h, w))
    masks = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(-1, h, w)
    directions, rows = prediction.directions(masks), max(1, AT_ONCE // (h * w))
    return get_xp(directions).concatenate([prediction.gradients(directions[i:i + rows])[1]
                                           for i in range(0, len(directions), rows)])


def through_text_encoder(encoder, ids, dcontext):
    """ids (1,M), dcontext (n,M,D) -> the gradients of the tokens' embeddings (n,M,D)."""
    found, rows = [], max(1, AT_ONCE // ids.size)

    def see(backward, dy, *rest):
        found.append(dy)
        return backward(dy, *rest)

    with backward_hooks({encoder.text_model.embeddings.token_embedding: see}):
        for i in range(0, len(dcontext), rows):
            tape, own = Tape(), dcontext[i:i + rows]
            encoder(ids.repeat(len(own), axis=0), tape)
            encoder.backward(own, tape)
    return get_xp(dcontext).concatenate(found)


def norms(gradients, h, w):
    """The gradients of the cells (cells,M,D) -> their norms (M,n,m) float32, on the host."""
    found = np.asarray(to_host((widen(gradients) ** 2).sum(axis=-1) ** 0.5), np.float32)
    return found.T.reshape(-1, *cell_counts(h, w))


def check_slope(prediction, area, seed=0):
    """One directional derivative of R, claimed by backward and measured by central differences.

    Everything is in float64, so that both have many digits in common. area: a mask (h,w).
    """
    inputs = {name: value.astype(np.float64) if value.dtype.kind == "f" else value
              for name, value in prediction.inputs.items()}
    name = "context" if "context" in inputs else "latents"
    along = np.random.default_rng(seed).standard_normal(inputs[name].shape)
    along = get_xp(inputs[name]).asarray(along / np.linalg.norm(along))
    direction = prediction.directions(area[None]).astype(np.float64)
    dlatents, dcontext = prediction.gradients(direction, **inputs)
    claimed = ((dlatents if dcontext is None else dcontext) * along).sum()
    far = FAR * float((inputs[name] ** 2).sum() ** 0.5)
    distances = [-STEP, STEP, *np.linspace(-far, far, POINTS)]
    before, after, *responses = (float(prediction.response(
        direction, **inputs | {name: inputs[name] + step * along})) for step in distances)
    return {"claimed": float(claimed), "measured": (after - before) / (2 * STEP), "step": STEP,
            "distances": np.array(distances[2:]), "responses": np.array(responses)}
