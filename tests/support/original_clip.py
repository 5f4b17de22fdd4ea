"""The original CLIP in torch, as openai/CLIP's clip/model.py has it: same names, same numbers.

openai/CLIP is not installed. What differs from transformers' class: q, k and v in one matrix, both
projections stored transposed, positions that are bare tensors, and no config.
"""
import torch
from torch import nn


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width, heads, hidden, act):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, hidden))
        self.mlp.add_module("gelu", act())
        self.mlp.add_module("c_proj", nn.Linear(hidden, width))

    def forward(self, x, mask):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, *block):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, *block) for _ in range(layers))

    def forward(self, x, mask):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class VisionTransformer(nn.Module):
    def __init__(self, size, patch, width, layers, embed, *block):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, *block)
        self.proj = nn.Parameter(torch.randn(width, embed))

    def forward(self, x):
        x = self.conv1(x).flatten(2).permute(0, 2, 1)                    # (N,G*G,W)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding), None)
        return self.ln_post(x[:, 0]) @ self.proj


class OriginalCLIP(nn.Module):
    """sizes: OpenAI's files also hold three whole numbers; open_clip's do not."""

    def __init__(self, size=12, patch=4, width=64, layers=2, heads=1, hidden=96, text_width=64,
                 text_layers=1, text_heads=1, vocabulary=99, length=20, embed=6, act=QuickGELU,
                 sizes=True):
        super().__init__()
        self.visual = VisionTransformer(size, patch, width, layers, embed, heads, hidden, act)
        self.transformer = Transformer(text_width, text_layers, text_heads, 4 * text_width, act)
        self.token_embedding = nn.Embedding(vocabulary, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(length, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, embed))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        if sizes:
            for name, number in (("input_resolution", size), ("context_length", length),
                                 ("vocab_size", vocabulary)):
                self.register_buffer(name, torch.tensor(number))

    def encode_text(self, ids):
        M = ids.shape[1]
        mask = torch.full((M, M), -torch.inf, dtype=self.ln_final.weight.dtype).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding[:M]
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), ids.argmax(dim=-1)] @ self.text_projection

    def forward(self, images, ids):
        u, v = self.visual(images), self.encode_text(ids)
        u, v = (x / x.norm(dim=1, keepdim=True) for x in (u, v))
        return self.logit_scale.exp() * u @ v.t()
