"""How well a model follows prompts that it was never trained on, by the judge's verdicts."""
import numpy as np
from PIL import Image
from tqdm import tqdm

from .judge import score


def evaluate(pipe, prompts, **options):
    """Draw every prompt once, prompt i with seed i, and score the pictures.

    pipe: a StableDiffusion; options: those of its call. Returns accuracies in [0, 1] by name, and
    the pictures, a list of uint8 (H,W,3).
    """
    pictures = []
    for seed, prompt in enumerate(tqdm(prompts, desc="drawing")):
        pictures.append(np.asarray(pipe(prompt, seed=seed, **options)[0]))
    return score(pictures, prompts), pictures


def grid(pictures, columns, gap=2):
    """Pictures, uint8 (H,W,3) of one size -> one PIL image with `columns` of them per row."""
    H, W, _ = pictures[0].shape
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (W + gap) - gap, rows * (H + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        at = (i % columns * (W + gap), i // columns * (H + gap))
        sheet.paste(Image.fromarray(picture), at)
    return sheet
