"""Where the time of a call goes, by op, beside what matrix products reach on this machine.

    python -m tests.benchmarks.where [--rounds 5] [--json PATH]

SD 1.5's UNet up to 64x64 latents and the text encoder on one prompt, as --profile shows them:
`rounds` calls together, after a first one.
"""
import json
from pathlib import Path

import numpy as np

from tests.benchmarks import timing, unet
from tests.support import sd15
from tinyldm.cli.profiler import Profiler
from tinyldm.models import CLIPTextModel, UNet2DConditionModel


def main():
    parser = timing.arguments("Where the time of a call goes, by op", rounds=5)
    args = parser.parse_args()
    tables = {}
    for name, module, inputs in cases():
        module(*inputs)
        with Profiler(module) as profile:
            for _ in range(args.rounds):
                module(*inputs)
        tables[name] = str(profile).split("\n\n")[-1]    # by op
        print(f"\n{name}, {args.rounds} calls\n{tables[name]}", flush=True)
    if args.json:
        content = {"about": timing.machine(), "calls": args.rounds, "tables": tables}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def cases():
    module = sd15.randomise(UNet2DConditionModel(sd15.UNET))
    for batch, size in unet.CASES[:3]:
        yield unet.case(batch, size), module, unet.make_inputs(batch, size)
    ids = np.random.default_rng(1).integers(sd15.TEXT_ENCODER["vocab_size"], size=(1, 77))
    yield "one prompt", sd15.randomise(CLIPTextModel(sd15.TEXT_ENCODER)), (ids,)


if __name__ == "__main__":
    main()
