"""What the commands `lora`, `textual-inversion` and `unet` share around their training.

    Stage(options): the weights and the pictures   stage.train: the loop   stage.check: the result

lora.py and textual_inversion.py put into the pipeline what is trained, and write it; unet.py trains
the pipeline's own UNet.
"""
import json
import shlex
import shutil
import time
from collections import Counter
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import numpy as np

from ...backend import asarray, to_host, widen
from ...checkpoints import save_model, write_pipeline
from ...checkpoints.addons.writing import XL
from ...cli.console import say
from ...cli.options import path
from ...errors import TinyldmError
from ...pipelines.loading import load
from ...pipelines.stable_diffusion import StableDiffusion
from .. import memory
from ..data.class_pictures import draw_class_pictures
from ..data.latents import LatentCache
from ..data.pictures import PictureFolder
from ..options import (
    DTYPES,
    add_diffusion,
    add_output,
    add_shared,
    diffusion_loss_from,
    real,
    trainer,
    whole,
)
from .conditions import Texts
from .fine_tuning import FineTuning, Source

END = ".safetensors"
SETTINGS = ("weights", "caption", "resolution", "caption_dropout")
EXACT = 1e-3                # of the prediction's standard deviation, what the file may be off
COARSE = 1e-2               # the same of a file in float16
ROUNDED = 5e-2              # the same of a model that computes in float16


def add_options(parser, *, steps, learning_rate, output, dropout=0.0, layouts=True, **shared):
    """Add what all three offer; the keywords are this stage's defaults. layouts: whether the result
    is a file, which has layouts. shared: see add_shared."""
    add = parser.add_argument_group("weights and pictures").add_argument
    add("--weights", metavar="W", help="a folder, a file, or a name on the Hugging Face hub, as "
        "for python -m tinyldm (default: the bundled model)")
    add("--data", type=path, required=True, metavar="FOLDER", help="the pictures, with captions as "
        "dog.txt beside dog.png, metadata.jsonl, or kohya's folders such as 10_dog")
    add("--caption", metavar="TEXT", help="one caption for all pictures, in place of their own")
    add("--resolution", type=whole(8, 8192), metavar="N", help="side of the pictures in training, "
        "in pixels (the weights' own)")
    add("--buckets", action="store_true", help="keep the pictures' aspect ratios: pictures of "
        "similar ones make a batch")
    add("--caption-dropout", type=real(0, 1), default=dropout, metavar="S", help="the share of the "
        f"pictures that train without their caption, for guidance ({dropout:g})")
    add("--flip", action="store_true", help="mirror half of the pictures")
    add("--strict", action="store_true", help="stop where a picture cannot be read or has no "
        "caption")
    if layouts:
        add("--layout", choices=("diffusers", "kohya"), default="diffusers", help="of the file: "
            "diffusers, or kohya for the web interfaces (diffusers)")
    add("--save-as", choices=DTYPES, default="float32", help="numbers in the result (float32)")
    add_shared(parser, steps=steps, learning_rate=learning_rate, **shared)
    add_diffusion(parser)
    add_output(parser, output)


def file_of(options):
    """Where the file of a training goes: --output, if that ends with .safetensors, and then the
    state goes into a folder beside it, dog.training for dog.safetensors; else into --output."""
    output = options.output
    options.output = output.with_suffix(".training") if output.suffix == END else output
    return output if output.suffix == END else output / f"{output.name}{END}"


def check_free(result, options):
    """Raise TinyldmError where a result lies already that this training has not begun."""
    if result.exists() and not options.resume:
        raise TinyldmError(f"{result} exists already: name another one with --output, or go on "
                           "with its training by --resume")


class Stage:
    """The weights, the pictures and the result of one command.

    options: what add_options adds, parsed. captions: for all pictures, in place of --caption and
    their own. pipe: what is trained, and then result, the folder it goes to; None loads --weights,
    and the result is a file, see file_of.
    Raises TinyldmError for whatever is wrong before the training.
    """

    def __init__(self, options, captions=None, *, pipe=None, result=None):
        self.options, self.result = options, result
        if result is None:
            self.result = file_of(options)
            check_free(self.result, options)
        self.started, self.prior, self.rounding = time.time(), None, None
        self.pipe = pipe or load_weights(options.weights, options.device, DTYPES[options.dtype])
        self.resolution = options.resolution or min(self.pipe.size())
        f = self.pipe.vae.vae_scale_factor
        if self.resolution % f:
            raise TinyldmError(f"--resolution must be a multiple of {f} for these weights, not "
                               f"{self.resolution}")
        self.prefix = f"{options.trigger} " if getattr(options, "trigger", None) else ""
        self.pictures = self._folder(options.data, captions or options.caption)

    def _folder(self, folder, captions):
        options = self.options
        pictures = PictureFolder(folder, self.resolution, caption=captions, flip=options.flip,
                                 buckets=options.buckets, strict=options.strict)
        for tokenizer in self.pipe.tokenizers.values():
            pictures.fit_captions(tokenizer)
        for line in pictures.report():
            say(line)
        return pictures

    def add_prior(self, folder, prompt, count):
        """Draw what is missing of `count` pictures of the class, and read them."""
        side = self.resolution
        drawn = draw_class_pictures(self.pipe, prompt, folder, count, width=side, height=side)
        say(f"{folder}: {drawn} of {count} pictures of the class drawn now")
        self.prior = self._folder(folder, prompt)

    def train(self, named, write, settings):
        """Train parameters, [(name, Parameter)], to the last step.

        write() -> Rounding of a file, or None: writes the result; the loop calls it after each save
        of the state. settings: names of the options that a training that goes on must have in
        common, besides those of all stages.
        """
        options = self.options
        folders = [(self.pictures, 1.0, self.prefix)]
        folders += [(self.prior, options.prior_weight, "")] if self.prior else []
        sources = []
        for pictures, weight, prefix in folders:
            latents = LatentCache(pictures, self.pipe.vae, options.output / "latents")
            sources.append(Source(pictures, latents, options.batch, weight, prefix))
        tuning = FineTuning(self.pipe, sources, diffusion_loss_from(options, self.pipe.schedule),
                            options.seed, options.checkpoints, options.caption_dropout)
        settings = {f"--{name.replace('_', '-')}": getattr(options, name)
                    for name in (*SETTINGS, *settings)}
        self.loop = loop = trainer(
            options, named, data="".join(source.pictures.fingerprint for source in sources),
            batches_per_epoch=self.pictures.batches_per_epoch(options.batch), settings=settings)
        loop.models = self.pipe.models
        say(self.memory(tuning, named))

        def batch_loss(_):                              # each sample has a generator of its own
            loop.about = tuning.describe(loop.batch)
            return tuning.batch_loss(loop.batch, loop.scale)

        def kept():
            self.rounding = write()

        loop.train(batch_loss, write=kept, sample=self.sample, validate=tuning.validate)
        loop.optimizer.adopt_average()                  # the state is saved

    def sample(self):
        """A picture of each --sample-prompt, with the seed of its place."""
        side = self.resolution
        return [self.pipe(prompt, seed=seed, width=side, height=side)[0]
                for seed, prompt in enumerate(self.options.sample_prompt)]

    def memory(self, tuning, named):
        """A line on the memory that the training will take, and on how it could take less."""
        options, unet = self.options, self.pipe.unet
        side = self.resolution // self.pipe.vae.vae_scale_factor
        conditions = tuning.texts.frozen([""])
        if unet.add_embedding:
            conditions["time_ids"] = unet.xp.zeros((1, 6), np.float32)
        context, texts = conditions.pop("context"), tuning.texts if tuning.reads else None
        at_once = memory.division(options.batch, unet.xp).at_once
        found = {kept: memory.activations(unet, context, side, at_once, kept, texts, **conditions)
                 for kept in (False, True)}
        return memory.sentence(options, self.pipe.models.values(), named, found)

    # ---- the file -------------------------------------------------------------------------------

    @property
    def base(self):
        """What kohya's files call the weights, a key of writing.BASES."""
        if self.pipe.text_encoder_2 is not None:
            return XL
        second = self.pipe.unet.settings.cross_attention_dim == 1024
        return f"sd_v{1 + second}{'_v' * (self.pipe.schedule.prediction_type == 'v_prediction')}"

    def metadata(self):
        """What the header of kohya's layout says of the training; of paths only the last name."""
        options, now = self.options, time.time()
        folder, R = self.pictures.folder.name, self.resolution
        tags = Counter(tag.strip() for item in self.pictures.items
                       for caption in item.captions for tag in caption.split(","))
        found = {
            "modelspec.resolution": f"{R}x{R}",
            "modelspec.date": datetime.fromtimestamp(int(now), timezone.utc).isoformat(),
            "ss_training_started_at": self.started, "ss_training_finished_at": now,
            "ss_sd_model_name": Path(options.weights or "shapes").name,
            "ss_resolution": f"({R}, {R})", "ss_seed": options.seed,
            "ss_num_train_images": len(self.pictures), "ss_batch_size_per_device": options.batch,
            "ss_gradient_accumulation_steps": options.accumulate,
            "ss_steps": self.loop.step, "ss_max_train_steps": options.steps,
            "ss_learning_rate": options.learning_rate, "ss_lr_scheduler": options.schedule,
            "ss_lr_warmup_steps": options.warmup, "ss_optimizer": "AdamW",
            "ss_max_grad_norm": options.clip, "ss_min_snr_gamma": options.min_snr,
            "ss_noise_offset": options.noise_offset,
            "ss_dataset_dirs": json.dumps({folder: {"n_repeats": 1,
                                                    "img_count": len(self.pictures.items)}}),
            "ss_tag_frequency": json.dumps({folder: tags})}
        if trigger := getattr(options, "trigger", None) or getattr(options, "token", None):
            found["modelspec.trigger_phrase"] = trigger
        return {name: str(value) for name, value in found.items()}

    def probe(self):
        """One prediction of the UNet for a caption, as the pipeline is now, (1,h,w,C)."""
        unet, texts = self.pipe.unet, Texts(self.pipe)
        side = self.resolution // self.pipe.vae.vae_scale_factor
        conditions = texts.frozen([self.prefix + self.pictures.items[0].caption])
        if unet.add_embedding:
            conditions["time_ids"] = unet.xp.full((1, 6), self.resolution, np.float32)
        shape = 1, side, side, unet.settings.in_channels
        latents = asarray(np.random.default_rng(0).standard_normal(shape).astype(unet.dtype),
                          like=conditions["context"])
        t = asarray(np.array([self.pipe.schedule.num_train_timesteps // 2]), like=latents)
        return widen(to_host(unet(latents, t, conditions.pop("context"), **conditions)))

    def check(self, read_back):
        """Compare a prediction of the trained model with one after reading the result.

        read_back: takes out what was trained, calls `probe`, reads the file -> what probe gave.
        Raises TinyldmError where the two differ.
        """
        trained, rounding = self.probe(), self.rounding
        untrained, again = read_back(), self.probe()
        error, change = (float(abs(other - trained).max() / trained.std())
                         for other in (again, untrained))
        if rounding and self.options.save_as == "float16":
            say(f"{self.result}: as float16 {rounding.zeros} of {rounding.numbers} numbers became "
                f"0, and the largest error is {rounding.largest:.2g}")
        allowed = COARSE if self.options.save_as == "float16" else EXACT
        if not error <= (ROUNDED if self.options.dtype == "float16" else allowed):
            raise TinyldmError(f"{self.result}, read back, changes the prediction by {error:.2g} "
                               "of its standard deviation: go on with --resume and --save-as "
                               "float32")
        say(f"checked: with {self.result} read back, the model predicts what the trained one does, "
            f"up to {error:.1g} of the standard deviation; without it, up to {change:.1g}")

    def show_use(self, *option, weights=None):
        """Print a command that draws with the result, an option's, or as the weights."""
        words = [self.prefix + self.pictures.items[0].caption, *option]
        if weights := weights or self.options.weights:
            words += ["--weights", weights]
        say(f"draw with it: python -m tinyldm {' '.join(shlex.quote(str(word)) for word in words)}")


def load_weights(weights, device, dtype=np.float32, exact=()):
    """The pipeline of some weights -> StableDiffusion.

    dtype: float32, or float16 for all except the VAE, which overflows easily, and the parts of the
    names `exact`.
    Raises TinyldmError for weights of another system, and for those that are trained otherwise.
    """
    pipe = load(weights, dtype=np.float32)
    check_kind(pipe, weights)
    for part, model in pipe.models.items():
        for parameter in model.parameters() if part not in ("vae", *exact) else ():
            parameter.data = parameter.data.astype(dtype, copy=False)
    pipe.to_device(device)
    pipe.language = None                                # it will know more
    return pipe


def check_kind(pipe, weights):
    """Raise TinyldmError unless a pipeline, of these weights, is one that is trained here."""
    reason = None
    if not isinstance(pipe, StableDiffusion):
        reason = "no UNet that reads prompts"
    elif pipe.unet.settings.in_channels != pipe.vae.settings.latent_channels:
        reason = "a UNet for inpainting"
    elif pipe.unet.settings.time_cond_proj_dim:
        reason = "a UNet that imitates guidance"
    if reason:
        raise TinyldmError(f"{weights} is {pipe.described}, with {reason}: this stage trains "
                           "Stable Diffusion 1, 2 and XL")


def writer(pipe, folder, parts, dtype):
    """The function that writes a pipeline's folder: at first whole, then only what is trained.

    parts: the models that are trained; dtype: of their files. The others have the narrowest one
    that loses nothing. model_index.json comes last, so a folder that has it is whole; and each file
    is replaced whole or not at all.
    """
    written = False

    def write():
        nonlocal written
        if written:
            for part in parts:
                save_model(getattr(pipe, part), folder / part, dtype)
            return
        tokenizers = {part: partial(write_tokenizer, tokenizer)
                      for part, tokenizer in pipe.tokenizers.items()}
        write_pipeline(folder, pipe.kind, pipe.models, tokenizers, pipe.schedulers,
                       pipe.settings(), dict.fromkeys(parts, dtype))
        written = True
    return write


def write_tokenizer(tokenizer, folder):
    """Save a tokenizer in a folder, unless the training put it there before it was stopped."""
    if not (folder / "tokenizer_config.json").exists():         # the file that is written last
        shutil.rmtree(folder, ignore_errors=True)
        tokenizer.save(folder)
