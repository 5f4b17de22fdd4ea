"""Weights and pictures for the stages."""
import pytest

from tests.support import small_pipelines
from tests.support.pictures_to_train import write_pictures


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """A function from a name in small_pipelines to its folder, a folder of pictures with captions,
    and one of other pictures."""
    root, made = tmp_path_factory.mktemp("stages"), {}

    def weights(name):
        if name not in made:
            made[name] = getattr(small_pipelines, name)(root / name)
        return made[name]
    return weights, write_pictures(root / "pictures"), write_pictures(root / "class", 3)
