"""Classifier-free guidance: combine two predictions of the UNet before the sampler's step."""


def classifier_free(noise_uncond, noise_cond, guidance_scale):
    """Go from the prediction without the prompt towards the one with it, and beyond.

        noise = noise_uncond + s (noise_cond - noise_uncond)

    Two arrays of one shape -> that shape. s = guidance_scale: 1 is the prompt's own prediction, 0
    ignores the prompt. The formula also holds for v-prediction, as v is linear in the noise.
    Source: Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", arXiv:2207.12598, eq. 6, with
    s = 1 + w.
    """
    return noise_uncond + guidance_scale * (noise_cond - noise_uncond)


def rescale(noise, noise_cond, guidance_rescale):
    """Undo the over-saturation that guidance causes: bring the std back towards the prompt's own.

        noise = phi noise std(noise_cond) / std(noise) + (1 - phi) noise

    noise, noise_cond (B,...) -> (B,...); each sample has its own std. phi = guidance_rescale: 0
    changes nothing, 1 restores the std of noise_cond; the authors use 0.7.
    Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed",
    arXiv:2305.08891, section 3.4, eq. 14-16.
    """
    axes = tuple(range(1, noise.ndim))
    ratio = noise_cond.std(axis=axes, keepdims=True) / noise.std(axis=axes, keepdims=True)
    return guidance_rescale * (noise * ratio) + (1 - guidance_rescale) * noise
