"""Stage 5: how well a model follows prompts that it never saw in training, by the judge."""
import json

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..files import write_json
from ..pipelines.stable_diffusion import load
from .judge import score
from .scenes import held_out_prompts

SHOWN, COLUMNS, GAP = 48, 12, 2     # pictures in samples.png, pictures per row, pixels between them


def evaluate(weights, prompts, output):
    """Draw so many held-out prompts, prompt i with seed i, and print the accuracies, in [0, 1].

    weights: as for load. output: a folder for the accuracies and the first pictures, or None.
    """
    pipe, prompts = load(weights), held_out_prompts(prompts, seed=0)
    pictures = [np.asarray(pipe(prompt, seed=seed)[0])
                for seed, prompt in enumerate(tqdm(prompts, desc="drawing"))]
    accuracies = {name: round(value, 4) for name, value in score(pictures, prompts).items()}
    report = {"prompts": len(prompts), **accuracies}
    print(json.dumps(report, indent=2))
    if output:
        write_json(output / "accuracy.json", report)
        grid(pictures[:SHOWN]).save(output / "samples.png")
        (output / "samples.txt").write_text("\n".join(prompts[:SHOWN]) + "\n")


def grid(pictures):
    """Pictures, uint8 (H,W,3) of one size -> one PIL image with COLUMNS of them per row."""
    H, W, _ = pictures[0].shape
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (W + GAP) - GAP, rows * (H + GAP) - GAP), "white")
    for i, picture in enumerate(pictures):
        at = (i % COLUMNS * (W + GAP), i // COLUMNS * (H + GAP))
        sheet.paste(Image.fromarray(picture), at)
    return sheet
