"""The original DDPM's network in PyTorch, as pesser/pytorch_diffusion and ermongroup/ddim have it.

Written from their code in the fewest lines, with their names: the reference for files in that
layout, also without convolutions in the resampling, which diffusers' class does not have.
"""
import math

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, pad, silu


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class Resnet(nn.Module):
    def __init__(self, C, O, E):
        super().__init__()
        self.norm1, self.conv1 = norm(C), nn.Conv2d(C, O, 3, 1, 1)
        self.temb_proj = nn.Linear(E, O)
        self.norm2, self.conv2 = norm(O), nn.Conv2d(O, O, 3, 1, 1)
        if C != O:
            self.nin_shortcut = nn.Conv2d(C, O, 1)

    def forward(self, x, temb):
        h = self.conv1(silu(self.norm1(x))) + self.temb_proj(silu(temb))[:, :, None, None]
        h = self.conv2(silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.norm = norm(C)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(C, C, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))       # (B,C,N)
        weights = torch.softmax(q.mT @ k * q.shape[1] ** -0.5, dim=2)               # (B,N,N)
        return x + self.proj_out((v @ weights.mT).reshape(x.shape))


class Resample(nn.Module):
    def __init__(self, C, with_conv, up):
        super().__init__()
        self.up = up
        if with_conv:
            self.conv = nn.Conv2d(C, C, 3, 1, 1) if up else nn.Conv2d(C, C, 3, 2, 0)

    def forward(self, x):
        if self.up:
            x = interpolate(x, scale_factor=2.0, mode="nearest")
            return self.conv(x) if hasattr(self, "conv") else x
        return self.conv(pad(x, (0, 1, 0, 1))) if hasattr(self, "conv") else avg_pool2d(x, 2)


class Model(nn.Module):
    def __init__(self, *, ch, out_ch, ch_mult, num_res_blocks, attn_resolutions, resolution,
                 resamp_with_conv=True, in_channels=3):
        super().__init__()
        self.ch, E = ch, 4 * ch
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, E), nn.Linear(E, E)])
        self.conv_in = nn.Conv2d(in_channels, ch, 3, 1, 1)
        C, size, skips = ch, resolution, [ch]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, factor in enumerate(ch_mult):
            part = self.level(size in attn_resolutions)
            for _ in range(num_res_blocks):
                self.add(part, C, C := ch * factor, E)
                skips.append(C)
            if level < len(ch_mult) - 1:
                part.downsample = Resample(C, resamp_with_conv, up=False)
                size //= 2
                skips.append(C)
            self.down.append(part)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1 = Resnet(C, C, E), Attention(C)
        self.mid.block_2 = Resnet(C, C, E)
        for level, factor in reversed(list(enumerate(ch_mult))):
            part = self.level(size in attn_resolutions)
            for _ in range(num_res_blocks + 1):
                self.add(part, C + skips.pop(), C := ch * factor, E)
            if level:
                part.upsample = Resample(C, resamp_with_conv, up=True)
                size *= 2
            self.up.insert(0, part)
        self.norm_out, self.conv_out = norm(C), nn.Conv2d(C, out_ch, 3, 1, 1)

    @staticmethod
    def level(attends):
        part = nn.Module()
        part.attends, part.block, part.attn = attends, nn.ModuleList(), nn.ModuleList()
        return part

    @staticmethod
    def add(part, C, O, E):
        part.block.append(Resnet(C, O, E))
        if part.attends:
            part.attn.append(Attention(O))

    def forward(self, x, t):
        half = self.ch // 2
        angles = t[:, None] * torch.exp(torch.arange(half, dtype=x.dtype)
                                        * -(math.log(10000) / (half - 1)))
        temb = torch.cat([angles.sin(), angles.cos()], 1)
        temb = self.temb.dense[1](silu(self.temb.dense[0](temb)))
        skips = [self.conv_in(x)]
        for part in self.down:
            for i, block in enumerate(part.block):
                h = block(skips[-1], temb)
                skips.append(part.attn[i](h) if part.attends else h)
            if hasattr(part, "downsample"):
                skips.append(part.downsample(skips[-1]))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(skips[-1], temb)), temb)
        for part in reversed(self.up):
            for i, block in enumerate(part.block):
                h = block(torch.cat([h, skips.pop()], 1), temb)
                h = part.attn[i](h) if part.attends else h
            h = part.upsample(h) if hasattr(part, "upsample") else h
        return self.conv_out(silu(self.norm_out(h)))
