"""On a GPU, ours against diffusers: a call of SD 1.5's UNet, a training step of the bundled one.

    python -m tests.benchmarks.gpu [--rounds 11] [--json PATH]

Needs a CUDA device, CuPy, and PyTorch for CUDA. float32 is float32 on both sides: PyTorch's
convolutions would round their inputs to ten bits (TF32) unless told otherwise. On a machine without
a GPU nothing is measured.
"""
import gc
import sys

import numpy as np
import torch
from diffusers import UNet2DConditionModel as ReferenceUNet

from tests.benchmarks import timing, training
from tests.benchmarks.unet import case, make_inputs
from tests.support import sd15
from tests.support.extra import no_gpu
from tests.support.reference import nchw
from tests.support.tolerance import within
from tinyldm.models import UNet2DConditionModel

SIZES = 2, 64               # a step with guidance
BATCHES = 64, 256


def main():
    parser = timing.arguments("On a GPU: calls and training steps against diffusers", rounds=11)
    args = parser.parse_args()
    if reason := no_gpu():
        return print(reason, file=sys.stderr)
    import cupy
    torch.backends.cudnn.allow_tf32 = False
    rows = (*calls(cupy, args.rounds), *steps(cupy, args.rounds))
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    timing.report("On a GPU", rows, "diffusers", args.json, gpu=name, cupy=cupy.__version__)


def waiting(function, *inputs):
    """function(*inputs), which returns when the GPU has done its work."""
    def run():
        result = function(*inputs)
        torch.cuda.synchronize()                        # waits for CuPy's work, too
        return result
    return run


def calls(xp, rounds):
    """One call of SD 1.5's UNet, in both precisions, the same weights on both sides."""
    module = sd15.randomise(UNet2DConditionModel(sd15.UNET))
    with torch.device("meta"):
        reference = ReferenceUNet(**sd15.UNET)
    sd15.share_weights(module, reference).to("cuda")
    latents, timesteps, context = make_inputs(*SIZES)
    for dtype, theirs, allowed in ((np.float32, torch.float32, 1e-4),
                                   (np.float16, torch.float16, 1e-2)):
        for parameter in module.parameters():
            parameter.data = xp.asarray(parameter.data, dtype)
        reference.to(theirs)
        ours = [xp.asarray(x) for x in (latents.astype(dtype), timesteps, context.astype(dtype))]
        tensors = [nchw(latents), torch.from_numpy(timesteps), torch.from_numpy(context)]
        tensors = [x.to("cuda", theirs if x.is_floating_point() else None) for x in tensors]
        with torch.inference_mode():
            contestants = {"tinyldm": waiting(module, *ours),
                           "diffusers": waiting(reference, *tensors)}
            found = contestants["tinyldm"]().get().astype(np.float64)
            expected = contestants["diffusers"]().sample.permute(0, 2, 3, 1).double().cpu().numpy()
            within(np.sqrt(((found - expected) ** 2).mean()), allowed * expected.std(), "outputs")
            samples = timing.in_turns(contestants, rounds)
        yield f"SD 1.5's UNet, {np.dtype(dtype)}, {case(*SIZES)}", "s", samples


def steps(xp, rounds):
    """A training step of the bundled UNet, float32."""
    for size in BATCHES:
        batch = training.make_batch(size)
        unet, ours = training.our_step(batch, xp)
        reference, theirs = training.their_step(batch, "cuda")
        training.assert_same_work(unet, ours, reference, theirs)
        contestants = {"tinyldm": waiting(ours), "diffusers": waiting(theirs)}
        yield f"a training step, batch {size}", "s", timing.in_turns(contestants, rounds)
        del unet, ours, reference, theirs, contestants
        gc.collect()


if __name__ == "__main__":
    main()
