"""What the tests of a GPU share: a picture, a sampling, ops at float16's limits."""
import math

import numpy as np

from tests.support import strict
from tests.support.schedulers import SD15
from tinyldm import backend, ops
from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.diffusion.schedule import Schedule
from tinyldm.images import to_pil

PROMPT = "a big red ring above a small green square on a white background"


def draw(pipe, steps=3, prompt=PROMPT, **options):
    """-> latents after every step, pictures (B,H,W,3)."""
    latents = [state.latents for state in pipe.stream(prompt, num_inference_steps=steps, **options)]
    images = np.stack([np.asarray(image) for image in to_pil(pipe.decode(latents[-1]))])
    return np.stack([backend.to_host(x) for x in latents]), images.astype(int)


def large(op, *inputs, gradient=False, **params):
    """An op on float16 arrays of the device -> its output, or its first gradient for dy = 1."""
    inputs = [strict.Array(np.asarray(x, None if np.asarray(x).dtype.kind == "i" else np.float16))
              for x in inputs]
    y, cache = getattr(ops, op)(*inputs, **params)
    if gradient:
        y = getattr(ops, op + "_backward")(strict.Array(np.ones(y.shape, np.float16)), cache)
    return (y[0] if isinstance(y, tuple) else y).get()


ROW = np.linspace(-1, 1, 64)
TAPS = [[2048, 1, 1], [1, 1, 1], [1, 1, 1]]             # 2048 + 1 is 2048 in float16


LARGE = [
    (lambda: large("mse", [300.0], [0.0]), 90000),                      # beyond 65504
    (lambda: large("kl_normal", [[0.0]], [[15.0]]), 0.5 * (math.exp(15) - 16)),
    (lambda: large("l1", [60000.0] * 2, [0.0] * 2), 60000),             # so is the sum
    (lambda: large("silu", [-12.0]), -12 / (1 + math.exp(12))),         # 1 + tanh(-6) has no digits
    (lambda: large("gelu", [-3.0]), -0.00404969),                       # nor has 1 + erf(-2.1)
    (lambda: large("quick_gelu", [60000.0], gradient=True), 1),
    (lambda: large("gelu", [-60000.0], gradient=True), 0),
    (lambda: large("softmax", [-60000.0, 60000.0]), [0, 1]),
    (lambda: large("embedding", np.zeros(5000, int), [[0.0]], gradient=True), 5000),
    (lambda: large("linear", np.ones((4096, 1)), [[1.0]], [0.0], gradient=True)[:1], 1),
    (lambda: large("conv2d", np.ones((1, 3, 3, 1)), [[[[w]] for w in row] for row in TAPS]), 2056),
    (lambda: large("conv2d", np.ones((1, 3, 3, 1)), [[[[w]] for w in row] for row in TAPS],
                   padding=(1, 1), gradient=True)[0, 1, 1], 2056),
    (lambda: backend.add_up(strict.Array(np.full((5000, 1), 10, np.float16)), axis=0).get(), 50000),
    (lambda: large("layer_norm", 1000.0 + np.arange(64), np.ones(64), np.zeros(64), eps=1e-5),
     ROW / ROW.std()),
    (lambda: large("group_norm", np.tile(5000 * ROW, (1, 500, 1)), np.ones(64), np.zeros(64),
                   num_groups=1, eps=1e-5)[0, 0], ROW / ROW.std()),
    (lambda: large("attention", *np.full((3, 1, 2, 64), 200.0), num_heads=1), 200),
]


def sampled(name, xp):
    """The states of a sampler over 7 steps of a made-up model, in an array library."""
    rng = np.random.default_rng(0)

    def draw_noise():
        return xp.asarray(rng.standard_normal((2, 4, 4, 4), np.float32))

    def predict(x, t):
        return 0.5 * x + xp.sin(x * (1 + t / 1000))
    return list(SAMPLERS[name](predict, draw_noise(), Schedule.from_config(SD15), 7, draw_noise))
