"""Fast twins of ops: the same signature and the same numbers, no new mathematics.

`@fast_twin` above an op names its twins: those in cuda.py are for CuPy arrays, all others for
float32 NumPy arrays. Tests compare each with its op. Read ops/ first: nothing here is needed to
understand Stable Diffusion.
"""
