"""openai's UNetModel in torch, as its papers and files describe it: same names, same numbers.

improved-diffusion and guided-diffusion are not installed. Everything is computed in the dtype of
the weights. Source: arXiv:2102.09672, arXiv:2105.05233, and the lists of what the files hold.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F


def norm(channels):
    return nn.GroupNorm(32, channels)


class UNetModel(nn.Module):
    """mult: the widths of the levels; attention: at which levels. heads, or head_channels."""

    def __init__(self, width, mult, layers, attention, *, heads=4, head_channels=None, colours=3,
                 out=6, scale_shift=True, updown=False, new_order=False, classes=None):
        super().__init__()
        self.width, E = width, 4 * width

        def resnet(c_in, c_out, resample=None):
            return ResBlock(c_in, c_out, E, scale_shift, resample)

        def attend(channels):
            count = channels // head_channels if head_channels else heads
            return AttentionBlock(channels, count, new_order)
        self.time_embed = nn.Sequential(nn.Linear(width, E), nn.SiLU(), nn.Linear(E, E))
        if classes:
            self.label_emb = nn.Embedding(classes, E)
        channels = int(mult[0] * width)
        blocks, skips = [[nn.Conv2d(colours, channels, 3, padding=1)]], [channels]
        for level, factor in enumerate(mult):
            for _ in range(layers):
                block = [resnet(channels, channels := int(factor * width))]
                blocks.append(block + [attend(channels)] * (level in attention))
                skips.append(channels)
            if level < len(mult) - 1:
                blocks.append([resnet(channels, channels, "down") if updown else Down(channels)])
                skips.append(channels)
        self.input_blocks = nn.ModuleList(map(nn.ModuleList, blocks))
        self.middle_block = nn.ModuleList([resnet(channels, channels), attend(channels),
                                           resnet(channels, channels)])
        blocks = []
        for level, factor in reversed(list(enumerate(mult))):
            for i in range(layers + 1):
                block = [resnet(channels + skips.pop(), channels := int(factor * width))]
                block += [attend(channels)] * (level in attention)
                if level and i == layers:
                    block += [resnet(channels, channels, "up") if updown else Up(channels)]
                blocks.append(block)
        self.output_blocks = nn.ModuleList(map(nn.ModuleList, blocks))
        self.out = nn.Sequential(norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))

    def forward(self, x, timesteps, labels=None):
        half = self.width // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=x.dtype) / half)
        angles = timesteps[:, None].to(x.dtype) * frequencies
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1))
        if labels is not None:
            emb = emb + self.label_emb(labels)
        skips = []
        for block in self.input_blocks:
            x = run(block, x, emb)
            skips.append(x)
        x = run(self.middle_block, x, emb)
        for block in self.output_blocks:
            x = run(block, torch.cat([x, skips.pop()], 1), emb)
        return self.out(x)


def run(layers, x, emb):
    for layer in layers:
        x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
    return x


class ResBlock(nn.Module):
    def __init__(self, channels, out, E, scale_shift, resample):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(norm(channels), nn.SiLU(),
                                       nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(E, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(norm(out), nn.SiLU(), nn.Dropout(0.0),
                                        nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x, emb):
        h = self.in_layers[:2](x)
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.resample == "up":
            h, x = (F.interpolate(y, scale_factor=2, mode="nearest") for y in (h, x))
        h, e = self.in_layers[2](h), self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, 1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    def __init__(self, channels, heads, new_order):
        super().__init__()
        self.heads, self.new_order, self.norm = heads, new_order, norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        B, C, N = len(x), x.shape[1], x[0, 0].numel()
        qkv, d = self.qkv(self.norm(x).reshape(B, C, N)), C // self.heads
        if self.new_order:                              # q/k/v, head, channel
            q, k, v = qkv.reshape(B, 3, self.heads, d, N).unbind(1)
        else:                                           # head, q/k/v, channel
            q, k, v = qkv.reshape(B, self.heads, 3, d, N).unbind(2)
        weight = torch.einsum("bhcn,bhcm->bhnm", q * d ** -0.25, k * d ** -0.25).softmax(-1)
        h = torch.einsum("bhnm,bhcm->bhcn", weight, v).reshape(B, C, N)
        return x + self.proj_out(h).reshape(x.shape)


class Down(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
