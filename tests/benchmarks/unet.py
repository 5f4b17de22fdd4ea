"""One call of SD 1.5's UNet, float32, ours against diffusers with as many threads.

    python -m tests.benchmarks.unet [--batch 2] [--size 64] [--rounds 5] [--json PATH]

Several batches and sizes make a table, as does the command without them. Takes 8 GB. --profile
tells instead where our time and memory go in the first row of the table.
"""
from itertools import product

import numpy as np
import torch
from diffusers import UNet2DConditionModel as ReferenceUNet

from tests.benchmarks import timing
from tests.support import sd15
from tests.support.reference import nchw
from tinyldm import backend
from tinyldm.models import UNet2DConditionModel

CASES = [(2, 64), (1, 32), (4, 32), (1, 96), (4, 96)]  # batch, and size; 2: a step with guidance


def main():
    parser = timing.arguments("SD 1.5's UNet against diffusers", rounds=5)
    parser.add_argument("--batch", type=int, nargs="+", help="how many latents at once")
    parser.add_argument("--size", type=int, nargs="+", help="height and width of the latents")
    parser.add_argument("--profile", action="store_true", help="profile one call of ours instead")
    args = parser.parse_args()
    cases = CASES
    if args.batch or args.size:
        cases = list(product(args.batch or [2], args.size or [64]))
    module = sd15.randomise(UNet2DConditionModel(sd15.UNET))
    if args.profile:
        inputs = make_inputs(*cases[0])
        return timing.profile(module, lambda: module(*inputs))
    torch.set_num_threads(backend.num_threads())
    with torch.device("meta"):
        reference = ReferenceUNet(**sd15.UNET)
    sd15.share_weights(module, reference)
    rows = ((case(*sizes), "s", measure(module, reference, make_inputs(*sizes), args.rounds))
            for sizes in cases)
    timing.report("Stable Diffusion 1.5's UNet", rows, "diffusers", args.json)


def case(batch, size):
    return f"{batch} x {size}x{size} latents"


def make_inputs(batch, size):
    """Latents, timesteps and context for one call."""
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((batch, size, size, 4), np.float32)
    return latents, np.full(batch, 501), rng.standard_normal((batch, 77, 768), np.float32)


def measure(module, reference, inputs, rounds):
    latents, timesteps, context = inputs
    torch_inputs = nchw(latents), torch.from_numpy(timesteps), torch.from_numpy(context)
    with torch.inference_mode():
        return timing.in_turns({"tinyldm": lambda: module(*inputs),
                                "diffusers": lambda: reference(*torch_inputs)}, rounds)


if __name__ == "__main__":
    main()
