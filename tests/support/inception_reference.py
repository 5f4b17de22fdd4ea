"""The Inception network of the FID in torch's functions, from its published tables.

Weights are a dict by their names in the public file. Kernels and strides are read off the weights
and the layer's place, so that no code is shared with tinyldm.models.inception.
"""
from tests.support.extra import F, torch

BLOCKS = {  # branches in the order of their channels; "avg", "max" and "half" are pools
    "Mixed_5b": "branch1x1|branch5x5_1 branch5x5_2|branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3|"
                "avg branch_pool",
    "Mixed_6a": "branch3x3/2|branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3/2|half",
    "Mixed_6b": "branch1x1|branch7x7_1 branch7x7_2 branch7x7_3|branch7x7dbl_1 branch7x7dbl_2 "
                "branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5|avg branch_pool",
    "Mixed_7a": "branch3x3_1 branch3x3_2/2|branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 "
                "branch7x7x3_4/2|half",
    "Mixed_7b": "branch1x1|branch3x3_1 branch3x3_2a+branch3x3_2b|branch3x3dbl_1 branch3x3dbl_2 "
                "branch3x3dbl_3a+branch3x3dbl_3b|avg branch_pool",
}
BLOCKS |= dict.fromkeys(("Mixed_5c", "Mixed_5d"), BLOCKS["Mixed_5b"])
BLOCKS |= dict.fromkeys(("Mixed_6c", "Mixed_6d", "Mixed_6e"), BLOCKS["Mixed_6b"])
BLOCKS["Mixed_7c"] = BLOCKS["Mixed_7b"].replace("avg", "max")
STAGES = {64: "Conv2d_1a_3x3/2 Conv2d_2a_3x3 Conv2d_2b_3x3=1 half",
          192: "Conv2d_3b_1x1 Conv2d_4a_3x3 half",
          768: "Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e",
          2048: "Mixed_7a Mixed_7b Mixed_7c"}
POOLS = {"avg": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
         "max": lambda x: F.max_pool2d(x, 3, 1, 1), "half": lambda x: F.max_pool2d(x, 3, 2)}


def inception(weights, x, features=2048):
    """x (B,3,H,W) in [-1, 1] -> (B,features); 1008 are the logits."""
    for width, stage in STAGES.items():
        for name in stage.split():
            if name.startswith("Mixed"):
                x = block(weights, name, x)
            else:
                x = layer(weights, "", name, x, "valid")
        if width == min(features, 2048):
            break
    x = x.mean((2, 3))
    return F.linear(x, weights["fc.weight"], weights["fc.bias"]) if features == 1008 else x


def block(weights, name, x):
    outputs = []
    for branch in BLOCKS[name].split("|"):
        h = x
        for step in branch.split():
            h = torch.cat([layer(weights, f"{name}.", part, h, "same")
                           for part in step.split("+")], 1)
        outputs.append(h)
    return torch.cat(outputs, 1)


def layer(weights, prefix, name, x, padding):
    """A pool; or convolution, batch norm, ReLU: NAME, NAME/stride or NAME=padding."""
    if name in POOLS:
        return POOLS[name](x)
    name, _, stride = name.partition("/")
    name, _, zeros = name.partition("=")
    weight, mean, var, gain, shift = (
        weights[f"{prefix}{name}.{part}"] for part in
        ("conv.weight", "bn.running_mean", "bn.running_var", "bn.weight", "bn.bias"))
    zeros = int(zeros or 0) if padding == "valid" or stride else [k // 2 for k in weight.shape[2:]]
    x = F.conv2d(x, weight, weights.get(f"{prefix}{name}.conv.bias"), int(stride or 1), zeros)
    if f"{prefix}{name}.conv.bias" in weights:
        return F.relu(x)
    if not torch.is_grad_enabled():
        return F.relu(F.batch_norm(x, mean, var, gain, shift, eps=1e-3))
    # With gradients of the statistics, too, which batch_norm does not give.
    mean, var, gain, shift = (p[None, :, None, None] for p in (mean, var, gain, shift))
    return F.relu((x - mean) / (var + 1e-3).sqrt() * gain + shift)


def folded(weights):
    """The same network with each batch norm folded into its convolution's weight and bias."""
    result = dict(weights)
    for name in [name[:-len("conv.weight")] for name in weights if name.endswith("conv.weight")]:
        mean, var, gain, shift = (weights[f"{name}bn.{part}"] for part in
                                  ("running_mean", "running_var", "weight", "bias"))
        scale = gain / (var + 1e-3).sqrt()
        result[f"{name}conv.weight"] = weights[f"{name}conv.weight"] * scale[:, None, None, None]
        result[f"{name}conv.bias"] = shift - mean * scale
    return result
