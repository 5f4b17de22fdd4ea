"""Training: the objectives, the optimiser, and a loop that saves and resumes."""
