"""Work cut into blocks."""
import numpy as np
import pytest

from tinyldm.kernels import blocks


@pytest.mark.parametrize("shape", [
    (1, 1, 1), (3, 7, 5), (70, 16, 32), (2, 5000, 320), (1, 3, 200000), (1, 0, 4)], ids=str)
def test_blocks_cover_everything_once(shape):
    counted = np.zeros(shape)

    def count(block):
        counted[block] += 1
        assert counted[block].size <= max(blocks.BLOCK, shape[-1])
    blocks.over_blocks(count, *shape)
    assert (counted == 1).all()
