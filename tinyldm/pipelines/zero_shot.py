"""Zero-shot classification: CLIP tells which of some words describe a picture, without training.

    clip = ZeroShot.load("openai/clip-vit-base-patch32")
    clip([picture], ["cat", "dog"])                     # probabilities (1,2)

The other way round from the pipelines that draw: a picture goes in, words come out. A class is the
mean of the embeddings of several texts about it, "a photo of a cat.", "a drawing of a cat." ...,
each of length 1; a picture belongs to the class whose vector is nearest to its own embedding.
Source: Radford et al. 2021, arXiv:2103.00020, section 3.1; openai/CLIP, notebooks/
Prompt_Engineering_for_ImageNet.ipynb.
"""
from pathlib import Path

import numpy as np

from .. import ops
from ..backend import to_host, widen
from ..checkpoints.components import load_model, save_model
from ..checkpoints.places import resolve_model
from ..errors import TinyldmError, note
from ..image_processor import ImageProcessor
from ..models.clip_model import CLIPModel

TEMPLATES = ("a photo of a {}.",)
# The seven of CLIP's authors' eighty that they found best for ImageNet.
IMAGENET = ("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
            "a {} in a video game.", "art of the {}.", "a photo of the small {}.")
BATCH = 16                  # pictures or texts at a time, to bound memory


class ZeroShot:
    """model: a CLIPModel. tokenizer: a Tokenizer. processor: an ImageProcessor."""

    def __init__(self, model, tokenizer, processor):
        if not isinstance(model, CLIPModel):
            raise TinyldmError(f"expected a CLIPModel, with both halves, not a "
                               f"{type(model).__name__}: load a whole CLIP")
        text = model.settings.text
        if (tokenizer.model_max_length > text.max_position_embeddings
                or len(tokenizer) > text.vocab_size):
            raise TinyldmError(f"the tokenizer has {len(tokenizer)} words and rows of "
                               f"{tokenizer.model_max_length}, but this CLIP reads "
                               f"{text.vocab_size} and {text.max_position_embeddings}: use its own")
        self.model, self.tokenizer, self.processor = model, tokenizer, processor

    def __repr__(self):
        return f"<ZeroShot: {self.model!r}>"

    @classmethod
    def load(cls, folder, dtype=np.float32):
        """Read a folder, or a repository of the Hugging Face hub, that holds a CLIPModel, its
        tokenizer and its preprocessor_config.json.

        Raises TinyldmError for anything missing or wrong in it.
        """
        from ..text.tokenizer import Tokenizer  # here: `import tinyldm` need not wait for it

        folder = resolve_model(folder, dtype)
        if not Path(folder).is_dir():
            raise TinyldmError(f"{folder} must be a folder with a CLIP, its tokenizer and its "
                               "image processor: read a file by load_model, and make a ZeroShot "
                               "of the three")
        tokenizer, processor = Tokenizer.from_folder(folder), ImageProcessor.from_folder(folder)
        return cls(load_model(folder, dtype), tokenizer, processor)

    def save(self, folder, dtype=np.float16):
        """Write all three into a new or an empty folder, from which transformers loads them, too.

        dtype: see save_model. Raises TinyldmError for a folder that holds something.
        """
        self.tokenizer.save(folder)
        save_model(self.model, folder, dtype)
        self.processor.save(folder)

    def __call__(self, images, names, templates=TEMPLATES):
        """PIL images, names of classes -> probabilities (images, names) float64; see classifier."""
        return self.probabilities(images, self.classifier(names, templates))

    def classifier(self, names, templates=TEMPLATES):
        """Names of classes -> one vector of length 1 for each, (names, P) float64.

        templates: texts with {} in place of the name. The embeddings of all of them are normalised,
        averaged, and normalised again.
        Raises TinyldmError for what is no list of texts.
        """
        check_texts("names", names)
        check_texts("templates", templates)
        if wrong := [template for template in templates if "{}" not in template]:
            raise TinyldmError(f"a template must have {{}} in place of a class's name, but "
                               f"{wrong[0]!r:.80} has none: use one like {TEMPLATES[0]!r}")
        texts = [template.replace("{}", name) for name in names for template in templates]
        embeds = self.embed_texts(texts).reshape(len(names), len(templates), -1)
        return ops.unit(embeds.mean(axis=1))[0]

    def probabilities(self, images, classifier):
        """PIL images, the vectors of classes (K,P) -> probabilities (images, K) float64.

        The softmax of exp(logit_scale), which is 100 in OpenAI's models, times the cosines.
        Raises TinyldmError for vectors of another length.
        """
        scale, embeds = np.exp(float(self.model.logit_scale.data)), self.embed_images(images)
        if getattr(classifier, "shape", ())[1:] != embeds.shape[1:]:
            raise TinyldmError(f"the classifier must be an array of shape (classes, "
                               f"{embeds.shape[1]}), not {classifier!r:.80}: make it by classifier")
        return ops.softmax(scale * embeds @ classifier.T)[0]

    def embed_images(self, images):
        """PIL images -> their embeddings, of length 1, (images, P) float64."""
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        return self._embed(images, self._pixels, self.model.encode_image, self.model.dtype)

    def embed_texts(self, texts):
        """Texts -> their embeddings, of length 1, (texts, P) float64. A note says what is cut."""
        check_texts("texts", texts)
        return self._embed(texts, self._ids, self.model.encode_text, np.int64)

    def _embed(self, items, prepare, encode, dtype):
        """As few items as BATCH at a time; the host prepares them, the model's device encodes."""
        if not items:
            raise TinyldmError("expected one picture at least, got none: give a list of PIL images")
        rows = [widen(to_host(encode(self.model.xp.asarray(prepare(items[i:i + BATCH]), dtype))))
                for i in range(0, len(items), BATCH)]
        return ops.unit(np.concatenate(rows).astype(np.float64))[0]

    def _pixels(self, images):
        size, pixels = self.model.settings.vision.image_size, self.processor(images)
        if pixels.shape[1:3] != (size, size):
            raise TinyldmError("the image processor makes pictures of "
                               f"{pixels.shape[2]}x{pixels.shape[1]} pixels, but this CLIP reads "
                               f"{size}x{size}: use its own")
        return pixels                                   # (images, H, W, 3)

    def _ids(self, texts):
        most = self.tokenizer.model_max_length - 2
        rows = []
        for text in texts:
            ids = self.tokenizer.ids(text)
            if len(ids) > most:
                note(f"{text!r:.40} has {len(ids)} tokens, but CLIP reads {most}: its end is cut")
            rows.append(self.tokenizer.row(ids[:most]))
        return np.concatenate(rows)                     # (texts, T)


def check_texts(what, texts):
    """Raise TinyldmError for anything but a list of texts, at least one, none of them blank."""
    if isinstance(texts, (list, tuple)) and texts and all(
            isinstance(text, str) and text.strip() for text in texts):
        return
    raise TinyldmError(f"{what} must be a list of texts, at least one, none of them empty, not "
                       f"{texts!r:.80}: give one like ['a cat', 'a dog']")
