"""The UNet of Improved DDPM and guided diffusion in PyTorch, with its authors' names.

Written from their description in the fewest lines: the reference for their files, both orders of
q, k and v among them.
"""
import math

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-5)


def sinusoids(t, dim):
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=t.dtype) / half)
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Resize(nn.Module):
    """Without channels there is no convolution, as inside of residual blocks."""

    def __init__(self, up, channels=None):
        super().__init__()
        self.up = up
        if channels and up:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        elif channels:
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        if self.up:
            x = interpolate(x, scale_factor=2.0, mode="nearest")
            return self.conv(x) if hasattr(self, "conv") else x
        return self.op(x) if hasattr(self, "op") else avg_pool2d(x, 2)


class ResBlock(nn.Module):
    def __init__(self, C, O, E, shift, resize=None):
        super().__init__()
        self.shift, self.resize = shift, resize
        self.in_layers = nn.Sequential(norm(C), nn.SiLU(), nn.Conv2d(C, O, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(E, 2 * O if shift else O))
        self.out_layers = nn.Sequential(norm(O), nn.SiLU(), nn.Dropout(0),
                                        nn.Conv2d(O, O, 3, padding=1))
        self.skip_connection = nn.Identity() if C == O else nn.Conv2d(C, O, 1)

    def forward(self, x, emb):
        h = self.in_layers[:2](x)
        if self.resize:
            h, x = self.resize(h), self.resize(x)
        h, emb = self.in_layers[2](h), self.emb_layers(emb)[:, :, None, None]
        if self.shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


class Attention(nn.Module):
    def __init__(self, C, heads, new_order):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm, self.qkv = norm(C), nn.Conv1d(C, 3 * C, 1)
        self.proj_out = nn.Conv1d(C, C, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv, d = self.qkv(self.norm(x).flatten(2)), C // self.heads
        if self.new_order:
            q, k, v = qkv.reshape(B, 3, self.heads, d, H * W).unbind(1)
        else:
            q, k, v = qkv.reshape(B, self.heads, 3, d, H * W).unbind(2)         # (B,heads,d,N)
        weights = torch.softmax((q * d ** -0.25).mT @ (k * d ** -0.25), dim=-1)
        h = (v @ weights.mT).reshape(B, C, H * W)
        return x + self.proj_out(h).reshape(x.shape)


class UNet(nn.Module):
    """size: of the pictures, by which attention counts its levels; head_dim or else heads."""

    def __init__(self, ch, mult, blocks, attention=(16, 8), size=32, *, heads=4, head_dim=None,
                 classes=None, shift=True, updown=False, new_order=False, inputs=3, outputs=6):
        super().__init__()
        E, self.ch = 4 * ch, ch
        self.time_embed = nn.Sequential(nn.Linear(ch, E), nn.SiLU(), nn.Linear(E, E))
        if classes:
            self.label_emb = nn.Embedding(classes, E)

        def attend(C):
            return Attention(C, C // head_dim if head_dim else heads, new_order)

        def resize(up):
            return ResBlock(C, C, E, shift, Resize(up)) if updown else Resize(up, C)

        C, skips = ch, [ch]
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(inputs, ch, 3, padding=1)])])
        self.output_blocks = nn.ModuleList()
        for level, factor in enumerate(mult):
            for _ in range(blocks):
                parts = [ResBlock(C, C := factor * ch, E, shift)]
                parts += [attend(C)] if size in attention else []
                self.input_blocks.append(nn.ModuleList(parts))
                skips.append(C)
            if level < len(mult) - 1:
                self.input_blocks.append(nn.ModuleList([resize(up=False)]))
                skips.append(C)
                size //= 2
        self.middle_block = nn.ModuleList([ResBlock(C, C, E, shift), attend(C),
                                           ResBlock(C, C, E, shift)])
        for level, factor in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                parts = [ResBlock(C + skips.pop(), C := factor * ch, E, shift)]
                parts += [attend(C)] if size in attention else []
                if level and i == blocks:
                    parts.append(resize(up=True))
                    size *= 2
                self.output_blocks.append(nn.ModuleList(parts))
        self.out = nn.Sequential(norm(C), nn.SiLU(), nn.Conv2d(C, outputs, 3, padding=1))

    def forward(self, x, t, y=None):
        emb = self.time_embed(sinusoids(t.to(x.dtype), self.ch))
        if y is not None:
            emb = emb + self.label_emb(y)
        skips = []
        for block in self.input_blocks:
            x = through(block, x, emb)
            skips.append(x)
        x = through(self.middle_block, x, emb)
        for block in self.output_blocks:
            x = through(block, torch.cat([x, skips.pop()], dim=1), emb)
        return self.out(x)


def through(layers, x, emb):
    for layer in layers:
        x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
    return x


# The published files, by the flags in their authors' README.
PUBLISHED = {
    "cifar10": {"ch": 128, "mult": (1, 2, 2, 2), "blocks": 3},
    "imagenet64": {"ch": 128, "mult": (1, 2, 3, 4), "blocks": 3, "size": 64},
    "imagenet64 with classes": {"ch": 192, "mult": (1, 2, 3, 4), "blocks": 3, "size": 64,
                                "classes": 1000},
    "lsun256": {"ch": 128, "mult": (1, 1, 2, 2, 4, 4), "blocks": 2, "size": 256, "heads": 1,
                "attention": (16,), "shift": False},
    "adm64": {"ch": 192, "mult": (1, 2, 3, 4), "blocks": 3, "size": 64, "attention": (32, 16, 8),
              "head_dim": 64, "updown": True, "new_order": True, "classes": 1000},
    "adm128": {"ch": 256, "mult": (1, 1, 2, 3, 4), "blocks": 2, "size": 128,
               "attention": (32, 16, 8), "updown": True, "classes": 1000},
    "adm256": {"ch": 256, "mult": (1, 1, 2, 2, 4, 4), "blocks": 2, "size": 256,
               "attention": (32, 16, 8), "head_dim": 64, "updown": True},
}
