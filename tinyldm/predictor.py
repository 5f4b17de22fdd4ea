"""The UNet as a sampler calls it, and what is said when its numbers stop being finite.

Stands between pipeline.py, which prepares what the UNet is told, and diffusion/samplers.py.
"""
from .backend import get_xp
from .diffusion.guidance import classifier_free, rescale
from .errors import TinyldmError
from .layers import forward_hooks, named_modules


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

def is_finite(array):
    return bool(get_xp(array).isfinite(array).all())


def watched(states, predict):
    """Pass on a sampler's states while their latents are finite; else say where that ended."""
    for state in states:
        if not is_finite(state.latents):
            culprit = blame(predict.unet, lambda: predict.unet(**predict.inputs))
            raise TinyldmError(f"the latents became NaN or infinite at step {state.step + 1} "
                               f"(timestep {state.timestep:g}): {culprit}")
        yield state


def blame(module, run):
    """Run a module again with every layer watched -> a phrase naming the first that goes wrong.

    That is the innermost one which is given finite numbers and answers others.
    """
    culprits = []

    def check(name):
        def checked(forward, *inputs, **options):
            clean = _all_finite([*inputs, *options.values()])
            output = forward(*inputs, **options)
            if clean and not culprits and not is_finite(output):
                culprits.append(name)
            return output
        return checked

    with forward_hooks({layer: check(name) for name, layer in named_modules(module)}):
        run()
    if not culprits:
        return "no layer is to blame, so lower guidance_scale or take another sampler"
    return (f"the first layer to produce it is {culprits[0]} of {type(module).__name__}: "
            "check the weights, or use dtype float32")


def _all_finite(values):
    """Of arrays, also in lists such as the UNet's skips; anything else passes."""
    return all(_all_finite(value) if isinstance(value, (list, tuple))
               else is_finite(value) if hasattr(value, "dtype") else True for value in values)
