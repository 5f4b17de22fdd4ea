"""Tensors in files: safetensors, torch files, and pickles read as data."""
