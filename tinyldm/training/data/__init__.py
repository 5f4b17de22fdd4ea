"""What a training reads: a folder's pictures, captions and classes, and their cached latents."""
