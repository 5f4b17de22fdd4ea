"""Random LoRAs and learned words, in files of every layout."""
import math

import safetensors.torch
import torch

from tests.support.reference import to_ours
from tests.support.tolerance import assert_allclose

PARTS = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
XL_PARTS = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def make_lora(pipe, layers="", ranks=(3, 4), alphas=(0.5, 1.0, 3.0), seed=0, parts=PARTS):
    """A pair for each layer whose name contains `layers`; ranks and alphas are used in turn."""
    generator, pairs = torch.Generator().manual_seed(seed), {}
    for part in parts:
        for name, layer in getattr(pipe, part).named_modules():
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and layers in name:
                O, *inputs = layer.weight.shape
                rank, alpha = (values[len(pairs) % len(values)] for values in (ranks, alphas))
                down = torch.randn(rank, *inputs, generator=generator) * math.prod(inputs) ** -0.5
                up = torch.randn(O, rank, *[1] * len(inputs[1:]), generator=generator) * 0.3
                pairs[part, name] = down, up, alpha
    return pairs


def merge(pipe, pairs, weight):
    """The definition of a LoRA, computed by torch on diffusers' model."""
    with torch.no_grad():
        for (part, name), (down, up, alpha) in pairs.items():
            W, rank = getattr(pipe, part).get_submodule(name).weight, len(down)
            change = up.flatten(1) @ down.flatten(1)
            W += weight * (1 if alpha is None else alpha / rank) * change.reshape(W.shape)


def public(part, name):
    prefix = "text_model." if part == "text_encoder" and not name.startswith("text_model.") else ""
    return prefix + name


def weights(pipe):
    return {(part, name): parameter.data for part in PARTS
            for name, parameter in getattr(pipe, part).named_parameters()}


def assert_same_weights(pipe, reference, parts=PARTS):
    """Our pipeline and diffusers' have the same weights, except for the rounding of sums."""
    compared = 0
    for part in parts:
        theirs = {public(part, name): tensor
                  for name, tensor in getattr(reference, part).state_dict().items()}
        for name, parameter in getattr(pipe, part).named_parameters():
            assert_allclose(parameter.data, to_ours(theirs[name]), atol=1e-6)
            compared += 1
    assert compared > 100


def kohya(pairs):
    tensors, parts = {}, {part for part, _ in pairs}
    prefixes = XL_PARTS if "text_encoder_2" in parts else PARTS
    for (part, name), (down, up, alpha) in pairs.items():
        flat = prefixes[part] + public(part, name).replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    return tensors


def write(tensors, path, metadata=None):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({name: tensor.contiguous().clone()
                                     for name, tensor in tensors.items()}, path, metadata)
    else:
        torch.save(tensors, path)
    return path


WORD = "<cat-toy>"


def vectors(count=3, width=32):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))
