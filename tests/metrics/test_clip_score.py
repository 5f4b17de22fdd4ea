"""CLIP scores: the cosine on both scales, against transformers' embeddings."""
import numpy as np
import pytest
import torch
import transformers

from tests.support.small_clip import pictures, write_clip
from tests.support.tolerance import within
from tinyldm.errors import TinyldmError
from tinyldm.metrics.clip_score import clip_s, clip_score
from tinyldm.pipelines.zero_shot import ZeroShot

TEXTS = ["a cat", "red", "low dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def parts(folder):
    clip = ZeroShot.load(folder, np.float64)
    return clip.model, clip.tokenizer, clip.processor


def cosines(folder, texts):
    model = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float64).eval()
    ids = transformers.CLIPTokenizer.from_pretrained(folder)(
        texts, padding=True, return_tensors="pt")       # as short as the longest: no difference
    pixels = transformers.CLIPImageProcessorPil.from_pretrained(folder)(
        pictures(), return_tensors="pt")["pixel_values"].double()
    with torch.no_grad():
        found = model(**ids, pixel_values=pixels)
    return (found.text_embeds * found.image_embeds).sum(1).numpy()


def test_both_conventions(folder):
    scores = clip_score(*parts(folder), pictures(), TEXTS)
    assert scores.shape == (3,) and scores.dtype == np.float64
    within(abs(scores - 100 * cosines(folder, TEXTS)).max(), 1e-8)
    assert scores.min() < 0                             # not cut, or the next lines say nothing
    expected = cosines(folder, [f"A photo depicts {text}" for text in TEXTS])
    assert expected.min() < 0 < expected.max()
    within(abs(clip_s(*parts(folder), pictures(), TEXTS) - 2.5 * expected.clip(0)).max(), 1e-8)


def test_numbers_that_do_not_match(folder):
    with pytest.raises(TinyldmError, match="one text for each picture, got 3 pictures and 2 texts"):
        clip_score(*parts(folder), pictures(), TEXTS[:2])
    with pytest.raises(TinyldmError, match="got 1 pictures and 3 texts"):
        clip_score(*parts(folder), pictures()[0], TEXTS)
    with pytest.raises(TinyldmError, match="texts must be a list of texts"):
        clip_s(*parts(folder), pictures(), ["a cat", None, "red"])
