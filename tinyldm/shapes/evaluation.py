"""How well a model follows prompts it was never trained on: its pictures before the judge."""
import numpy as np
from PIL import Image
from tqdm import tqdm

from .judge import score


def evaluate(pipe, prompts, **options):
    """Draw every prompt once, each with its own seed, and score the pictures.

    pipe: a StableDiffusion; options: its own (steps, guidance_scale …). -> (accuracies by name in
    [0, 1], list of pictures uint8 (H,W,3)).
    """
    pictures = []
    for seed, prompt in enumerate(tqdm(prompts, desc="drawing")):
        pictures.append(np.asarray(pipe(prompt, seed=seed, **options)[0]))
    return score(pictures, prompts), pictures


def grid(pictures, columns, gap=2):
    """Pictures (H,W,3) uint8 of one size side by side, `columns` a row -> PIL image."""
    H, W, _ = pictures[0].shape
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (W + gap) - gap, rows * (H + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        at = (i % columns * (W + gap), i // columns * (H + gap))
        sheet.paste(Image.fromarray(picture), at)
    return sheet
