"""Diffusion as pure mathematics: the noise schedule, the samplers, guidance.

The pipeline runs a sampler with its UNet as `predict`; training takes noisy latents and targets
from the schedule. Nothing here knows a model, a file or a progress bar.
"""
