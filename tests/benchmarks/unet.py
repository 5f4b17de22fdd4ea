"""One call of SD 1.5's UNet, float32, ours against diffusers with as many threads.

    python -m tests.benchmarks.unet [--size 64] [--batch 2] [--rounds 5] [--json PATH]

Takes 7 GB. --profile tells instead where our time and memory go.
"""
import numpy as np
import torch
from diffusers import UNet2DConditionModel as ReferenceUNet

from tests import sd15
from tests.reference import nchw
from tinyldm import backend
from tinyldm.models import UNet2DConditionModel

from . import timing


def main():
    parser = timing.arguments("SD 1.5's UNet against diffusers", rounds=5)
    parser.add_argument("--size", type=int, default=64, help="height and width of the latents (64)")
    parser.add_argument("--batch", type=int, default=2, help="2: as one step with guidance (2)")
    parser.add_argument("--profile", action="store_true", help="profile one call of ours instead")
    args = parser.parse_args()
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((args.batch, args.size, args.size, 4), np.float32)
    context = rng.standard_normal((args.batch, 77, 768), np.float32)
    timesteps = np.full(args.batch, 501)
    module = sd15.randomise(UNet2DConditionModel(sd15.UNET))

    def ours():
        module(latents, timesteps, context)

    if args.profile:
        return timing.profile(module, ours)
    torch.set_num_threads(backend.num_threads())
    with torch.device("meta"):
        reference = ReferenceUNet(**sd15.UNET)
    sd15.share_weights(module, reference)
    inputs = nchw(latents), torch.from_numpy(timesteps), torch.from_numpy(context)

    @torch.inference_mode()
    def theirs():
        reference(*inputs)

    samples = timing.in_turns({"tinyldm": ours, "diffusers": theirs}, args.rounds)
    title = f"Stable Diffusion 1.5's UNet, {args.batch} x {args.size}x{args.size} latents"
    timing.report(title, {"one call, s": samples}, "diffusers", args.json)


if __name__ == "__main__":
    main()
