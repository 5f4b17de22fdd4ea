"""One call of the x4 upscaler's UNet, float32, ours against diffusers with as many threads.

    python -m tests.benchmarks.upscale [--batch 1] [--size 32 64] [--rounds 5] [--json PATH]

Takes 6 GB. --profile tells instead where our time and memory go, for the
first size.
"""
import numpy as np
import torch
from diffusers import UNet2DConditionModel as ReferenceUNet

from tests.benchmarks import timing
from tests.support import sd15
from tests.support.keys import CONFIGS
from tests.support.reference import nchw
from tinyldm import backend
from tinyldm.models import UNet2DConditionModel

CONFIG = {key: value for key, value in CONFIGS["SD x4 upscaler"]["unet"].items()
          if not key.startswith("_")}


def main():
    parser = timing.arguments("the x4 upscaler's UNet against diffusers", rounds=5)
    parser.add_argument("--batch", type=int, default=1, help="how many pictures at once (1)")
    parser.add_argument("--size", type=int, nargs="+", default=[32, 64],
                        help="height and width of the latents (32 and 64)")
    parser.add_argument("--profile", action="store_true", help="profile one call of ours instead")
    args = parser.parse_args()
    module = sd15.randomise(UNet2DConditionModel(CONFIG))
    if args.profile:
        inputs = make_inputs(args.batch, args.size[0])
        return timing.profile(module, lambda: call(module, inputs))
    torch.set_num_threads(backend.num_threads())
    with torch.device("meta"):
        reference = ReferenceUNet(**CONFIG)
    sd15.share_weights(module, reference)
    rows = ((f"{args.batch} x {size}x{size} latents", "s",
             measure(module, reference, make_inputs(args.batch, size), args.rounds))
            for size in args.size)
    timing.report("The x4 upscaler's UNet", rows, "diffusers", args.json)


def make_inputs(batch, size):
    """Latents beside a picture, timesteps, context and levels of noise for one call."""
    rng = np.random.default_rng(1)
    return (rng.standard_normal((batch, size, size, 7), np.float32), np.full(batch, 501),
            rng.standard_normal((batch, 77, 1024), np.float32), np.full(batch, 20))


def call(module, inputs):
    *inputs, levels = inputs
    return module(*inputs, class_labels=levels)


def measure(module, reference, inputs, rounds):
    latents, *others = inputs
    x, (t, context, levels) = nchw(latents), map(torch.from_numpy, others)

    def theirs():
        return reference(x, t, context, class_labels=levels).sample

    with torch.inference_mode():
        ours = call(module, inputs)
        error = abs(ours - theirs().permute(0, 2, 3, 1).numpy()).max() / ours.std()
        assert error < 1e-3, f"the outputs differ by {error:.1e} of their standard deviation"
        return timing.in_turns({"tinyldm": lambda: call(module, inputs), "diffusers": theirs},
                               rounds)


if __name__ == "__main__":
    main()
