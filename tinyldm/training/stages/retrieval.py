"""What a CLIP finds among pictures that it was not trained on: numbers, and a picture of them.

clip.py looks here every --validate-every and --sample-every steps. Nothing is trained: a picture
finds the caption, and a caption the picture, whose embedding is nearest to its own.
Source: Radford et al. 2021, arXiv:2103.00020, sections 3.1 and 3.2.
"""
import textwrap
from typing import NamedTuple

import numpy as np

from ... import ops
from ...backend import parallel
from ...errors import clean
from ...images import LETTER, LINE, labelled, open_image
from ...pipelines.zero_shot import BATCH

SHOWN = 8                   # pictures of the matrix
CELL, GAP, WORDS = 72, 2, 240       # pixels of it: a cell's side, between cells, for a caption
LOW, HIGH = np.array([255, 255, 255]), np.array([24, 64, 160])      # colours of its numbers


class Found(NamedTuple):
    """The embeddings, of length 1, of pictures and of their captions, without repetitions."""

    images: np.ndarray                                  # (N,P)
    texts: np.ndarray                                   # (M,P)
    own: np.ndarray                                     # (N,), the number of each picture's text


class Retrieval:
    """clip: a ZeroShot. items: of a PictureFolder; each with its first caption.

    classes: (names, the label of each item), or None. templates: see ZeroShot.classifier. size: the
    pairs of a batch, for the loss.
    """

    def __init__(self, clip, items, size, classes=None, templates=()):
        self.clip, self.items, self.size = clip, items, min(size, len(items))
        self.classes, self.templates = classes, templates
        self.texts = list(dict.fromkeys(item.caption for item in items))

    def look(self, items=None):
        """-> Found, of all items or of some."""
        items = self.items if items is None else items
        texts = list(dict.fromkeys(item.caption for item in items))
        parts = [items[i:i + BATCH] for i in range(0, len(items), BATCH)]
        images = parallel(lambda part: self.clip.embed_images(
            [open_image(item.path) for item in part]), parts)
        words = parallel(self.clip.embed_texts, [texts[i:i + BATCH]
                                                 for i in range(0, len(texts), BATCH)])
        return Found(np.concatenate(images), np.concatenate(words),
                     np.array([texts.index(item.caption) for item in items]))

    def measure(self):
        """-> the loss of batches of these pairs, and {name: share of what is found right}."""
        found = self.look()
        cosines = found.images @ found.texts.T                           # (N,M)
        own, texts = found.own, np.arange(len(found.texts))
        shares = {"image to text": np.mean(cosines.argmax(axis=1) == own),
                  "text to image": np.mean(own[cosines.argmax(axis=0)] == texts)}
        if self.classes:
            names, labels = self.classes
            vectors = self.clip.classifier(names, self.templates)
            shares["classes"] = np.mean((found.images @ vectors.T).argmax(axis=1) == labels)
        scale, losses = np.exp(float(self.clip.model.logit_scale.data)), []
        for start in range(0, len(own) - self.size + 1, self.size):
            rows = slice(start, start + self.size)
            logits = scale * found.images[rows] @ found.texts[own[rows]].T
            losses.append(ops.contrastive(logits)[0])
        return float(np.mean(losses)), {name: float(share) for name, share in shares.items()}

    def sentence(self, shares):
        """The shares of `measure` in words."""
        n = len(self.texts)
        said = (f"of {len(self.items)} pictures {shares['image to text']:.1%} find their caption "
                f"among {n}, of the captions {shares['text to image']:.1%} their picture (chance "
                f"{1 / n:.1%})")
        if self.classes:
            k = len(self.classes[0])
            said += f"; {shares['classes']:.1%} find the name of their class among {k} (chance " \
                    f"{1 / k:.1%})"
        return said

    def matrix(self):
        """The cosines of the first pictures with each other's captions -> a PIL image."""
        from PIL import Image, ImageDraw, ImageFont

        first = {}
        for item in self.items:
            first.setdefault(item.caption, item)
        items = list(first.values())[:SHOWN]
        found = self.look(items)
        cosines = found.images @ found.texts.T                           # (picture, text)
        low, high = cosines.min(), cosines.max()
        n, step, font = len(items), CELL + GAP, ImageFont.load_default()
        sheet = Image.new("RGB", (WORDS + n * step, n * step + step), "white")
        draw = ImageDraw.Draw(sheet)
        for i, item in enumerate(items):
            sheet.paste(labelled(open_image(item.path), "", CELL, lines=0), (WORDS + i * step, 0))
            wrapped = textwrap.wrap(clean(item.caption), WORDS // LETTER - 2,
                                    max_lines=CELL // LINE, placeholder=" ...")
            text = "\n".join(wrapped).encode("latin-1", "replace").decode("latin-1")
            draw.text((4, (i + 1) * step + 4), text, "black", font, spacing=0)
        for picture, text in np.ndindex(n, n):
            part = (cosines[picture, text] - low) / max(high - low, 1e-9)
            x, y = WORDS + picture * step, (text + 1) * step
            colour = tuple((LOW + part * (HIGH - LOW)).astype(int))
            draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), colour, "black" if picture == text
                           else None)
            draw.text((x + CELL // 2, y + CELL // 2), f"{cosines[picture, text]:.2f}",
                      "white" if part > 0.5 else "black", font, anchor="mm")
        return sheet
