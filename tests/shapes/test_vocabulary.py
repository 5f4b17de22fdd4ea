"""The toy world's tokenizer: one token per word of a caption, and any text spelled."""
import pytest

from tinyldm.shapes.vocabulary import write_tokenizer
from tinyldm.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder, pytest.importorskip("transformers").CLIPTokenizer.from_pretrained(folder)


def test_every_word_of_a_caption_is_one_token(reference, scenes):
    _, tokenizer = reference
    start, end = len(tokenizer) - 2, len(tokenizer) - 1
    assert tokenizer.model_max_length == 77
    for scene in scenes[:200]:
        ids = tokenizer(scene.caption()).input_ids
        assert ids[0] == start and ids[-1] == end
        words = [token.removesuffix("</w>") for token in tokenizer.convert_ids_to_tokens(ids[1:-1])]
        assert " ".join(words) == scene.caption()


@pytest.mark.parametrize("text", ["", "a Photograph of 12 cats!", "größer, 猫 and 🙂", "reddish"])
def test_any_text_is_spelled_without_loss(reference, text):
    _, tokenizer = reference
    ids = tokenizer(text).input_ids[1:-1]
    assert tokenizer.unk_token_id not in ids
    spelled = tokenizer.decode(ids).replace(" ", "")
    assert spelled == text.lower().replace(" ", "")


def test_our_tokenizer_reads_the_files_like_transformers(reference, scenes):
    folder, theirs = reference
    ours = Tokenizer.from_folder(folder)
    texts = [scene.caption() for scene in scenes[:50]] + ["", "größer, 猫 and 🙂", "red " * 100]
    for text in texts:
        padded = theirs(text, padding="max_length", truncation=True, max_length=77).input_ids
        assert ours(text).tolist() == [padded]
