"""The FID's Inception network, float32, ours against torch's functions, equal threads.

    python -m tests.benchmarks.inception [--batch 1 8] [--rounds 5]

torch runs it twice: with batch norms, as pytorch-fid does, and with each batch norm folded into its
convolution. Ours computes batch norm and ReLU in one op, and folds nothing. Of a batch, each thread
computes some pictures; of one picture, some branches of a block.
"""
import numpy as np
import torch

from tests.benchmarks import timing
from tests.support import inception_reference
from tests.support.models import inception_weights, with_weights
from tests.support.reference import nchw
from tinyldm import backend
from tinyldm.models import InceptionV3


def main():
    parser = timing.arguments("The FID's Inception network against torch", rounds=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8],
                        help="how many pictures at once (1 8)")
    parser.add_argument("--profile", action="store_true", help="profile one call of ours instead")
    args = parser.parse_args()
    backend.keep_freed_memory()                         # as the program does
    module = InceptionV3()
    arrays = inception_weights(module, np.float32)
    module = with_weights(module, arrays)
    if args.profile:
        images = make_images(args.batch[0])
        return timing.profile(module, lambda: module(images))
    torch.set_num_threads(backend.num_threads())
    weights = {name: torch.from_numpy(array) for name, array in arrays.items()}
    ways = {"with batch norms": weights, "folded": inception_reference.folded(weights)}
    rows = [(f"{batch} x 299x299, torch {way}", "s",
             measure(module, ways[way], batch, args.rounds))
            for batch in args.batch for way in ways]
    timing.report("The FID's Inception network", rows, "torch", args.json)


def make_images(batch):
    return np.random.default_rng(1).uniform(-1, 1, (batch, 299, 299, 3)).astype(np.float32)


def measure(module, weights, batch, rounds):
    images = make_images(batch)
    tensor = nchw(images)
    with torch.inference_mode():
        ours, theirs = module(images), inception_reference.inception(weights, tensor).numpy()
        error = abs(ours - theirs).max() / ours.std()
        assert error < 1e-3, f"the outputs differ by {error:.1e} of their standard deviation"
        return timing.in_turns(
            {"tinyldm": lambda: module(images),
             "torch": lambda: inception_reference.inception(weights, tensor)}, rounds)


if __name__ == "__main__":
    main()
