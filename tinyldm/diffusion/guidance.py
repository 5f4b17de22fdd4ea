"""Classifier-free guidance: two predictions of the UNet become one, before the sampler steps."""


def classifier_free(noise_uncond, noise_cond, guidance_scale):
    """Move from the prediction without the prompt towards, and past, the one with it.

        noise = noise_uncond + s (noise_cond - noise_uncond)

    Two arrays of one shape -> that shape. s = 1 is the prompt's own prediction, s = 0 ignores the
    prompt. The same line serves v-prediction, which is linear in the noise.
    Source: Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", arXiv:2207.12598, eq. 6, with
    s = 1 + w.
    """
    return noise_uncond + guidance_scale * (noise_cond - noise_uncond)
