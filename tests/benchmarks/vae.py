"""SD 1.5's VAE decoder, float32, ours against diffusers with as many threads.

    python -m tests.benchmarks.vae [--size 64] [--rounds 3] [--json PATH]

--profile tells instead where our time and memory go.
"""
import numpy as np
import torch
from diffusers import AutoencoderKL as ReferenceVAE

from tests import sd15
from tests.reference import nchw
from tinyldm import backend
from tinyldm.models import AutoencoderKL

from . import timing


def main():
    parser = timing.arguments("SD 1.5's VAE decoder against diffusers", rounds=3)
    parser.add_argument("--size", type=int, default=64, help="height and width of the latents (64)")
    parser.add_argument("--profile", action="store_true", help="profile one picture instead")
    args = parser.parse_args()
    z = np.random.default_rng(1).standard_normal((1, args.size, args.size, 4), np.float32)
    module = sd15.randomise(AutoencoderKL(sd15.VAE))

    def ours():
        module.decode(z)

    if args.profile:
        return timing.profile(module, ours)
    torch.set_num_threads(backend.num_threads())
    with torch.device("meta"):
        reference = ReferenceVAE(**sd15.VAE)
    sd15.share_weights(module, reference)
    tz = nchw(z)

    @torch.inference_mode()
    def theirs():
        reference.decode(tz)

    samples = timing.in_turns({"tinyldm": ours, "diffusers": theirs}, args.rounds)
    title = f"Stable Diffusion 1.5's VAE decoder, {args.size}x{args.size} latents"
    timing.report(title, {"one picture, s": samples}, "diffusers", args.json)


if __name__ == "__main__":
    main()
