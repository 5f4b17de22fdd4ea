"""Whole systems, one per file: from a prompt or a picture to pictures."""
