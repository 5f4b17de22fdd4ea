"""python -m tinyldm.training ddpm: a diffusion model of pictures, from scratch or from weights.

    --model ─new_models→ pipeline ┐
    --weights ─load→ pipeline ────┴→ its network is trained
    pictures, classes ─Denoising→ gradients ─Trainer→ the folder --output ─read back→ checked

The folder is a pipeline's in the public layout: python -m tinyldm --weights FOLDER draws with it.
Source: Ho et al. 2020, arXiv:2006.11239; Nichol & Dhariwal 2021, arXiv:2102.09672; for a DiT
Peebles & Xie 2022, arXiv:2212.09748.
"""
import shlex
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ...backend import asarray, to_host, widen
from ...cli.console import say
from ...cli.options import path
from ...configs import sides
from ...diffusion.schedule import PREDICTION_TYPES
from ...errors import TinyldmError, shorten
from ...pipelines.ddpm import DDPM
from ...pipelines.dit import DiT
from ...pipelines.guided_ddpm import GuidedDDPM
from ...pipelines.loading import load
from .. import memory
from ..data.classes import find_classes
from ..data.latents import LatentCache
from ..data.pictures import PictureFolder
from ..objectives import HybridLoss
from ..options import (
    add_diffusion,
    add_output,
    add_shared,
    diffusion_loss_from,
    real,
    trainer,
    whole,
)
from .autoencoder import load_from
from .denoising import Denoising, Latents, Pixels
from .new_models import MODELS, new_pipeline, scheduler_config
from .stage import EXACT, ROUNDED, check_free, writer

SAMPLES, SAMPLE_STEPS = 8, 25       # pictures of a row of the sheet, steps of DDIM for each
# What a training that goes on must have in common with its beginning, besides that of all stages.
SETTINGS = ("weights", "model", "classes", "class_dropout", "resolution", "variance",
            "beta_schedule", "train_timesteps", "prediction_type", "held_out")
# Options of new models, and their defaults.
NEW = {"model": "small", "variance": "fixed_large", "beta_schedule": "linear",
       "train_timesteps": 1000, "prediction_type": "epsilon"}


def add_options(parser):
    add = parser.add_argument_group("pictures").add_argument
    add("--data", type=path, required=True, metavar="FOLDER", help="the pictures, also in "
        "sub-folders; python -m tinyldm.shapes pictures writes some")
    add("--resolution", type=whole(8, 8192), metavar="N", help="side of the pictures in training, "
        "in pixels (the weights' own; 32, of a DiT 64)")
    add("--classes", choices=("folders", "names"), help="draw by class: the first sub-folder, "
        "cat/1.png, or what stands before the first _ of a name, cat_1.png")
    add("--class-dropout", type=real(0, 1), default=0.1, metavar="S", help="the share of the "
        "pictures that train without their class, for guidance (0.1)")
    add("--held-out", type=whole(0, 10_000), default=0, metavar="N", help="pictures that are not "
        "trained on: the validation's, and at the end the bits per dimension of a model of pixels "
        "are measured on them (0)")
    add("--bits-steps", type=whole(1, 100_000), default=100, metavar="N", help="steps of that: "
        "more give a tighter bound, and at most all timesteps (100)")
    add("--flip", action="store_true", help="mirror half of the pictures")
    add = parser.add_argument_group("model").add_argument
    add("--weights", metavar="W", help="go on with a DDPM, an Improved DDPM or a DiT: a folder, a "
        "file, or a name on the Hugging Face hub (default: a new model)")
    add("--model", choices=MODELS, metavar="NAME", help="a new one: small, a UNet for a CPU, "
        "cifar10, that of DDPM, or dit, a small DiT on latents (small)")
    add("--vae", metavar="W", help="of a new DiT: a folder or a file (the bundled model's)")
    add("--variance", choices=("fixed_small", "fixed_large", "learned"), help="of a new model's "
        "reverse steps; learned is Improved DDPM (fixed_large)")
    add("--beta-schedule", choices=("linear", "squaredcos_cap_v2"), help="of a new model; the "
        "second is Improved DDPM's cosine (linear)")
    add("--train-timesteps", type=whole(2, 100_000), metavar="T", help="of a new model (1000)")
    add("--prediction-type", choices=PREDICTION_TYPES, help="of a new model (epsilon)")
    add_shared(parser, steps=1500, learning_rate=1e-3, batch=16, warmup=100,
               schedule="constant_with_warmup", weight_decay=0.0, ema=0.999)
    add_diffusion(parser)
    add_output(parser, Path("ddpm"), prompts=False)


def run(options):
    """Train, write and check. Raises TinyldmError for whatever is wrong."""
    stage = Stage(options)
    stage.train()
    stage.finish()


class Stage:
    """The pictures, the pipeline and the folder of one command.

    options: what add_options adds, parsed; of those in NEW None becomes what is used.
    Raises TinyldmError for whatever is wrong before the training.
    """

    def __init__(self, options):
        self.options = options
        check_free(options.output / "model_index.json", options)
        begun, vae = self.begin(), None
        if options.model == "dit":
            vae = vae_of(options.vae)
        side = options.resolution or (side_of(begun) if begun else 64 if vae else 32)
        self.pictures = PictureFolder(options.data, side, caption="", flip=options.flip)
        held_out = self.pictures.hold_out(options.held_out) if options.held_out else []
        self.classes, labels = [], None                 # names, in the order of the labels
        if options.classes:
            self.classes, labels = find_classes(self.pictures, options.classes)
        self.pipe = begun or self.new(side, vae)
        self.network = getattr(self.pipe, self.pipe.network)
        self.check(side)
        self.numbers = self.numbered()                  # of the classes, in the model
        if options.device == "cuda":
            self.pipe.to_device("cuda")
        self.denoising = Denoising(
            self.network, self.pictures, self.x_start(), self.loss(), options.seed,
            labels=labels and [self.numbers[label] for label in labels],
            dropout=options.class_dropout if self.guided else 0.0, no_class=self.known,
            held_out=held_out, checkpoints=options.checkpoints,
            timestep_scale=(1000 / self.pipe.schedule.num_train_timesteps
                            if getattr(self.pipe, "rescale_timesteps", False) else 1))
        for line in self.pictures.report():
            say(line)
        if self.classes:
            say("classes: " + ", ".join(f"{number} {name}" for number, name in
                                        zip(self.numbers, self.classes)))

    def begin(self):
        """The pipeline of --weights; None for a new one, whose options get their defaults."""
        options = self.options
        if options.weights:
            if given := [name for name in (*NEW, "vae") if getattr(options, name) is not None]:
                raise TinyldmError(f"--{given[0].replace('_', '-')} is for a new model, and "
                                   "--weights have their own: leave one of them out")
            return load_weights(options.weights)
        for name, default in NEW.items():
            if getattr(options, name) is None:
                setattr(options, name, default)
        if options.vae and options.model != "dit":
            raise TinyldmError("--vae is for --model dit: a UNet here trains on pixels")
        return None

    def new(self, side, vae):
        """A pipeline with new weights."""
        options = self.options
        scheduler = scheduler_config(options.beta_schedule, options.train_timesteps,
                                     options.prediction_type, options.variance)
        return new_pipeline(options.model, side, scheduler, seed=options.seed,
                            classes=self.classes, vae=vae, dropped=options.class_dropout > 0,
                            learned=options.variance == "learned")

    def check(self, side):
        """Raise TinyldmError where the pipeline does not fit pictures of this side."""
        pipe, settings = self.pipe, self.network.settings
        self.learned = settings.out_channels == 2 * settings.in_channels
        self.guided = isinstance(pipe, (DiT, GuidedDDPM))
        if side != side_of(pipe):
            raise TinyldmError(f"--resolution must be {side_of(pipe)}, the size of these weights' "
                               f"pictures, not {side}")
        if isinstance(pipe, DDPM) and (settings.class_embed_type or settings.in_channels != 3):
            raise TinyldmError("the weights are of grey pictures, or their classes are no "
                               "numbers: this stage trains on colours and numbered classes")
        if self.learned and pipe.scheduler.get("variance_type") == "learned":
            raise TinyldmError("the weights' variance_type is learned: this stage trains "
                               "learned_range, the variance of Improved DDPM")
        own = self.options
        if self.learned and (own.min_snr or own.noise_offset or own.timesteps != "uniform"):
            raise TinyldmError("with a learned variance the loss has a bound, of uniform timesteps "
                               "and normal noise: leave --min-snr, --noise-offset and --timesteps "
                               "out")

    def numbered(self):
        """The numbers of the pictures' classes in the model: by their names, where it has any.

        Raises TinyldmError for classes that the model does not know.
        """
        pipe, settings, count = self.pipe, self.network.settings, len(self.classes)
        self.known = (settings.num_embeds_ada_norm if isinstance(pipe, DiT) else
                      (settings.num_class_embeds or 0) - self.guided)
        if (names := getattr(pipe, "names", None)) and count:
            if unknown := [name for name in self.classes if name not in names]:
                raise TinyldmError(f"the weights know no class {unknown[0]!r:.80}, but "
                                   f"{shorten(list(names))}: name the pictures' classes like these")
            return [names[name] for name in self.classes]
        if self.known != count:
            raise TinyldmError(f"the weights know {self.known or 'no'} classes, and --classes "
                               f"{self.options.classes or 'is not given, which'} finds {count}: "
                               "give pictures of as many")
        return list(range(count))

    def x_start(self):
        if not isinstance(self.pipe, DiT):
            return Pixels(self.pictures)
        vae = self.pipe.vae
        return Latents(LatentCache(self.pictures, vae, self.options.output / "latents"), vae)

    def loss(self):
        simple = diffusion_loss_from(self.options, self.pipe.schedule)
        return HybridLoss(simple) if self.learned else simple

    def train(self):
        """Train to the last step; from then on the network has the averaged weights, if any."""
        options, denoising, size = self.options, self.denoising, self.options.batch
        self.loop = loop = trainer(
            options, self.network.named_parameters(), data=self.pictures.fingerprint,
            settings={f"--{name.replace('_', '-')}": getattr(options, name) for name in SETTINGS})
        loop.models = self.pipe.models
        say(self.memory())

        def batch_loss(rng):
            loop.about = denoising.describe(loop.batch, size)
            return denoising.batch_loss(loop.batch, size, loop.scale)

        write = writer(self.pipe, options.output, [self.pipe.network], np.float32)
        loop.train(batch_loss, write=write, sample=self.sample, validate=denoising.validate)
        loop.optimizer.adopt_average()                  # the state is saved: from here on these

    def memory(self):
        """A line on the memory that the training will take."""
        settings = self.network.settings
        at_once = memory.division(self.options.batch, self.network.xp).at_once
        side, _ = sides(settings.sample_size)
        least = None if isinstance(self.pipe, DiT) else 2 ** (len(settings.block_out_channels) - 1)
        found = {kept: at_once * max(memory.places(self.denoising.step, side, kept, least))
                 for kept in (False, True)}
        return memory.sentence(self.options, self.pipe.models.values(),
                               self.network.named_parameters(), found)

    # ---- the result -----------------------------------------------------------------------------

    def sample(self):
        """Some pictures of fixed seeds, of one class after the other, by a short DDIM."""
        steps = min(SAMPLE_STEPS, self.pipe.schedule.num_train_timesteps)
        labels = {}
        if self.classes:
            labels["label"] = [self.numbers[i % len(self.numbers)] for i in range(SAMPLES)]
        else:
            labels["num_images"] = SAMPLES
        return self.pipe(**labels, seed=list(range(SAMPLES)), sampler="ddim",
                         num_inference_steps=steps)

    def finish(self):
        """Read the folder back and compare, tell the bits per dimension, and how to draw."""
        output, label = self.options.output, ""
        first = {"class_labels": np.array(self.numbers[:1])} if self.classes else {}
        again = load(output, self.options.device, np.float32)
        found = [probe(getattr(pipe, pipe.network), first) for pipe in (self.pipe, again)]
        error = float(abs(found[0] - found[1]).max() / found[0].std())
        if not error <= (ROUNDED if self.options.dtype == "float16" else EXACT):
            raise TinyldmError(f"{output}, read back, predicts something else, by {error:.2g} of "
                               "the standard deviation: go on with --resume to write it anew")
        say(f"checked: {output}, read back, predicts what the trained model does, up to "
            f"{error:.1g} of the standard deviation")
        if self.options.held_out and isinstance(self.pipe, DDPM):
            self.tell_bits()
        if self.classes:
            named = getattr(self.pipe, "names", None)
            label = f" --label {shlex.quote(self.classes[0]) if named else self.numbers[0]}"
        say(f"draw with it: python -m tinyldm --weights {shlex.quote(str(output))}{label}")

    def tell_bits(self):
        """Print the bits per dimension of the held-out pictures."""
        T = self.pipe.schedule.num_train_timesteps
        steps = min(self.options.bits_steps, T)
        kind = self.pipe.scheduler.get("variance_type") or "fixed_small"
        kind = "learned_range" if self.learned else kind.removesuffix("_log")
        bits = self.denoising.bits(kind, steps, partial(tqdm, total=steps, leave=False,
                                                        desc="bits per dimension"))
        say(f"bits per dimension of {self.options.held_out} held-out pictures: {bits.total:.3f}, "
            f"in {steps} of {T} steps")


def probe(network, label):
    """One prediction of a network, (1,h,w,O)."""
    settings = network.settings
    shape = 1, *sides(settings.sample_size), settings.in_channels
    latents = np.random.default_rng(0).standard_normal(shape)
    latents = network.xp.asarray(latents.astype(network.dtype))
    label = {name: asarray(value, like=latents) for name, value in label.items()}
    return widen(to_host(network(latents, asarray(np.array([500]), like=latents), **label)))


def side_of(pipe):
    """The side of a pipeline's pictures in pixels. Raises TinyldmError for others than squares."""
    width, height = pipe.picture_size(None)
    if width != height:
        raise TinyldmError(f"the weights draw pictures of {width}x{height} pixels: this stage "
                           "trains on squares")
    return width


def vae_of(weights):
    """An AutoencoderKL in float32: of a place, or the bundled model's."""
    return load_from(weights) if weights else load(None, dtype=np.float32).vae


def load_weights(weights):
    """The pipeline of some weights in float32, DDPM or DiT. Raises TinyldmError for others."""
    pipe = load(weights, dtype=np.float32)
    if not isinstance(pipe, (DDPM, DiT)):
        raise TinyldmError(f"{weights} is {pipe.described}: this stage trains DDPM, Improved DDPM "
                           "and DiT")
    return pipe
