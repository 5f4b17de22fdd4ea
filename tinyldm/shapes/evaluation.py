"""Stage 5: how well a model follows prompts that it never saw in training, by the judge.

And how much its VAE loses of true drawings of these prompts.
"""
import json

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..checkpoints import load_model, resolve
from ..cli.console import say
from ..files import make_folder, write_json
from ..images import grid, to_pil
from ..pipelines.loading import load
from .drawing import to_images
from .judge import score
from .scenes import held_out_scenes

SHOWN, COLUMNS, GAP = 48, 12, 2     # pictures in samples.png, pictures per row, pixels between them


def evaluate(weights, prompts, output, round_trip=False):
    """Draw so many held-out prompts, prompt i with seed i, and print the accuracies, in [0, 1].

    weights: as for load. output: a folder for the accuracies and the first pictures, or None.
    round_trip: in place of the model's pictures, true drawings after the VAE's round trip: the best
    that the latents allow.
    """
    if output:
        make_folder(output)                             # before anything is drawn
    scenes = held_out_scenes(prompts, seed=0)
    prompts = list(scenes)
    if round_trip:
        vae = load_model(resolve(weights) / "vae")
        pictures = reconstruct(vae, list(scenes.values()))
    else:
        pipe = load(weights)
        pictures = [np.asarray(pipe(prompt, seed=seed)[0])
                    for seed, prompt in enumerate(tqdm(prompts, desc="drawing"))]
    accuracies = {name: round(value, 4) for name, value in score(pictures, prompts).items()}
    report = {"prompts": len(prompts), **accuracies}
    if output:
        write_json(output / "accuracy.json", report)
        shown = [Image.fromarray(picture) for picture in pictures[:SHOWN]]
        grid(shown, COLUMNS, GAP).save(output / "samples.png")
        (output / "samples.txt").write_text("\n".join(prompts[:SHOWN]) + "\n")
    say(json.dumps(report, indent=2))


def reconstruct(vae, scenes, at_once=10):
    """Draw scenes, encode and decode them -> list of pictures, uint8 (64,64,3)."""
    pictures = []
    for start in tqdm(range(0, len(scenes), at_once), desc="encoding and decoding"):
        mean, _ = vae.encode(to_images(scenes[start:start + at_once]))
        pictures += map(np.asarray, to_pil(vae.decode(mean)))
    return pictures
