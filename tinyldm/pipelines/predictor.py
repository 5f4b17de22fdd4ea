"""The UNet as a sampler calls it, and what is said when its numbers stop being finite.

Stands between pipeline.py, which prepares what the UNet is told, and diffusion/samplers.py.
"""
from ..backend import get_xp
from ..diffusion.guidance import classifier_free, rescale


class Predictor:
    """The UNet with what it is told and guidance inside: a sampler calls it as predict(x_t, t).

    conditions: the UNet's keyword arguments besides latents and timesteps, such as the prompt's
    context (1,M,D); or two of them, the negative prompt's first: then both predictions are made in
    one batch. hints: None, or (B,H,W,c) for a model that reads more channels than it draws. The
    last inputs are kept, to ask what went wrong in them.
    """

    def __init__(self, unet, conditions, guidance_scale, guidance_rescale=0.0, hints=None):
        self.unet, self.conditions, self.hints = unet, conditions, hints
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        self.inputs, self.dtype = {}, unet.dtype

    def __call__(self, x_t, t):                         # (B,H,W,C) -> (B,H,W,C)
        xp, n = get_xp(x_t), len(self.conditions)
        told = {name: xp.concatenate([condition[name].repeat(len(x_t), axis=0)
                                      for condition in self.conditions])        # (nB,...)
                for name in self.conditions[0]}
        latents = x_t if self.hints is None else xp.concatenate([x_t, self.hints], axis=-1)
        latents = xp.concatenate([latents] * n)
        self.inputs = {"latents": latents.astype(self.dtype), **told,
                       "timesteps": xp.full(len(latents), t, x_t.dtype)}
        output = self.unet(**self.inputs).astype(x_t.dtype)
        if n == 1:
            return output
        uncond, cond = xp.split(output, 2)
        noise = classifier_free(uncond, cond, self.guidance_scale)
        return rescale(noise, cond, self.guidance_rescale) if self.guidance_rescale else noise


# ---- NaN and infinity -----------------------------------------------------------------------
