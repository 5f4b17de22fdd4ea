"""The latents of a PictureFolder, computed once and kept on disk.

Between data.py and the objective: the VAE's encoder is frozen while a UNet trains, so what it gives
for a picture stays the same. A file has its mean and standard deviation, from which a training
draws a new sample in every epoch; kohya-ss/sd-scripts keeps one sample.

One file per picture, and one more for its mirror image. A file's name is a hash of all that its
numbers depend on. So a picture, a VAE or a setting that changes asks for a file that is not there,
only those are computed, and several trainings can share a folder. Files that nobody asks for stay;
the folder can be deleted at any time.
"""
import hashlib

import numpy as np

from ... import ranks
from ...backend import to_host
from ...errors import TinyldmError
from ...files import as_path
from ..state import read_npz, write_npz
from .pictures import progress


class LatentCache:
    """Means and standard deviations of a PictureFolder's latents, unscaled as the VAE gives them.

    folder: a PictureFolder with centre crops. vae: an AutoencoderKL. path: the folder to keep them
    in; it is made if missing. dtype: "float32", exactly what the VAE gives, or "float16", in half
    the space with three digits.
    Raises TinyldmError for random crops, for sizes that the VAE does not take, where a latent is
    not finite, and where the files cannot be written.
    """

    def __init__(self, folder, vae, path, dtype="float32"):
        self.folder, self.path, self.dtype = folder, as_path("the folder of latents", path), dtype
        if dtype not in ("float16", "float32"):
            raise TinyldmError(f"latents are kept as float16 or float32, not {dtype!r:.80}")
        if not folder.center_crop:
            raise TinyldmError("latents of random crops cannot be kept: crop in the middle, or "
                               "train without kept latents")
        self.factor, self.channels = vae.vae_scale_factor, vae.settings.latent_channels
        wrong = {size for item in folder.items for size in item.target if size % self.factor}
        if wrong:
            raise TinyldmError(f"the sides of images must be multiples of {self.factor} for this "
                               f"VAE, not {min(wrong)}: choose another resolution")
        self.encoder = fingerprint(vae)
        flips = (False, True) if folder.flip else (False,)
        wanted = [(index, flip) for index in range(len(folder.items)) for flip in flips]
        mine = [wanted[i] for i in ranks.share(len(wanted))]
        missing = [key for key in progress("checking latents", mine) if self._read(*key) is None]
        self._compute(vae, missing)
        self.computed = sum(ranks.gather(len(missing)))
        self.found = len(wanted) - self.computed

    def _compute(self, vae, missing):
        for index, flipped in progress("encoding pictures", missing):
            images = self.folder.image(self.folder.centred(index, flipped))[None]
            mean, logvar = vae.encode(vae.xp.asarray(images, vae.dtype))
            mean, logvar = (to_host(x[0]).astype(np.float32) for x in (mean, logvar))   # (h,w,C)
            name = self.folder.items[index].name
            if not (np.isfinite(mean).all() and np.isfinite(logvar).all()):
                raise TinyldmError(f"the VAE gives NaN or infinity for {name}: use it in float32, "
                                   "or take the picture out")
            with np.errstate(over="ignore"):
                mean, std = mean.astype(self.dtype), np.exp(logvar / 2).astype(self.dtype)
            if not np.isfinite(mean).all():
                raise TinyldmError(f"the latents of {name} are too large for float16: keep them "
                                   "as float32")
            write_npz(self._file(index, flipped), mean=mean, std=std)

    def _file(self, index, flipped):
        item = self.folder.items[index]
        key = self.encoder, item.digest, item.resized, item.target, flipped, self.dtype
        return self.path / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.npz"

    def _read(self, index, flipped):
        """-> [mean, std], each (h,w,C); None where the file is missing or damaged."""
        W, H = self.folder.items[index].target
        shape = H // self.factor, W // self.factor, self.channels
        file = self._file(index, flipped)
        try:
            arrays = read_npz(file, {"mean": shape, "std": shape}) if file.exists() else {}
        except TinyldmError:                            # damaged: computed again
            return None
        return [arrays[name] for name in ("mean", "std")] if arrays else None

    def report(self):
        """One line of text: how many were there, and how many are new."""
        return f"latents in {self.path}: {self.found} found, {self.computed} computed"

    def batch(self, seed, step, batch_size):
        """-> means, stds (B,h,w,C) float32, captions, indices: of PictureFolder.batch's images.

        z = mean + std * normal numbers is what the VAE gives for a picture; vae.to_latents scales.
        Raises TinyldmError for a file that has vanished or is damaged.
        """
        samples = self.folder.samples(seed, step, batch_size)
        means, stds = zip(*map(self.moments, samples))
        return (np.stack(means), np.stack(stds), [sample.caption for sample in samples],
                [sample.index for sample in samples])

    def moments(self, sample):
        """The mean and the standard deviation of a Sample -> (h,w,C) each, float32."""
        found = self._read(sample.index, sample.flipped)
        if found is None:
            raise TinyldmError(f"{self._file(sample.index, sample.flipped)} has vanished or is "
                               "damaged: start again, and only that file is made anew")
        return [x.astype(np.float32) for x in found]


def fingerprint(vae):
    """A hash of the encoder: its settings and weights."""
    found = hashlib.sha256(repr(vae.settings).encode())
    for part in (vae.encoder, vae.quant_conv):
        for name, parameter in part.named_parameters():
            array = np.ascontiguousarray(to_host(parameter.data))
            found.update(f"{name} {array.dtype} {array.shape}".encode())
            found.update(array)
    return found.hexdigest()
