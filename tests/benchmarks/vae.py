"""SD 1.5's VAE, both halves, float32, ours against diffusers with as many threads.

    python -m tests.benchmarks.vae [--part decoder] [--size 512] [--rounds 5] [--json PATH]

--profile tells instead where our time and memory go in the first part.
"""
import numpy as np
import torch
from diffusers import AutoencoderKL as ReferenceVAE

from tests.benchmarks import timing
from tests.support import sd15
from tests.support.reference import nchw
from tinyldm import backend
from tinyldm.models import AutoencoderKL

PARTS = {"decoder": ("decode", 8, 4), "encoder": ("encode", 1, 3)}     # pixels a number, channels


def main():
    parser = timing.arguments("SD 1.5's VAE against diffusers", rounds=5)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS), help="(both)")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels (512)")
    parser.add_argument("--profile", action="store_true", help="profile one picture instead")
    args = parser.parse_args()
    module = sd15.randomise(AutoencoderKL(sd15.VAE))
    if args.profile:
        method, x = make_input(args.part[0], args.size)
        return timing.profile(module, lambda: getattr(module, method)(x))
    torch.set_num_threads(backend.num_threads())
    with torch.device("meta"):
        reference = ReferenceVAE(**sd15.VAE)
    sd15.share_weights(module, reference)
    rows = ((f"{part}, {args.size}x{args.size} pixels", "s",
             measure(module, reference, *make_input(part, args.size), args.rounds))
            for part in args.part)
    timing.report("Stable Diffusion 1.5's VAE", rows, "diffusers", args.json)


def make_input(part, size):
    """The method's name, and an array for it."""
    method, shrink, channels = PARTS[part]
    shape = (1, size // shrink, size // shrink, channels)
    return method, np.random.default_rng(1).standard_normal(shape, np.float32)


def measure(module, reference, method, x, rounds):
    ours, theirs, tx = getattr(module, method), getattr(reference, method), nchw(x)
    with torch.inference_mode():
        return timing.in_turns({"tinyldm": lambda: ours(x), "diffusers": lambda: theirs(tx)},
                               rounds)


if __name__ == "__main__":
    main()
