"""One call of DDPM's UNets, float32, ours against diffusers with as many threads.

    python -m tests.benchmarks.ddpm [--model cifar10 cat256] [--batch N] [--rounds 5] [--json PATH]

--profile tells instead where our time and memory go, for the first model.
"""
import numpy as np
import torch
from diffusers import UNet2DModel as ReferenceUNet2D

from tests.benchmarks import timing
from tests.support import sd15
from tests.support.models import CAT256, CIFAR10
from tests.support.reference import nchw
from tinyldm import backend
from tinyldm.models import UNet2DModel

MODELS = {"cifar10": (CIFAR10, 16), "cat256": (CAT256, 1)}      # and how many pictures at once


def main():
    parser = timing.arguments("DDPM's UNets against diffusers", rounds=5)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS),
                        help="of CIFAR-10, or of cats of 256 pixels (both)")
    parser.add_argument("--batch", type=int, help="how many pictures at once (16 or 1)")
    parser.add_argument("--profile", action="store_true", help="profile one call of ours instead")
    args = parser.parse_args()
    if args.profile:
        module, _, inputs = make(args.model[0], args.batch)
        return timing.profile(module, lambda: module(*inputs))
    torch.set_num_threads(backend.num_threads())
    timing.report("DDPM's UNets", (row(name, args.batch, args.rounds) for name in args.model),
                  "diffusers", args.json)


def row(name, batch, rounds):
    module, reference, inputs = make(name, batch)
    B, size = inputs[0].shape[:2]
    return f"{B} x {size}x{size} pixels, {name}", "s", measure(module, reference, inputs, rounds)


def make(name, batch):
    """Ours, diffusers' with the same weights, and images and timesteps for one call."""
    config, own_batch = MODELS[name]
    module, B, size = UNet2DModel(config), batch or own_batch, config["sample_size"]
    with torch.device("meta"):
        reference = ReferenceUNet2D(**config)
    sd15.share_weights(sd15.randomise(module), reference)
    images = np.random.default_rng(1).standard_normal((B, size, size, 3), np.float32)
    return module, reference, (images, np.full(B, 501))


def measure(module, reference, inputs, rounds):
    tensors = nchw(inputs[0]), torch.from_numpy(inputs[1])
    with torch.inference_mode():
        ours, theirs = module(*inputs), reference(*tensors).sample
        error = abs(ours - theirs.permute(0, 2, 3, 1).numpy()).max() / ours.std()
        assert error < 1e-3, f"the outputs differ by {error:.1e} of their standard deviation"
        return timing.in_turns({"tinyldm": lambda: module(*inputs),
                                "diffusers": lambda: reference(*tensors)}, rounds)


if __name__ == "__main__":
    main()
