"""The perceptual term of an autoencoder's loss: pictures compared by a frozen network's features.

    output, images ─network→ features at several depths ─unit→ squared difference → p → doutput

Two pictures that differ by a blur are near in pixels and far in features. The paper's network is
LPIPS, a VGG trained on ImageNet with weights fitted to people's judgements. Neither is here; the
networks are those that tinyldm has: CLIP's vision transformer, or the encoder of another VAE.
Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
arXiv:1801.03924, eq. 1, with all weights w = 1; Rombach et al. 2022, arXiv:2112.10752, section 3.1.
"""
import numpy as np

from ... import ops
from ...backend import get_xp
from ...checkpoints import load_model
from ...checkpoints.places import bundled, resolve_model
from ...errors import TinyldmError
from ...image_processor import MEAN, STD
from ...layers import NO_TAPE, Module, Tape
from ...models import AutoencoderKL

BUNDLED = "bundled"


class Perceptual:
    """p = mean over depths, pictures and places of |u(f(output)) - u(f(images))|^2, u(x) = x / |x|.

    network: EncoderFeatures or VisionFeatures, f. p lies between 0 and 4: it is twice 1 - cosine.
    """

    def __init__(self, network):
        network.freeze()
        self.network = network

    def __call__(self, output, images, dp):
        """images, output (B,H,W,3) -> p, doutput. dp: the gradient of the final loss with p."""
        tape, p, gradients = Tape(), 0, []
        wanted, found = self.network(images), self.network(output, tape)
        for theirs, ours in zip(wanted, found):
            unit, cache = ops.unit(ours)
            square, mse_cache = ops.mse(unit, ops.unit(theirs)[0])
            weight = ours.shape[-1] / len(found)        # the mean over channels becomes a sum
            p = p + weight * square
            dunit, _ = ops.mse_backward(dp * weight, mse_cache)
            gradients.append(ops.unit_backward(dunit, cache))
        return p, self.network.backward(gradients, tape)


class EncoderFeatures(Module):
    """images (B,H,W,3) -> what each level of a VAE's encoder gives, [(B,H',W',C')]."""

    def __init__(self, vae):
        self.encoder, self.multiple = vae.encoder, vae.vae_scale_factor

    def forward(self, images, tape=NO_TAPE):
        h, features = self.encoder.conv_in(images, tape), []
        for block in self.encoder.down_blocks:
            h = block(h, tape)
            features.append(h)
        return features

    def backward(self, dfeatures, tape):                # -> dimages (B,H,W,3)
        dh = 0
        for block, dfeature in zip(self.encoder.down_blocks[::-1], dfeatures[::-1]):
            dh = block.backward(dh + dfeature, tape)    # an output, and the next block's input: add
        return self.encoder.conv_in.backward(dh, tape)


class VisionFeatures(Module):
    """images (B,H,W,3) -> of CLIP's vision transformer the patches (B,N,D) halfway, and the whole
    picture's (B,D). Images are resized to its size, by a linear map that backward can turn round.
    """

    multiple = 1

    def __init__(self, clip):
        self.vision_model = clip.vision_model
        self.middle = len(self.vision_model.encoder.layers) // 2
        self.scale, shift = 0.5 / np.array(STD), (0.5 - np.array(MEAN)) / np.array(STD)
        self.shift = shift                              # of pixels in [-1, 1], not [0, 1]

    def forward(self, images, tape=NO_TAPE):
        side, xp = self.vision_model.embeddings.size, get_xp(images)
        x, lines = ops.resize_bilinear(images, (side, side))
        tape.save(self, lines)
        x = x * xp.asarray(self.scale, x.dtype) + xp.asarray(self.shift, x.dtype)
        hidden, pooled = self.vision_model(x, tape, skip=self.middle)
        return [hidden[:, 1:], pooled]                  # the first token is the picture's

    def backward(self, dfeatures, tape):                # -> dimages (B,H,W,3)
        (dpatches, dpooled), xp = dfeatures, get_xp(dfeatures[0])
        dhidden = xp.concatenate([xp.zeros_like(dpatches[:, :1]), dpatches], axis=1)
        dx = self.vision_model.backward(dhidden, dpooled, tape)
        dx = dx * xp.asarray(self.scale, dx.dtype)
        return ops.resize_bilinear_backward(dx, tape.load(self))


def load_perceptual(name, resolution):
    """What a user calls a network -> Perceptual.

    name: "bundled", the encoder of the bundled model; or a folder, a file or a name on the hub, of
    a CLIP, of its vision model, or of a VAE. resolution: of the images.
    Raises TinyldmError for any other model, as load_model does, and for a size that does not fit.
    """
    model = load_model(bundled() / "vae" if name == BUNDLED else resolve_model(name))
    if isinstance(model, AutoencoderKL):
        network = EncoderFeatures(model)
    elif hasattr(model, "vision_model"):
        network = VisionFeatures(model)
    else:
        raise TinyldmError(f"{name} holds a {type(model).__name__}, which does not see pictures: "
                           f"name a CLIP, a VAE, or {BUNDLED}")
    if resolution % network.multiple:
        raise TinyldmError(f"--resolution must be a multiple of {network.multiple} for the VAE of "
                           f"--perceptual, not {resolution}")
    return Perceptual(network)
