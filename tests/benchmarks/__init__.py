"""Side-by-side timings against the references, not tests: python -m tests.benchmarks.NAME."""
