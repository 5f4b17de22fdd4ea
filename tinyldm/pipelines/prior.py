"""From prompts to image embeddings by a diffusion prior: the first half of unCLIP.

    prompt -> CLIP's text transformer -> text embeddings ┐
    seed -> a normal vector -> sampler, which calls the prior at each step -> image embedding

unclip.py -> TextPrior -> text/, models/clip.py, models/prior.py, diffusion/samplers/.
Source: Ramesh et al. 2022, arXiv:2204.06125, section 2.2; diffusers' StableUnCLIPPipeline.
"""
from functools import partial

import numpy as np

from ..backend import get_xp
from ..diffusion.samplers import SAMPLERS, check_sampler, default_sampler, own_options
from ..diffusion.schedule import Schedule
from ..errors import TinyldmError, note
from ..text.prompt import split_into_chunks
from .finite import check_output, finite_states
from .interpolation import lerp, mixed
from .predictor import Predictor


class TextPrior:
    """A tokenizer, CLIP's text transformer, the prior, and the scheduler's config of the prior.

    Raises TinyldmError for parts that do not fit together.
    """

    def __init__(self, tokenizer, text_encoder, prior, scheduler):
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        self.prior, self.scheduler = prior, scheduler
        self.schedule = Schedule.from_config(scheduler)
        text, settings = text_encoder.settings, prior.settings
        C = settings.embedding_dim
        for what, value, expected in [
                ("text encoder's hidden_size", text.hidden_size, C),
                ("text encoder's projection_dim", text.projection_dim,
                 settings.embedding_proj_dim or C),
                ("tokenizer's model_max_length", tokenizer.model_max_length,
                 settings.num_embeddings),
                ("prior's clip_embed_dim", settings.clip_embed_dim or C, C)]:
            if value != expected:
                raise TinyldmError(f"the {what} is {value}, but the prior needs {expected}: use "
                                   "parts of one pipeline")

    def check_steps(self, num_inference_steps):
        """Raise TinyldmError for a number of steps that the prior's schedule cannot take."""
        self.schedule.check_steps(num_inference_steps)
        check_sampler(*self._sampler(num_inference_steps)[:3], options=self._options)

    def __call__(self, prompts, guidance_scale, num_inference_steps, draw_noise):
        """Draw one image embedding for each row of draw_noise() -> (B,C), as CLIP would give it.

        prompts: a list, each for as many rows. draw_noise: () -> (B,C), normal numbers. Guidance
        moves away from the empty prompt.
        Raises TinyldmError as split_into_chunks does, and for numbers that are not finite.
        """
        sampler, schedule, steps = self._sampler(num_inference_steps)
        texts = [[""], prompts] if guidance_scale > 1 else [prompts]
        predict = Predictor(self.prior, [self._read(own) for own in texts], guidance_scale)
        states = SAMPLERS[sampler](predict, draw_noise(), schedule, steps, draw_noise,
                                   **self._options)
        for state in finite_states(states, predict):
            latents = state.latents
        return self.prior.post_process_latents(latents)

    def _sampler(self, steps):
        return default_sampler(self.scheduler), self.schedule, steps

    @property
    def _options(self):
        return own_options(self.scheduler, default_sampler(self.scheduler))

    def _read(self, prompts):
        """-> {name: array (prompts,...)}, the conditioning of the prior."""
        rows = [mixed(prompt, self._encode, _lerp_all) for prompt in prompts]
        xp = get_xp(rows[0]["context"])
        return {name: xp.concatenate([row[name] for row in rows]) for name in rows[0]}

    def _encode(self, text):
        """A text -> {"text_embeds": (1,P), "context": (1,M,C), "mask": (1,M)}.

        The prior has places for one chunk: of a longer text it reads the beginning. The weights of
        words play no part.
        """
        encoder, size = self.text_encoder, self.tokenizer.model_max_length - 2
        tokens = [token for chunk in split_into_chunks(text, self.tokenizer) for token, _ in chunk]
        if len(tokens) > size:
            note(f"the prior reads only the first {size} of {len(tokens)} tokens of the prompt "
                 f"{text!r:.60}; the UNet reads all")
        ids = self.tokenizer.row(tokens[:size])
        if ids.max() >= encoder.settings.vocab_size:
            raise TinyldmError(f"the prior's tokenizer has a token {ids.max()}, but its text "
                               f"encoder only {encoder.settings.vocab_size}: use parts of one "
                               "pipeline")
        mask = np.arange(ids.shape[1])[None] < min(len(tokens), size) + 2       # start and end
        ids = encoder.xp.asarray(ids)
        context, text_embeds = encoder(ids)             # without the last layer
        context = encoder.text_model.encoder.layers[-1](context)
        context = encoder.text_model.final_layer_norm(context)
        for output in context, text_embeds:
            check_output(output, f"the prior's text encoder gives NaN or infinity for {text!a:.80}",
                         encoder, partial(encoder, ids))
        return {"text_embeds": text_embeds, "context": context, "mask": encoder.xp.asarray(mask)}


def _lerp_all(first, second, weight):
    """Interpolate what two prompts give; a token that either has is seen."""
    mixture = {name: lerp(first[name], second[name], weight) for name in first}
    return mixture | {"mask": first["mask"] | second["mask"]}
