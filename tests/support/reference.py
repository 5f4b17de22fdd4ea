"""Bridges to the reference implementations: the same random weights, gradients side by side."""
from contextlib import contextmanager
from functools import partial
from unittest import mock

import numpy as np

from tests.support.extra import torch
from tests.support.tolerance import within


def to_ours(tensor):
    """A torch tensor in our layout: convolutions (O,C,K,K) -> (K,K,C,O), all else as it is."""
    array = tensor.detach().numpy()
    return np.ascontiguousarray(array.transpose(2, 3, 1, 0)) if array.ndim == 4 else array.copy()


def nchw(array):
    """Our images (B,H,W,C) as a torch tensor (B,C,H,W)."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def nhwc(tensor):
    return np.ascontiguousarray(tensor.detach().numpy().transpose(0, 2, 3, 1))


def has_avx2():
    """Whether torch computes with AVX2: without, its randn and linspace have other last digits."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@contextmanager
def float32_noise():
    """torch.randn draws other numbers in float64: here it draws float32's, and widens them."""
    randn = torch.randn

    def widened(*shape, dtype=None, **options):
        return randn(*shape, **options).to(dtype)

    with mock.patch.object(torch, "randn", widened):
        yield


def sinusoidal(x, dim, sin_first, shift):
    """The sinusoidal embedding in float64; diffusers computes it in float32 for every model."""
    half = dim // 2
    frequencies = 10000.0 ** -(torch.arange(half).double() / (half - shift))
    angles = x.double()[:, None] * frequencies
    parts = [angles.sin(), angles.cos()]
    return torch.cat(parts if sin_first else parts[::-1], 1)


def widen_embeddings(model):
    """Let a UNet or DiT, or a pipeline's, embed in float64: timesteps, sizes, an LCM's guidance."""
    network = getattr(model, "unet", getattr(model, "transformer", model))
    embeddings = [getattr(block.norm1, "emb", None)     # DiT has one in each block
                  for block in getattr(network, "transformer_blocks", [])]
    for owner, name in [(network, "time_proj"), (network, "add_time_proj"),
                        *((embedding, "time_proj") for embedding in embeddings)]:
        if theirs := getattr(owner, name, None):
            theirs.forward = partial(sinusoidal, dim=theirs.num_channels,
                                     sin_first=not theirs.flip_sin_to_cos,
                                     shift=theirs.downscale_freq_shift)
    if hasattr(model, "get_guidance_scale_embedding"):
        model.get_guidance_scale_embedding = lambda w, embedding_dim: sinusoidal(
            1000 * w, embedding_dim, True, 1)


def randomise(reference, seed=0):
    """Fill every parameter with noise, biases and norms too: no zero may hide a wrong gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if parameter.ndim == 1:
                parameter.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
            elif parameter.ndim:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(noise)
    return reference


def reference_names(reference):
    """Name -> tensor, those of CLIP's encoders with the published prefix."""
    half = {"CLIPTextModel": "text_model.", "CLIPVisionModel": "vision_model."}.get(
        type(reference).__name__, "")
    for name, parameter in reference.named_parameters():
        yield name if name.startswith(half) else half + name, parameter


def copy_weights(reference, module):
    """The reference's weights into our module; both must have the same names and shapes."""
    theirs, ours = dict(reference_names(reference)), dict(module.named_parameters())
    assert theirs.keys() == ours.keys(), sorted(theirs.keys() ^ ours.keys())
    for name, parameter in ours.items():
        parameter.data = to_ours(theirs[name])
        shape = parameter.data.shape
        assert shape == parameter.shape, (name, shape, parameter.shape)
        parameter.data.flags.writeable = False
    return module


def assert_same_gradients(reference, module, relative=1e-6):
    """Every parameter of ours has a gradient equal to autograd's, each measured by its own size."""
    ours = dict(module.named_parameters())
    for name, parameter in reference_names(reference):
        assert ours[name].grad is not None, f"{name} got no gradient"
        theirs = to_ours(parameter.grad)
        if (size := abs(theirs).max()) >= 1e-12:
            within(abs(ours[name].grad - theirs).max(), relative * size, f"gradient of {name}")


def chw(x):
    """(B,...,C) -> (B,C,...)."""
    return x.movedim(-1, 1)


def hwc(x):
    return x.movedim(1, -1)
