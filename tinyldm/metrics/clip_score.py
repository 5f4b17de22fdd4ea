"""How well a picture matches its prompt: the cosine between their CLIP embeddings, on two scales.

Most papers on text to image report 100 times the cosine, with ViT-B/32 or L/14 and the bare prompt.
The paper that named the score has another scale, cuts negative cosines, and puts PREFIX before the
text. Numbers compare only with the same CLIP and the same convention.
Source: Hessel et al. 2021, "CLIPScore", arXiv:2104.08718, section 3; torchmetrics, CLIPScore.
"""
from ..errors import TinyldmError
from ..pipelines.zero_shot import ZeroShot, check_texts

PREFIX = "A photo depicts "
WEIGHT = 2.5                # w of the paper: stretches usual cosines, up to 0.4, to 0..1


def clip_score(model, tokenizer, processor, images, texts):
    """100 * cos(image, text) for each pair -> (N,) float64. The score of a set is their mean.

    model: a CLIPModel. images: N PIL images. texts: N texts.
    Raises TinyldmError for other kinds and numbers of them.
    """
    return 100 * _cosines(model, tokenizer, processor, images, texts)


def clip_s(model, tokenizer, processor, images, texts):
    """The paper's CLIP-S: 2.5 * max(cos(image, "A photo depicts " + text), 0) -> (N,) float64."""
    check_texts("texts", texts)
    texts = [PREFIX + text for text in texts]
    return WEIGHT * _cosines(model, tokenizer, processor, images, texts).clip(0)


def _cosines(model, tokenizer, processor, images, texts):
    clip = ZeroShot(model, tokenizer, processor)
    check_texts("texts", texts)
    images = images if isinstance(images, (list, tuple)) else [images]
    if len(images) != len(texts):
        raise TinyldmError(f"expected one text for each picture, got {len(images)} pictures and "
                           f"{len(texts)} texts")
    return (clip.embed_images(images) * clip.embed_texts(texts)).sum(axis=1)
