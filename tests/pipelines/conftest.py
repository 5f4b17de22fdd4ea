"""Fixtures of several tests of pipelines."""
import pytest

from tests.support.small_pipelines import smallest
from tinyldm.pipelines.stable_diffusion import load


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    return smallest(tmp_path_factory.mktemp("smallest"))


@pytest.fixture
def small(small_folder):
    return load(small_folder)
