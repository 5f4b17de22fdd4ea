"""The whole machine: prompt and seed in, picture out.

    encode_prompt   text -> context, what the UNet is to look at
    stream          seed -> latents, cleaned step by step by a sampler that calls the UNet
    decode          latents -> images

Above the models, the samplers, the tokenizer and the weight files; below it only __main__.py.
Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models",
arXiv:2112.10752, figure 3.
"""
import math
import operator

import numpy as np

from .backend import array_library, get_xp, keep_freed_memory, to_host
from .diffusion.samplers import default_sampler, get_sampler
from .diffusion.schedule import Schedule
from .errors import TinyldmError
from .noise import get_generator
from .predictor import Predictor, blame, is_finite, watched
from .prompt import rows, same_length, split, weigh

STEPS = 50                  # where the weights recommend no number of their own
LARGEST = 8192              # pixels a side: beyond is a slip of the keyboard, not a picture


def load(weights=None, device="cpu", dtype=None, low_memory=False, ema=False):
    """Read a pipeline's weights -> StableDiffusion.

    weights: None for the bundled model; a folder in the diffusers layout; a single file in the
    original layout (.safetensors, .ckpt); or a name on the Hugging Face hub, downloaded once:
    owner/name, or owner/name/file of a single file there. A single file's tokenizer is downloaded
    too, unless TINYLDM_TOKENIZER names a folder with one. ema: of a single file with two sets of
    the UNet's weights take the averaged one. device: "cpu" or "cuda". dtype: of the weights and of
    what the models store; for float16 the weights' fp16 variant is taken where there is one. Unless
    given it is float16 on the GPU and float32 on the CPU, where large weights that the files have
    in float16 stay so and are widened when they are used: half of the memory, the same numbers. To
    train them give float32. low_memory: less memory for more time. Pictures larger than those the
    VAE was trained on are decoded in tiles, a little differently (see AutoencoderKL.decode_tiled);
    on the CPU freed memory goes back to the system, and weights whose dtype is the file's stay in
    its memory map.
    Raises TinyldmError for anything missing, damaged or not supported, and for a missing GPU.
    """
    # Here, so that `import tinyldm` need not wait for the libraries behind them.
    from .checkpoints import load_pipeline_parts, resolve
    from .tokenizer import Tokenizer

    if not low_memory:
        keep_freed_memory()
    xp = array_library(device)
    try:
        if dtype is None and xp is not np:
            dtype = np.float16
        dtype = None if dtype is None else np.dtype(dtype)
    except TypeError:
        raise TinyldmError(f"dtype must be float16, float32 or float64, not {dtype!r}") from None
    parts = load_pipeline_parts(resolve(weights, dtype), dtype, low_memory and xp is np, ema)
    steps = parts.index.get("_num_inference_steps", STEPS)
    tokenizer = Tokenizer.from_folder(parts.tokenizer, parts.padding)
    for model in (parts.text_encoder, parts.unet, parts.vae):
        move(model, xp)
    return StableDiffusion(tokenizer, parts.text_encoder, parts.unet, parts.vae, parts.scheduler,
                           steps, low_memory)


def move(module, xp):
    """Move a module's parameters to where xp, numpy or cupy, keeps its arrays."""
    for parameter in module.parameters():
        parameter.data = xp.asarray(parameter.data)


class StableDiffusion:
    """A tokenizer, three models and a noise schedule that belong together.

    scheduler: the dict of a scheduler_config.json, whose class names the sampler to use if none is
    asked for. num_inference_steps: how many steps if none are asked for; a folder recommends its
    own as `_num_inference_steps` in model_index.json. low_memory: whether to decode in tiles.
    Raises TinyldmError for parts that do not fit together.
    """

    def __init__(self, tokenizer, text_encoder, unet, vae, scheduler, num_inference_steps=STEPS,
                 low_memory=False):
        self.tokenizer, self.text_encoder, self.unet, self.vae = tokenizer, text_encoder, unet, vae
        self.scheduler, self.num_inference_steps = scheduler, num_inference_steps
        self.low_memory = low_memory
        # Old files carry other values of these two; the public pipeline corrects them as well.
        self.schedule = Schedule.from_config(scheduler | {"steps_offset": 1, "clip_sample": False})
        self._check_fit()

    def _check_fit(self):
        unet, vae, text = self.unet.config, self.vae.config, self.text_encoder.config
        for key, whose, config, name in [
                ("in_channels", "VAE", vae, "latent_channels"),
                ("out_channels", "VAE", vae, "latent_channels"),
                ("cross_attention_dim", "text encoder", text, "hidden_size")]:
            if np.any(np.asarray(unet[key]) != config[name]):       # may be a list, of the levels
                raise TinyldmError(f"the UNet's {key} is {unet[key]}, but the {whose}'s {name} "
                                   f"is {config[name]}: use parts of one pipeline")
        for key in ("addition_embed_type", "time_cond_proj_dim"):
            if unet.get(key):
                raise TinyldmError(f"the UNet wants to be told more than a prompt ({key} = "
                                   f"{unet[key]!r}), as those of SDXL and of Latent Consistency "
                                   "Models: a pipeline for it is not built yet")
        length, limit = self.tokenizer.model_max_length, text.get("max_position_embeddings", 77)
        if length > limit:
            raise TinyldmError(f"the tokenizer's model_max_length is {length}, but the text "
                               f"encoder knows {limit} positions: use parts of one pipeline")

    def __call__(self, prompt, negative_prompt="", num_inference_steps=None, guidance_scale=7.5,
                 seed=0, width=None, height=None, num_images=1, sampler=None, latents=None,
                 noise="torch-cpu", guidance_rescale=0.0):
        """Draw num_images pictures of a prompt -> list of PIL images. Arguments: see stream."""
        for state in self.stream(prompt, negative_prompt, num_inference_steps, guidance_scale, seed,
                                 width, height, num_images, sampler, latents, noise,
                                 guidance_rescale):
            clean = state.latents
        return to_pil(self.decode(clean))

    def stream(self, prompt, negative_prompt="", num_inference_steps=None, guidance_scale=7.5,
               seed=0, width=None, height=None, num_images=1, sampler=None, latents=None,
               noise="torch-cpu", guidance_rescale=0.0):
        """Draw, a model call at a time -> iterator of samplers.State, whose last latents are clean.

        prompt: what to draw, of any length, with weights such as (word:1.3): see prompt.py.
        negative_prompt: what guidance moves away from; the same goes for it.
        num_inference_steps: 1 to 1000; more is slower and finer. PNDM makes a call more than that,
        Heun twice as many but one.
        guidance_scale: how strongly to follow the prompt; up to 1 there is no guidance, and the
        negative prompt plays no part.
        seed: image i is drawn from seed + i, and equals the one image of that seed.
        width, height: pixels, multiples of the VAE's factor; the weights' own size unless given.
        sampler: a key of diffusion.samplers.SAMPLERS; the weights' own unless given.
        latents: (num_images, height / factor, width / factor, channels), standard normal numbers
        to start from in place of the seed's.
        noise: a key of noise.GENERATORS, whose normal numbers the seed stands for: torch's on the
        CPU ("torch-cpu") or on a GPU ("torch-cuda"), or NumPy's ("numpy").
        guidance_rescale: 0 to 1, how much of the contrast that guidance adds to take away again.
        Raises TinyldmError, before anything is drawn for a bad argument, and at the step where
        the latents stop being finite, naming it and the layer.
        """
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        self.schedule.timesteps(steps, "leading")       # for its check of the number
        sampler = self.sampler(sampler)
        guidance_scale = _finite_number("guidance_scale", guidance_scale)
        guidance_rescale = _finite_number("guidance_rescale", guidance_rescale)
        if not 0 <= guidance_rescale <= 1:
            raise TinyldmError(f"guidance_rescale must be from 0 to 1, not {guidance_rescale:g}")
        latents = None if latents is None else self._array(latents)
        shape = self._latents_shape(width, height, num_images, latents)
        generator = get_generator(noise)
        generators = [generator(seed), *(generator(seed + i) for i in range(1, shape[0]))]

        def draw_noise():                               # -> (B,H/f,W/f,C)
            return self._draw(generators, shape)

        pieces = split(prompt, self.tokenizer)
        negative = split(negative_prompt, self.tokenizer)
        conditions = []
        if guidance_scale > 1:
            pieces, negative = same_length([pieces, negative])
            conditions = [{"context": self._encode(negative_prompt, negative)}]
        conditions.append({"context": self._encode(prompt, pieces)})
        latents = draw_noise() if latents is None else latents
        predict = Predictor(self.unet, conditions, guidance_scale, guidance_rescale)
        states = get_sampler(sampler)(predict, latents, self.schedule, steps, draw_noise)
        return watched(states, predict)

    def encode_prompt(self, text):
        """What the UNet is to look at: text -> context (1, 77 * pieces, D).

        The text transformer's last hidden state, weighted, the pieces of a long prompt side by
        side. See prompt.py.
        """
        return self._encode(text, split(text, self.tokenizer))

    def _encode(self, text, pieces):
        ids, weights = rows(pieces, self.tokenizer)
        known = self.text_encoder.config["vocab_size"]
        if ids.max() >= known:
            raise TinyldmError(f"the tokenizer knows token {ids.max()}, the text encoder only "
                               f"{known} tokens: use parts of one pipeline")
        ids = self._xp.asarray(ids)
        features = self.text_encoder(ids)                               # (n,77,D)
        context = weigh(features, weights).reshape(1, -1, features.shape[-1])
        if not is_finite(context):
            culprit = ("its weights are to blame, take some closer to 1" if is_finite(features)
                       else blame(self.text_encoder, lambda: self.text_encoder(ids)))
            raise TinyldmError(f"the text encoder answers NaN or infinity for {text!a:.80}: "
                               f"{culprit}")
        return context

    def decode(self, latents):
        """The VAE's pictures of clean latents: (B,h,w,C) -> images (B,f*h,f*w,3) in [-1, 1].

        One picture at a time, as the largest maps of the whole pipeline arise here; with low_memory
        one tile at a time.
        """
        channels = self.vae.config["latent_channels"]
        if latents.ndim != 4 or latents.shape[-1] != channels:
            raise TinyldmError(f"latents must have the shape (images, height, width, {channels}), "
                               f"not {latents.shape}")
        z = (self._array(latents) / self.vae.scaling_factor).astype(self._dtype)
        decode = self.vae.decode_tiled if self.low_memory else self.vae.decode
        images = [decode(z[i:i + 1]) for i in range(len(z))]
        for i, image in enumerate(images):
            if not is_finite(image):
                culprit = blame(self.vae, lambda i=i: decode(z[i:i + 1]))
                raise TinyldmError(f"picture {i} is decoded to NaN or infinity: {culprit}")
        return self._xp.concatenate(images).clip(-1, 1)

    # ---- arguments --------------------------------------------------------------------------

    def sampler(self, name=None):
        """The name of the sampler that will draw: the given one, or the weights' own."""
        name = default_sampler(self.scheduler) if name is None else name
        get_sampler(name)                               # for its check of the name
        return name

    def size(self, width=None, height=None):
        """(width, height) in pixels, the weights' own where None. Raises TinyldmError."""
        own = self.unet.config.get("sample_size")
        own = own if isinstance(own, (list, tuple)) else (own, own)     # (height, width)
        return (self._side("width", width, own[1]), self._side("height", height, own[0]))

    def _side(self, name, pixels, own):
        factor = self.vae.factor
        if pixels is None and own is None:
            raise TinyldmError(f"the weights name no size: {name} must be given")
        try:
            pixels = operator.index(own * factor if pixels is None else pixels)
        except TypeError:
            raise TinyldmError(f"{name} must be a whole number of pixels, not {pixels!r}") from None
        if not 0 < pixels <= LARGEST:
            raise TinyldmError(f"{name} must be from {factor} to {LARGEST} pixels, not {pixels}")
        if pixels % factor:
            near = [n for n in (pixels // factor * factor, -(-pixels // factor) * factor) if n]
            raise TinyldmError(f"{name} must be a multiple of {factor}, not {pixels}: "
                               f"the nearest is {' or '.join(map(str, near))}")
        return pixels

    def _latents_shape(self, width, height, num_images, latents):
        if not isinstance(num_images, (int, np.integer)) or num_images < 1:
            raise TinyldmError(f"num_images must be a whole number from 1, not {num_images!r}")
        factor = self.vae.factor
        if latents is not None and latents.ndim == 4:           # they have a size of their own
            height = latents.shape[1] * factor if height is None else height
            width = latents.shape[2] * factor if width is None else width
        width, height = self.size(width, height)
        shape = (num_images, height // factor, width // factor, self.unet.config["in_channels"])
        if latents is not None and (latents.shape != shape or not is_finite(latents)):
            raise TinyldmError(f"latents must be finite and of shape {shape} (num_images, height / "
                               f"{factor}, width / {factor}, channels), not {latents.shape}")
        return shape

    # ---- arrays -----------------------------------------------------------------------------

    @property
    def _xp(self):
        return get_xp(self.unet.conv_in.weight.data)

    @property
    def _dtype(self):
        return self.unet.conv_in.bias.data.dtype        # large weights may be narrower

    def _draw(self, generators, shape):
        """Normal numbers (B,H,W,C), in the order of the reference: image by image, (C,H,W) each."""
        _, H, W, C = shape
        noise = np.concatenate([generator.randn((1, C, H, W)) for generator in generators])
        return self._array(noise.transpose(0, 2, 3, 1))

    def _array(self, values):
        """On the models' device, at least float32: the sampler's sums want more than float16."""
        dtype = np.promote_types(self._dtype, np.float32)
        return self._xp.ascontiguousarray(self._xp.asarray(values, dtype))


def to_pil(images):
    """Images (B,H,W,3) in [-1, 1] -> list of PIL images."""
    from PIL import Image  # takes long to import

    pixels = (to_host(images).astype(np.float32) / 2 + 0.5).clip(0, 1)
    return [Image.fromarray(image) for image in (pixels * 255).round().astype(np.uint8)]


def _finite_number(name, value):
    try:
        if math.isfinite(value):
            return float(value)
    except (TypeError, OverflowError):
        pass
    raise TinyldmError(f"{name} must be a finite number, not {value!r}")
