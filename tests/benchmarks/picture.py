"""A whole picture at SD 1.5's size from float16 weights: tinyldm's command against diffusers.

    python -m tests.benchmarks.picture [--steps 20] [--size 512] [--rounds 5] [--folder PATH]
        [--json PATH]

Each in a process of its own: wall time from start to PNG, and peak memory. The weights are random,
made in a temporary folder (2.1 GB), or in one that stays for the next time.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks import timing

PROMPT = "a lighthouse on a cliff, oil on canvas"
DIFFUSERS = """
import sys
import torch
from diffusers import StableDiffusionPipeline
prompt, folder, steps, size, threads, output = sys.argv[1:]
torch.set_num_threads(int(threads))
pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
generator = torch.Generator().manual_seed(0)
image = pipe(prompt, num_inference_steps=int(steps), height=int(size), width=int(size),
             generator=generator).images[0]
image.save(output)
"""


def main():
    parser = timing.arguments("A whole picture at SD 1.5's size against diffusers", rounds=5)
    parser.add_argument("--steps", type=int, default=20, help="steps of PNDM (20)")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels (512)")
    parser.add_argument("--folder", type=Path, help="keep the weights there (a temporary folder)")
    parser.add_argument("--make", type=Path, help="only make the weights, in this folder")
    args = parser.parse_args()
    if args.make:
        return make_weights(args.make)
    with tempfile.TemporaryDirectory() as temporary:
        folder = with_weights(args.folder or Path(temporary) / "random-sd15")
        contestants = commands(folder, args.steps, args.size, Path(temporary))
        seconds, gigabytes = timing.processes(contestants, args.rounds)
        print(f"largest difference of the two pictures: {difference(Path(temporary))} of 255")
    case = f"{args.size}x{args.size} pixels, {args.steps} steps"
    rows = [(f"{case}, time", "s", seconds), (f"{case}, peak memory", "GB", gigabytes)]
    timing.report("Stable Diffusion 1.5, prompt to PNG, load included", rows, "diffusers",
                  args.json)


def commands(folder, steps, size, output):
    from tinyldm.backend import num_threads

    size, steps = str(size), str(steps)
    return {
        "tinyldm": ["-m", "tinyldm", PROMPT, "--weights", str(folder), "--steps", steps,
                    "--width", size, "--height", size, "--output", str(output / "tinyldm.png")],
        "diffusers": ["-c", DIFFUSERS, PROMPT, str(folder), steps, size, str(num_threads()),
                      str(output / "diffusers.png")],
    }


def difference(folder):
    import numpy as np
    from PIL import Image

    ours, theirs = (np.asarray(Image.open(folder / name), int)
                    for name in ("tinyldm.png", "diffusers.png"))
    return abs(ours - theirs).max()


def with_weights(folder):
    """The folder, with weights made now if it has none, in another process: this one stays small.
    """
    if not (folder / "model_index.json").is_file():
        make = [sys.executable, "-m", "tests.benchmarks.picture", "--make", folder]
        subprocess.run(make, check=True)
    return folder


def make_weights(folder):
    """A folder in the public layout with SD 1.5's configs; its tokenizer knows single letters."""
    import numpy as np

    from tests.support import sd15
    from tinyldm.checkpoints import save_model
    from tinyldm.models import AutoencoderKL, CLIPTextModel, UNet2DConditionModel

    for part, make in (("unet", lambda: UNet2DConditionModel(sd15.UNET)),
                       ("vae", lambda: AutoencoderKL(sd15.VAE)),
                       ("text_encoder", lambda: CLIPTextModel(sd15.TEXT_ENCODER))):
        save_model(sd15.randomise(make()), folder / part, np.float16)
    write_json(folder / "scheduler" / "scheduler_config.json", sd15.SCHEDULER)
    make_tokenizer(folder / "tokenizer")
    write_json(folder / "model_index.json", {            # last: it says that the folder is whole
        "_class_name": "StableDiffusionPipeline", "requires_safety_checker": False,
        "safety_checker": [None, None], "feature_extractor": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"], "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder": ["transformers", "CLIPTextModel"]})


def make_tokenizer(folder):
    from tokenizers.pre_tokenizers import ByteLevel

    signs = sorted(ByteLevel.alphabet())
    special = ["<|startoftext|>", "<|endoftext|>"]
    words = signs + [sign + "</w>" for sign in signs] + special
    write_json(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True,
        "bos_token": special[0],
        "eos_token": special[1], "unk_token": special[1], "pad_token": special[1]})


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")


if __name__ == "__main__":
    main()
