"""Gradients of one prediction, by the backward passes of this package.

What is differentiated is a response: how far the predicted x_start of an area of the picture lies
along what the prompt changes there,

    R = sum over the area of x_start * d,    d = (x_start - x_start_uncond) / its norm in the area

with x_start predicted from x_t and the prompt alone, without guidance; d counts as constant. Where
nothing is predicted without a prompt, d is x_start itself over its norm.

    gradient_steps          (G,), the calls of the network that are looked at
    gradient/BLOCK          (G,h_l,w_l,c), dR / d(the block's output), R of the first box, or of
                            the whole picture where there is none (`gradient_area` of the record)
    word_gradient           (G,M,8,8), the norm of d(R of a cell) / d(a token's vector), for each of
                            8 x 8 cells of the picture; the vector is the one the UNet reads
    embedding_gradient      (G,M,8,8), the same for the token's embedding, which the text encoder
                            reads: the causal encoder carries a word into all tokens after it
    check                   one slope along a random direction of the context, in float64: `claimed`
                            by backward, `measured` by R at two points, `step` apart from the middle

record.py -> record_gradients -> words.py.
"""
from contextlib import contextmanager
from functools import partial

import numpy as np

from ..backend import get_xp, to_host
from ..bad_layer import backward_hooks
from ..diffusion.objective import to_x_start_and_noise
from ..layers import Tape

SHARES = 0.2, 0.5, 0.8              # of the calls, where gradients are taken
CELLS = 8                           # a side of the coarse picture
AT_ONCE = 32                        # rows of a batch
STEP = 1e-3                         # of the check's differences


class Prediction:
    """One call of the network, for the prompt alone: its inputs, and what x_start is of its output.

    call: the recorded inputs and output, the last row is the prompt's.
    """

    def __init__(self, network, schedule, call, alpha_bar, channels):
        self.network, self.schedule, self.channels = network, schedule, channels
        self.inputs = {name: value[-1:] for name, value in call.items() if name != "output"}
        self.scales = alpha_bar ** 0.5, (1 - alpha_bar) ** 0.5
        x_starts = [self.x_start(row[None], self.inputs["latents"]) for row in call["output"]]
        self.change = x_starts[-1] - (x_starts[0] if len(x_starts) > 1 else 0)      # (1,h,w,C)

    def x_start(self, model_output, latents):
        C = self.channels
        return to_x_start_and_noise(self.schedule, model_output[..., :C], latents[..., :C],
                                    *self.scales)[0]

    def directions(self, areas):
        """Masks (n,h,w), numbers from 0 to 1 -> d (n,h,w,C), of norm 1 each, or 0."""
        xp = get_xp(self.change)
        d = xp.asarray(areas, self.change.dtype)[..., None] * self.change
        norm = (d ** 2).sum(axis=(1, 2, 3), keepdims=True) ** 0.5
        return d / xp.maximum(norm, 1e-12)

    def response(self, direction, **changes):
        """R (1,) for inputs that are changed, such as context (1,M,D)."""
        inputs = self.inputs | changes
        x_start = self.x_start(self.network(**inputs), inputs["latents"])
        return (x_start * direction).sum(axis=(1, 2, 3))

    def gradients(self, directions, **changes):
        """d (n,h,w,C) -> what the network's backward returns, one row for each direction."""
        n, inputs = len(directions), self.inputs | changes
        inputs = {name: value.repeat(n, axis=0) for name, value in inputs.items()}
        tape = Tape(checkpoints=directions[0, ..., 0].size > 32 * 32)
        output = self.network(**inputs, tape=tape)
        # x_start is linear in the output; its derivative is what it is of the output alone.
        dy = get_xp(output).zeros_like(output)
        dy[..., :self.channels] = self.x_start(directions, 0 * directions)
        return self.network.backward(dy, tape)


@contextmanager
def frozen(*modules):
    """Inside, no parameter is trained: a backward gives gradients of the inputs alone."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    before = [parameter.trainable for parameter in parameters]
    for parameter in parameters:
        parameter.trainable = False
    try:
        yield
    finally:
        for parameter, trainable in zip(parameters, before):
            parameter.trainable = trainable


def gradient_steps(count):
    """The indices of the calls whose gradients are taken."""
    return np.unique([int(count * share) for share in SHARES])


def block_gradients(prediction, area, layers):
    """{name: module} -> {name: dR / d(its output), (h_l,w_l,c) or (T,c)}, for a mask (h,w)."""
    found = {}

    def see(name, backward, dy, *rest):
        found[name] = np.asarray(to_host(dy[0]), np.float32)
        return backward(dy, *rest)

    with backward_hooks({layer: partial(see, name) for name, layer in layers.items()}):
        prediction.gradients(prediction.directions(area[None]))
    return found


def cells(h, w):
    """Masks (n*m,h,w) of n x m cells of a map, 8 x 8 where it is large enough, and (n, m)."""
    n, m = min(CELLS, h), min(CELLS, w)
    rows = np.arange(h) * n // h == np.arange(n)[:, None]                # (n,h)
    columns = np.arange(w) * m // w == np.arange(m)[:, None]             # (m,w)
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(n * m, h, w), (n, m)


def token_gradients(prediction):
    """d(R of a cell) / d(context), for each cell -> (cells,M,D)."""
    xp = get_xp(prediction.change)
    masks, _ = cells(*prediction.change.shape[1:3])
    directions = prediction.directions(xp.asarray(masks))
    return xp.concatenate([prediction.gradients(directions[i:i + AT_ONCE])[1]
                           for i in range(0, len(directions), AT_ONCE)])


def through_text_encoder(encoder, ids, dcontext):
    """ids (1,M), dcontext (n,M,D) -> the gradients of the tokens' embeddings (n,M,D)."""
    found, tape = [], Tape()

    def see(backward, dy, *rest):
        found.append(dy)
        return backward(dy, *rest)

    encoder(ids.repeat(len(dcontext), axis=0), tape=tape)
    embedding = encoder.text_model.embeddings.token_embedding
    with backward_hooks({embedding: see}):
        encoder.backward(dcontext, tape)
    return found[0]


def check_slope(prediction, area, seed=0):
    """One directional derivative of R, claimed by backward and measured by central differences.

    Everything is in float64, so that both have many digits in common.
    """
    xp = get_xp(prediction.change)
    name = "context" if "context" in prediction.inputs else "latents"
    start = prediction.inputs[name].astype(np.float64)
    changes = {key: value.astype(np.float64) for key, value in prediction.inputs.items()
               if key in ("latents", "context", "timesteps")}
    along = np.random.default_rng(seed).standard_normal(start.shape)
    along = xp.asarray(along / np.linalg.norm(along))
    direction = prediction.directions(area[None]).astype(np.float64)
    gradients = prediction.gradients(direction, **changes)
    claimed = (getattr(gradients, name, gradients) * along).sum()
    ends = [prediction.response(direction, **changes | {name: start + sign * STEP * along})[0]
            for sign in (1, -1)]
    return {"claimed": float(claimed), "measured": float(ends[0] - ends[1]) / (2 * STEP),
            "step": STEP}


def record_gradients(record, network, layers, predictions, area, encode=None):
    """Fill in this file's arrays. area: a mask (h,w). encode: (encoder, ids) or None.

    predictions: {step: Prediction}.
    """
    blocks, tokens, embeddings = [], [], []
    with frozen(network, *([encode[0]] if encode else [])):
        for prediction in predictions.values():
            blocks.append(block_gradients(prediction, area, layers))
            if "context" in prediction.inputs:
                dcontext = token_gradients(prediction)
                tokens.append(_norms(dcontext, area.shape))
                if encode:
                    embeddings.append(_norms(through_text_encoder(*encode, dcontext), area.shape))
        middle = list(predictions.values())[len(predictions) // 2]
        record.check = check_slope(middle, area)
    record.arrays["gradient_steps"] = np.array(list(predictions), np.int64)
    for name in blocks[0]:
        record.arrays[f"gradient/{name}"] = np.stack([own[name] for own in blocks])
    for name, own in ("word_gradient", tokens), ("embedding_gradient", embeddings):
        if own:
            record.arrays[name] = np.stack(own)


def _norms(gradients, size):
    """(cells,M,D) -> (M,n,m) float32 on the host."""
    norms = np.asarray(to_host((gradients ** 2).sum(axis=-1) ** 0.5), np.float32)
    return norms.T.reshape(norms.shape[1], *cells(*size)[1])
