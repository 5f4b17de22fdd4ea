"""CLIP's vision transformer, ViT-B/32 or L/14, float32, ours against transformers, equal threads.

    python -m tests.benchmarks.clip_vision [--model B/32 L/14] [--batch 1 8] [--rounds 7]
"""
import numpy as np
import torch
from transformers import CLIPVisionConfig
from transformers import CLIPVisionModelWithProjection as ReferenceVision

from tests.benchmarks import timing
from tests.support import sd15
from tests.support.reference import nchw
from tinyldm import backend
from tinyldm.models import CLIPVisionModelWithProjection

CONFIGS = {"B/32": {"projection_dim": 512},
           "L/14": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                    "num_attention_heads": 16, "patch_size": 14, "projection_dim": 768}}


def main():
    parser = timing.arguments("CLIP's vision transformer against transformers", rounds=7)
    parser.add_argument("--model", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8],
                        help="how many pictures at once (1 8)")
    parser.add_argument("--profile", action="store_true", help="profile one call of ours instead")
    args = parser.parse_args()
    if args.profile:
        module = sd15.randomise(CLIPVisionModelWithProjection(CONFIGS[args.model[0]]))
        images = make_images(args.batch[0])
        return timing.profile(module, lambda: module(images))
    torch.set_num_threads(backend.num_threads())
    rows = [(f"{name}, {batch} x 224x224", "s", measure(CONFIGS[name], batch, args.rounds))
            for name in args.model for batch in args.batch]
    timing.report("CLIP's vision transformer", rows, "transformers", args.json)


def make_images(batch):
    return np.random.default_rng(1).standard_normal((batch, 224, 224, 3), np.float32)


def measure(config, batch, rounds):
    module = sd15.randomise(CLIPVisionModelWithProjection(config))
    reference = sd15.share_weights(module, ReferenceVision(CLIPVisionConfig(**config)))
    images = make_images(batch)
    tensor = nchw(images)
    with torch.inference_mode():
        ours, theirs = module(images)[1], reference(tensor).image_embeds.numpy()
        error = abs(ours - theirs).max() / ours.std()
        assert error < 1e-3, f"the outputs differ by {error:.1e} of their standard deviation"
        return timing.in_turns({"tinyldm": lambda: module(images),
                                "transformers": lambda: reference(tensor)}, rounds)


if __name__ == "__main__":
    main()
