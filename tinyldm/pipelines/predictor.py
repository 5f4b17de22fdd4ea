"""The UNet as a sampler calls it, with the conditioning and guidance inside."""
from ..backend import get_xp
from ..diffusion.guidance import classifier_free, rescale
from ..errors import TinyldmError
from ..layers import NO_TAPE, Module
from ..models import UNet2DConditionModel


class Predictor:
    """predict(x_t, t) -> model output, for a sampler.

    conditioning: [the prompt's], or with guidance [the negative prompt's, the prompt's], predicted
    in one batch; each a dict of the UNet's keyword arguments besides latents and timesteps, such as
    context (prompts,M,D), each prompt for as many latents. extra_channels: None, or what an
    inpainting UNet reads behind x_t, (B,H,W,c). guided_channels: how many channels of the
    prediction are guided, the others are the condition's own; None for all of x_t's.
    keeps_variance: whether what a model predicts behind x_t's channels, for a learned variance, is
    handed on. timestep_scale: the model sees t times this number. The last inputs are kept in
    `inputs`, for the search for NaN.
    """

    def __init__(self, unet, conditioning, guidance_scale, guidance_rescale=0.0,
                 extra_channels=None, *, guided_channels=None, keeps_variance=False,
                 timestep_scale=1):
        self.unet, self.conditioning, self.extra_channels = unet, conditioning, extra_channels
        self.guidance_scale = float(guidance_scale)     # a NumPy number would change the dtype
        self.guidance_rescale = float(guidance_rescale)
        self.guided_channels, self.keeps_variance = guided_channels, keeps_variance
        self.timestep_scale = timestep_scale
        self.inputs, self.dtype = {}, unet.dtype

    def __call__(self, x_t, t):                         # (B,H,W,C) -> (B,H,W,C)
        xp, n = get_xp(x_t), len(self.conditioning)
        conditioning = {name: xp.concatenate([own[name].repeat(len(x_t) // len(own[name]), axis=0)
                                              for own in self.conditioning])    # (nB,...)
                        for name in self.conditioning[0]}
        latents = [x_t] if self.extra_channels is None else [x_t, self.extra_channels]
        latents = xp.concatenate(latents, axis=-1)
        if not (isinstance(self.unet, UNet2DConditionModel) and conditioning.keys() == {"context"}):
            latents = xp.concatenate([latents] * n)     # that UNet itself repeats its maps, later
        self.inputs = {"latents": latents.astype(self.dtype), **conditioning,
                       "timesteps": xp.full(len(latents), t * self.timestep_scale, x_t.dtype)}
        model_output = self.unet(**self.inputs).astype(x_t.dtype)
        if not self.keeps_variance:
            model_output = model_output[..., :x_t.shape[-1]]
        if n == 1:
            return model_output
        uncond, cond = xp.split(model_output, 2)
        guided = slice(self.guided_channels or x_t.shape[-1])
        noise = classifier_free(uncond[..., guided], cond[..., guided], self.guidance_scale)
        if self.guidance_rescale:
            noise = rescale(noise, cond[..., guided], self.guidance_rescale)
        own = cond[..., noise.shape[-1]:]
        return xp.concatenate([noise, own], axis=-1) if own.shape[-1] else noise


class FunctionUNet(Module):
    """Any function in place of the UNet `like`, whose settings, dtype and device it keeps.

    function(latents (B,H,W,C), timesteps (B,), context (B,M,D), **further conditions) -> array or
    tensor (B,H,W,O): what the replaced UNet predicts, the noise or v.
    Raises TinyldmError for what cannot be called, and if there is no UNet that it replaces.
    """

    settings = dtype = xp = None                        # not those of parameters: there are none

    def __init__(self, function, like):
        if not callable(function):
            raise TinyldmError("the UNet must be a model or a function of (latents, timesteps, "
                               f"context), not a {type(function).__name__}")
        if like is None:
            raise TinyldmError("a pipeline is built with a UNet2DConditionModel: set pipe.unet to "
                               "the function afterwards")
        self.function = function
        self.settings, self.dtype, self.xp = like.settings, like.dtype, like.xp

    def forward(self, latents, timesteps, context, tape=NO_TAPE, **conditions):
        output = self.function(latents, timesteps, context, **conditions)
        output = output.detach() if hasattr(output, "detach") else output
        expected = (*latents.shape[:3], self.settings.out_channels)
        if getattr(output, "shape", None) != expected:
            raise TinyldmError("the function in place of the UNet must return an array of shape "
                               f"{expected}, channels last, not {_described(output)}")
        return self.xp.asarray(output, latents.dtype)


def _described(value):
    return f"one of {tuple(value.shape)}" if hasattr(value, "shape") else repr(type(value).__name__)
