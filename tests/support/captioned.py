"""A folder of pictures that each have a caption of their own, of the toy vocabulary's words."""
from tests.support.pictures_to_train import write_pictures

CAPTIONS = ("red cat", "a low dog", "photo", "cat, red", "low red er", "x", "a cat!", "red red",
            "b", "dog low", "old cat", "hat")


def write_captioned(folder, count=9, size=(20, 16)):
    assert count <= len(CAPTIONS)
    return write_pictures(folder, count, size, CAPTIONS)
