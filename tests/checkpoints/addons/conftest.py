"""A small Stable Diffusion for add-ons: its folder, and diffusers' pipeline of it."""
import copy

import pytest

from tests.support import small_pipelines
from tests.support.drawing import Reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_pipelines.toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def original(folder):
    return Reference(folder)


@pytest.fixture
def reference(original):
    """A copy of diffusers' pipeline, which a test may change."""
    return copy.deepcopy(original)
