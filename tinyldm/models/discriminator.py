"""PatchGAN: images (B,H,W,3) -> one number per patch: does it look real or made?

It is no part of a pipeline. While an autoencoder trains, it learns to tell pictures from their
round trips, and the decoder learns to mislead it: training/stages/adversarial.py.

    conv 4x4, stride 2 → leaky ReLU → (layers - 1) x (conv 4x4, stride 2 → batch norm → leaky ReLU)
    → conv 4x4 → batch norm → leaky ReLU → conv 4x4 to one channel

With three layers a number depends on 70x70 pixels, and neighbours are 8 pixels apart.
Source: Isola et al. 2016, "Image-to-Image Translation with Conditional Adversarial Networks",
arXiv:1611.07004, section 3.2.2 and appendix 6.1.2. Names are those of CompVis/taming-transformers,
taming/modules/discriminator/model.py.
"""
import numpy as np

from ..layers import Activation, BatchNorm, Conv2d, Sequence

EPS = 1e-5
WIDEST = 8                  # times the first layer's channels


class PatchDiscriminator(Sequence):
    """forward: images (B,H,W,in_channels) in [-1, 1] -> logits (B,h,w,1), large for real ones.

    channels: of the first layer; they double with each, up to eight times. layers: those of stride
    2. Batch norm uses the batch's own mean and variance, as in training: in files of taming-
    transformers there are running statistics, too, which nothing reads here.
    """

    def __init__(self, in_channels=3, channels=64, layers=3):
        widths = [channels * min(2 ** i, WIDEST) for i in range(layers + 1)]
        self.main = [conv(in_channels, channels, 2), Activation("leaky_relu")]
        for i in range(1, layers + 1):
            self.main += [conv(widths[i - 1], widths[i], 2 if i < layers else 1, bias=False),
                          BatchNorm(widths[i], EPS), Activation("leaky_relu")]
        self.main.append(conv(widths[-1], 1, 1))

    def layers(self):
        return self.main


def conv(in_channels, out_channels, stride, bias=True):
    return Conv2d(in_channels, out_channels, 4, stride, (1, 1), bias)


def smallest(layers=3):
    """The least side of images for which a PatchDiscriminator has a number to give."""
    return 3 * 2 ** layers


def initialise(discriminator, rng):
    """Fill it, float32: weights from N(0, 0.02^2), scales of norms from N(1, 0.02^2), biases 0."""
    for name, parameter in discriminator.named_parameters():
        noise = rng.normal(0, 0.02, parameter.shape) if name.endswith("weight") else 0
        mean = float(len(parameter.shape) == 1 and name.endswith("weight"))
        parameter.data = np.full(parameter.shape, mean, np.float32) + np.float32(noise)
