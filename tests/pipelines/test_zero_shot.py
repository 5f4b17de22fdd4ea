"""Zero-shot classification against transformers' CLIPModel, tokenizer and PIL processor."""
import numpy as np
import pytest
import torch
import transformers

from tests.support.small_clip import pictures, write_clip
from tests.support.tolerance import assert_close, within
from tinyldm.checkpoints.components import load_model, save_model
from tinyldm.errors import TinyldmError
from tinyldm.image_processor import ImageProcessor
from tinyldm.models import CLIPVisionModelWithProjection
from tinyldm.pipelines.zero_shot import IMAGENET, ZeroShot
from tinyldm.text.tokenizer import Tokenizer

NAMES = ["cat", "red dog", "old {hat}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder):
    return ZeroShot.load(folder, np.float64)


@pytest.fixture(scope="module")
def reference(folder):
    """texts, images -> text embeddings, image embeddings, logits."""
    model = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)

    def call(texts, images):
        ids = tokenizer(texts, padding="max_length", max_length=77, truncation=True,
                        return_tensors="pt")
        with torch.no_grad():
            found = model(**ids, pixel_values=processor(images, return_tensors="pt")[
                "pixel_values"].double())
        return [x.numpy() for x in (found.text_embeds, found.image_embeds, found.logits_per_image)]
    return call


def test_one_template_equals_transformers(clip, reference):
    texts = [f"a photo of a {name}." for name in NAMES]
    text_embeds, image_embeds, logits = reference(texts, pictures())
    assert_close(clip.embed_texts(texts), text_embeds, 1e-10)
    assert_close(clip.embed_images(pictures()), image_embeds, 1e-10)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    within(abs(clip(pictures(), NAMES) - shares / shares.sum(axis=1, keepdims=True)).max(), 1e-12)


def test_templates_are_normalised_averaged_normalised(clip, reference):
    expected = []
    for name in NAMES:
        embeds = reference([template.replace("{}", name) for template in IMAGENET],
                           pictures(1))[0].mean(axis=0)
        expected.append(embeds / np.linalg.norm(embeds))
    classifier = clip.classifier(NAMES, IMAGENET)
    assert_close(classifier, np.stack(expected), 1e-10)
    shares = clip.probabilities(pictures(), classifier)
    assert shares.shape == (3, 3) and np.allclose(shares.sum(axis=1), 1, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(shares, clip(pictures(), NAMES, IMAGENET))


def test_the_class_whose_vector_is_the_picture(clip):
    """A toy: the picture's own embedding, among others, as a class."""
    classes = np.concatenate([clip.classifier(NAMES), clip.embed_images(pictures(2))])
    assert list(clip.probabilities(pictures(2), classes).argmax(axis=1)) == [3, 4]


def test_many_pictures_in_batches(clip):
    few, many = pictures(3), [picture for _ in range(7) for picture in pictures(3)]
    assert_close(clip.embed_images(many)[-3:], clip.embed_images(few), 1e-10)
    np.testing.assert_array_equal(clip.embed_images(few[0]), clip.embed_images(few[:1]))


def test_a_long_text_is_cut_with_a_note(clip, recwarn):
    text = "cat " * 80
    embeds = clip.embed_texts([text])
    assert "CLIP reads 75: its end is cut" in str(recwarn.pop().message)
    assert_close(embeds, clip.embed_texts(["cat " * 75]), 1e-10)


@pytest.mark.parametrize("names, templates, message", [
    ([], ["a {}"], "names must be a list of texts, at least one"),
    ("cat", ["a {}"], "names must be a list of texts"), (["cat", " "], ["a {}"], "names must be"),
    (["cat", 5], ["a {}"], "names must be"), (None, ["a {}"], "names must be"),
    (["cat"], [], "templates must be"), (["cat"], "a {}", "templates must be"),
    (["cat"], ["a photo of a {}.", "a photo"], "a template must have {} .* 'a photo' has none"),
])
def test_refused_texts(clip, names, templates, message):
    with pytest.raises(TinyldmError, match=message):
        clip(pictures(), names, templates)


@pytest.mark.parametrize("images, message", [
    ([], "expected one picture at least"), ("cat.png", "image must be a PIL image"),
    ([np.zeros((4, 4, 3))], "image must be a PIL image")])
def test_refused_pictures(clip, images, message):
    with pytest.raises(TinyldmError, match=message):
        clip(images, NAMES)


def test_saved_folders_load_here_and_in_transformers(clip, tmp_path):
    clip.save(tmp_path / "new", np.float64)
    np.testing.assert_array_equal(ZeroShot.load(tmp_path / "new", np.float64)(pictures(), NAMES),
                                  clip(pictures(), NAMES))
    model = transformers.CLIPModel.from_pretrained(tmp_path / "new", dtype=torch.float64).eval()
    ids = transformers.CLIPTokenizer.from_pretrained(tmp_path / "new")(
        [f"a photo of a {name}." for name in NAMES], padding=True, return_tensors="pt")
    pixels = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path / "new")(
        pictures(), return_tensors="pt")["pixel_values"].double()
    with torch.no_grad():
        theirs = model(**ids, pixel_values=pixels).logits_per_image.softmax(1).numpy()
    within(abs(clip(pictures(), NAMES) - theirs).max(), 1e-12)
    with pytest.raises(TinyldmError, match="cannot copy the tokenizer"):
        clip.save(tmp_path / "new")


def test_what_is_no_whole_clip(clip, folder, tmp_path):
    half = CLIPVisionModelWithProjection({"num_hidden_layers": 1})
    with pytest.raises(TinyldmError, match="expected a CLIPModel, with both halves, not a CLIPVis"):
        ZeroShot(half, clip.tokenizer, clip.processor)
    for processor in ImageProcessor(), ImageProcessor({"size": 12, "crop_size": 13}):
        with pytest.raises(TinyldmError, match="but this CLIP reads 12x12: use its own"):
            ZeroShot(clip.model, clip.tokenizer, processor)(pictures(), NAMES)
    longer = Tokenizer.from_folder(folder)
    longer.model_max_length = 100
    with pytest.raises(TinyldmError, match="rows of 100, but this CLIP reads 99 and 77: use its"):
        ZeroShot(clip.model, longer, clip.processor)
    with pytest.raises(TinyldmError, match="must be a folder with a CLIP"):
        ZeroShot.load(folder / "model.safetensors")
    save_model(load_model(folder), tmp_path)
    with pytest.raises(TinyldmError, match="vocab.json"):
        ZeroShot.load(tmp_path)


@pytest.mark.parametrize("classifier", [np.zeros((2, 3)), np.zeros(6), "cat", None], ids=str)
def test_vectors_of_classes_of_another_length(classifier, clip):
    with pytest.raises(TinyldmError, match=r"must be an array of shape \(classes, 6\), not"):
        clip.probabilities(pictures(1), classifier)
