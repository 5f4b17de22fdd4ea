"""A folder of pictures with captions -> batches for a training.

The first file of the flow: PictureFolder examines every picture once, says what it found, and gives
batches of images (B,H,W,3); latents.py keeps their latents instead. captions.py reads the captions.

Everything random is keyed by (seed, epoch, entry), where an entry is one picture, or one of its
repeats. So a batch is the same whatever ran before it, in whatever parts it is computed. One epoch
holds each entry once.
Sizes as in diffusers' examples/text_to_image (shorter side, then a crop), or kohya-ss/sd-scripts'
buckets of aspect ratios, after NovelAI.
"""
import hashlib
import math
import os
import re
import stat
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import TinyldmError, clean, shorten
from ...files import as_path
from ...images import LARGEST, UnreadablePicture, grid, labelled, open_described, to_pil
from .captions import (
    EMPTY,
    EXAMPLE,
    MANY,
    MISNAMED,
    NO_CAPTION,
    ORPHANS,
    SEVERAL,
    UNREADABLE,
    find_captions,
    fit,
    kohya_folder,
    years,
)

# The last three cannot be read; they are here to be named.
ENDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm",
        ".pgm", ".tga", ".qoi", ".heic", ".heif", ".jxl")
ORDER, CHOICES = 0, 1       # what random numbers are for, as a part of their key
GAP = 8                     # pixels between the pictures of a contact sheet

SKIPPED = "pictures that cannot be read and are skipped"
FOLDERS = "folders that cannot be read"
LINKS = "links to folders that are searched already, not followed"
BROKEN = "links that lead nowhere"
NAMES = "pictures whose names are not UTF-8, so that no metadata file can name them"
TURNED = "pictures turned as their EXIF says"
TRANSPARENT = "pictures with transparent parts, behind which is white"
ANIMATED = "animations, of which the first frame is used"
CONVERTED = "pictures converted to 8 bits of red, green and blue"
ENLARGED = "pictures too small, which are enlarged"
TWICE = "pictures with the same content"
SIDES = "captions that say left or right, whose pictures are mirrored in half of the epochs"
LONG = "captions too long for the text encoder, cut at a word"
STOPS_STRICT = {SKIPPED, FOLDERS, NO_CAPTION, EMPTY, ORPHANS, SEVERAL, UNREADABLE}


@dataclass(frozen=True)
class Item:
    """One picture of a folder."""

    path: Path
    name: str                   # relative to the folder
    captions: tuple             # one or more; one of several is drawn each time
    size: tuple                 # (W, H), upright
    resized: tuple              # (W, H) before the crop
    target: tuple               # (W, H) of the images in a batch
    repeats: int                # per epoch
    digest: str                 # of the file's content

    @property
    def caption(self):
        return self.captions[0]


class Sample(NamedTuple):
    """One row of a batch: which picture, and what was drawn for it."""

    index: int                  # of PictureFolder.items
    caption: str
    left: int                   # of the crop, in the resized picture
    top: int
    flipped: bool               # mirrored, after the crop


class PictureFolder:
    """The pictures of a folder and its sub-folders, each examined once.

    folder: where they lie. resolution: the side of the images, in pixels; with `buckets` that of
    the square whose area no image exceeds. caption: one for all, "" where none is needed, or a list
    to draw from, instead of the forms that captions.py reads. center_crop: cut in the middle, not
    at a random place. flip: mirror half of the pictures. strict: raise where otherwise a picture
    would be skipped or would train with an empty caption. filter: resizes, "lanczos" or "bicubic".

    items: [Item]. fingerprint: it changes with the pictures' names and contents, their captions,
    and the settings. len(): pictures per epoch, repeats counted.
    Raises TinyldmError for a folder without pictures or captions, and as `strict` says.
    """

    def __init__(self, folder, resolution, *, caption=None, buckets=False, center_crop=True,
                 flip=False, strict=False, filter="lanczos"):
        if type(resolution) is not int or not 8 <= resolution <= 8192:
            raise TinyldmError("the resolution must be a whole number from 8 to 8192, not "
                               f"{resolution!r:.80}")
        self.folder = as_path("the folder of pictures", folder)
        self.resolution, self.buckets = resolution, buckets
        self.center_crop, self.flip, self.filter = center_crop, flip, filter
        self.findings = defaultdict(list)
        files = list_files(self.folder, self.findings)
        names = [name for name in files if name.lower().endswith(ENDS)]
        if not names:
            raise TinyldmError(f"{self.folder} holds no pictures, but {shorten(files)}: name the "
                               "folder in which they lie")
        if caption is None:
            captions, self.forms = find_captions(self.folder, files, names, self.findings)
        else:
            captions, self.forms = dict.fromkeys(names, checked(caption)), {}
        self.findings[MANY] += years(names)
        self.items = self._examined(names, captions)
        if not self.items:
            raise TinyldmError(f"{self.folder} holds no picture that can be read", *self.report(),
                               "give PNG, JPEG or WebP files")
        if not captions:
            raise TinyldmError(
                f"{self.folder} has no captions: write a file metadata.jsonl with lines like "
                f"{EXAMPLE}, or dog.txt beside dog.png, or give one caption for all",
                *self._lines(MISNAMED, UNREADABLE, ORPHANS))
        if strict and (lines := self._lines(*STOPS_STRICT)):
            raise TinyldmError(f"{self.folder} has what `strict` does not allow: correct it, or "
                               "leave `strict` out", *lines)
        self.entries = np.repeat(np.arange(len(self.items)), [item.repeats for item in self.items])
        targets = sorted({item.target for item in self.items})
        self._bucket = np.array([targets.index(item.target) for item in self.items])[self.entries]
        self.fingerprint = self._fingerprint()

    # ---- the one look at everything --------------------------------------------------------------

    def _examined(self, names, captions):
        """Decode every picture -> [Item]."""
        items, contents = [], {}
        sizes = bucket_sizes(self.resolution) if self.buckets else [(self.resolution,) * 2]
        for name in progress("examining pictures", names):
            path = self.folder / name
            try:
                image, stored = open_described(path)
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
            except (UnreadablePicture, OSError) as error:
                reason = getattr(error, "reason", None) or error.strerror
                self.findings[SKIPPED].append(f"{name}: {reason}")
                continue
            target = nearest_bucket(image.size, sizes)
            resized = cover(image.size, target, 0.5 if self.buckets else 0)
            if math.prod(resized) > LARGEST:
                self.findings[SKIPPED].append(f"{name}: with {image.width}x{image.height} pixels "
                                              "it is too narrow")
                continue
            self._remark(name, image, stored, resized)
            if digest in contents:
                self.findings[TWICE].append(f"{name} = {contents[digest]}")
            contents.setdefault(digest, name)
            if name not in captions and captions:
                self.findings[NO_CAPTION].append(name)
            items.append(Item(path, name, captions.get(name, ("",)), image.size, resized, target,
                              kohya_folder(name)[0], digest))
            if self.flip and re.search(r"\b(left|right)\b", " ".join(items[-1].captions), re.I):
                self.findings[SIDES].append(name)
        return items

    def _remark(self, name, image, stored, resized):
        """Add what the report says of one picture that can be read."""
        for found, what in ((stored.turned, TURNED), (stored.transparent, TRANSPARENT)):
            if found:
                self.findings[what].append(name)
        if stored.frames > 1:
            self.findings[ANIMATED].append(f"{name}: {stored.frames} frames")
        if stored.mode not in ("RGB", "RGBA", "L", "LA"):
            self.findings[CONVERTED].append(f"{name}: {stored.mode}")
        if resized[0] > image.width or resized[1] > image.height:
            self.findings[ENLARGED].append(f"{name}: {image.width}x{image.height}")
        if not is_utf8(name):
            self.findings[NAMES].append(name)

    def _fingerprint(self):
        found = hashlib.sha256(repr((self.resolution, self.buckets, self.center_crop, self.flip)
                                    ).encode())
        for item in self.items:
            found.update(repr((os.fsencode(item.name), item.digest, item.captions, item.repeats)
                              ).encode())
        return found.hexdigest()

    # ---- what was found --------------------------------------------------------------------------

    def report(self):
        """Lines of text: how many pictures, captions and sizes, and what is odd about which."""
        lines = []
        if self.items:
            repeats = f", {len(self)} per epoch with their repeats" * (len(self) > len(self.items))
            lines += [clean(f"{self.folder}: {count(len(self.items), 'picture')}{repeats}"),
                      clean(self._caption_line()), self._size_line()]
        return lines + self._lines(*self.findings)

    def _caption_line(self):
        if self.forms:
            forms = Counter(self.forms[item.name] for item in self.items if item.name in self.forms)
            return "captions: " + ", ".join(f"{n} from {form}" for form, n in forms.items())
        given = self.items[0].captions
        if given == ("",):
            return "captions are not used"
        return (f"one caption for all: {given[0]!r}" if len(given) == 1 else
                f"{len(given)} captions, of which one is drawn each time")

    def _size_line(self):
        how = "in the middle" if self.center_crop else "at a random place"
        flips = ", half of them mirrored" * self.flip
        if not self.buckets:
            R = self.resolution
            return f"resized to {R} on the shorter side, cut to {R}x{R} {how}{flips}"
        sizes = Counter(item.target for item in self.items)
        sizes = ", ".join(f"{W}x{H} ({n})" for (W, H), n in sorted(sizes.items()))
        return f"cut {how} to the sizes {sizes}{flips}"

    def _lines(self, *kinds):
        return [clean(f"{what} ({shorten(self.findings[what])})") for what in self.findings
                if what in kinds and self.findings[what]]

    def fit_captions(self, tokenizer):
        """Cut captions that are longer than the tokenizer's length, at a word; report() names them.

        The fingerprint stays.
        """
        for i, item in enumerate(self.items):
            cut = [fit(caption, tokenizer) for caption in item.captions]
            if lost := max(tokens for _, tokens in cut):
                self.findings[LONG].append(f"{item.name}: {lost} tokens too long")
                self.items[i] = replace(item, captions=tuple(text for text, _ in cut))

    def leave_out(self, indices):
        """Take pictures, by their indices of items, out of all batches. The fingerprint stays."""
        kept = ~np.isin(self.entries, indices)
        self.entries, self._bucket = self.entries[kept], self._bucket[kept]

    def hold_out(self, count):
        """Take `count` pictures out of the batches -> their indices of items.

        They lie at equal distances in the order of the names, so each class gives its share. Their
        number is not in the fingerprint.
        Raises TinyldmError where nothing would be left.
        """
        there = np.unique(self.entries)
        if count >= len(there):
            raise TinyldmError(f"{count} of {self.folder}'s {len(there)} pictures cannot be held "
                               "out, as some must be left to train on: hold out fewer")
        held = there[np.linspace(0, len(there), count, endpoint=False).astype(int)]
        self.leave_out(held)
        return held.tolist()

    # ---- batches ---------------------------------------------------------------------------------

    def __len__(self):
        return len(self.entries)

    def batch(self, seed, step, batch_size):
        """-> images (B,H,W,3) float32 in [-1, 1], captions, indices of items.

        With buckets B is smaller where a bucket's last batch of an epoch is not full.
        """
        samples = self.samples(seed, step, batch_size)
        return (np.stack([self.image(sample) for sample in samples]),
                [sample.caption for sample in samples], [sample.index for sample in samples])

    def samples(self, seed, step, batch_size):
        """The rows of the batch of one step -> [Sample].

        Without buckets the epochs follow one another without a gap, so two batches of 4 hold what
        one of 8 holds. With buckets a batch has one size, and the last one of a bucket is short.
        """
        if not self.buckets:
            numbers = range(step * batch_size, (step + 1) * batch_size)
            places = [divmod(number, len(self)) for number in numbers]
            orders = {epoch: self._rng(seed, epoch, ORDER).permutation(len(self))
                      for epoch, _ in places}
            return [self._sample(seed, epoch, orders[epoch][place]) for epoch, place in places]
        epoch, place = divmod(step, self.batches_per_epoch(batch_size))
        rng = self._rng(seed, epoch, ORDER)
        order = rng.permutation(len(self))
        by_size = [order[self._bucket[order] == size] for size in range(self._bucket.max() + 1)]
        batches = [entries[i:i + batch_size] for entries in by_size
                   for i in range(0, len(entries), batch_size)]
        chosen = batches[rng.permutation(len(batches))[place]]
        return [self._sample(seed, epoch, entry) for entry in chosen]

    def batches_per_epoch(self, batch_size):
        """How many batches hold every entry at least once; with buckets, exactly once."""
        counts = np.bincount(self._bucket) if self.buckets else [len(self)]
        return int(sum(-(-n // batch_size) for n in counts))

    @staticmethod
    def _rng(*key):
        return np.random.default_rng(key)

    def _sample(self, seed, epoch, entry):
        """What is drawn for one entry in one epoch: all four numbers, whatever is used of them."""
        caption, left, top, flipped = self._rng(seed, epoch, CHOICES, int(entry)).random(4)
        index = int(self.entries[entry])
        item = self.items[index]
        sample = self.centred(index, bool(self.flip and flipped < 0.5),
                              item.captions[int(caption * len(item.captions))])
        if self.center_crop:
            return sample
        width, height = (have - need for have, need in zip(item.resized, item.target))
        return sample._replace(left=int(left * (width + 1)), top=int(top * (height + 1)))

    def centred(self, index, flipped=False, caption=""):
        """The middle of a picture, rounded as torchvision's CenterCrop does -> Sample."""
        item = self.items[index]
        left, top = (round((have - need) / 2) for have, need in zip(item.resized, item.target))
        return Sample(index, caption, left, top, flipped)

    def image(self, sample):
        """The picture of a Sample as the model sees it -> (H,W,3) float32 in [-1, 1].

        Raises TinyldmError for a file that has vanished or is damaged since it was examined.
        """
        from PIL import Image

        item = self.items[sample.index]
        image, _ = open_described(item.path)
        if image.size != item.size:
            raise TinyldmError(f"{item.path} has {image.width}x{image.height} pixels now, not "
                               f"{item.size[0]}x{item.size[1]}: start again with the new picture")
        (W, H), left, top = item.target, sample.left, sample.top
        image = image.resize(item.resized, Image.Resampling[self.filter.upper()])
        image = image.crop((left, top, left + W, top + H))
        pixels = np.asarray(image, np.float32) / 255 * 2 - 1
        return pixels[:, ::-1] if sample.flipped else pixels

    def sheet(self, count=16, seed=0):
        """A contact sheet of the first pictures as the model sees them, with their captions below.

        -> a PIL image. Crops, flips and captions are those of the first epoch.
        """
        _, first = np.unique(self.entries, return_index=True)
        samples = [self._sample(seed, 0, entry) for entry in first[:count]]
        side = max(128, min(256, self.resolution))
        cells = [labelled(to_pil(self.image(sample)[None])[0], sample.caption, side)
                 for sample in samples]
        return grid(cells, math.ceil(len(cells) ** 0.5), GAP)


def checked(captions):
    """A given caption or several -> a tuple. Raises TinyldmError for anything else."""
    captions = (captions,) if isinstance(captions, str) else captions
    captions = tuple(captions) if isinstance(captions, (list, tuple)) else ()
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise TinyldmError("the caption for all pictures must be a string, or a list of at least "
                           "one")
    return captions


def progress(what, items):
    """The items, with a progress bar on standard error once a second has passed."""
    from tqdm import tqdm  # here, so that a wrong argument is reported at once

    return tqdm(items, what, delay=1, leave=False, unit="picture")


def count(n, noun):
    return f"{n} {noun}{'s' * (n != 1)}"


def is_utf8(name):
    try:
        return bool(name.encode())
    except UnicodeEncodeError:                          # bytes that are none, as Python keeps them
        return False


# ---- folders -------------------------------------------------------------------------------------

def list_files(root, findings):
    """The files in a folder and its sub-folders, by names relative to it, sorted.

    Hidden ones are left out, and whatever is no ordinary file. Links to folders are followed, after
    the others, once each: so a loop of links ends.
    Raises TinyldmError if `root` is no folder that can be read.
    """
    files, folders, links, seen = [], [""], [], set()
    while folders or links:
        prefix = folders.pop() if folders else links.pop(0)
        try:
            place = os.stat(root / prefix)
            if (place.st_dev, place.st_ino) in seen:
                findings[LINKS].append(prefix[:-1])
                continue
            seen.add((place.st_dev, place.st_ino))
            with os.scandir(root / prefix) as entries:
                entries = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            if not prefix:
                raise TinyldmError(f"cannot read the folder {root} ({error.strerror}): name a "
                                   "folder of pictures") from None
            findings[FOLDERS].append(f"{prefix[:-1]}: {error.strerror}")
            continue
        for entry in entries:
            name = prefix + entry.name
            if entry.name.startswith("."):
                continue
            try:
                mode = entry.stat().st_mode
            except OSError:
                findings[BROKEN].append(name)
                continue
            if stat.S_ISDIR(mode):
                (links if entry.is_symlink() else folders).append(f"{name}/")
            elif stat.S_ISREG(mode):
                files.append(name)
    return sorted(files, key=os.fsencode)


# ---- sizes ---------------------------------------------------------------------------------------

def bucket_sizes(resolution):
    """The sizes (W, H) of kohya's buckets, sorted: for 512 there are 17.

    Sides are multiples of 64 from half to twice the resolution (fewer pixels for small models), and
    the area is at most that of the square.
    Source: kohya-ss/sd-scripts, library/model_util.py, make_bucket_resolutions.
    """
    step = 64 if resolution >= 256 else max(8, resolution // 64 * 8)
    least, most = max(step, resolution // 2 // step * step), 2 * resolution // step * step
    square = resolution // step * step or resolution
    sizes = {(square, square)}
    for W in range(least, most + 1, step):
        H = min(most, resolution ** 2 // W // step * step)
        if H >= least:
            sizes |= {(W, H), (H, W)}
    return sorted(sizes)


def nearest_bucket(size, sizes):
    """The one of `sizes` whose aspect ratio W/H is nearest, the first of several."""
    return min(sizes, key=lambda other: abs(other[0] / other[1] - size[0] / size[1]))


def cover(size, target, rounding):
    """The least (W, H) of the same aspect ratio that covers the target.

    rounding: 0 rounds the longer side down as torchvision's Resize, 0.5 to the nearest as kohya.
    """
    (w, h), (W, H) = size, target
    if w * H > W * h:
        return max(W, int(w * H / h + rounding)), H
    return W, max(H, int(h * W / w + rounding))
