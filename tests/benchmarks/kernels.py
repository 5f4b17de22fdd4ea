"""Each fast twin against PyTorch, with Stable Diffusion 1.5's shapes, float32, same threads.

    python -m tests.benchmarks.kernels [--rounds 5] [--only conv] [--json PATH]

PyTorch gets its own layout (B,C,H,W).
"""
import numpy as np
import torch
import torch.nn.functional as F

from tests.benchmarks import timing
from tinyldm import backend, ops

CONVS = [                   # B, H, C, O, stride
    # SD 1.5's UNet at 64x64 latents, batch 2 for guidance
    (2, 64, 320, 320, 1), (2, 64, 640, 320, 1), (2, 64, 960, 320, 1), (2, 64, 320, 320, 2),
    (2, 32, 640, 640, 1), (2, 32, 1280, 640, 1), (2, 32, 640, 640, 2),
    (2, 16, 1280, 1280, 1), (2, 16, 2560, 1280, 1), (2, 8, 1280, 1280, 1), (2, 8, 2560, 1280, 1),
    (2, 64, 4, 320, 1), (2, 64, 320, 4, 1),
    # its VAE decoder at 512x512
    (1, 64, 512, 512, 1), (1, 128, 512, 512, 1), (1, 256, 256, 256, 1), (1, 512, 128, 128, 1),
    (1, 512, 128, 3, 1),
    # a training step of the bundled model
    (64, 16, 64, 64, 1), (64, 8, 128, 128, 1), (64, 4, 160, 160, 1)]
NORMS = [                   # B, H, C
    (2, 64, 320), (2, 32, 640), (2, 16, 1280), (2, 8, 1280), (1, 512, 128), (1, 256, 256)]
TOKENS = [                  # B, N, C
    (2, 4096, 320), (2, 1024, 640), (2, 256, 1280)]
ATTENTIONS = [              # B, N, M, C, heads
    (2, 4096, 4096, 320, 8), (2, 1024, 1024, 640, 8), (2, 256, 256, 1280, 8), (2, 64, 64, 1280, 8),
    (2, 4096, 77, 320, 8), (2, 1024, 77, 640, 8), (1, 4096, 4096, 512, 1), (1, 77, 77, 768, 12)]


def normal(*shape, scale=1.0):
    return np.random.default_rng(0).normal(scale=scale, size=shape).astype(np.float32)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def conv(B, H, C, O, stride):
    x, weight, bias = normal(B, H, H, C), normal(3, 3, C, O, scale=(9 * C) ** -0.5), normal(O)
    tx, tbias = nchw(x), torch.from_numpy(bias)
    tweight = torch.from_numpy(np.ascontiguousarray(weight.transpose(3, 2, 0, 1)))
    return (lambda: ops.conv2d(x, weight, bias, stride, (1, 1)),
            lambda: F.conv2d(tx, tweight, tbias, stride, 1))


def group_norm(B, H, C):
    x, weight, bias = normal(B, H, H, C), normal(C), normal(C)
    tx, tweight, tbias = nchw(x), torch.from_numpy(weight), torch.from_numpy(bias)
    return (lambda: ops.group_norm_silu(x, weight, bias, 32, 1e-5),
            lambda: F.silu(F.group_norm(tx, 32, tweight, tbias, 1e-5)))


def layer_norm(B, N, C):
    x, weight, bias = normal(B, N, C), normal(C), normal(C)
    tx, tweight, tbias = (torch.from_numpy(a) for a in (x, weight, bias))
    return (lambda: ops.layer_norm(x, weight, bias, 1e-5),
            lambda: F.layer_norm(tx, (C,), tweight, tbias, 1e-5))


def geglu(B, N, C):
    x = normal(B, N, 8 * C)
    tx = torch.from_numpy(x)
    return lambda: ops.geglu(x), lambda: torch_geglu(tx)


def quick_gelu(B, N, C):
    x = normal(B, N, C)
    tx = torch.from_numpy(x)
    return lambda: ops.quick_gelu(x), lambda: tx * torch.sigmoid(1.702 * tx)


def attention(B, N, M, C, heads):
    q, k, v = normal(B, N, C), normal(B, M, C), normal(B, M, C)
    tq, tk, tv = (torch.from_numpy(a) for a in (q, k, v))
    causal = N == 77
    return (lambda: ops.attention(q, k, v, heads, causal),
            lambda: torch_attention(tq, tk, tv, heads, causal))


CASES = {conv: CONVS, group_norm: NORMS, layer_norm: TOKENS, geglu: TOKENS,
         quick_gelu: [(1, 77, 3072)], attention: ATTENTIONS}


def torch_geglu(x):
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def torch_attention(q, k, v, heads, causal):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def main():
    parser = timing.arguments("Each fast twin against PyTorch", rounds=5)
    parser.add_argument("--only", default="", help="only names that contain this text")
    args = parser.parse_args()
    torch.set_num_threads(backend.num_threads())
    backend.keep_freed_memory()                         # as loading does
    rows = ((f"{case.__name__} {shape}", "s", measure(*case(*shape), args.rounds))
            for case, shapes in CASES.items() if args.only in case.__name__ for shape in shapes)
    timing.report("Operations", rows, "PyTorch", args.json)


@torch.inference_mode()
def measure(ours, theirs, rounds):
    return timing.in_turns({"tinyldm": ours, "PyTorch": theirs}, rounds)


if __name__ == "__main__":
    main()
