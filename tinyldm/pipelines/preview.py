"""What a picture will be, seen before it is finished: the x_start that a state predicts.

pipe.stream -> ShownState.show() -> Preview -> PIL images. The command line's --show, --preview and
--animate use Preview as well.
"""
from typing import Any

import numpy as np

from ..backend import to_host
from ..diffusion.samplers.shared import State
from ..images import to_pil

DECODED = 256 * 256         # pixels: up to this size the VAE is fast enough for previews
PATCHES = 8                 # per side, of one colour each, to which the linear map is fitted


class Preview:
    """Pictures of predicted latents: by the VAE if they are small, else by a fast linear map.

    Colours are nearly a linear function of a latent's channels. When the map is first needed, it is
    fitted to the pipeline's own VAE: least squares between patches of random latents and the mean
    colours of the decoded patches.
    """

    def __init__(self, pipe):
        self.pipe, self.map = pipe, None

    def __call__(self, latents):
        """Clean latents (B,h,w,C) -> Pictures, B PIL images of the picture's size."""
        _, h, w, C = latents.shape
        factor = self.pipe.scale_factor
        if factor == 1 or h * w * factor ** 2 <= DECODED:
            return to_pil(self.pipe.decode(latents))
        if self.map is None:
            self.map = self._fit(C)
        pictures = to_pil(with_ones(to_host(latents)) @ self.map)
        pictures[:] = [image.resize((w * factor, h * factor)) for image in pictures]    # bicubic
        return pictures

    def _fit(self, C):                                  # -> (C+1,3)
        patches = np.random.default_rng(0).standard_normal((1, PATCHES, PATCHES, C), np.float32)
        images = to_host(self.pipe.decode(patches.repeat(2, axis=1).repeat(2, axis=2)))
        side = images.shape[1] // PATCHES
        colours = images.reshape(PATCHES, side, PATCHES, side, 3).mean(axis=(1, 3))
        return np.linalg.lstsq(with_ones(patches).reshape(-1, C + 1), colours.reshape(-1, 3))[0]


def with_ones(x):
    """x (...,C) -> (...,C+1): a column of ones for the map's constant."""
    return np.concatenate([x, np.ones_like(x[..., :1])], axis=-1)


class ShownState(State):
    """A State that knows its pipeline's Preview, so that a notebook shows it as a picture."""

    preview: Any                                        # set by `shown`

    def show(self):
        """Pictures of the predicted x_start: decoded, or of a large picture its rough colours."""
        return self.preview(self.pred_x0)

    def _repr_png_(self):
        return self.show()._repr_png_()

    def __reduce__(self):                               # a copy need not hold the models
        return State, tuple(self)


def shown(states, pipe):
    """The states of a pipeline's sampler -> iterator of ShownState."""
    preview = Preview(pipe)
    for state in states:
        state = ShownState(*state)
        state.preview = preview
        yield state
