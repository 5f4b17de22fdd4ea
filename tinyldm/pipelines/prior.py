"""From prompts to image embeddings by a diffusion prior: the first half of unCLIP.

    prompt -> CLIP's text transformer -> text embeddings ┐
    seed -> a normal vector -> sampler, which calls the prior at each step -> image embedding

unclip.py -> TextPrior -> text/, models/clip.py, models/prior.py, diffusion/samplers/.
Source: Ramesh et al. 2022, arXiv:2204.06125, section 2.2; diffusers' StableUnCLIPPipeline.
"""
from functools import partial

import numpy as np

from ..backend import asarray, get_xp, to_host
from ..diffusion.samplers import SAMPLERS, check_sampler, default_sampler, own_options
from ..diffusion.schedule import Schedule
from ..errors import TinyldmError, note
from ..models.clip import end_tokens
from ..text.prompt import split_into_chunks
from .finite import check_output, finite_states
from .interpolation import ends, mixed, slerp
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
        self.schedule.check_steps(num_inference_steps, "prior_num_inference_steps, the number of "
                                  "the prior's steps,")
        check_sampler(self.sampler, self.schedule, num_inference_steps, options=self._options)

    def __call__(self, prompts, guidance_scale, num_inference_steps, draw_noise):
        """Draw one image embedding for each prompt -> (B,C), as CLIP would give it.

        prompts: B of them, each a text or a Between: then both ends are drawn from the same noise,
        and what they give is mixed by slerp. draw_noise: () -> (B,C), normal numbers. Guidance
        moves away from the empty prompt.
        Raises TinyldmError as split_into_chunks does, and for numbers that are not finite.
        """
        texts = [end for prompt in prompts for end in ends(prompt)]
        rows = [row for row, prompt in enumerate(prompts) for _ in ends(prompt)]
        used = [[""], texts] if guidance_scale > 1 else [texts]
        predict = Predictor(self.prior, [self._read(own) for own in used], guidance_scale)
        states = SAMPLERS[self.sampler](
            predict, draw_noise()[rows], self.schedule, num_inference_steps,
            lambda: draw_noise()[rows], **self._options)
        for state in finite_states(states, predict):
            latents = state.latents
        embeds = iter(self.prior.post_process_latents(latents))
        found = [mixed(prompt, lambda _: next(embeds), slerp_on_device) for prompt in prompts]
        return get_xp(latents).stack(found)

    @property
    def sampler(self):
        """The name of the sampler that the scheduler's file asks for."""
        return default_sampler(self.scheduler)

    @property
    def _options(self):
        return own_options(self.scheduler, self.sampler)

    def _read(self, texts):
        """-> {name: array (texts,...)}, the conditioning of the prior."""
        known = {text: self._encode(text) for text in dict.fromkeys(texts)}
        xp = get_xp(known[texts[0]]["context"])
        return {name: xp.concatenate([known[text][name] for text in texts])
                for name in known[texts[0]]}

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
        context = encoder.text_model(ids)               # after the last layer and its norm
        text_embeds = encoder.text_projection(context[end_tokens(ids, encoder.end)])
        for output in context, text_embeds:
            check_output(output, f"the prior's text encoder gives NaN or infinity for {text!a:.80}",
                         encoder, partial(encoder, ids))
        return {"text_embeds": text_embeds, "context": context, "mask": encoder.xp.asarray(mask)}


def slerp_on_device(first, second, weight):
    """slerp of two arrays of any library -> an array like the first one."""
    return asarray(slerp(to_host(first), to_host(second), weight).astype(first.dtype), like=first)
