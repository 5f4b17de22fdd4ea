"""The UNet as a sampler calls it, with the conditioning and guidance inside."""
from ..backend import get_xp
from ..diffusion.guidance import classifier_free, rescale


class Predictor:
    """predict(x_t, t) -> model output, for a sampler.

    conditioning: [the prompt's], or with guidance [the negative prompt's, the prompt's], predicted
    in one batch; each a dict of the UNet's keyword arguments besides latents and timesteps, such as
    context (prompts,M,D), each prompt for as many latents. extra_channels: None, or what an
    inpainting UNet reads behind x_t, (B,H,W,c). The last inputs are kept in `inputs`, for the
    search for NaN.
    """

    def __init__(self, unet, conditioning, guidance_scale, guidance_rescale=0.0,
                 extra_channels=None):
        self.unet, self.conditioning, self.extra_channels = unet, conditioning, extra_channels
        self.guidance_scale = float(guidance_scale)     # a NumPy number would change the dtype
        self.guidance_rescale = float(guidance_rescale)
        self.inputs, self.dtype = {}, unet.dtype

    def __call__(self, x_t, t):                         # (B,H,W,C) -> (B,H,W,C)
        xp, n = get_xp(x_t), len(self.conditioning)
        conditioning = {name: xp.concatenate([own[name].repeat(len(x_t) // len(own[name]), axis=0)
                                              for own in self.conditioning])    # (nB,...)
                        for name in self.conditioning[0]}
        latents = [x_t] if self.extra_channels is None else [x_t, self.extra_channels]
        latents = xp.concatenate([xp.concatenate(latents, axis=-1)] * n)
        self.inputs = {"latents": latents.astype(self.dtype), **conditioning,
                       "timesteps": xp.full(len(latents), t, x_t.dtype)}
        model_output = self.unet(**self.inputs).astype(x_t.dtype)
        if n == 1:
            return model_output
        uncond, cond = xp.split(model_output, 2)
        guided = classifier_free(uncond, cond, self.guidance_scale)
        return rescale(guided, cond, self.guidance_rescale) if self.guidance_rescale else guided
