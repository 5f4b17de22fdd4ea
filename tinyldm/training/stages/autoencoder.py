"""python -m tinyldm.training autoencoder: train the VAE, which diffusion works inside of.

    weights, or a config ─→ VAE ┐
    pictures ─RoundTrip→ loss ──┴─Trainer→ the folder --output ─read back→ checked

The folder is that of an AutoencoderKL in diffusers' layout: `--vae FOLDER` draws with it.

round_trip.py has the loss, with perceptual.py and adversarial.py where they are asked for.
Source: Rombach et al. 2022, arXiv:2112.10752, section 3.1; CompVis/latent-diffusion,
ldm/models/autoencoder.py. Explained: docs/autoencoder.md
"""
import math

import numpy as np

from ... import ops
from ...backend import array_library, to_host
from ...checkpoints import load_model, resolve_vae, save_model
from ...checkpoints.components import config_errors, has_config, note_unknown_keys
from ...checkpoints.components import read_config as model_config
from ...checkpoints.folders import load_vae
from ...checkpoints.single_file.kinds import SD1
from ...cli.console import say
from ...cli.options import path
from ...configs import sides
from ...errors import TinyldmError
from ...files import read_json
from ...images import grid, to_pil
from ...models import AutoencoderKL
from ...models.discriminator import PatchDiscriminator, smallest
from ...models.discriminator import initialise as initialise_discriminator
from .. import memory
from ..data.pictures import PictureFolder
from ..objectives import generators
from ..optim import initialise
from ..options import DTYPES, add_output, add_shared, real, trainer, whole
from .adversarial import Adversary
from .perceptual import BUNDLED, load_perceptual
from .round_trip import AutoencoderLoss, decode, decoder_parameters, encode, latent_shape, psnr
from .stage import COARSE, EXACT, ROUNDED

CREATION = 2 ** 32 - 1      # the key of the first numbers; the steps have smaller ones
CHANNELS, LATENTS, LAYERS, RESOLUTION = (64, 128, 256), 4, 1, 64        # of a new VAE
MEASURED, SHOWN, GAP = 16, 8, 2         # pictures at the end, pictures of a sample, pixels between
SETTINGS = ("weights", "config", "channels", "latent_channels", "layers", "resolution",
            "decoder_only", "held_out", "distance", "kl_weight", "perceptual", "perceptual_weight",
            "discriminator", "discriminator_weight", "discriminator_channels")


def add_options(parser):
    add = parser.add_argument_group("autoencoder and pictures").add_argument
    add("--data", type=path, required=True, metavar="FOLDER", help="of pictures; they need no "
        "captions")
    add("--weights", metavar="W", help="train the VAE of these further: a folder, a file, or a "
        "name on the Hugging Face hub; without them a new one is made")
    add("--config", type=path, metavar="FILE", help="of a new VAE: a config.json as diffusers has "
        "it")
    add("--channels", type=whole(1, 65536), nargs="+", metavar="C", help="of a new VAE, one number "
        f"per level; each level but the first halves the picture ({' '.join(map(str, CHANNELS))})")
    add("--latent-channels", type=whole(1, 256), metavar="C", help=f"of a new VAE ({LATENTS})")
    add("--layers", type=whole(1, 8), metavar="N", help="residual blocks per level of a new VAE's "
        f"encoder ({LAYERS})")
    add("--resolution", type=whole(8, 8192), metavar="R", help="side of the images in pixels (what "
        f"the VAE's config says; of a new one {RESOLUTION})")
    add("--decoder-only", action="store_true", help="leave the encoder as it is, and with it the "
        "latents that a UNet knows")
    add("--held-out", type=whole(0, 10_000), default=0, metavar="N", help="pictures that are not "
        "trained on, but measured and shown; 0 shows the first ones (0)")
    add("--flip", action="store_true", help="mirror half of the pictures")
    add("--random-crop", action="store_true", help="cut at a random place, not in the middle")
    add("--strict", action="store_true", help="stop where a picture cannot be read")
    add("--save-as", choices=DTYPES, default="float32", help="numbers in the file (float32)")
    add("--set-scaling-factor", action="store_true", help="write 1 / std of the latents into the "
        "config: a UNet that is trained next needs it")
    add_loss(parser)
    add_shared(parser, steps=2000, batch=8, learning_rate=1e-4, betas=(0.5, 0.9), weight_decay=0.0,
               clip=0.0)
    add_output(parser, path("autoencoder"), prompts=False)


def add_loss(parser):
    add = parser.add_argument_group("loss").add_argument
    add("--distance", choices=("l1", "l2"), default="l1", help="of pixels: absolute or squared "
        "differences, summed over a picture (l1)")
    add("--kl-weight", type=real(0), default=1e-6, metavar="W", help="of the KL divergence, summed "
        "over a picture's latents (1e-6)")
    add("--perceptual", metavar="NET", help="also compare features of this network: a CLIP or a "
        f"VAE, as a folder, a file or a name on the hub, or {BUNDLED}, the bundled model's encoder")
    add("--perceptual-weight", type=real(0), default=1.0, metavar="W", help="beside the mean "
        "difference of pixels (1)")
    add("--discriminator", type=whole(0), metavar="STEP", help="from this step on, train a patch "
        "discriminator, and the decoder against it; the paper begins at 50001")
    add("--discriminator-weight", type=real(0), default=0.5, metavar="W", help="of its gradient, "
        "in units of that of the rest (0.5)")
    add("--discriminator-channels", type=whole(1, 1024), default=64, metavar="C", help="of its "
        "first layer (64)")


def run(options):
    """Train, write and check. Raises TinyldmError for whatever is wrong."""
    output = options.output
    if (output / "config.json").exists() and not options.resume:
        raise TinyldmError(f"{output} holds a model already: name another folder with --output, or "
                           "go on with its training by --resume")
    vae = load_or_make(options)
    check(options, vae)
    pictures = PictureFolder(options.data, options.resolution, caption="", flip=options.flip,
                             center_crop=not options.random_crop, strict=options.strict)
    held_out = pictures.hold_out(options.held_out) if options.held_out else []
    for line in pictures.report():
        say(line)
    loss, models = loss_from(options, vae), {"vae": vae}
    named = decoder_parameters(vae) if options.decoder_only else list(vae.named_parameters())
    if loss.adversary:                                  # both networks, one optimiser
        models["discriminator"] = loss.adversary.discriminator
        named += models["discriminator"].named_parameters("discriminator.")
    loop = trainer(options, named, data=pictures.fingerprint, terms=3 * options.resolution ** 2,
                   settings={
        f"--{name.replace('_', '-')}": value if value is None else str(value)
        for name in SETTINGS for value in [getattr(options, name)]})
    loop.models = models
    frozen = [loss.perceptual.network] if loss.perceptual else []
    say(memory.sentence(options, [*models.values(), *frozen], named,
                        {kept: loss.memory(options.resolution, options.batch, kept)
                         for kept in (False, True)}))
    watched = Watched(vae, pictures, held_out)

    def batch_loss(rng):
        images, _, indices = pictures.batch(options.seed, loop.batch, options.batch)
        loop.about = "pictures " + ", ".join(pictures.items[i].name for i in indices)
        noise = draw_noise(vae, images, options.seed, loop.batch)
        return loss(vae.xp.asarray(images), noise, loop.step, loop.scale)

    def write():
        save_model(vae, output, options.save_as)

    def finish():
        found = watched.measure()
        if options.set_scaling_factor:
            set_scaling_factor(vae, found["latent_std"])
            loop.averaged(write, exact=True)()
        say(summary(found, len(watched.images), options.set_scaling_factor))
        check_file(vae, output, watched.images[0], ROUNDED if options.dtype == "float16" else
                   COARSE if options.save_as == "float16" else EXACT)

    loop.train(batch_loss, write=write, sample=watched.sample, validate=watched.validate)
    loop.optimizer.adopt_average()                      # the state is saved
    finish()


def loss_from(options, vae):
    """The AutoencoderLoss of the options, with the networks that it needs."""
    perceptual = adversary = None
    if options.perceptual:
        perceptual = load_perceptual(options.perceptual, options.resolution)
        perceptual.network.move_to(vae.xp)
    if options.discriminator is not None:
        discriminator = PatchDiscriminator(channels=options.discriminator_channels)
        initialise_discriminator(discriminator, np.random.default_rng([options.seed, CREATION, 1]))
        adversary = Adversary(discriminator.move_to(vae.xp), options.discriminator,
                              options.discriminator_weight)
    return AutoencoderLoss(
        vae, squared=options.distance == "l2", kl_weight=options.kl_weight, perceptual=perceptual,
        perceptual_weight=options.perceptual_weight, adversary=adversary,
        decoder_only=options.decoder_only, checkpoints=options.checkpoints)


# ---- the model and its options -----------------------------------------------------------------

def load_or_make(options):
    """The VAE of --weights, or a new one; float32, on the device. It sets --resolution."""
    new = {"--config": options.config, "--channels": options.channels,
           "--latent-channels": options.latent_channels, "--layers": options.layers}
    given = [name for name, value in new.items() if value is not None]
    if options.weights and given:
        raise TinyldmError(f"{given[0]} describes a new VAE, and --weights name one that is there: "
                           "leave one of both out")
    if options.config and len(given) > 1:
        raise TinyldmError(f"{given[1]} is in the file of --config already: leave one of both out")
    if options.decoder_only and not options.weights:
        raise TinyldmError("--decoder-only needs an encoder that is trained: name one with "
                           "--weights")
    if options.weights:
        vae = load_from(options.weights)
    else:
        vae = AutoencoderKL(read_config(options.config) if options.config else new_config(options))
        initialise(vae, np.random.default_rng([options.seed, CREATION]))
    options.resolution = options.resolution or min(sides(vae.settings.sample_size or RESOLUTION))
    return vae.move_to(array_library(options.device))


def load_from(weights):
    """The VAE of some weights, float32, with the scaling factor that its own config names."""
    path = resolve_vae(weights)
    path = path / "vae" if (path / "model_index.json").is_file() else path
    folder = path.parent if path.is_file() and has_config(path) else path
    kind, config = model_config(folder) if folder.is_dir() else (AutoencoderKL, SD1.vae)
    return load_vae(path, config if kind is AutoencoderKL else SD1.vae)


def new_config(options):
    channels = options.channels or list(CHANNELS)
    return {"_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": 3, "out_channels": 3,
            "block_out_channels": channels, "latent_channels": options.latent_channels or LATENTS,
            "layers_per_block": options.layers or LAYERS,
            "norm_num_groups": math.gcd(32, *channels),
            "down_block_types": ["DownEncoderBlock2D"] * len(channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(channels),
            "sample_size": options.resolution or RESOLUTION, "scaling_factor": 1.0}


def read_config(file):
    """The config of a VAE in a file, checked."""
    config = read_json(file)
    with config_errors(file, "VAE that is supported"):
        AutoencoderKL.Settings.read(config)
    note_unknown_keys(file, AutoencoderKL.Settings, config)
    return config


def check(options, vae):
    """Raise TinyldmError for options that do not fit the VAE."""
    settings, factor = vae.settings, vae.vae_scale_factor
    if (settings.in_channels, settings.out_channels) != (3, 3):
        raise TinyldmError(f"a VAE of {settings.in_channels} channels in and "
                           f"{settings.out_channels} out does not fit pictures, which have 3")
    if options.resolution % factor:
        raise TinyldmError(f"--resolution must be a multiple of {factor} for this VAE, not "
                           f"{options.resolution}")
    if options.discriminator is not None and options.resolution < smallest():
        raise TinyldmError(f"--discriminator needs pictures of at least {smallest()} pixels, not "
                           f"--resolution {options.resolution}: its patches are larger")
    if options.decoder_only and options.set_scaling_factor:
        raise TinyldmError("with --decoder-only the latents stay as they are, and so does their "
                           "scaling factor: leave --set-scaling-factor out")


# ---- what is drawn and measured ----------------------------------------------------------------

def draw_noise(vae, images, seed, batch):
    """Normal numbers (B,h,w,C), those of each sample from a generator of its own."""
    shape = latent_shape(vae, images)
    noise = [rng.standard_normal(shape, np.float32)
             for rng in generators(seed, batch, len(images))]
    return vae.xp.asarray(np.stack(noise))


class Watched:
    """The pictures that are held out, or the first ones; their round trip by the latents' mean."""

    def __init__(self, vae, pictures, held_out=()):
        self.vae = vae
        self.images = [vae.xp.asarray(pictures.image(pictures.centred(i))[None])
                       for i in (held_out or range(len(pictures.items)))[:MEASURED]]

    def round_trip(self, image):
        return round_trip(self.vae, image)

    def sample(self):
        """Two pictures above, their round trips below, in each of a few PIL images."""
        shown = self.images[:SHOWN]
        pairs = [shown[i:i + 2] for i in range(0, len(shown), 2)]
        return [grid([to_pil(x)[0] for x in (*pair, *map(self.round_trip, pair))], len(pair), GAP)
                for pair in pairs]

    def validate(self):
        """The mean absolute difference of pixels in [-1, 1] -> {"l1": ...}."""
        errors = [float(abs(self.round_trip(image) - image).mean())
                  for image in self.images[:SHOWN]]
        return {"l1": float(np.mean(errors))}

    def measure(self):
        """-> {"l1", "psnr", "kl_bits", "latent_std"}, as AutoencoderLoss reports them, of one
        picture after another; but latent_std is that of all latents, to_latents without the factor.
        """
        vae, reports, latents = self.vae, [], []
        for i, image in enumerate(self.images):
            noise = draw_noise(vae, image, 0, i)
            mean, logvar = encode(vae, image)
            output, (kl, _) = decode(vae, mean), ops.kl_normal(mean, logvar)
            z = mean + vae.xp.exp(0.5 * logvar) * noise
            latents.append(to_host(vae.to_latents(z)) / vae.scaling_factor)
            reports.append((abs(output - image).mean(), psnr(((output - image) ** 2).mean()[None]),
                            kl / math.log(2)))
        l1, decibels, bits = np.mean([[float(x) for x in report] for report in reports], axis=0)
        return {"l1": l1, "psnr": decibels, "kl_bits": bits, "latent_std": float(np.std(latents))}


def round_trip(vae, images):
    """Images (B,H,W,3) -> what their latents' mean is decoded to."""
    mean, _ = encode(vae, images)
    return decode(vae, mean)


def set_scaling_factor(vae, std):
    """Scale the latents to a standard deviation of 1, as latent diffusion's `scale_by_std`."""
    vae.scaling_factor = round(1 / std, 6)
    vae.config = vae.config | {"scaling_factor": vae.scaling_factor}


def summary(found, count, was_set):
    """The line at the end. found: what Watched.measure gives of so many pictures."""
    return (f"round trip of {count} pictures: l1 {found['l1']:.4f}, PSNR {found['psnr']:.1f} dB, "
            f"KL {found['kl_bits']:.0f} bits per picture; the latents' standard deviation is "
            f"{found['latent_std']:.3f}, so a UNet's training needs the scaling factor "
            f"{1 / found['latent_std']:.4f}"
            + (", which the config has now" if was_set else ": see --set-scaling-factor"))


def check_file(vae, folder, image, allowed):
    """Compare a round trip of the trained VAE with that of the written one.

    Raises TinyldmError where the two differ by more than `allowed` standard deviations.
    """
    trained, read = (to_host(round_trip(model, model.xp.asarray(to_host(image))))
                     for model in (vae, load_model(folder)))
    error = float(abs(read - trained).max() / trained.std())
    if not error <= allowed:
        raise TinyldmError(f"{folder}, read back, changes the round trip by {error:.2g} of its "
                           "standard deviation: go on with --resume and --save-as float32")
    say(f"checked: {folder}, read back, makes the same round trip, up to {error:.1g} of its "
        "standard deviation")
