"""One training step of each stage, float32, ours against PyTorch: its time and its peak memory.

    python -m tests.benchmarks.steps [--only lora ddpm] [--rounds 5] [--json PATH]

Each side of a stage is a process of its own, steps_ours.py or steps_torch.py. Both build the model
from the same random weights, and then make one step at a time, in turns; one waits while the other
works. A step is forward, the stage's loss, backward and AdamW; the batch is given. The losses of
all steps must agree: those after the first one tell whether the updates were alike. Memory is the
peak of the process.
"""
import json
import math
import os
import subprocess
import sys
import time
import zlib

import numpy as np

from tests.benchmarks import timing
from tinyldm.checkpoints.single_file.kinds import SD1
from tinyldm.shapes import configs
from tinyldm.training.stages.new_models import UNETS

RATE, RANK = 1e-4, 4
DRAWN = 1_000_003           # numbers: a prime, so that no two rows of a matrix are the same
PIXELS = {"in_channels": 3, "out_channels": 3}
NEW_VAE = PIXELS | {
    "act_fn": "silu", "block_out_channels": [64, 128, 256], "latent_channels": 4,
    "layers_per_block": 1, "norm_num_groups": 32, "sample_size": 64,
    "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
HALF = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3,
        "num_attention_heads": 3}
CLIP = {"projection_dim": 96,
        "text_config": HALF | {"vocab_size": 1000, "max_position_embeddings": 77,
                               "bos_token_id": 998, "eos_token_id": 999, "pad_token_id": 999},
        "vision_config": HALF | {"image_size": 64, "patch_size": 8}}
TEXT_ENCODER = SD1.text_encoder

# {name: (what, config of the model that is trained, batch, height = width of its input)}
STAGES = {
    "unet": ("the bundled UNet", configs.UNET, 64, 16),
    "vae": ("the bundled VAE, L1 + squares + KL", configs.VAE, 8, 64),
    "lora": ("LoRA of SD 1.5's attention, checkpoints", SD1.unet, 1, 64),
    "textual_inversion": ("a word of SD 1.5, checkpoints", SD1.unet, 1, 32),
    "autoencoder": ("a new VAE of 64 to 256 channels, L1 + KL", NEW_VAE, 8, 64),
    "ddpm": ("DDPM's UNet for CIFAR-10", UNETS["cifar10"] | PIXELS | {"sample_size": 32}, 8, 32),
    "clip": ("a new CLIP of 96 channels", CLIP, 64, 64),
}


def main():
    parser = timing.arguments("One training step of each stage against PyTorch's", rounds=5)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES),
                        help="which stages (all)")
    args = parser.parse_args()
    timing.report("A training step", (row for name in args.only for row in rows(name, args.rounds)),
                  "PyTorch", args.json)


def rows(name, rounds):
    """The rows of a stage: time and memory."""
    what, _, batch, side = STAGES[name]
    sides = {"tinyldm": Side("steps_ours", name), "PyTorch": Side("steps_torch", name)}
    seconds = timing.in_turns(sides, rounds, measure=Side.step)
    losses = [side.losses for side in sides.values()]
    assert np.allclose(*losses, rtol=1e-3), f"{name}: the losses part, {losses}"
    memory = {who: [side.end()] for who, side in sides.items()}
    what = f"{name}, {what}: {batch} x {side}x{side}"
    yield f"{what}, time", "s", seconds
    yield f"{what}, memory", "GB", memory


class Side:
    """One contestant: a process that answers each line with one step."""

    def __init__(self, module, stage):
        command = [sys.executable, "-m", f"tests.benchmarks.{module}", stage]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)
        self.losses = []

    def step(self):
        """-> seconds."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{' '.join(self.process.args)} ended")
        seconds, loss = json.loads(answer)
        self.losses.append(loss)
        return seconds

    def end(self):
        """-> its peak memory in GB."""
        self.process.stdin.close()
        _, _, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = 0
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# ---- what both sides share ------------------------------------------------------------------

def serve(step):
    """Make a step for each line of the input, and answer with its seconds and its loss."""
    for _ in sys.stdin:
        begun = time.perf_counter()
        loss = step()
        print(json.dumps([time.perf_counter() - begun, float(loss)]), flush=True)


def numbers(name, shape):
    """Random weights of a parameter, by its public name, in our layout: as sd15.randomise."""
    noise = normal(name, *shape)
    if noise.ndim == 0:
        return np.float32(math.log(1 / 0.07))           # CLIP's scale
    if noise.ndim == 1:
        return np.float32(0.2) * noise + np.float32("norm" in name and name.endswith("weight"))
    fan_in = shape[1] if noise.ndim == 2 else math.prod(shape[:3])
    return noise * np.float32(fan_in ** -0.5)


def normal(name, *shape):
    """Normal numbers, always the same ones for a name. Of large arrays, a million are repeated."""
    rng, size = np.random.default_rng(zlib.crc32(name.encode())), math.prod(shape)
    return np.resize(rng.standard_normal(min(size, DRAWN), np.float32), shape)


def images(name):
    """(B,H,W,3) in [-1, 1], about."""
    *_, batch, side = STAGES[name]
    return np.float32(0.5) * normal("images", batch, side, side, 3)


def diffusion(name):
    """x_start and noise (B,H,W,C), timesteps (B,)."""
    _, config, batch, side = STAGES[name]
    shape = batch, side, side, config["in_channels"]
    timesteps = np.random.default_rng(0).integers(1000, size=batch)
    return normal("x_start", *shape), normal("noise", *shape), timesteps


def token_ids(vocabulary, batch, new=()):
    """(B,77): random tokens between the start and end tokens, which are the last of the vocabulary,
    and perhaps new tokens among them."""
    ids = np.random.default_rng(1).integers(vocabulary - 2, size=(batch, 77))
    ids[:, 0], ids[:, 20:] = vocabulary - 2, vocabulary - 1
    ids[:, 5:5 + len(new)] = new
    return ids


if __name__ == "__main__":
    main()
