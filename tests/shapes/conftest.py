"""Fixtures of several tests of the toy world."""
import numpy as np
import pytest

from tinyldm.shapes.scenes import sample


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [sample(rng) for _ in range(3000)]
