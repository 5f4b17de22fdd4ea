"""What an op keeps for its backward: references to its inputs and small statistics."""
import numpy as np
import pytest

from tests.support.arrays import arrays_in
from tinyldm import ops

B, H, C, G, T = 2, 6, 8, 4, 12                          # T tokens


@pytest.mark.parametrize("name, numbers, new, params", [
    ("linear", [(T, C), (5, C), (5,)], 0, {}),
    ("conv2d", [(B, H, H, C), (3, 3, C, 5), (5,)], 0, {"padding": (1, 1)}),
    ("upsample_nearest", [(B, H, H, C)], 0, {}),
    ("downsample_average", [(B, H, H, C)], 0, {}),
    ("upsample_bilinear", [(B, H, H, C)], 2 * 2 * H * H, {"size": (2 * H, 2 * H)}),
    ("group_norm", [(B, H, H, C), (C,), (C,)], 2 * B * G, {"num_groups": G, "eps": 1e-5}),
    ("group_norm_silu", [(B, H, H, C), (C,), (C,)], 2 * B * G, {"num_groups": G, "eps": 1e-5}),
    ("layer_norm", [(T, C), (C,), (C,)], 2 * T, {"eps": 1e-5}),
    ("resize_bilinear", [(B, H, H, C)], 2 * 3 * H, {"size": (3, 3)}),
    ("batch_norm", [(B, H, H, C), (C,), (C,)], 2 * C, {"eps": 1e-5}),
    ("leaky_relu", [(T, C)], 0, {}), ("hinge", [(T, C)] * 2, 0, {}),
    ("batch_norm_relu", [(B, H, H, C)] + [(C,)] * 4, 0, {"eps": 9}),
    ("max_pool", [(B, H, H, C)], B * 2 * 2 * C, {"K": 3, "stride": 2}),      # the output
    ("average_pool", [(B, H, H, C)], 0, {"K": 3, "padding": (1, 1)}),
    ("silu", [(T, C)], 0, {}), ("gelu", [(T, C)], 0, {}), ("quick_gelu", [(T, C)], 0, {}),
    ("gelu_tanh", [(T, C)], 0, {}), ("geglu", [(T, C)], 0, {}),
    ("ada_layer_norm", [(B, T, C), (B, C), (B, C)], B * (2 * T + C), {"eps": 1e-6}),
    ("ada_group_norm_silu", [(B, H, H, C), (C,), (C,), (B, C), (B, C)], B * (3 * C + 2 * G),
     {"num_groups": G, "eps": 1e-5}),
    ("add_gated", [(B, T, C), (B, T, C), (B, C)], 0, {}),
    ("unpatchify", [(B, 9, 4 * C)], 0, {"patch_size": 2}),
    ("attention", [(B, T, C)] * 3, 0, {"num_heads": 2}),
    ("concat", [(T, C), (T, 3)], 0, {}),
    ("kl_normal", [(B, C), (B, C)], 0, {}),
    ("mse", [(T, C)] * 2, T * C, {}),                   # the difference instead of both
    ("l1", [(T, C)] * 2, T * C, {}),
])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])      # float32: the fast twins
def test_a_cache_holds_inputs_and_small_statistics(name, numbers, new, params, dtype, rng):
    inputs = [rng.normal(size=shape).astype(dtype) for shape in numbers]
    _, cache = getattr(ops, name)(*inputs, **params)
    kept = {id(whole(array)): whole(array).size for array in arrays_in(cache)}
    assert sum(size for key, size in kept.items() if key not in map(id, inputs)) == new


def whole(array):
    """The array that a view keeps alive."""
    return array if array.base is None else whole(array.base)
