"""Diffusion as pure mathematics: the noise schedule, what is predicted, guidance, the samplers.

A pipeline calls a sampler with its UNet as `predict`; training takes noisy latents and targets from
here. This folder contains no model, no file reading and no progress bar.
"""
