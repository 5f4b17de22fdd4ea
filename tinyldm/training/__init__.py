"""Training the bundled model: drawn pictures, objectives, the optimiser, and the loops."""
