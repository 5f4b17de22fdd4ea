"""The Inception network of the FID: a picture -> numbers that say what it shows.

It was trained to tell the classes of ImageNet apart, so its inner features tell pictures apart as
people do, more than pixels would. metrics/ compares the features of drawn pictures with those of
real ones; no pipeline uses it. Its weights come from the TensorFlow model of 2015-12-05, which is
not torchvision's inception_v3: averages leave out the zeros around the map, and the last block's
pool takes the maximum.
Source: Szegedy et al. 2015, "Rethinking the Inception Architecture for Computer Vision",
arXiv:1512.00567, figures 5-7 and table 1; its use: Heusel et al. 2017, arXiv:1706.08500; the names
and the weights: mseitzer/pytorch-fid, inception.py.
"""
import numpy as np

from .. import ops
from ..backend import free_threads, get_xp, parallel, wide
from ..layers import (
    NO_TAPE,
    Conv2d,
    Linear,
    Module,
    Parameter,
    Pool,
    Sequence,
    check_filled,
    unobserved,
)

EPS = 1e-3                  # of every batch norm
FEATURES = 64, 192, 768, 2048   # at the four places where they may be taken
CLASSES = 1008              # and the logits are taken at the end
SHARE = 4                   # images at a time in one thread: more would leave its cache


class BasicConv2d(Module):
    """A convolution without bias, batch norm with running statistics, ReLU: (B,H,W,C) ->
    (B,Ho,Wo,O). Unless told otherwise, stride 1 keeps the size, and stride 2 pads nothing."""

    def __init__(self, in_channels, out_channels, kernel_size=1, stride=1, padding=None):
        padding = (0, 0) if stride == 2 else padding
        self.conv = Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = BatchNormReLU(out_channels)

    def forward(self, x, tape=NO_TAPE):
        h = self.conv(x, tape)
        return self.bn(h, tape, out=h if unobserved(tape) else None)

    def backward(self, dy, tape):
        return self.conv.backward(self.bn.backward(dy, tape), tape)


class BatchNormReLU(Module):
    """y = max(weight * (x - running_mean) / sqrt(running_var + eps) + bias, 0) for each channel.

    The statistics are those of the training, as in PyTorch's eval mode. They have gradients like
    all parameters, but no use for them.
    """

    def __init__(self, channels):
        self.weight, self.bias = Parameter(channels), Parameter(channels)
        self.running_mean, self.running_var = Parameter(channels), Parameter(channels)

    def forward(self, x, tape=NO_TAPE, out=None):
        for parameter in self.parameters():
            check_filled(self, parameter)
        y, cache = ops.batch_norm_relu(x, *(p.data for p in self.parameters()), EPS, out)
        tape.save(self, cache)
        return y

    def backward(self, dy, tape):
        dx, *gradients = ops.batch_norm_relu_backward(dy, tape.load(self))
        for parameter, gradient in zip(self.parameters(), gradients):
            parameter.add_grad(gradient)
        return dx


# ---- blocks -----------------------------------------------------------------------------------

AVERAGE = Pool("average_pool", 3, 1, (1, 1))
LARGEST = Pool("max_pool", 3, 1, (1, 1))
HALVE = Pool("max_pool", 3, 2, (0, 0))


def in_any_order(x, tape):
    """Whether worker threads may share the branches or the images: on the CPU, without a tape.

    Threads that share every layer instead wait for each other after each one.
    """
    return unobserved(tape) and get_xp(x) is np


class SideBySide(Module):
    """Several layers on the same input; their channels are joined. (B,H,W,C) -> (B,Ho,Wo,O)."""

    def __init__(self, *parts):
        self.parts = parts                              # a tuple: the block owns their parameters

    def forward(self, x, tape=NO_TAPE):
        if in_any_order(x, tape):                       # the last ones take longest: they begin
            outputs = parallel(lambda part: part(x), self.parts[::-1])[::-1]
        else:
            outputs = [part(x, tape) for part in self.parts]
        tape.save(self, [y.shape[-1] for y in outputs])
        return get_xp(x).concatenate(outputs, axis=-1)

    def backward(self, dy, tape):
        end, dx = dy.shape[-1], 0
        for part, width in zip(reversed(self.parts), reversed(tape.load(self))):
            dx = dx + part.backward(dy[..., end - width:end], tape)     # all parts used x: add
            end -= width
        return dx


class Branch(Sequence):
    """One layer after another."""

    def __init__(self, *steps):
        self.steps = steps

    def layers(self):
        return self.steps


class Mixed(SideBySide):
    """Branches side by side. A branch is a list of steps: a pool; (name, out_channels, kernel_size)
    and perhaps the stride, of a BasicConv2d; or a list of such, which run side by side."""

    def __init__(self, channels, *branches):
        super().__init__(*(self._branch(channels, steps) for steps in branches))

    def _branch(self, channels, steps):
        layers = []
        for step in steps:
            if isinstance(step, list):
                layer = SideBySide(*(self._branch(channels, [one]) for one in step))
            elif isinstance(step, tuple):
                name, out_channels, *options = step
                layer = BasicConv2d(channels, out_channels, *options)
                setattr(self, name, layer)
                channels = out_channels
            else:
                layer = step
            layers.append(layer)
        return Branch(*layers)


def block_a(channels, pool_features):
    return Mixed(
        channels,
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        [AVERAGE, ("branch_pool", pool_features, 1)])


def block_b(channels):
    return Mixed(
        channels,
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
        [HALVE])


def block_c(channels, c7):
    """Kernels of 7x7, each as one of 1x7 and one of 7x1."""
    return Mixed(
        channels,
        [("branch1x1", 192, 1)],
        [("branch7x7_1", c7, 1), ("branch7x7_2", c7, (1, 7)), ("branch7x7_3", 192, (7, 1))],
        [("branch7x7dbl_1", c7, 1), ("branch7x7dbl_2", c7, (7, 1)), ("branch7x7dbl_3", c7, (1, 7)),
         ("branch7x7dbl_4", c7, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))],
        [AVERAGE, ("branch_pool", 192, 1)])


def block_d(channels):
    return Mixed(
        channels,
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
        [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
         ("branch7x7x3_4", 192, 3, 2)],
        [HALVE])


def block_e(channels, pool):
    return Mixed(
        channels,
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
         [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]],
        [pool, ("branch_pool", 192, 1)])


# ---- the network ------------------------------------------------------------------------------

class InceptionV3(Module):
    """forward: images (B,H,W,3) in [-1, 1], 299 high and wide for comparable numbers, 75 at least
    -> (B,F), F = `features`: 64, 192, 768 or 2048, the mean of that map over its pixels; 1008, the
    logits. The layers after it do not run.
    backward: dy (B,F) -> dimages (B,H,W,3).
    logits=False: without the last layer, which files may lack and the FID does not need.
    """

    def __init__(self, logits=True):
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, 2)                   # 149 x 149
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3, padding=(0, 0))     # 147 x 147
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3)                     # pooled to 73 x 73
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3, padding=(0, 0))    # pooled to 35 x 35
        self.Mixed_5b = block_a(192, 32)
        self.Mixed_5c = block_a(256, 64)
        self.Mixed_5d = block_a(288, 64)
        self.Mixed_6a = block_b(288)                                    # 17 x 17
        self.Mixed_6b = block_c(768, 128)
        self.Mixed_6c = block_c(768, 160)
        self.Mixed_6d = block_c(768, 160)
        self.Mixed_6e = block_c(768, 192)
        self.Mixed_7a = block_d(768)                                    # 8 x 8
        self.Mixed_7b = block_e(1280, AVERAGE)
        self.Mixed_7c = block_e(2048, LARGEST)
        self.fc = Linear(2048, CLASSES) if logits else None

    def layers(self, features):
        """Those that run, one after another, for so many features."""
        stages = (
            (self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3, HALVE),
            (self.Conv2d_3b_1x1, self.Conv2d_4a_3x3, HALVE),
            (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b,
             self.Mixed_6c, self.Mixed_6d, self.Mixed_6e),
            (self.Mixed_7a, self.Mixed_7b, self.Mixed_7c))
        last = FEATURES.index(2048 if features == CLASSES else features)
        return [layer for stage in stages[:last + 1] for layer in stage]

    def forward(self, images, tape=NO_TAPE, *, features=2048):
        if in_any_order(images, tape) and len(images) > 1 < free_threads():
            count = max(free_threads(), -(-len(images) // SHARE))
            shares = np.array_split(images, min(len(images), count))
            return np.concatenate(parallel(
                lambda share: self.forward(share, features=features), shares))
        h = images
        for layer in self.layers(features):
            h = layer(h, tape)
        tape.save(self, h.shape)
        y = h.mean(axis=(1, 2), dtype=wide(h.dtype)).astype(h.dtype, copy=False)    # (B,F)
        return self.fc(y, tape) if features == CLASSES else y

    def backward(self, dy, tape):
        features = dy.shape[-1]
        if features == CLASSES:
            dy = self.fc.backward(dy, tape)
        B, H, W, C = tape.load(self)
        dh = get_xp(dy).broadcast_to(dy[:, None, None] / (H * W), (B, H, W, C))
        for layer in reversed(self.layers(features)):
            dh = layer.backward(dh, tape)
        return dh
