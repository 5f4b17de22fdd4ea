"""The weights of cross-attention: how much each position of a map looks at each token.

ops.attention never stores them, so a hook on the layer computes them again from its inputs, with
the layer's own to_q and to_k. The models stay as they are.

    attention_maps          the smallest use: word by word, for one picture
    cross_attention_hooks   by layer, head and step, for record.py

Beware of reading a map as what its word does. CLIP's text encoder is causal: each token has read
all tokens before it, so that a later one, and the end token, may carry the whole prompt. Gradients
of the tokens' embeddings (gradients.py) say what the word itself does.

Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; as maps of words Tang et al. 2022, "What the
DAAM: Interpreting Stable Diffusion Using Cross Attention", arXiv:2210.04885, section 3.
"""
from functools import partial

import numpy as np

from ..backend import to_host, widen
from ..errors import TinyldmError
from ..layers import NO_TAPE, forward_hooks, named_modules
from ..models.unet import BasicTransformerBlock
from ..ops.attention import split_heads, weights
from .drawing import latents_size, one_picture, progress, read_prompt


def attention_maps(pipe, prompt, *, seed=0, num_inference_steps=25, guidance_scale=None,
                   sampler="ddim", negative_prompt="", **options):
    """Draw a picture of a prompt -> {word: (h,w)}: how much its positions look at each word.

    The mean over all steps, heads and layers of one size, see mean_maps; of a word of several
    tokens, the sum. The second "red" of a prompt is named "red (2)". The options are those of xray.
    Raises TinyldmError as xray does, and for a pipeline without cross-attention.
    """
    request = one_picture(pipe, prompt, dict(
        options, seed=seed, num_inference_steps=num_inference_steps, sampler=sampler,
        guidance_scale=guidance_scale, negative_prompt=negative_prompt))
    network, sums = getattr(pipe, pipe.network), {}
    if not cross_attentions(network):
        raise TinyldmError(f"{pipe.name} has no cross-attention here, so there are no maps of "
                           "words: use a pipeline with a text encoder and its own UNet")

    def see(name, weights):                             # (h,N,M)
        sums[name] = sums.get(name, 0) + weights.mean(axis=0)

    with forward_hooks(cross_attention_hooks(network, see)):
        states = [*progress("drawing", pipe.states(request), pipe.steps_made(request))]
    size = latents_size(pipe, request)
    maps = mean_maps({name: host_map(own[None] / len(states), *size)
                      for name, own in sums.items()})                   # (h,w,M)
    ids, _ = read_prompt(pipe, prompt)
    found, times = {}, {}
    for text, tokens in next(iter(pipe.tokenizers.values())).words(ids):
        times[text] = times.get(text, 0) + 1
        name = text if times[text] == 1 else f"{text} ({times[text]})"
        found[name] = maps[..., tokens].sum(axis=-1)
    return found


def mean_maps(maps):
    """{layer: (...,h_l,w_l,M)} -> (h,w,M), the mean over the layers of one size and all other axes.

    The size is the one nearest to 8 x 8.
    """
    sizes = {own.shape[-3:-1] for own in maps.values()}
    size = min(sizes, key=lambda size: abs(np.log(size[0] * size[1] / 64)))
    return np.mean([own.mean(axis=tuple(range(own.ndim - 3))) for own in maps.values()
                    if own.shape[-3:-1] == size], axis=0)


def attention_weights(layer, x, context):
    """softmax(q @ k.T / sqrt(d)) of an Attention, for each head.

    x (N,C), context (M,D) -> (h,N,M), float32 at least; the weights of each position sum to 1.
    """
    q, k = (widen(split_heads(y[None], layer.num_heads))
            for y in (layer.to_q(x), layer.to_k(context)))              # (1,h,N,d), (1,h,M,d)
    return weights(q, k, 0, causal=False, mask=None)[0]


def cross_attentions(network):
    """{name: Attention}: the layers whose keys come from the context."""
    found = {}
    for name, block in named_modules(network):
        if isinstance(block, BasicTransformerBlock):
            if block.only_cross_attention:
                found[f"{name}.attn1"] = block.attn1
            found[f"{name}.attn2"] = block.attn2
    return found


def cross_attention_hooks(network, see):
    """Hooks for forward_hooks: see(name, weights (h,N,M)) at every call of a cross-attention.

    Of a batch, only the last row is seen: with guidance, that is the prompt's.
    """
    def hook(name, layer, forward, x, context, tape=NO_TAPE, **options):
        see(name, attention_weights(layer, x[-1], context[-1]))
        return forward(x, context, tape, **options)

    return {layer: partial(hook, name, layer) for name, layer in cross_attentions(network).items()}


def host_map(weights, height, width):
    """Weights (h,N,M) of a map of latents (height,width,...) -> NumPy's (h,h_l,w_l,M) float32."""
    positions = weights.shape[1]
    while height * width > positions:
        height, width = -(-height // 2), -(-width // 2)                 # as Downsample2D does
    assert height * width == positions, f"no map of these latents has {positions} positions"
    weights = np.asarray(to_host(weights), np.float32)
    return weights.reshape(len(weights), height, width, -1)
