"""The original DiT in torch, as its paper and its file describe it: same names, same numbers.

facebookresearch/DiT is not installed. What differs from diffusers' class: one embedding for all
blocks, frequencies divided by 128, eps 1e-6 in every norm, q, k and v in one matrix, and positions
that are stored. Everything is computed in the dtype of the weights.
"""
import torch
from torch import nn
from torch.nn import functional as F


class OriginalDiT(nn.Module):
    def __init__(self, depth, width, heads, patch, size=32, channels=4, classes=1000, out=8):
        super().__init__()
        self.patch, self.out = patch, out
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, width, patch, patch)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(),
                                            nn.Linear(width, width))
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(classes + 1, width)
        self.pos_embed = nn.Parameter(positions(width, size // patch)[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(width, patch * patch * out)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, t, y):                         # (N,C,H,W), (N,), (N,) -> (N,O,H,W)
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed     # (N,T,D)
        frequencies = 10000.0 ** (-torch.arange(128, dtype=x.dtype) / 128)
        angles = t.to(x.dtype)[:, None] * frequencies
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], 1))
        c = c + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer.adaLN_modulation(c).chunk(2, 1)
        x = self.final_layer.linear(modulated(x, shift, scale))
        n, side, p = len(x), int(x.shape[1] ** 0.5), self.patch
        x = x.reshape(n, side, side, p, p, self.out)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(n, self.out, side * p, side * p)

    def forward_with_cfg(self, x, t, y, scale):
        """Guidance as the original has it: on the first three channels only."""
        half = x[:len(x) // 2]
        output = self.forward(torch.cat([half, half]), t, y)
        guided, rest = output[:, :3], output[:, 3:]
        cond, uncond = guided.chunk(2)
        cond = uncond + scale * (cond - uncond)
        return torch.cat([torch.cat([cond, cond]), rest], 1)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        m = self.adaLN_modulation(c).chunk(6, 1)
        x = x + m[2][:, None] * self.attention(modulated(x, m[0], m[1]))
        h = self.mlp.fc2(F.gelu(self.mlp.fc1(modulated(x, m[3], m[4])), approximate="tanh"))
        return x + m[5][:, None] * h

    def attention(self, x):
        n, tokens, width = x.shape
        q, k, v = self.attn.qkv(x).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.attn.proj(y.transpose(1, 2).reshape(n, tokens, width))


def modulated(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def positions(width, grid):
    """(grid * grid, width): the first half tells a token's column, the second its row."""
    frequencies = 10000.0 ** (-torch.arange(width // 4).double() / (width // 4))
    angles = torch.arange(grid).double()[:, None] * frequencies
    e = torch.cat([angles.sin(), angles.cos()], 1)      # (grid, width / 2)
    return torch.cat([e.repeat(grid, 1), e.repeat_interleave(grid, 0)], 1).float()
