"""All the calculus: pure functions of arrays, each op with its derivative directly below it.

    y, cache = op(x, ...)            dx, dw, db = op_backward(dy, cache)

Letters in the shape comments, here and in all files that use these ops:

    B batch · H, W height, width · C channels in · O channels out · K kernel · G groups
    N = H*W tokens (queries) · M context tokens (77) · D context width (768)
    h heads · d head width · E time-embedding width · V vocabulary

Images are channels last, (B,H,W,C), so the channels of a pixel are a row of a matrix. `dx` is the
gradient of the loss with respect to x. Gradients come back in the order of the op's array
arguments. A cache holds only inputs and small statistics; what is cheap is computed again.
`@fast_twin` above an op names its faster twins in kernels/; the op is complete without them.
"""
# ruff: noqa: I001 (each op beside its backward)
from .activation import (
    geglu, geglu_backward, gelu, gelu_backward, gelu_tanh, gelu_tanh_backward,
    leaky_relu, leaky_relu_backward,
    quick_gelu, quick_gelu_backward, silu, silu_backward, softmax, softmax_backward)
from .attention import attention, attention_backward
from .conv import (
    conv2d, conv2d_backward, conv2d_input_backward,
    downsample_average, downsample_average_backward, resize_bilinear, resize_bilinear_backward,
    upsample_bilinear, upsample_bilinear_backward, upsample_nearest, upsample_nearest_backward)
from .embedding import (
    embedding, embedding_backward, timestep_embedding, timestep_embedding_backward)
from .gaussian import (
    discretized_log_likelihood, discretized_log_likelihood_backward,
    gaussian_kl, gaussian_kl_backward)
from .linear import (
    linear, linear_backward, linear_input_backward, scale_shift, scale_shift_backward,
    similarity, similarity_backward)
from .loss import (
    contrastive, contrastive_backward,
    cross_entropy, cross_entropy_backward, hinge, hinge_backward, kl_normal, kl_normal_backward,
    l1, l1_backward, mse, mse_backward)
from .modulation import (
    ada_group_norm_silu, ada_group_norm_silu_backward, ada_layer_norm, ada_layer_norm_backward,
    add_gated, add_gated_backward)
from .norm import (
    batch_norm, batch_norm_backward, batch_norm_relu, batch_norm_relu_backward,
    group_norm, group_norm_backward,
    group_norm_silu, group_norm_silu_backward, layer_norm, layer_norm_backward,
    unit, unit_backward)
from .pool import average_pool, average_pool_backward, max_pool, max_pool_backward
from .shape import (
    concat, concat_backward, split, split_backward, unpatchify, unpatchify_backward)
