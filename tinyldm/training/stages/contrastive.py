"""The batches and the loss of clip.py: pairs of a picture and its caption.

    pictures ─processor→ pixels ─encode_image→ image_embeds ┐
    captions ─tokenizer→ ids ────encode_text─→ text_embeds ─┴→ logits (N,N) → loss

The loss of a pair depends on all other pairs of the batch, so it is no sum over samples. The shards
of a batch, each in a thread, run forward and keep their tapes. The loss is that of all embeddings,
of all ranks, and its gradient goes back through the shards.
Source: Radford et al. 2021, arXiv:2103.00020, section 2.3. Explained: docs/clip.md
"""
import math
from collections import Counter

import numpy as np

from ... import ops, ranks
from ...backend import asarray, to_host, widen
from ...images import to_pil
from ...layers import NO_TAPE, Tape
from ...models.clip_model import LARGEST_SCALE
from ..shards import over_shards


class Pairs:
    """The batches of a training and their loss.

    clip: a ZeroShot; the halves of its model that have trainable parameters are trained. pictures:
    a PictureFolder. Everything random is keyed by (seed, picture).
    """

    def __init__(self, clip, pictures, seed, checkpoints=False):
        self.clip, self.model, self.pictures, self.seed = clip, clip.model, pictures, seed
        self.checkpoints = checkpoints
        halves = self.model.vision_model, self.model.text_model
        self.trains_image, self.trains_text = (
            any(parameter.trainable for parameter in half.parameters()) for half in halves)

    def samples(self, number, size):
        """The rows of the batch of this number -> [Sample]."""
        return self.pictures.samples(self.seed, number, size)

    def describe(self, number, size):
        """The names of a batch's pictures, for messages."""
        return "pictures " + ", ".join(self.pictures.items[sample.index].name
                                       for sample in self.samples(number, size))

    def pixels(self, samples):
        """Pictures as the vision transformer reads them, (B,H,W,3)."""
        images = to_pil(np.stack([self.pictures.image(sample) for sample in samples]))
        return self.model.xp.asarray(self.clip.processor(images), self.model.vision_model.dtype)

    def ids(self, captions):
        """Token ids (B,T) of the captions; T is what the longest one needs.

        What follows the end token does not count, because the transformer is causal.
        """
        tokenizer = self.clip.tokenizer
        rows = [tokenizer.ids(caption)[:tokenizer.model_max_length - 2] for caption in captions]
        ids = np.concatenate([tokenizer.row(row) for row in rows])
        return ids[:, :2 + max(map(len, rows))]

    def batch_loss(self, number, size, gradient_scale=1.0):
        """Add the gradients of a batch of N pairs to the parameters -> {"loss", ...}.

        gradient_scale: of the gradients, Trainer.scale. The halves may compute in float16; the
        embeddings and what follows from them are float32 then.

        expected: the loss of a model that knows nothing, ln N. found: the share of pictures that
        find their caption among the N. scale: exp(logit_scale). same_captions: how many pictures
        have a caption that another picture of the batch has, too. All times the rank's share.
        """
        model, tapes = self.model, {}                   # a tape per shard, by its first row
        samples = self.samples(number, size)
        captions = [sample.caption for sample in samples]

        def forward(samples, ids, rows, share):
            tape = tapes[rows[0]] = Tape(self.checkpoints)
            return self.encode(self.pixels(samples), model.xp.asarray(ids), tape)

        def backward(rows, share):
            tape, rows = tapes[rows[0]], slice(rows[0] - first, rows[-1] + 1 - first)
            self.encode_backward(dimage_embeds[rows], dtext_embeds[rows], tape)

        shards = over_shards(forward, [samples, self.ids(captions), range(size)], xp=model.xp)
        image_embeds, text_embeds = map(model.xp.concatenate, zip(*shards))     # of this rank
        n, first, tape = len(image_embeds), min(tapes), Tape()
        logits = model.match(of_all_ranks(image_embeds), of_all_ranks(text_embeds), tape)
        loss, cache = ops.contrastive(logits)
        dlogits = ops.contrastive_backward(gradient_scale * n / size, cache)
        dimage_embeds, dtext_embeds = (ranks.stack_backward(gradient, n) for gradient in
                                       model.match_backward(dlogits, tape))     # of this rank
        over_shards(backward, [range(size)], xp=model.xp)
        found = logits.argmax(axis=1) == model.xp.arange(size)
        report = {"loss": float(loss), "expected": math.log(size), "found": float(found.mean()),
                  "scale": math.exp(float(model.logit_scale.data)),
                  "same_captions": sum(n for n in Counter(captions).values() if n > 1)}
        return {name: value * n / size for name, value in report.items()}

    def encode(self, pixels, ids, tape):
        """pixels (B,H,W,3), ids (B,T) -> image_embeds and text_embeds (B,P), float32 at least."""
        image_embeds = self.model.encode_image(pixels, tape if self.trains_image else NO_TAPE)
        text_embeds = self.model.encode_text(ids, tape if self.trains_text else NO_TAPE)
        return widen(image_embeds), widen(text_embeds)

    def encode_backward(self, dimage_embeds, dtext_embeds, tape):
        model = self.model
        if self.trains_text:
            model.encode_text_backward(dtext_embeds.astype(model.text_model.dtype, copy=False),
                                       tape)
        if self.trains_image:
            model.encode_image_backward(
                dimage_embeds.astype(model.vision_model.dtype, copy=False), tape)

    def step(self, size, side, checkpoints):
        """Forward and backward of one pair, for memory.py. Its caption is as long as those of the
        first batch of `size` pairs."""
        tape, xp = Tape(checkpoints), self.model.xp
        ids = self.ids([sample.caption for sample in self.samples(0, size)])[:1]
        pixels = xp.zeros((1, side, side, 3), self.model.vision_model.dtype)
        self.encode_backward(*self.encode(pixels, xp.asarray(ids), tape), tape)
        self.model.zero_grad()

    def clamp_scale(self):
        """As CLIPModel.clamp_scale, but in place: the optimiser holds the array."""
        scale = self.model.logit_scale.data
        scale[...] = scale.clip(max=math.log(LARGEST_SCALE))

    def same_pairs(self, size):
        """How many pairs of pictures with the same caption a batch holds, on average."""
        captions = Counter(self.pictures.items[index].caption for index in self.pictures.entries)
        n = len(self.pictures)
        same = sum(count * (count - 1) for count in captions.values())
        return size * (size - 1) / 2 * same / max(1, n * (n - 1))


def of_all_ranks(embeds):
    """Embeddings (n,P) of each rank -> those of the batch (N,P)."""
    return asarray(ranks.stack(to_host(embeds)), like=embeds)


def initialise_clip(model, rng):
    """Fill a CLIPModel, float32, from a numpy Generator.

    Weights are normal, biases 0, norms 1. With D the width and L the layers of a half, the standard
    deviation of the projections of q, k, v and of fc2 is 1/sqrt(2 L D), that of fc1 1/sqrt(2 D),
    that of embeddings and patches 0.02, and all others have 1/sqrt(D). The scale begins at 1/0.07.
    Source: transformers 5, modeling_clip.py, _init_weights. OpenAI's code makes out_proj smaller by
    1/sqrt(2 L), not q, k and v.
    """
    settings = model.settings
    for name, parameter in model.named_parameters():
        half = settings.vision if name.startswith("vis") else settings.text
        D, L = half.hidden_size, half.num_hidden_layers
        narrow = (2 * L * D) ** -0.5
        std = {"q_proj": narrow, "k_proj": narrow, "v_proj": narrow, "fc1": (2 * D) ** -0.5,
               "fc2": narrow, "token_embedding": 0.02, "position_embedding": 0.02,
               "patch_embedding": 0.02}.get(name.split(".")[-2], D ** -0.5) if "." in name else 0
        if name == "logit_scale":
            data = np.full((), math.log(1 / 0.07))
        elif name.endswith("bias"):
            data = np.zeros(parameter.shape)
        elif "norm" in name:
            data = np.ones(parameter.shape)
        else:
            data = rng.normal(0, std, parameter.shape)
        parameter.data = data.astype(np.float32)
