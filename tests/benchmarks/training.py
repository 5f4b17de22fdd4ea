"""One training step of the bundled UNet, float32, against autograd and torch.optim.AdamW.

    python -m tests.benchmarks.training [--batch 64] [--rounds 11] [--json PATH]

A step is forward, mean squared error to a given v, backward and AdamW, from the bundled weights on
one batch of 16x16 latents with its context. Both also give the context's gradient, from which the
text transformer learns; it is not part of either. Ours splits the batch over its threads and keeps
the gradient's norm and averaged weights, as in training; theirs does neither. A first step of both
must give the same loss and weights. --profile tells instead where our time and memory go.
"""
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel as ReferenceUNet

from tests.benchmarks import timing
from tests.support.reference import nchw, to_ours
from tests.support.tolerance import within
from tinyldm import backend, load_model, ops
from tinyldm.backend import to_host
from tinyldm.checkpoints import resolve
from tinyldm.diffusion.objective import target
from tinyldm.diffusion.schedule import Schedule
from tinyldm.layers import Tape
from tinyldm.shapes.configs import LATENT_CHANNELS, SCHEDULER
from tinyldm.training.optim import AdamW
from tinyldm.training.shards import split_batch

RATE = 1e-4
OPTIONS = dict(weight_decay=0.01, eps=1e-8)


def main():
    parser = timing.arguments("A training step of the bundled UNet against PyTorch's", rounds=11)
    parser.add_argument("--batch", type=int, default=64, help="latents a step (64)")
    parser.add_argument("--profile", action="store_true", help="profile one step of ours instead")
    args = parser.parse_args()
    batch = make_batch(args.batch)
    unet, ours = our_step(batch)
    if args.profile:
        return timing.profile(unet, ours)
    torch.set_num_threads(backend.num_threads())
    reference, theirs = their_step(batch)
    assert_same_work(unet, ours, reference, theirs)
    samples = timing.in_turns({"tinyldm": ours, "diffusers": theirs}, args.rounds)
    timing.report("A training step of the bundled UNet",
                  [(f"batch {args.batch}", "s", samples)], "diffusers", args.json)


def make_batch(size, seed=1):
    """x_t (B,16,16,C), timesteps (B,), context (B,77,128), and what the network is to answer."""
    rng = np.random.default_rng(seed)
    schedule = Schedule.from_config(SCHEDULER)
    latents, noise = rng.standard_normal((2, size, 16, 16, LATENT_CHANNELS), np.float32)
    context = rng.standard_normal((size, 77, 128), np.float32)
    timesteps = rng.integers(schedule.num_train_timesteps, size=size)
    x_t = schedule.add_noise(latents, noise, timesteps)
    return x_t, timesteps, context, target(schedule, latents, noise, timesteps)


def our_step(batch, xp=np):
    """-> the UNet, and a function that trains it one step and returns the loss.

    xp: the array library.
    """
    backend.keep_freed_memory()                         # as a training does
    unet = load_model(resolve() / "unet", np.float32).move_to(xp)
    batch = [xp.asarray(part) for part in batch]
    optimizer = AdamW(unet.named_parameters(), beta1=0.9, beta2=0.99, clip=0, decay_vectors=True,
                      **OPTIONS)

    def loss_of(x_t, timesteps, context, target, share):
        tape = Tape()
        prediction = unet(x_t, timesteps, context, tape)
        loss, cache = ops.mse(prediction, target)
        dprediction, _ = ops.mse_backward(np.float32(share), cache)
        unet.backward(dprediction, tape)
        return {"loss": share * loss}

    def step():
        report = split_batch(loss_of, batch, xp=xp)
        optimizer.step(RATE)
        return float(report["loss"])
    return unet, step


def their_step(batch, device="cpu"):
    """The same of diffusers' UNet."""
    unet = ReferenceUNet.from_pretrained(resolve(), subfolder="unet", torch_dtype=torch.float32,
                                         low_cpu_mem_usage=False)
    unet.train().to(device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE, betas=(0.9, 0.99), **OPTIONS)
    x_t, timesteps, context, target = batch
    x_t, target = nchw(x_t), nchw(target)
    x_t, target, timesteps, context = (x.to(device) for x in (
        x_t, target, torch.from_numpy(timesteps), torch.from_numpy(context)))
    context.requires_grad_()

    def step():
        loss = F.mse_loss(unet(x_t, timesteps, context).sample, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        context.grad = None
        return loss.item()
    return unet, step


def assert_same_work(unet, ours, reference, theirs):
    """One step of both: the same loss, and weights that moved by the same.

    AdamW's first step is the learning rate times the gradient's sign, nearly, which rounding turns
    where the gradient is almost 0: single weights may part, their mean square may not.
    """
    before = [to_host(parameter.data).copy() for parameter in unet.parameters()]
    losses = ours(), theirs()
    within(abs(losses[0] - losses[1]), 1e-5 * losses[1], f"losses {losses}")
    published, moved, apart = dict(reference.named_parameters()), 0.0, 0.0
    for (name, parameter), old in zip(unet.named_parameters(), before):
        new = to_ours(published[name].cpu())
        moved += ((new - old) ** 2).sum()
        apart += ((to_host(parameter.data) - new) ** 2).sum()
    within(apart ** 0.5, 1e-2 * moved ** 0.5, "the weights' distance, of their step")


if __name__ == "__main__":
    main()
