"""Whole systems, one a file: from a prompt or a picture to pictures."""
