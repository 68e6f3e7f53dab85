"""Synthetic speech for demos, tests and benchmarks."""
