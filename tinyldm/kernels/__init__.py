"""Fast float32 twins of ops on NumPy: the same signature, the same numbers, no new mathematics.

Each is called by the op of its name unless the plain switch is on, and tested equal to it. Read
ops/ first: nothing here is needed to understand Stable Diffusion.
"""
