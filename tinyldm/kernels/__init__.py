"""Fast twins of ops: the same signature, the same numbers, no new mathematics.

Each is called by the op of its name unless the plain switch is on, and tested equal to it: those of
cuda.py for arrays of CuPy, all others for float32 arrays of NumPy. Read ops/ first: nothing here is
needed to understand Stable Diffusion.
"""
