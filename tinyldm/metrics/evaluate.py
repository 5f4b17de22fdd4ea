"""How well a model follows prompts it was never trained on: its pictures before the judge.

And how much its VAE loses of true drawings of such prompts.
"""
import numpy as np
from PIL import Image
from tqdm import tqdm

from ..images import to_pil
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


def round_trip(vae, drawings, prompts, at_once=10):
    """Send true drawings through the VAE and back, and score them: the best its latents allow.

    drawings: uint8 (n,H,W,3) of the n prompts. -> as evaluate.
    """
    pictures = []
    for start in tqdm(range(0, len(drawings), at_once), desc="there and back"):
        images = drawings[start:start + at_once].astype(np.float32) / 127.5 - 1
        mean, _ = vae.encode(images)
        pictures += map(np.asarray, to_pil(vae.decode(mean)))
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
