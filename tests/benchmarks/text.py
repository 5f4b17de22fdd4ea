"""SD 1.5's text encoder on the ids of one prompt, float32, ours against transformers.

    python -m tests.benchmarks.text [--rounds 21] [--json PATH]

As many threads for both. --profile tells instead where our time and memory go.
"""
import numpy as np
import torch
from transformers import CLIPTextConfig
from transformers import CLIPTextModel as ReferenceCLIP

from tests.benchmarks import timing
from tests.support import sd15
from tinyldm import backend
from tinyldm.models import CLIPTextModel


def main():
    parser = timing.arguments("SD 1.5's text encoder against transformers", rounds=21)
    parser.add_argument("--profile", action="store_true", help="profile one prompt instead")
    args = parser.parse_args()
    ids = np.random.default_rng(1).integers(sd15.TEXT_ENCODER["vocab_size"], size=(1, 77))
    module = sd15.randomise(CLIPTextModel(sd15.TEXT_ENCODER))

    def ours():
        module(ids)

    if args.profile:
        return timing.profile(module, ours)
    torch.set_num_threads(backend.num_threads())
    reference = sd15.share_weights(module, ReferenceCLIP(CLIPTextConfig(**sd15.TEXT_ENCODER)))
    tids = torch.from_numpy(ids)

    @torch.inference_mode()
    def theirs():
        reference(tids)

    samples = timing.in_turns({"tinyldm": ours, "transformers": theirs}, args.rounds)
    timing.report("Stable Diffusion 1.5's text encoder", [("one prompt", "s", samples)],
                  "transformers", args.json)


if __name__ == "__main__":
    main()
