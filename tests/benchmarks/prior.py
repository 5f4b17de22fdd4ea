"""One call of karlo's prior, float32, ours against diffusers with as many threads.

    python -m tests.benchmarks.prior [--batch 2 8] [--layers 20] [--rounds 5] [--json PATH]

Its 1.02 billion parameters take 4 GB; with fewer layers less. --profile tells instead where our
time and memory go.
"""
import numpy as np
import torch
from diffusers import PriorTransformer as ReferencePrior

from tests.benchmarks import timing
from tests.support import sd15
from tinyldm import backend
from tinyldm.models import PriorTransformer

LAYERS, TOKENS, C = 20, 77, 768


def main():
    parser = timing.arguments("karlo's prior against diffusers", rounds=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8],
                        help="how many embeddings at once; 2 is a step with guidance (2 8)")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"how many blocks ({LAYERS})")
    parser.add_argument("--profile", action="store_true", help="profile one call of ours instead")
    args = parser.parse_args()
    module = sd15.randomise(PriorTransformer({"num_layers": args.layers}))
    if args.profile:
        *inputs, mask = make_inputs(args.batch[0])
        return timing.profile(module, lambda: module(*inputs, mask=mask))
    torch.set_num_threads(backend.num_threads())
    with torch.device("meta"):
        reference = ReferencePrior(num_layers=args.layers)
    places = TOKENS + 4                                 # the triangle is not among the weights
    reference.causal_attention_mask = torch.full((1, places, places), -10000.0).triu_(1)
    sd15.share_weights(module, reference)
    few = "" if args.layers == LAYERS else f", {args.layers} blocks"
    rows = ((f"{batch} embeddings, 81 tokens each{few}", "s",
             measure(module, reference, make_inputs(batch), args.rounds)) for batch in args.batch)
    timing.report("karlo's prior", rows, "diffusers", args.json)


def make_inputs(batch):
    """Embeddings, timesteps, text embeddings, context and mask for one call."""
    rng = np.random.default_rng(1)
    embeds, text = (rng.standard_normal((batch, C), np.float32) for _ in range(2))
    context = rng.standard_normal((batch, TOKENS, C), np.float32)
    mask = np.arange(TOKENS) < np.linspace(2, TOKENS, batch)[:, None]
    return embeds, np.full(batch, 501), text, context, mask


def measure(module, reference, inputs, rounds):
    *arrays, mask = inputs
    tensors = [torch.from_numpy(x) for x in inputs]
    with torch.inference_mode():
        ours, theirs = module(*arrays, mask=mask), reference(*tensors).predicted_image_embedding
        error = abs(ours - theirs.numpy()).max() / ours.std()
        assert error < 1e-3, f"the outputs differ by {error:.1e} of their standard deviation"
        return timing.in_turns({"tinyldm": lambda: module(*arrays, mask=mask),
                                "diffusers": lambda: reference(*tensors)}, rounds)


if __name__ == "__main__":
    main()
