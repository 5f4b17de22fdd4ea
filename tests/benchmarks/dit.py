"""One call of DiT-XL/2's transformer, float32, ours against diffusers with as many threads.

    python -m tests.benchmarks.dit [--batch 2 1] [--layers 28] [--rounds 5] [--json PATH]

Takes 4 GB; with fewer layers less. --profile tells instead where our time and memory go.
"""
import numpy as np
import torch
from diffusers import DiTTransformer2DModel as ReferenceDiT

from tests.benchmarks import timing
from tests.support import sd15
from tests.support.reference import nchw
from tinyldm import backend
from tinyldm.models import DiTTransformer2DModel
from tinyldm.models.dit import config_of


def main():
    parser = timing.arguments("DiT-XL/2 against diffusers", rounds=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8],
                        help="how many latents at once; 2 is a step with guidance (2 8)")
    parser.add_argument("--layers", type=int, default=28, help="how many blocks (28)")
    parser.add_argument("--profile", action="store_true", help="profile one call of ours instead")
    args = parser.parse_args()
    config = config_of("XL", 2, num_layers=args.layers)
    module = sd15.randomise(DiTTransformer2DModel(config))
    if args.profile:
        inputs = make_inputs(args.batch[0])
        return timing.profile(module, lambda: module(*inputs))
    torch.set_num_threads(backend.num_threads())
    with torch.device("meta"):
        reference = ReferenceDiT(**config)
    reference.pos_embed = type(reference.pos_embed)(        # its table is not among the weights
        height=32, width=32, patch_size=2, in_channels=4, embed_dim=1152)
    sd15.share_weights(module, reference)
    few = "" if args.layers == 28 else f", {args.layers} blocks"
    rows = ((f"{batch} x 32x32 latents{few}", "s",
             measure(module, reference, make_inputs(batch), args.rounds)) for batch in args.batch)
    timing.report("DiT-XL/2", rows, "diffusers", args.json)


def make_inputs(batch):
    """Latents, timesteps and labels for one call."""
    latents = np.random.default_rng(1).standard_normal((batch, 32, 32, 4), np.float32)
    return latents, np.full(batch, 501), np.arange(batch)


def measure(module, reference, inputs, rounds):
    latents, *others = inputs
    tensors = nchw(latents), *map(torch.from_numpy, others)
    with torch.inference_mode():
        ours, theirs = module(*inputs), reference(*tensors).sample
        error = abs(ours - theirs.permute(0, 2, 3, 1).numpy()).max() / ours.std()
        assert error < 1e-3, f"the outputs differ by {error:.1e} of their standard deviation"
        return timing.in_turns({"tinyldm": lambda: module(*inputs),
                                "diffusers": lambda: reference(*tensors)}, rounds)


if __name__ == "__main__":
    main()
