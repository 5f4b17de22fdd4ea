"""The whole machine: prompt and seed in, picture out; or a picture in, and another one out.

    encode_prompt   text -> context, what the UNet is to look at
    encode          images -> latents, where a walk may begin in place of noise
    stream          seed -> latents, cleaned step by step by a sampler that calls the UNet
    decode          latents -> images

Above the models, the samplers, the tokenizer and the weight files; below it only __main__.py.
Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models",
arXiv:2112.10752, figure 3.
"""
import math
import operator

import numpy as np

from ..backend import array_library, free_scratch, get_xp, keep_freed_memory
from ..diffusion.samplers import default_sampler, get_sampler
from ..diffusion.schedule import Schedule
from ..errors import TinyldmError
from ..images import to_pil
from ..noise import get_generator
from .conditioning import Conditioner
from .editing import Edit
from .finite import finite_states, first_bad_layer, is_finite
from .interpolation import BetweenGenerator, ends, mixed
from .predictor import Predictor

STEPS = 50                  # where the weights recommend no number of their own
FEW_STEPS = 4               # the same of a UNet that imitates guidance, made to need no more
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
    from ..checkpoints import float_type, load_pipeline_parts, resolve
    from ..text.tokenizer import Tokenizer

    if not low_memory:
        keep_freed_memory()
    xp = array_library(device)
    dtype = float_type(np.float16 if dtype is None and xp is not np else dtype)
    parts = load_pipeline_parts(resolve(weights, dtype), dtype, low_memory and xp is np, ema)
    steps = parts.index.get("_num_inference_steps",
                            FEW_STEPS if parts.unet.config.get("time_cond_proj_dim") else STEPS)
    tokenizer = Tokenizer.from_folder(parts.tokenizer, parts.padding)
    tokenizer_2 = parts.tokenizer_2 and Tokenizer.from_folder(parts.tokenizer_2, parts.padding_2)
    pipe = StableDiffusion(tokenizer, parts.text_encoder, parts.unet, parts.vae, parts.scheduler,
                           steps, low_memory, tokenizer_2, parts.text_encoder_2,
                           parts.index.get("force_zeros_for_empty_prompt", True))
    for model in pipe.models.values():
        move(model, xp)
    return pipe


def move(module, xp):
    """Move a module's parameters to where xp, numpy or cupy, keeps its arrays."""
    for parameter in module.parameters():
        parameter.data = xp.asarray(parameter.data)


class StableDiffusion:
    """A tokenizer, three models and a noise schedule that belong together.

    scheduler: the dict of a scheduler_config.json, whose class names the sampler to use if none is
    asked for. num_inference_steps: how many steps if none are asked for; a folder recommends its
    own as `_num_inference_steps` in model_index.json. low_memory: whether to decode in tiles.
    tokenizer_2, text_encoder_2: of Stable Diffusion XL, else None; force_zeros_for_empty_prompt:
    see Conditioner.
    Raises TinyldmError for parts that do not fit together.
    """

    def __init__(self, tokenizer, text_encoder, unet, vae, scheduler, num_inference_steps=STEPS,
                 low_memory=False, tokenizer_2=None, text_encoder_2=None,
                 force_zeros_for_empty_prompt=True):
        self.tokenizer, self.text_encoder, self.unet, self.vae = tokenizer, text_encoder, unet, vae
        self.tokenizer_2, self.text_encoder_2 = tokenizer_2, text_encoder_2
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        self.scheduler, self.num_inference_steps = scheduler, num_inference_steps
        self.low_memory = low_memory
        self._check_fit()
        # Old files carry other values of these two; the public pipeline corrects them as well, but
        # not those of SDXL and Latent Consistency Models.
        newer = unet.config.get("addition_embed_type") or unet.config.get("time_cond_proj_dim")
        corrected = {} if newer else {"steps_offset": 1, "clip_sample": False}
        self.schedule = Schedule.from_config({"clip_sample": False} | scheduler | corrected)

    def _check_fit(self):
        unet, C = self.unet.config, self.vae.config["latent_channels"]
        texts = [encoder.config for _, encoder in self._readers]
        D = sum(text["hidden_size"] for text in texts)
        for key, fitting, what in [
                ("in_channels", (C, 2 * C + 1), f"VAE's latent_channels is {C}"),
                ("out_channels", (C,), f"VAE's latent_channels is {C}"),
                ("cross_attention_dim", (D,), f"text encoder's hidden_size is {D}")]:
            if not np.isin(unet[key], fitting).all():                   # may be a list, of levels
                raise TinyldmError(f"the UNet's {key} is {unet[key]}, but the {what}: "
                                   "use parts of one pipeline")
        if (unet.get("addition_embed_type") is None) != (len(texts) == 1):
            raise TinyldmError(f"the UNet's addition_embed_type is "
                               f"{unet.get('addition_embed_type')}, but there is "
                               f"{'a' if len(texts) == 2 else 'no'} second text encoder: "
                               "use parts of one pipeline")
        if len(texts) == 2:
            told = texts[1]["projection_dim"] + 6 * unet["addition_time_embed_dim"]
            if unet["projection_class_embeddings_input_dim"] != told:
                raise TinyldmError(
                    "the UNet's projection_class_embeddings_input_dim is "
                    f"{unet['projection_class_embeddings_input_dim']}, but six sizes and the "
                    f"second text encoder's projection make {told}: use parts of one pipeline")
        for (tokenizer, _), text in zip(self._readers, texts):
            length, limit = tokenizer.model_max_length, text.get("max_position_embeddings", 77)
            if length > limit:
                raise TinyldmError(f"the tokenizer's model_max_length is {length}, but the text "
                                   f"encoder knows {limit} positions: use parts of one pipeline")

    def __call__(self, prompt, *arguments, **options):
        """Draw num_images pictures of a prompt -> list of PIL images. Arguments: see stream."""
        for state in self.stream(prompt, *arguments, **options):
            clean = state.latents
        return to_pil(self.decode(clean))

    def stream(self, prompt, negative_prompt="", num_inference_steps=None, guidance_scale=7.5,
               seed=0, width=None, height=None, num_images=1, sampler=None, latents=None,
               noise="torch-cpu", guidance_rescale=0.0, image=None, strength=None, mask=None):
        """Draw, a model call at a time -> iterator of walk.State, whose last latents are clean.

        prompt: what to draw, of any length, with weights such as (word:1.3): see prompt.py.
        negative_prompt: what guidance moves away from; the same goes for it.
        num_inference_steps: 1 to 1000; more is slower and finer. PNDM makes a call more than that,
        Heun twice as many but one.
        guidance_scale: how strongly to follow the prompt; up to 1 there is no guidance, and the
        negative prompt plays no part. Nor does it in a model that imitates guidance (LCM), which
        is told this number.
        seed: image i is drawn from seed + i, and equals the one image of that seed.
        width, height: pixels, multiples of the VAE's factor; unless given the image's size, rounded
        down, or without one the weights' own.
        sampler: a key of diffusion.samplers.SAMPLERS; the weights' own unless given.
        latents: (num_images, height / factor, width / factor, channels), standard normal numbers
        to start from in place of the seed's.
        noise: a key of noise.GENERATORS, whose normal numbers the seed stands for: torch's on the
        CPU ("torch-cpu") or on a GPU ("torch-cuda"), or NumPy's ("numpy").
        guidance_rescale: 0 to 1, how much of the contrast that guidance adds to take away again.
        image: a PIL image to begin from, resized. strength: 0 to 1, how much of it to draw anew:
        the share of the steps that are made, the noise added to the image being that of the first;
        0.8 unless given. (A Latent Consistency Model makes them all, from as low a start.) mask: a
        PIL image, white where to paint and black where the image is to stay; then strength is 1
        unless given, and 1 begins from noise alone. Models made for inpainting want both. Source:
        SDEdit, see walk.Origin.
        A prompt, a seed and an image may be a between.Between, to mix two of them.
        Raises TinyldmError, before anything is drawn for a bad argument, and at the step where
        the latents stop being finite, naming it and the layer.
        """
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        self.schedule.timesteps(steps, "leading")       # for its check of the number
        sampler = self.sampler(sampler)
        guidance_scale = _finite_number("guidance_scale", guidance_scale)
        guidance_rescale = _fraction("guidance_rescale", guidance_rescale)
        edit = self.edit(image, strength, mask, sampler)
        edit.steps_left_out(steps)                      # for its check
        latents = None if latents is None else self._array(latents)
        shape = self._latents_shape(width, height, num_images, latents, image)
        generator = get_generator(noise)
        generators = [mixed(seed, lambda k, i=i: generator(k + i if i else k), BetweenGenerator)
                      for i in range(shape[0])]

        def draw_noise():                               # -> (B,H/f,W/f,C)
            return self._draw(generators, shape)

        size = self.vae.vae_scale_factor * shape[2], self.vae.vae_scale_factor * shape[1]
        conditions = self._conditioner(prompt, negative_prompt, guidance_scale, *size)
        latents, origin, hints = edit.prepare(self.encode, steps, size, latents, draw_noise)
        predict = Predictor(self.unet, conditions, guidance_scale, guidance_rescale, hints)
        states = get_sampler(sampler)(predict, latents, self.schedule, steps, draw_noise, origin)
        return finite_states(states, predict)

    def encode_prompt(self, text):
        """What the UNet is to look at: text -> context (1, 77 * pieces, D).

        The text transformer's last hidden state, weighted, the pieces of a long prompt side by
        side; of Stable Diffusion XL's two the one before, D of both together. See conditioning.py.
        """
        return self._conditioner.context(text)

    @property
    def _readers(self):
        readers = [(self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)]
        return readers[:1 if self.text_encoder_2 is None else 2]

    @property
    def _conditioner(self):
        return Conditioner(self._readers, self.unet.config, self.force_zeros_for_empty_prompt)

    def encode(self, images, noise):
        """The VAE's latents of images, drawn by standard normal numbers from its distribution.

        images (1 or B,H,W,3) in [-1, 1], noise (B,h,w,C) -> latents (B,h,w,C). With low_memory one
        tile at a time.
        """
        encode = self.vae.encode_tiled if self.low_memory else self.vae.encode
        images = self._array(images).astype(self.vae.quant_conv.bias.data.dtype)
        mean, logvar = (self._array(moment) for moment in encode(images))
        latents = (mean + self._xp.exp(logvar / 2) * noise) * self.vae.scaling_factor
        if not is_finite(latents):
            culprit = first_bad_layer(self.vae, lambda: encode(images))
            raise TinyldmError(f"the picture is encoded to NaN or infinity: {culprit}")
        return latents

    def decode(self, latents):
        """The VAE's pictures of clean latents: (B,h,w,C) -> images (B,f*h,f*w,3) in [-1, 1].

        One picture at a time, as the largest maps of the whole pipeline arise here; with low_memory
        one tile at a time.
        """
        channels = self.vae.config["latent_channels"]
        if latents.ndim != 4 or latents.shape[-1] != channels:
            raise TinyldmError(f"latents must have the shape (images, height, width, {channels}), "
                               f"not {latents.shape}")
        z = self._array(latents) / self.vae.scaling_factor
        z = z.astype(self.vae.post_quant_conv.bias.data.dtype)
        decode = self.vae.decode_tiled if self.low_memory else self.vae.decode
        if self.low_memory:
            free_scratch()                              # what the UNet used
        images = [decode(z[i:i + 1]) for i in range(len(z))]
        free_scratch()
        for i, image in enumerate(images):
            if not is_finite(image):
                culprit = first_bad_layer(self.vae, lambda i=i: decode(z[i:i + 1]))
                raise TinyldmError(f"picture {i} is decoded to NaN or infinity: {culprit}")
        return self._xp.concatenate(images).clip(-1, 1)

    @property
    def models(self):
        """{name of the part: model}, without a second text encoder where there is none."""
        parts = {name: getattr(self, name)
                 for name in ("text_encoder", "text_encoder_2", "unet", "vae")}
        return {name: model for name, model in parts.items() if model is not None}

    # ---- add-ons ----------------------------------------------------------------------------

    def load_lora(self, path, weight=1.0):
        """Add `weight` times what a LoRA trained to the weights; the same negative undoes it.

        path: a .safetensors file, or one that torch.save wrote, as kohya, peft and diffusers name
        its contents; several may be added one after another. See checkpoints/lora.py.
        Raises TinyldmError, and changes nothing, for a file that does not fit this model.
        """
        from ..checkpoints import merge_lora

        merge_lora(self.models, path, _finite_number("weight", weight), self._dtype)

    def load_textual_inversion(self, path, token=None):
        """Teach prompts a word, `token` or the one that the file or its name says.

        path: as for load_lora, in the layout of diffusers or of the web interfaces. See
        checkpoints/embedding.py.
        Raises TinyldmError, and changes nothing, for a file that does not fit this model and for a
        word that is in the vocabulary.
        """
        from ..checkpoints import add_word

        add_word(dict(zip(("text_encoder", "text_encoder_2"), self._readers)), path, token)

    # ---- arguments --------------------------------------------------------------------------

    def sampler(self, name=None):
        """The name of the sampler that will draw: the given one, or the weights' own."""
        name = default_sampler(self.scheduler) if name is None else name
        get_sampler(name)                               # for its check of the name
        return name

    def edit(self, image=None, strength=None, mask=None, sampler=None):
        """What these arguments of stream ask for, an editing.Edit. Raises TinyldmError."""
        if strength is not None:
            strength = _fraction("strength", strength)
        channels = self.vae.config["latent_channels"]
        inpaints = self.unet.config["in_channels"] == 2 * channels + 1
        spread = self.unet.config.get("time_cond_proj_dim") and self.sampler(sampler) == "lcm"
        return Edit(image, strength, mask, inpaints, spread)

    def size(self, width=None, height=None, image=None):
        """(width, height) in pixels; where None the image's, or the weights' own."""
        own = self.unet.config.get("sample_size")
        own = own if isinstance(own, (list, tuple)) else (own, own)     # (height, width)
        if image is not None:
            image, f = ends(image)[0], self.vae.vae_scale_factor
            own = image.height // f, image.width // f
            if 0 in own and None in (width, height):
                raise TinyldmError(f"the image is {image.width}x{image.height} pixels, too small "
                                   f"for multiples of {f}: give a width and a height")
        return (self._side("width", width, own[1]), self._side("height", height, own[0]))

    def _side(self, name, pixels, own):
        factor = self.vae.vae_scale_factor
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

    def _latents_shape(self, width, height, num_images, latents, image):
        if not isinstance(num_images, (int, np.integer)) or num_images < 1:
            raise TinyldmError(f"num_images must be a whole number from 1, not {num_images!r}")
        factor = self.vae.vae_scale_factor
        if latents is not None and latents.ndim == 4:           # they have a size of their own
            height = latents.shape[1] * factor if height is None else height
            width = latents.shape[2] * factor if width is None else width
        width, height = self.size(width, height, image)
        shape = (num_images, height // factor, width // factor,
                 self.vae.config["latent_channels"])
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


def _finite_number(name, value):
    try:
        if math.isfinite(value):
            return float(value)
    except (TypeError, OverflowError):
        pass
    raise TinyldmError(f"{name} must be a finite number, not {value!r}")


def _fraction(name, value):
    value = _finite_number(name, value)
    if not 0 <= value <= 1:
        raise TinyldmError(f"{name} must be from 0 to 1, not {value:g}")
    return value
